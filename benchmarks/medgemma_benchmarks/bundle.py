"""A reference bundle: recorded inputs and outputs of the original model, as a directory that proves itself.

    bundle.json          what was recorded, with which device, dtype and versions, and the hash of every file
    arrays.safetensors   the reference's own model inputs, its embeddings and its logits
    images/NAME.png      each image as decoded RGB, lossless
    programs/NAME.onnx   of a packing reference: a component's exact form, to run over the artifact's weights

Three kinds share the form. `float` is an encoder of images and texts in floating point. `packing` is the same
carrying the dequantized weights of one QuantPlan, twice: `pooler_output` with activations left float, which
the exact form over the artifact's weights must equal, and `rounded_output` with the target's own rounding of
activations, which the artifact's program comes close to. Its logits are those of the float reference.
`generative` is a model that answers, in floating point.

Every row was computed alone (batch 1), because run-time quantization of activations may depend on the batch.

Of a model that answers, a row of logits is `head @ hidden`: 262,144 numbers from 640 or 2,560. So the bundle
holds the hidden states and the head once, and every logit of the reference is exact, at any number of tokens.
Rows of logits themselves would take 0.5 GB for 1,000 tokens in float16, and rows cut to their highest values
would bound a KL divergence from below only.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from medgemma_benchmarks.bundle_record import (
    BUNDLE_NAME,
    BundleError,
    BundleKind,
    BundleRecord,
    Producer,
    ReferenceImage,
    ReferenceLabel,
    ReferencePrompt,
    StageTiming,
    read_record,
)
from medgemma_runtime.artifact import sha256_file
from medgemma_runtime.errors import missing_package
from medgemma_runtime.manifest import FileEntry, ImageSpec

__all__ = ["ReferenceBundle", "DecodedImage", "open_bundle", "write_bundle", "sha256_pixels"]

_ARRAYS = "arrays.safetensors"

_Layout = dict[str, tuple[str, tuple[str, ...]]]
# Name, dtype and axes of each array: N images, M labels, D embedding width, L ids.
_ENCODERS: _Layout = {
    "image.pixel_values": ("float32", ("N", "3", "H", "W")),
    "image.pooler_output": ("float32", ("N", "D")),
    "text.input_ids": ("int64", ("M", "L")),
    "text.pooler_output": ("float32", ("M", "D")),
    "logits": ("float32", ("N", "M")),
}
# S ids and T predictions of all prompts together, V rows of the head, F image tokens of all images together.
_DECODER: _Layout = {
    "decoder.input_ids": ("int64", ("S",)),
    "decoder.hidden_states": ("float32", ("T", "D")),
    "decoder.head": ("float32", ("V", "D")),
}
_VISION: _Layout = {
    "vision.pixel_values": ("float32", ("N", "3", "H", "W")),
    "vision.image_features": ("float32", ("F", "D")),
}


@dataclass(frozen=True, kw_only=True)
class DecodedImage:
    """An image to record: [H, W, 3] uint8 RGB and what is known about it, as in `ReferenceImage`."""

    name: str
    modality: str
    label: str | None
    source: str
    licence: str
    rgb: NDArray[np.uint8]
    is_sample: bool = False


@dataclass(frozen=True, kw_only=True)
class ReferenceBundle:
    """An opened bundle.

    Attributes:
        directory: Where it lies.
        record: Its `bundle.json`.
        sha256: Hash of `bundle.json`, which itself holds every other hash.
        arrays: Of encoders `image.pixel_values` [N, 3, H, W] float32, `image.pooler_output` [N, D] float32,
            `text.input_ids` [M, L] int64, `text.pooler_output` [M, D] float32, `logits` [N, M] float32;
            and `rounded_output`, of the shape of `pooler_output`, of every component in `programs`.
            Of a model that answers `decoder.input_ids` [S] int64, `decoder.hidden_states` [T, D] float32
            after the final norm, `decoder.head` [V, D] float32, and where there are images
            `vision.pixel_values` [N, 3, H, W] float32 and `vision.image_features` [F, D] float32.
            Of every component in `record.layers` its `layers` [items, layers + 1, tokens, D] float32: the
            residual stream of the first items, as `medgemma_benchmarks.layer_parity` reads it.
    """

    directory: Path
    record: BundleRecord
    sha256: str
    arrays: Mapping[str, NDArray[Any]]

    def program(self, component: str) -> Path:
        """The exact form of a component that `record.programs` names."""
        return self.directory / _program(component)

    def rgb(self, image: ReferenceImage) -> NDArray[np.uint8]:
        """The decoded image, [H, W, 3] uint8.

        Raises:
            BundleError: If its pixels do not have the recorded hash.
        """
        with Image.open(self.directory / _png(image.name)) as stored:
            rgb = np.asarray(stored.convert("RGB"), dtype=np.uint8)
        if sha256_pixels(rgb) != image.sha256:
            raise BundleError(
                f"the pixels of {_png(image.name)} do not have the recorded SHA-256; record it again"
            )
        return rgb


def sha256_pixels(rgb: NDArray[np.uint8]) -> str:
    """SHA-256 over the bytes of [H, W, 3] uint8 RGB."""
    return hashlib.sha256(np.ascontiguousarray(rgb).tobytes()).hexdigest()


def write_bundle(
    out: Path,
    *,
    kind: BundleKind,
    model_id: str,
    revision: str | None,
    weights_sha256: str,
    plan_sha256: str | None,
    producer: Producer,
    image: ImageSpec | None,
    images: Sequence[DecodedImage],
    labels: Sequence[ReferenceLabel],
    arrays: Mapping[str, NDArray[Any]],
    timings: Mapping[str, StageTiming],
    programs: Mapping[str, Path] | None = None,
    prompts: Sequence[ReferencePrompt] = (),
    embedding_scale: float | None = None,
    layers: Sequence[str] = (),
) -> ReferenceBundle:
    """Write a bundle beside `out`, rename it into place, and open it.

    Args:
        out: The directory to create.
        kind: See `BundleRecord`, as for all others that bear its names.
        model_id: Of the checkpoint.
        revision: Of the checkpoint.
        weights_sha256: Of the checkpoint.
        plan_sha256: Of the plan, for `packing`.
        producer: Device, dtype, versions.
        image: What the image processor was set to do; None without images.
        images: In the order of the arrays' rows.
        labels: Likewise.
        arrays: Those of `ReferenceBundle`.
        timings: By stage name.
        programs: The exact form of each component, for `packing`; the files are copied.
        prompts: In the order of the arrays' rows.
        embedding_scale: As `BundleRecord` has it.
        layers: Likewise.

    Raises:
        BundleError: If `out` exists, a name is taken twice or cannot be a file's, or an array is missing, of
            another shape or dtype, or not finite.
    """
    if out.exists():
        raise BundleError(f"{out} exists; remove it or choose another place for the reference")
    try:
        record = BundleRecord(
            kind=kind,
            model_id=model_id,
            revision=revision,
            weights_sha256=weights_sha256,
            plan_sha256=plan_sha256,
            producer=producer,
            image=image,
            images=tuple(
                ReferenceImage(
                    name=decoded.name,
                    modality=decoded.modality,
                    label=decoded.label,
                    source=decoded.source,
                    licence=decoded.licence,
                    width=decoded.rgb.shape[1],
                    height=decoded.rgb.shape[0],
                    sha256=sha256_pixels(decoded.rgb),
                    is_sample=decoded.is_sample,
                )
                for decoded in images
            ),
            labels=tuple(labels),
            timings=dict(timings),
            programs=tuple(programs or ()),  # type: ignore[arg-type]
            prompts=tuple(prompts),
            embedding_scale=embedding_scale,
            layers=tuple(layers),  # type: ignore[arg-type]
        )
    except ValueError as error:
        raise BundleError(f"the reference cannot be written: {error}") from None
    _check_arrays(record, arrays)
    save_file = _safetensors().save_file
    temporary = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    try:
        temporary.mkdir(parents=True)
        for folder, wanted in (("images", images), ("programs", programs)):
            if wanted:
                (temporary / folder).mkdir()
        save_file({name: np.ascontiguousarray(arrays[name]) for name in arrays}, temporary / _ARRAYS)
        for decoded in images:
            Image.fromarray(decoded.rgb).save(temporary / _png(decoded.name), compress_level=1)
        for component, path in (programs or {}).items():
            shutil.copyfile(path, temporary / _program(component))
        files = tuple(
            FileEntry(
                path=path.relative_to(temporary).as_posix(),
                size_bytes=path.stat().st_size,
                sha256=sha256_file(path),
            )
            for path in sorted(temporary.rglob("*"))
            if path.is_file()
        )
        text = json.dumps(asdict(record) | {"files": [asdict(entry) for entry in files]}, indent=2)
        (temporary / BUNDLE_NAME).write_text(text + "\n", encoding="utf-8")
        temporary.rename(out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return open_bundle(out)


def open_bundle(directory: Path) -> ReferenceBundle:
    """Read a bundle and check every file and array of it.

    Raises:
        BundleError: If it is absent, of an unknown version, not to the form, incomplete or altered.
    """
    record = read_record(directory)
    listed = {entry.path for entry in record.files}
    expected = {_ARRAYS, *map(_png, (i.name for i in record.images)), *map(_program, record.programs)}
    if listed != expected:
        odd = ", ".join(sorted(listed ^ expected))
        raise BundleError(
            f"{directory / BUNDLE_NAME} does not list the files it needs: {odd}; record it again"
        )
    present = {p.relative_to(directory).as_posix() for p in directory.rglob("*") if p.is_file()}
    if unlisted := sorted(present - listed - {BUNDLE_NAME}):
        raise BundleError(f"{unlisted[0]} is in {directory.name} and not in its {BUNDLE_NAME}; remove it")
    for entry in record.files:
        path = directory / entry.path
        if not path.is_file():
            raise BundleError(f"{entry.path} is missing from {directory.name}; copy it again or record again")
        if path.stat().st_size != entry.size_bytes or sha256_file(path) != entry.sha256:
            raise BundleError(
                f"{entry.path} in {directory.name} is truncated or altered: its size or SHA-256 is not the "
                "recorded one; copy it again or record again"
            )
    arrays = _safetensors().load_file(directory / _ARRAYS)
    _check_arrays(record, arrays)
    return ReferenceBundle(
        directory=directory, record=record, sha256=sha256_file(directory / BUNDLE_NAME), arrays=arrays
    )


def _check_arrays(record: BundleRecord, arrays: Mapping[str, NDArray[Any]]) -> None:
    layout = _layout(record)
    if set(arrays) != set(layout):
        odd = ", ".join(sorted(set(arrays) ^ set(layout)))
        raise BundleError(f"the reference's arrays are not those it needs; missing or unknown: {odd}")
    sizes = {
        "N": len(record.images),
        "M": len(record.labels),
        "S": sum(prompt.tokens for prompt in record.prompts),
        "T": sum(prompt.predictions for prompt in record.prompts),
        "3": 3,
    }
    if record.image is not None:
        sizes |= {"H": record.image.height, "W": record.image.width}
    for name, (dtype, axes) in layout.items():
        array = arrays[name]
        shape = tuple(sizes.setdefault(axis, size) for axis, size in zip(axes, array.shape, strict=False))
        if array.dtype != dtype or array.ndim != len(axes) or array.shape != shape:
            raise BundleError(
                f"the reference's {name} must be {dtype} [{', '.join(axes)}] = {list(shape)} "
                f"and is {array.dtype} {list(array.shape)}"
            )
        bad = int(np.count_nonzero(~np.isfinite(array)))
        if bad:
            raise BundleError(f"the reference's {name} has {bad} values that are NaN or infinite")


def _layout(record: BundleRecord) -> _Layout:
    layers: _Layout = {
        f"{name}.layers": ("float32", (f"{name} items", f"{name} layers", f"{name} tokens", f"{name} width"))
        for name in record.layers
    }
    if record.kind == "generative":
        return _DECODER | (_VISION if record.images else {}) | layers
    rounded = {f"{name}.rounded_output": _ENCODERS[f"{name}.pooler_output"] for name in record.programs}
    return _ENCODERS | rounded | layers


def _program(component: str) -> str:
    return f"programs/{component}.onnx"


def _png(name: str) -> str:
    return f"images/{name}.png"


def _safetensors() -> Any:
    try:
        import safetensors.numpy
    except ImportError:
        raise missing_package("safetensors", extra="bench", purpose="read a reference bundle") from None
    return safetensors.numpy
