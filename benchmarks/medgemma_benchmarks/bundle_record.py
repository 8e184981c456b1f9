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
    "ReferencePrompt",
    "BundleKind",
    "StageTiming",
    "read_record",
]

BUNDLE_VERSION = 1
BUNDLE_NAME = "bundle.json"

BundleKind = Literal["float", "packing", "generative"]

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
        image_processor: The class that made the recorded pixels; `none` where there are no images.
        tokenizer: The class that made the recorded ids, and what it read.
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
class ReferencePrompt:
    """What a generative model was given, and then predicted token by token.

    Attributes:
        name: Unique in the bundle.
        images: Names of the images that stand before the question, in order.
        question: What the user asks, in the chat template; None where `text` follows `<bos>` at once.
        text: What is predicted: a text, or the answer to the question.
        source: Package and file, or `given by the user`.
        licence: Of question and text.
        tokens: Ids of all of it.
        given_tokens: How many of them come before the first that is predicted.
        is_sample: One of the built-in prompts, which a report names. Any other may be about a patient.
    """

    __pydantic_config__ = _STRICT

    name: str
    images: tuple[str, ...]
    question: str | None
    text: str
    source: str
    licence: str
    tokens: int
    given_tokens: int
    is_sample: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.given_tokens < self.tokens:
            raise ValueError(f"of the {self.tokens} tokens of {self.name!r}, {self.given_tokens} are given")
        if self.images and self.question is None:
            raise ValueError(f"prompt {self.name!r} has images and no question")

    @property
    def predictions(self) -> int:
        """Tokens that are predicted."""
        return self.tokens - self.given_tokens


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
        kind: `float` or `packing` for encoders of images and texts, `generative` for a model that answers.
        model_id: Hub id, `sample:NAME` or directory name of the checkpoint.
        revision: Hub commit, when known.
        weights_sha256: The same hash as in an artifact's manifest.
        plan_sha256: Of the QuantPlan whose weights computed the outputs; None but for `packing`.
        producer: Device, dtype, versions.
        image: What the reference's image processor was set to do; None where there are no images.
        images: The images, in the order of the arrays' rows.
        labels: The labels, likewise; none where the model answers.
        timings: Median per stage of the reference, by stage name.
        programs: The components of which a packing reference has an exact form and a rounded output.
        prompts: The prompts of a model that answers, in the order of the arrays' rows.
        embedding_scale: What such a model multiplies embedded tokens by: the released one computes with
            bfloat16, and so rounds it, which a model loaded in float32 by itself does not.
        layers: The components whose residual stream between layers was recorded, of the first inputs.
        files: Size and hash of every other file.
    """

    __pydantic_config__ = _STRICT

    schema_version: Literal[1] = 1
    kind: BundleKind
    model_id: str
    revision: str | None
    weights_sha256: str
    plan_sha256: str | None
    producer: Producer
    image: ImageSpec | None
    images: tuple[ReferenceImage, ...]
    labels: tuple[ReferenceLabel, ...]
    timings: dict[str, StageTiming]
    programs: tuple[Literal["image", "text"], ...] = ()
    prompts: tuple[ReferencePrompt, ...] = ()
    embedding_scale: float | None = None
    layers: tuple[Literal["image", "text", "vision", "decoder"], ...] = ()
    files: tuple[FileEntry, ...] = ()

    def __post_init__(self) -> None:
        if (self.kind == "packing") != (self.plan_sha256 is not None):
            raise ValueError("a packing reference names its plan, and no other reference has one")
        if (self.kind == "packing") != bool(self.programs):
            raise ValueError("a packing reference has exact programs, and no other reference has any")
        is_generative = self.kind == "generative"
        if is_generative != (self.embedding_scale is not None):
            raise ValueError("a generative reference states its embedding scale, and no other reference does")
        if bool(self.images) != (self.image is not None):
            raise ValueError("an image spec goes with images, and images with an image spec")
        for what, rows, is_needed in (
            ("image", self.images, not is_generative),
            ("label", self.labels, not is_generative),
            ("prompt", self.prompts, is_generative),
        ):
            names = [row.name for row in rows]
            if len(set(names)) != len(names) or (is_needed and not names):
                raise ValueError(f"{what} names must be unique and at least one: {names}")
        if self.prompts if not is_generative else self.labels:
            raise ValueError("prompts belong to a generative reference, and labels to the others")
        shown = {name for prompt in self.prompts for name in prompt.images}
        if is_generative and shown != {image.name for image in self.images}:
            raise ValueError("the images of a generative reference are those of its prompts")
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
