"""What an artifact says about itself: the schema of `manifest.json`.

Plain frozen dataclasses; pydantic reads them strictly, so an unknown key, a wrong type or an unknown
schema version is an error and never a guess. What a type cannot say (a path that stays inside the
artifact, a component whose program is listed) each class checks in `__post_init__`, for those who
write a manifest as for those who read one.
"""

import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Final, Literal

from pydantic import ConfigDict, TypeAdapter, ValidationError

from medgemma_runtime.errors import ArtifactError

__all__ = [
    "SCHEMA_VERSION",
    "MANIFEST_NAME",
    "Precision",
    "TargetName",
    "Manifest",
    "ModelInfo",
    "AdapterInfo",
    "ComponentEntry",
    "FileEntry",
    "TensorSpec",
    "ImageSpec",
    "TextSpec",
    "PromptSpec",
    "BuildInfo",
    "QuantizationSummary",
    "Similarity",
    "read_manifest",
    "write_manifest",
]

SCHEMA_VERSION: Final = 1
MANIFEST_NAME = "manifest.json"

DType = Literal["float32", "float16", "int64", "int32", "uint8", "bool"]

# JSON as Python reads it allows NaN and Infinity; no field here has a use for them.
TargetName = Literal["onnx", "coreml", "executorch"]
Precision = Literal["fp32", "fp16", "int8", "lut6", "int4", "lut4"]
_STRICT = ConfigDict(extra="forbid", allow_inf_nan=False)

# A manifest is a few kilobytes. A file past this is damaged or hostile and is not read into memory.
_MAX_MANIFEST_BYTES = 16 << 20

_SHA256 = re.compile("[0-9a-f]{64}")


@dataclass(frozen=True, kw_only=True)
class TensorSpec:
    """One named input or output of a component.

    A dimension is a size, or a name where it is free (`"batch"`); equal names mean equal sizes.

    Attributes:
        name: As the program has it.
        dtype: Of its elements.
        shape: Its dimensions.
        description: What it is, for people.
        may_be_empty: Whether free dimensions other than `batch` may be 0, as a cache's is at first.
        default: What every element is where the input is not given, and free dimensions are then 1, or 0
            where they may be; None where it must be given.
    """

    __pydantic_config__ = _STRICT

    name: str
    dtype: DType
    shape: tuple[int | str, ...]
    description: str
    may_be_empty: bool = False
    default: int | None = None

    def __post_init__(self) -> None:
        for dim in self.shape:
            if dim == "" or (isinstance(dim, int) and dim < 1):
                raise ValueError(f"shape {list(self.shape)} has the dimension {dim!r}")


@dataclass(frozen=True, kw_only=True)
class ImageSpec:
    """How a decoded RGB uint8 image becomes a model input [3, height, width] float32.

    The named variants, each with its source, are in `medgemma_runtime.images`.

    Attributes:
        name: Which documented variant this is, for people.
        height: Rows of the model input, pixels.
        width: Columns of the model input, pixels.
        fit: `stretch` ignores the aspect ratio; `pad` centres the image on a black square first.
        resample: Interpolation kernel.
        antialias: Whether the kernel widens when the image shrinks, as Pillow's does.
        rounding: How the resized value becomes uint8: to `nearest`, or `truncate` towards zero.
        rescale: Factor from uint8 to float, applied before `mean` and `std`.
        mean: Subtracted per channel after rescaling.
        std: Divisor per channel.
        source: Where this behaviour is documented.
    """

    __pydantic_config__ = _STRICT

    name: str
    height: int
    width: int
    fit: Literal["stretch", "pad"]
    resample: Literal["bilinear", "bicubic"]
    antialias: bool
    rounding: Literal["nearest", "truncate"]
    rescale: float
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    source: str

    def __post_init__(self) -> None:
        if min(self.height, self.width) < 1:
            raise ValueError(f"an image cannot be {self.height} x {self.width} pixels")
        if min(self.std) <= 0 or self.rescale <= 0:
            raise ValueError(f"rescale {self.rescale} and std {self.std} must be above zero")


@dataclass(frozen=True, kw_only=True)
class TextSpec:
    """How a text becomes token ids of a fixed length.

    Attributes:
        tokenizer: Path of the Hugging Face `tokenizer.json`, relative to the artifact.
        length: Ids per text; shorter texts are padded at the end, longer ones refused or, if the
            caller says so, truncated.
        pad_id: The id that fills; for SigLIP this is `</s>` (1), not `<pad>` (0).
        eos_id: The id that ends every text.
        canonicalize: `siglip` lower-cases, deletes ASCII punctuation and collapses white space first.
        source: Where this behaviour is documented.
    """

    __pydantic_config__ = _STRICT

    tokenizer: str
    length: int
    pad_id: int
    eos_id: int
    canonicalize: Literal["siglip", "none"]
    source: str

    def __post_init__(self) -> None:
        if self.length < 2:
            raise ValueError(f"length {self.length} leaves no room for a token before the end token")
        if min(self.pad_id, self.eos_id) < 0:
            raise ValueError(f"token ids {self.pad_id} and {self.eos_id} must not be negative")


@dataclass(frozen=True, kw_only=True)
class PromptSpec:
    """How a conversation, with or without images, becomes the token ids that a decoder continues.

    Attributes:
        tokenizer: Path of the Hugging Face `tokenizer.json`, relative to the artifact.
        template: The chat format; `gemma3` is the one of `medgemma_runtime.prompt`.
        context: Tokens of prompt and answer together, at most.
        bos_id: The id that starts every prompt, once.
        stop_ids: The ids that end an answer.
        image_id: The id that holds an image's places, or None for a model that reads text only.
        tokens_per_image: Places of one image; 0 for a model that reads text only.
        window: Positions that the layers with a window see, the newest included; None where there are none.
        source: Where this behaviour is documented.
    """

    __pydantic_config__ = _STRICT

    tokenizer: str
    template: Literal["gemma3"]
    context: int
    bos_id: int
    stop_ids: tuple[int, ...]
    image_id: int | None
    tokens_per_image: int
    window: int | None
    source: str

    def __post_init__(self) -> None:
        if self.window is not None and self.window < 1:
            raise ValueError(f"window {self.window} sees nothing")
        if self.context < 2:
            raise ValueError(f"context {self.context} leaves no room for a prompt and an answer")
        if not self.stop_ids:
            raise ValueError("stop_ids is empty, so no answer would end")
        ids = [self.bos_id, *self.stop_ids] + ([] if self.image_id is None else [self.image_id])
        if min(ids) < 0 or len(set(ids)) != len(ids):
            raise ValueError(f"the token ids {ids} must be different and not negative")
        if (self.image_id is None) != (self.tokens_per_image == 0) or self.tokens_per_image < 0:
            raise ValueError(
                f"image_id {self.image_id} and tokens_per_image {self.tokens_per_image} contradict each other"
            )


@dataclass(frozen=True, kw_only=True)
class Similarity:
    """How an image and a text embedding, both of unit length, become a logit: `scale * cos + bias`.

    Attributes:
        scale: The factor itself, `exp(logit_scale)` of the checkpoint.
        bias: Added to it, `logit_bias` of the checkpoint.
    """

    __pydantic_config__ = _STRICT

    scale: float
    bias: float


@dataclass(frozen=True, kw_only=True)
class FileEntry:
    """A file of the artifact: path with forward slashes relative to it, size and SHA-256."""

    __pydantic_config__ = _STRICT

    path: str
    size_bytes: int
    sha256: str

    def __post_init__(self) -> None:
        parts = PurePosixPath(self.path).parts
        # Back slashes and colons would be separators and drives on Windows.
        if (
            PurePosixPath(*parts).as_posix() != self.path
            or self.path in (".", MANIFEST_NAME)
            or self.path.startswith("/")
            or ".." in parts
            or any(char in self.path for char in "\\:\0")
        ):
            raise ValueError(f"path {self.path!r} is no plain relative path inside the artifact")
        if self.size_bytes < 0:
            raise ValueError(f"size_bytes of {self.path!r} is {self.size_bytes}")
        if _SHA256.fullmatch(self.sha256) is None:
            raise ValueError(f"sha256 of {self.path!r} is not 64 lower-case hexadecimal digits")


@dataclass(frozen=True, kw_only=True)
class ComponentEntry:
    """A separately runnable part of the model: its program file, and what goes in and comes out."""

    __pydantic_config__ = _STRICT

    program: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]


@dataclass(frozen=True, kw_only=True)
class AdapterInfo:
    """The adapter that was merged into the checkpoint's weights.

    Attributes:
        name: Name of its directory; never a path.
        sha256: SHA-256 over adapter_config.json and then adapter_model.safetensors.
    """

    __pydantic_config__ = _STRICT

    name: str
    sha256: str

    def __post_init__(self) -> None:
        if _SHA256.fullmatch(self.sha256) is None:
            raise ValueError(f"sha256 of adapter {self.name!r} is not 64 lower-case hexadecimal digits")


@dataclass(frozen=True, kw_only=True)
class ModelInfo:
    """The checkpoint an artifact was made from.

    Attributes:
        id: Hub id, `sample:NAME`, or the name of the local directory; never a path.
        revision: Hub commit, when known.
        architecture: The Hugging Face architecture, such as `SiglipModel`.
        weights_sha256: SHA-256 over the checkpoint's weight files in name order, and then the adapter's
            files: what has the same hash has the same weights.
        licence: The licence of the weights.
        intended_use: What the model may and may not be used for, one paragraph.
        adapter: What was merged into the checkpoint, if anything.
    """

    __pydantic_config__ = _STRICT

    id: str
    revision: str | None
    architecture: str
    weights_sha256: str
    licence: str
    intended_use: str
    adapter: AdapterInfo | None = None


@dataclass(frozen=True, kw_only=True)
class QuantizationSummary:
    """The quantization in one line; every row of it is in the file `plan`.

    Attributes:
        plan: Path of the QuantPlan, relative to the artifact.
        plan_sha256: SHA-256 of that file; parity uses it to pair an artifact with its packing
            reference.
        scheme: Name of the scheme.
        method: How the integers were found, such as `rtn`.
        activations: `float`, or how the target quantizes activations at run time.
        bits_per_weight: Mean stored bits, scales included, over all weights.
        calibration: Hash and size of the calibration set, or None when the method needs none.
    """

    __pydantic_config__ = _STRICT

    plan: str
    plan_sha256: str
    scheme: str
    method: str
    activations: str
    bits_per_weight: float
    calibration: str | None


@dataclass(frozen=True, kw_only=True)
class BuildInfo:
    """How the artifact was made: tool versions, seconds, and the build's peak resident memory."""

    __pydantic_config__ = _STRICT

    versions: dict[str, str]
    seconds: float
    peak_rss_bytes: int


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """Everything a runtime needs to know about an artifact directory."""

    __pydantic_config__ = _STRICT

    schema_version: Literal[1]
    target: TargetName
    precision: Precision
    model: ModelInfo
    components: dict[str, ComponentEntry]
    image: ImageSpec | None
    text: TextSpec | None
    prompt: PromptSpec | None
    similarity: Similarity | None
    quantization: QuantizationSummary
    build: BuildInfo
    files: tuple[FileEntry, ...]

    def __post_init__(self) -> None:
        sha256_of = {entry.path: entry.sha256 for entry in self.files}
        if len(sha256_of) != len(self.files):
            raise ValueError("files lists a path twice")
        if not self.components:
            raise ValueError("components is empty")
        needed = [entry.program for entry in self.components.values()] + [self.quantization.plan]
        if self.text is not None:
            needed.append(self.text.tokenizer)
        if self.prompt is not None:
            needed.append(self.prompt.tokenizer)
        for path in needed:
            # A Core ML package is a directory of files.
            if not any(f"{listed}/".startswith(f"{path}/") for listed in sha256_of):
                raise ValueError(f"{path!r} is named and not listed in files")
        if sha256_of.get(self.quantization.plan) != self.quantization.plan_sha256:
            raise ValueError("plan_sha256 is not the sha256 that files states for the plan")


_ADAPTER: TypeAdapter[Manifest] = TypeAdapter(Manifest)


def read_manifest(directory: Path) -> Manifest:
    """Read and check `manifest.json` of an artifact.

    Raises:
        ArtifactError: If it is absent, of an unknown schema version, or not to the schema.
    """
    path = directory / MANIFEST_NAME
    text = _read_text(path)
    try:
        content = json.loads(text, object_pairs_hook=_without_duplicates)
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"{path} is not JSON ({error}); export the model again") from None
    if not isinstance(content, dict):
        raise ArtifactError(f"{path} is not a JSON object; export the model again")
    version = content.get("schema_version")
    # JSON's true and 1.0 are equal to 1 in Python.
    if type(version) is not int or version != SCHEMA_VERSION:
        raise ArtifactError(
            f"{path} has schema version {version!r} and this runtime reads version "
            f"{SCHEMA_VERSION}; install the medgemma-edge that wrote it, or export again"
        )
    try:
        return _ADAPTER.validate_json(text, strict=True)
    except ValidationError as error:
        raise ArtifactError(
            f"{path} is not to the schema: {_first_violation(error)}; export the model again"
        ) from None


def write_manifest(manifest: Manifest, directory: Path) -> None:
    """Write `manifest.json`, keys in the order of the schema.

    Raises:
        ValueError: If a field is not of its declared type, so that no unreadable manifest is written.
    """
    text = json.dumps(asdict(manifest), indent=2, ensure_ascii=False, allow_nan=False)
    _ADAPTER.validate_json(text, strict=True)
    (directory / MANIFEST_NAME).write_text(text + "\n", encoding="utf-8")


def _read_text(path: Path) -> str:
    """The manifest's text, or the sentence that says why there is none."""
    if not path.parent.is_dir():
        raise ArtifactError(
            f"{path.parent} is not a directory; give the directory that medgemma-export wrote"
        )
    try:
        if path.stat().st_size > _MAX_MANIFEST_BYTES:
            raise ArtifactError(f"{path} is too large to be a manifest; export the model again")
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ArtifactError(
            f"{path.parent} has no {MANIFEST_NAME}, so it is no finished artifact; "
            "give the directory that medgemma-export wrote, or export again"
        ) from None
    except UnicodeDecodeError:
        raise ArtifactError(f"{path} is not UTF-8 text; export the model again") from None
    except OSError as error:
        raise ArtifactError(f"{path} cannot be read ({error.strerror})") from None


def _without_duplicates(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """A JSON object; a repeated key would let two readers see two manifests."""
    content = dict(pairs)
    if len(content) != len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"key {next(key for key in keys if keys.count(key) > 1)!r} occurs twice")
    return content


def _first_violation(error: ValidationError) -> str:
    """Where the manifest first departs from the schema, how, and how many more such there are."""
    first = error.errors(include_url=False, include_input=False)[0]
    where = ".".join(str(part) for part in first["loc"])
    more = error.error_count() - 1
    return f"{where}: {first['msg']}" + (f" (and {more} more)" if more else "")
