"""The samples cut to a few layers: lowering them to ExecuTorch takes a quarter of the time."""

from dataclasses import replace

from medgemma_export.checkpoint import Checkpoint
from medgemma_export.models import ModelSpec, load_model

__all__ = ["load_short_model"]

_VISION = {"num_hidden_layers": 1}
_DECODER = {"num_hidden_layers": 2, "layer_types": ["sliding_attention", "full_attention"]}


def load_short_model(
    checkpoint: Checkpoint, *, residual_scale: float = 1.0, table_bounds: tuple[int, ...] = ()
) -> ModelSpec:
    """A sample, described as if its towers had one layer and its decoder two, the first with a window."""
    config = dict(checkpoint.config)
    config["vision_config"] = {**config["vision_config"], **_VISION}
    is_decoder = config["architectures"] == ["Gemma3ForConditionalGeneration"]
    config["text_config"] = {**config["text_config"], **(_DECODER if is_decoder else _VISION)}
    return load_model(
        replace(checkpoint, config=config), residual_scale=residual_scale, table_bounds=table_bounds
    )
