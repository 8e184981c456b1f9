"""What a reference bundle says about itself: the schema of `bundle.json`, read as strictly as a manifest."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import ConfigDict, TypeAdapter, ValidationError

from medgemma_runtime.errors import EdgeError
from medgemma_runtime.manifest import FileEntry, ImageSpec

__all__ = [
    "BUNDLE_NAME",
    "BundleRecord",
    "BundleError",
    "Producer",
    "ReferenceImage",
    "ReferenceLabel",
    "StageTiming",
    "read_record",
]

BUNDLE_VERSION = 1
BUNDLE_NAME = "bundle.json"
_STRICT = ConfigDict(extra="forbid", allow_inf_nan=False)


class BundleError(EdgeError):
    """A reference bundle that is absent, incomplete, altered, or of an unknown version."""


@dataclass(frozen=True, kw_only=True)
class Producer:
    """What computed the outputs.

    Attributes:
        device: Where it ran.
        device_name: The product's name, such as `NVIDIA H100 80GB HBM3`.
        dtype: Floating type of weights and activations.
        attention: Which attention implementation, such as `eager`.
        image_processor: The class that made `image.pixel_values`.
        tokenizer: The class that made `text.input_ids`, and what it read.
        versions: Versions of the packages involved.
    """

    __pydantic_config__ = _STRICT

    device: Literal["cpu", "cuda"]
    device_name: str
    dtype: Literal["float32", "float16", "bfloat16"]
    attention: str
    image_processor: str
    tokenizer: str
    versions: dict[str, str]


@dataclass(frozen=True, kw_only=True)
class ReferenceImage:
    """One recorded image.

    Attributes:
        name: Unique in the bundle; `images/NAME.png` holds the pixels.
        modality: Such as `CT` or `fundus`.
        label: The name of the label that fits it, or None when unknown.
        source: Package and file, or `given by the user`.
        licence: Licence of the image.
        width: Columns, pixels.
        height: Rows, pixels.
        sha256: Over the RGB bytes, row by row.
        is_sample: One of the built-in images, which a report shows. Any other may be of a patient: a report
            has neither its pixels nor its file name unless asked to.
    """

    __pydantic_config__ = _STRICT

    name: str
    modality: str
    label: str | None
    source: str
    licence: str
    width: int
    height: int
    sha256: str
    is_sample: bool = False


@dataclass(frozen=True, kw_only=True)
class ReferenceLabel:
    """One zero-shot label: its short name, and the caption that the text tower reads."""

    __pydantic_config__ = _STRICT

    name: str
    caption: str


@dataclass(frozen=True, kw_only=True)
class StageTiming:
    """Median time of one stage of the reference, over `runs` runs."""

    __pydantic_config__ = _STRICT

    p50_ms: float
    runs: int


@dataclass(frozen=True, kw_only=True)
class BundleRecord:
    """`bundle.json`.

    Attributes:
        schema_version: Of this form.
        kind: `float` or `packing`.
        model_id: Hub id, `sample:NAME` or directory name of the checkpoint.
        revision: Hub commit, when known.
        weights_sha256: The same hash as in an artifact's manifest.
        plan_sha256: Of the QuantPlan whose weights computed the outputs; None for `float`.
        producer: Device, dtype, versions.
        image: What the reference's image processor was set to do.
        images: The images, in the order of the arrays' rows.
        labels: The labels, likewise.
        timings: Median per stage of the reference, by stage name.
        programs: The components of which a packing reference has an exact form and a rounded output.
        files: Size and hash of every other file.
    """

    __pydantic_config__ = _STRICT

    schema_version: Literal[1] = 1
    kind: Literal["float", "packing"]
    model_id: str
    revision: str | None
    weights_sha256: str
    plan_sha256: str | None
    producer: Producer
    image: ImageSpec
    images: tuple[ReferenceImage, ...]
    labels: tuple[ReferenceLabel, ...]
    timings: dict[str, StageTiming]
    programs: tuple[Literal["image", "text"], ...] = ()
    files: tuple[FileEntry, ...] = ()

    def __post_init__(self) -> None:
        if (self.kind == "packing") != (self.plan_sha256 is not None):
            raise ValueError("a packing reference names its plan, and a float reference has none")
        if (self.kind == "packing") != bool(self.programs):
            raise ValueError("a packing reference has exact programs, and a float reference has none")
        for what, names in (
            ("image", [image.name for image in self.images]),
            ("label", [label.name for label in self.labels]),
        ):
            if not names or len(set(names)) != len(names):
                raise ValueError(f"{what} names must be unique and at least one: {names}")
        for image in self.images:
            if image.name.startswith(".") or any(char in image.name for char in "/\\:\0"):
                raise ValueError(f"image name {image.name!r} cannot be a file name")


_ADAPTER: TypeAdapter[BundleRecord] = TypeAdapter(BundleRecord)


def read_record(directory: Path) -> BundleRecord:
    """Read and check `bundle.json`.

    Raises:
        BundleError: If it is absent, of an unknown version, or not to the schema.
    """
    path = directory / BUNDLE_NAME
    try:
        text = path.read_text(encoding="utf-8")
        version = json.loads(text).get("schema_version")
    except (FileNotFoundError, NotADirectoryError):
        raise BundleError(
            f"{directory} has no {BUNDLE_NAME}, so it is no finished reference; "
            "give the directory that medgemma-reference wrote, or record again"
        ) from None
    except (ValueError, RecursionError, AttributeError) as error:
        raise BundleError(f"{path} is not a JSON object ({error}); record the reference again") from None
    if version != BUNDLE_VERSION:
        raise BundleError(
            f"{path} has schema version {version!r} and this program reads version {BUNDLE_VERSION}; "
            "use the medgemma-edge that wrote it, or record again"
        )
    try:
        return _ADAPTER.validate_json(text, strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise BundleError(
            f"{path} is not to the schema: {where or 'the whole'}: {first['msg']} "
            f"({error.error_count()} such); record the reference again"
        ) from None
