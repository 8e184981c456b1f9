"""References of the tiny artifact, worked out with Pillow and numpy alone, and ways to break the artifact.

The tiny artifact's image encoder averages each quarter of an image, its text encoder averages table rows
over 64 positions; see `tests.runtime.tiny_artifact`.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from medgemma_benchmarks.bundle import DecodedImage, ReferenceBundle, write_bundle
from medgemma_benchmarks.bundle_record import Producer, ReferenceLabel, StageTiming
from medgemma_runtime.artifact import Artifact, open_artifact
from medgemma_runtime.images import medsiglip_processor
from medgemma_runtime.manifest import Manifest, write_manifest
from tests.runtime import tiny_artifact as tiny

LABELS = tuple(ReferenceLabel(name=name, caption=f"A {name} image!") for name in tiny.COLOURS)
SCALE, BIAS = 10.0, -5.0
PRODUCER = Producer(
    device="cpu",
    device_name="Test CPU",
    dtype="float32",
    attention="eager",
    image_processor="Pillow",
    tokenizer="by hand",
    versions={"numpy": np.__version__},
)


def decoded_image(name: str, *colours: str) -> DecodedImage:
    """Vertical stripes of equal width; no stripe edge falls inside a quarter."""
    stripes = [
        np.broadcast_to(np.array(tiny.COLOURS[c], np.uint8), (32, 32 // len(colours), 3)) for c in colours
    ]
    return DecodedImage(
        name=name,
        modality="test",
        label=colours[0],
        source="tests",
        licence="CC0",
        rgb=np.concatenate(stripes, axis=1),
        is_sample=True,
    )


IMAGES = tuple(decoded_image(name, name) for name in tiny.COLOURS)


def pixels_of(rgb: np.ndarray) -> np.ndarray:
    """Bicubic by Pillow, then (x / 255 - 0.5) / 0.5."""
    resized = np.asarray(Image.fromarray(rgb).resize((tiny.SIZE, tiny.SIZE), Image.Resampling.BICUBIC))
    values = (resized.astype(np.float32) * np.float32(1 / 255) - np.float32(0.5)) / np.float32(0.5)
    return values.transpose(2, 0, 1)


def arrays_of(images: tuple[DecodedImage, ...]) -> dict[str, np.ndarray]:
    pixels = np.stack([pixels_of(p.rgb) for p in images])
    image = pixels.reshape(-1, 3, 2, 8, 2, 8).mean(axis=(3, 5)).reshape(-1, tiny.WIDTH)
    ids = np.full((len(LABELS), tiny.LENGTH), 1, dtype=np.int64)
    for row, label in zip(ids, LABELS, strict=True):
        row[:3] = [tiny.TOKEN_IDS[f"▁{word}"] for word in ("a", label.name, "image")]
    text = tiny.text_table()[ids].mean(axis=1)
    unit_image, unit_text = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (image, text))
    return {
        "image.pixel_values": pixels.astype(np.float32),
        "image.pooler_output": image.astype(np.float32),
        "text.input_ids": ids,
        "text.pooler_output": text.astype(np.float32),
        "logits": (SCALE * unit_image @ unit_text.T + BIAS).astype(np.float32),
    }


def write_tiny_bundle(
    out: Path,
    *,
    images: tuple[DecodedImage, ...] = IMAGES,
    arrays: Mapping[str, np.ndarray] | None = None,
    **changes: Any,
) -> ReferenceBundle:
    """A float reference of the tiny artifact; `arrays` replaces some, `changes` any other argument."""
    arguments: dict[str, Any] = {
        "kind": "float",
        "model_id": "test:tiny",
        "revision": None,
        "weights_sha256": "0" * 64,
        "plan_sha256": None,
        "producer": PRODUCER,
        "image": medsiglip_processor(tiny.SIZE),
        "labels": LABELS,
        "timings": {"image": StageTiming(p50_ms=1.5, runs=3)},
    }
    return write_bundle(
        out, images=images, arrays=arrays_of(images) | dict(arrays or {}), **(arguments | changes)
    )


def write_packing_bundle(
    out: Path, artifact: Artifact, *, arrays: Mapping[str, np.ndarray] | None = None, **changes: Any
) -> ReferenceBundle:
    """A packing reference of the tiny artifact: it rounds nothing, so its programs are their exact form."""
    exact = arrays_of(IMAGES)
    rounded = {f"{name}.rounded_output": exact[f"{name}.pooler_output"] for name in ("image", "text")}
    packing: dict[str, Any] = {
        "kind": "packing",
        "plan_sha256": artifact.manifest.quantization.plan_sha256,
        "programs": {name: artifact.directory / f"{name}.onnx" for name in ("image", "text")},
    }
    return write_tiny_bundle(out, arrays=rounded | dict(arrays or {}), **(packing | changes))


def tiny_opened(directory: Path, *, precision: str = "fp32", **changes: Any) -> Artifact:
    """The tiny artifact, its manifest changed."""
    tiny.write_tiny_artifact(directory)
    return rewritten(directory, precision=precision, **changes)


def rewritten(directory: Path, **changes: Any) -> Artifact:
    """The artifact after its files were changed: a manifest that is true of them again."""
    manifest: Manifest = replace(tiny.tiny_manifest(directory), **changes)
    write_manifest(manifest, directory)
    return open_artifact(directory)


def broken_image(directory: Path, *operators: str, **changes: Any) -> Artifact:
    """The tiny artifact with operators of one input (or twice the same) after its image encoder."""
    tiny.write_tiny_artifact(directory)
    names = ["pooled", *(f"broken{index}" for index in range(len(operators)))]
    nodes = [tiny._node("AveragePool", ["pixel_values"], ["pooled"], kernel_shape=[8, 8], strides=[8, 8])]
    for operator, before, after in zip(operators, names[:-1], names[1:], strict=True):
        inputs = [before, before] if operator in ("Add", "Sub", "Mul") else [before]
        nodes.append(tiny._node(operator, inputs, [after]))
    nodes.append(tiny._node("Flatten", [names[-1]], ["pooler_output"]))
    program = tiny.model(
        nodes,
        inputs=[tiny._value("pixel_values", tiny._FLOAT, ["batch", 3, tiny.SIZE, tiny.SIZE])],
        outputs=[tiny._value("pooler_output", tiny._FLOAT, ["batch", tiny.WIDTH])],
    )
    (directory / "image.onnx").write_bytes(program)
    return rewritten(directory, **changes)
