"""Records what the original model computes, with transformers, as a reference bundle.

From decoded pixels and captions on, the model inputs come from the reference's own image processor and
tokenizer, never from our runtime, so that a bundle can find errors in the runtime's preprocessing too. Its
rows are computed one at a time.
"""

import json
import re
import statistics
import string
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from medgemma_benchmarks.bundle import DecodedImage, ReferenceBundle, write_bundle
from medgemma_benchmarks.bundle_record import Producer, ReferenceLabel, StageTiming
from medgemma_benchmarks.layer_parity import MAX_ITEMS
from medgemma_export.checkpoint import Checkpoint, open_checkpoint
from medgemma_export.reference.layers import layer_states
from medgemma_export.reference.original import (
    ATTENTION,
    Device,
    Dtype,
    compute_in_full,
    describe_processor,
    device_name,
    import_transformers,
    package_versions,
)
from medgemma_runtime.command import Progress
from medgemma_runtime.errors import CheckpointError, EdgeError
from medgemma_runtime.manifest import ImageSpec

if TYPE_CHECKING:
    import torch

__all__ = [
    "record_reference",
    "prepare_inputs",
    "similarity_logits",
    "describe_torch",
    "ReferenceInputs",
]

# SigLIP was trained on captions padded to 64 ids and pools the last of them (transformers' SiglipTextModel).
_TEXT_LENGTH = 64


@dataclass(frozen=True, kw_only=True)
class ReferenceInputs:
    """Model inputs as the reference's own processors made them.

    Attributes:
        pixel_values: [N, 3, H, W] float32.
        input_ids: [M, 64] int64.
        image: What the image processor was set to do.
        image_processor: Its class.
        tokenizer: Its class, and what was done to the text before it.
        preprocess: Time of the image processor on one image.
        tokenize: Time of the tokenizer on one caption.
    """

    pixel_values: NDArray[np.float32]
    input_ids: NDArray[np.int64]
    image: ImageSpec
    image_processor: str
    tokenizer: str
    preprocess: StageTiming
    tokenize: StageTiming


def record_reference(
    model: str,
    out: Path,
    *,
    images: Sequence[DecodedImage],
    labels: Sequence[ReferenceLabel],
    revision: str | None = None,
    device: Device = "cpu",
    dtype: Dtype = "float32",
    per_layer: bool = False,
    progress: Progress | None = None,
) -> ReferenceBundle:
    """Run the original model on images and captions and keep what went in and what came out.

    Args:
        model: What `open_checkpoint` takes; it must be a SiglipModel.
        out: The directory to create.
        images: In the order to record them.
        labels: Likewise.
        revision: Commit, for a hub id.
        device: Where to run. CUDA computes float32 in full, without TF32.
        dtype: Floating type of weights and activations; the recorded arrays are float32 in any case.
        per_layer: Also keep the residual stream between the layers, of the first images and captions.
        progress: Called before every step.

    Raises:
        EdgeError: If there is no CUDA device, a package is missing, or `out` exists.
        CheckpointError: If the checkpoint is no SiglipModel or lacks a processor's file.
    """
    if out.exists():
        raise EdgeError(f"{out} exists; remove it or choose another place for the reference")
    product = device_name(device)
    checkpoint = open_checkpoint(model, revision=revision)
    inputs = prepare_inputs(checkpoint, images, labels)
    reference = _load_model(checkpoint, device, dtype)

    steps = _Steps(len(images) + len(labels), progress)
    image, image_timing = _run_rows(
        lambda row: reference.get_image_features(pixel_values=row.to(reference.dtype)),
        inputs.pixel_values,
        device,
        steps.named("running image"),
    )
    text, text_timing = _run_rows(
        lambda row: reference.get_text_features(input_ids=row),
        inputs.input_ids,
        device,
        steps.named("running text"),
    )
    layers = _record_layers(reference, inputs, device) if per_layer else {}
    return write_bundle(
        out,
        kind="float",
        model_id=checkpoint.id,
        revision=checkpoint.revision,
        weights_sha256=checkpoint.weights_sha256(),
        plan_sha256=None,
        producer=_describe_producer(inputs, device=device, device_name=product, dtype=dtype),
        image=inputs.image,
        images=images,
        labels=labels,
        arrays={
            "image.pixel_values": inputs.pixel_values,
            "image.pooler_output": _float32(image),
            "text.input_ids": inputs.input_ids,
            "text.pooler_output": _float32(text),
            "logits": _float32(similarity_logits(reference, image, text)),
            **{f"{name}.layers": states for name, states in layers.items()},
        },
        layers=tuple(layers),
        timings={
            "preprocess": inputs.preprocess,
            "tokenize": inputs.tokenize,
            "image": image_timing,
            "text": text_timing,
        },
    )


def _record_layers(model: Any, inputs: ReferenceInputs, device: Device) -> dict[str, NDArray[np.float32]]:
    """[items, layers + 1, kept tokens, H] by component."""
    import torch

    towers: dict[str, tuple[Any, str, NDArray[Any]]] = {
        "image": (model.vision_model, "pixel_values", inputs.pixel_values),
        "text": (model.text_model, "input_ids", inputs.input_ids),
    }
    return {
        name: np.stack(
            [
                layer_states(tower, partial(tower, **{argument: torch.from_numpy(row[None]).to(device)}))
                for row in rows[:MAX_ITEMS]
            ]
        )
        for name, (tower, argument, rows) in towers.items()
    }


def prepare_inputs(
    checkpoint: Checkpoint, images: Sequence[DecodedImage], labels: Sequence[ReferenceLabel]
) -> ReferenceInputs:
    """Make model inputs with transformers' own processors, from the checkpoint's files.

    Raises:
        CheckpointError: If the checkpoint is no SiglipModel or lacks a processor's file.
        EdgeError: If a caption is longer than the model takes.
    """
    transformers = import_transformers()
    if checkpoint.config.get("architectures", ["SiglipModel"]) != ["SiglipModel"]:
        raise CheckpointError(
            f"{checkpoint.id} is {checkpoint.config.get('architectures')} and a reference is recorded of a "
            "SiglipModel; give a MedSigLIP checkpoint"
        )
    checkpoint.file("preprocessor_config.json")
    # The Pillow class by name: the torchvision one folds the rescaling into mean and std and rounds so.
    processor = transformers.SiglipImageProcessorPil.from_pretrained(checkpoint.directory)
    pixels, preprocess = _timed(
        lambda image: processor(images=image.rgb, return_tensors="np")["pixel_values"], images
    )
    tokenizer, tokenizer_name = _open_tokenizer(checkpoint)
    ids, tokenize = _timed(tokenizer, [label.caption for label in labels])
    for label, row in zip(labels, ids, strict=True):
        if row.shape[1] != _TEXT_LENGTH:
            raise EdgeError(
                f"the caption of label {label.name!r} makes {row.shape[1]} ids and the model takes "
                f"{_TEXT_LENGTH}; shorten it"
            )
    return ReferenceInputs(
        pixel_values=np.concatenate(pixels).astype(np.float32),
        input_ids=np.concatenate(ids).astype(np.int64),
        image=describe_processor(processor),
        image_processor=f"transformers {type(processor).__name__}",
        tokenizer=tokenizer_name,
        preprocess=preprocess,
        tokenize=tokenize,
    )


def _describe_producer(
    inputs: ReferenceInputs, *, device: Device, device_name: str, dtype: Dtype
) -> Producer:
    """The record of what computed a bundle."""
    return Producer(
        device=device,
        device_name=device_name,
        dtype=dtype,
        attention=ATTENTION,
        image_processor=inputs.image_processor,
        tokenizer=inputs.tokenizer,
        versions=package_versions(),
    )


def describe_torch(inputs_by: Producer) -> Producer:
    """The record of outputs that `TorchOps` computed on this machine's CPU, in float32.

    Args:
        inputs_by: Who made the model inputs: its image processor and tokenizer stay on record.
    """
    return replace(
        inputs_by,
        device="cpu",
        device_name=device_name("cpu"),
        dtype="float32",
        attention="TorchOps",
        versions=package_versions(),
    )


def similarity_logits(model: Any, image: "torch.Tensor", text: "torch.Tensor") -> "torch.Tensor":
    """The logits that SiglipModel's own `forward` makes of pooled outputs.

    The towers are replaced by what they returned for each row alone, so that normalization, scale and bias
    are transformers' code and no tower runs twice. `model` is not usable afterwards.

    Shapes:
        image: [N, D]
        text: [M, D]
        result: [N, M]
    """
    import torch
    from transformers.modeling_outputs import BaseModelOutputWithPooling

    class Recorded(torch.nn.Module):
        def __init__(self, pooled: torch.Tensor):
            super().__init__()
            self.pooled = pooled

        def forward(self, **_: object) -> BaseModelOutputWithPooling:
            return BaseModelOutputWithPooling(pooler_output=self.pooled)

    model.vision_model, model.text_model = Recorded(image), Recorded(text)
    with torch.inference_mode():
        logits: torch.Tensor = model(input_ids=None, pixel_values=None).logits_per_image
    return logits


def _load_model(checkpoint: Checkpoint, device: Device, dtype: Dtype) -> Any:
    import torch

    compute_in_full()
    model = import_transformers().SiglipModel.from_pretrained(
        checkpoint.directory, dtype=getattr(torch, dtype), attn_implementation=ATTENTION
    )
    return model.eval().to(device)


def _open_tokenizer(checkpoint: Checkpoint) -> tuple[Callable[[str], NDArray[np.int64]], str]:
    """The reference tokenizer of one caption to [1, 64] ids, and its description.

    With `spiece.model` it is transformers' SiglipTokenizer, which does as SigLIP's training did. A checkpoint
    that has only `tokenizer.json` is read by the fast tokenizer, whose own normalizer keeps `/`, `<` and `>`;
    so the text is canonicalized as SiglipTokenizer does before it gets there.
    """
    transformers = import_transformers()
    if (checkpoint.directory / "spiece.model").is_file():
        tokenizer = transformers.SiglipTokenizer.from_pretrained(checkpoint.directory)
        return _padded(tokenizer), "transformers SiglipTokenizer (slow, spiece.model)"
    checkpoint.file("tokenizer.json")
    settings = json.loads(checkpoint.file("tokenizer_config.json").read_text(encoding="utf-8"))
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(checkpoint.file("tokenizer.json")),
        **{key: settings[key] for key in ("eos_token", "pad_token", "unk_token") if key in settings},
    )
    encode = _padded(fast)
    return (
        lambda text: encode(canonicalize(text)),
        "transformers PreTrainedTokenizerFast (tokenizer.json), after SiglipTokenizer's canonicalization",
    )


def _padded(tokenizer: Any) -> Callable[[str], NDArray[np.int64]]:
    return lambda text: tokenizer(
        [text], padding="max_length", max_length=_TEXT_LENGTH, truncation=False, return_tensors="np"
    )["input_ids"]


def canonicalize(text: str) -> str:
    """What transformers' SiglipTokenizer.canonicalize_text does (from big_vision's prompt_engineering.py)."""
    text = text.lower().translate(str.maketrans("", "", string.punctuation))
    return re.sub(r"\s+", " ", text).strip()


class _Steps:
    """Counts rows, for progress."""

    def __init__(self, total: int, progress: Progress | None):
        self.done, self.total, self.progress = 0, total, progress

    def named(self, what: str) -> Callable[[], None]:
        def take() -> None:
            if self.progress is not None:
                self.progress(what, self.done, self.total)
            self.done += 1

        return take


def _run_rows(
    tower: Callable[["torch.Tensor"], Any],
    rows: NDArray[Any],
    device: Device,
    step: Callable[[], None],
) -> tuple["torch.Tensor", StageTiming]:
    """[N, ...] inputs to [N, D] pooled outputs, one row at a time, and the median time of a row."""
    import torch

    tensors = [torch.from_numpy(row[None]).to(device) for row in rows]

    def run(row: torch.Tensor) -> torch.Tensor:
        pooled: torch.Tensor = tower(row).pooler_output
        if device == "cuda":
            torch.cuda.synchronize()  # kernels run on after the call returns
        return pooled

    outputs, times = [], []
    with torch.inference_mode():
        run(tensors[0])  # the first call allocates and picks kernels
        for row in tensors:
            step()
            start = time.perf_counter()
            outputs.append(run(row))
            times.append(time.perf_counter() - start)
    return torch.cat(outputs), StageTiming(p50_ms=statistics.median(times) * 1e3, runs=len(times))


def _timed(work: Callable[[Any], Any], items: Sequence[Any]) -> tuple[list[Any], StageTiming]:
    results, times = [], []
    for item in items:
        start = time.perf_counter()
        results.append(work(item))
        times.append(time.perf_counter() - start)
    return results, StageTiming(p50_ms=statistics.median(times) * 1e3, runs=len(times))


def _float32(tensor: "torch.Tensor") -> NDArray[np.float32]:
    return tensor.float().cpu().numpy()
