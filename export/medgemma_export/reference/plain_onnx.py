"""The peer that every engineer would try first: transformers' module through plain `torch.onnx.export`."""

import logging
import warnings
from pathlib import Path

from medgemma_export.checkpoint import open_checkpoint
from medgemma_runtime.errors import EdgeError, missing_package

__all__ = ["export_plain_onnx"]


def export_plain_onnx(model: str, out: Path, *, revision: str | None = None) -> None:
    """Write the image tower of a SiglipModel in float32, batch dynamic, nothing fused by hand.

    Args:
        model: What `open_checkpoint` takes.
        out: The .onnx file to create; its weights go to `OUT.data`.
        revision: Hub revision, or None for its main branch.

    Raises:
        EdgeError: If `out` exists or onnxscript is not installed.
    """
    if out.exists():
        raise EdgeError(f"{out} exists already and is left alone; name another file or remove it")
    try:
        import onnxscript  # noqa: F401
    except ModuleNotFoundError:
        raise missing_package("onnxscript", extra="export", purpose="export the plain peer") from None
    import torch
    from transformers import SiglipVisionModel

    checkpoint = open_checkpoint(model, revision=revision)
    tower = SiglipVisionModel.from_pretrained(checkpoint.directory, dtype=torch.float32).eval()
    size = tower.config.image_size

    class Pooled(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tower = tower

        def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
            pooled: torch.Tensor = self.tower(pixel_values=pixel_values).pooler_output
            return pooled

    # The exporter reports every step and every optional package that it does without.
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            Pooled().eval(),
            (torch.zeros(2, 3, size, size),),
            out,
            input_names=["pixel_values"],
            output_names=["pooler_output"],
            dynamic_shapes={"pixel_values": {0: torch.export.Dim("batch")}},
            dynamo=True,
            external_data=True,
            verbose=False,
        )
