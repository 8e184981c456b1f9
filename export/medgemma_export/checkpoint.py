"""Reads model checkpoints one tensor at a time, from wherever a user keeps them.

A checkpoint is a directory as Hugging Face lays it out, a GGUF file, a hub id, or a sample that this package
brings along. Whichever it is, callers see Hugging Face's tensor names and float32 arrays, and never more than
one tensor (or a few of its rows) is in memory.
"""

import difflib
import fnmatch
import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from medgemma_export.hub import download
from medgemma_runtime.errors import CheckpointError

__all__ = [
    "Checkpoint",
    "Adapter",
    "TensorInfo",
    "TensorReader",
    "EXACT_DTYPES",
    "open_checkpoint",
    "check_tensors",
    "listed",
]

# Each of these converts to float32 without rounding.
EXACT_DTYPES = ("F32", "F16", "BF16")
# What may be a hub id: OWNER/NAME.
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_CHUNK_BYTES = 1 << 20
_SHOWN = 4


@dataclass(frozen=True, kw_only=True)
class TensorInfo:
    """What a checkpoint says about one tensor before it is read.

    Attributes:
        name: Hugging Face's name, whatever the file calls it.
        shape: Outermost axis first; a linear weight is [outputs, inputs].
        dtype: As the file format names it: "BF16", "F32", "Q4_K" ...
        file: The name of the weight file, relative to the checkpoint's directory.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    file: str


class TensorReader(Protocol):
    """Reads one tensor, or only some rows of its first axis, as the file format demands."""

    def __call__(self, info: TensorInfo, rows: slice | None) -> NDArray[np.float32]:
        """The values as float32."""
        ...


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """An adapter that is merged into a checkpoint's tensors as they are read.

    Attributes:
        name: Of its directory. Never a path.
        paths: The files that decide what it does, its settings before its tensors.
    """

    name: str
    paths: tuple[Path, ...]

    def sha256(self) -> str:
        """The SHA-256 of its files, one after the other."""
        return _sha256(self.paths)


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A model's weights on disk, read lazily.

    Attributes:
        id: The hub id, "sample:NAME", or the name of the directory or file. Never a path.
        revision: The commit of the hub's repository, where the checkpoint came from the hub.
        config: Hugging Face's config.json, or its equivalent made from GGUF metadata.
        tensors: Every tensor by its Hugging Face name.
        directory: Where the files are.
        reader: How this format reads a tensor; callers use `read`.
        adapter: What `reader` merges into the tensors, if anything.
        made: Files that the format holds in another form, by Hugging Face's name; callers use `content`.
    """

    id: str
    revision: str | None
    config: Mapping[str, object]
    tensors: Mapping[str, TensorInfo]
    directory: Path
    reader: TensorReader
    adapter: Adapter | None = None
    made: Mapping[str, Callable[[], bytes]] = field(default_factory=dict)

    def read(self, name: str, *, rows: slice | None = None) -> NDArray[np.float32]:
        """One tensor as float32, exactly as stored.

        Args:
            name: A key of `tensors`.
            rows: Read only these rows of the first axis (no step).

        Returns:
            A C-contiguous array that the caller owns.

        Raises:
            CheckpointError: If there is no such tensor, its dtype does not convert exactly, or a value is
                NaN or infinite.
        """
        info = self.tensors.get(name)
        if info is None:
            raise CheckpointError(
                f"{self.id} has no tensor {name!r}{_did_you_mean(name, self.tensors)}; "
                "check that this is the model you meant"
            )
        if rows is not None:
            rows = _checked_rows(rows, info)
        values = self.reader(info, rows)
        # min and max propagate NaN and need no temporary array.
        if values.size and not (np.isfinite(values.min()) and np.isfinite(values.max())):
            raise CheckpointError(
                f"{name} in {info.file} of {self.id} holds NaN or infinite values; the checkpoint is "
                "damaged or its training diverged: get the original file again"
            )
        return values

    def file(self, name: str) -> Path:
        """A file beside the weights, such as tokenizer.json.

        Raises:
            CheckpointError: If it is not there.
        """
        path = self.directory / name
        if not path.is_file():
            raise CheckpointError(
                f"{self.id} has no {name}; copy it from the model's repository into that directory"
            )
        return path

    def content(self, name: str) -> bytes:
        """A file beside the weights, or what the format holds in its place.

        Raises:
            CheckpointError: If it is not there.
        """
        return self.made[name]() if name in self.made else self.file(name).read_bytes()

    @property
    def weight_files(self) -> tuple[str, ...]:
        """The files that hold tensors, in name order."""
        return tuple(sorted({info.file for info in self.tensors.values()}))

    @property
    def weight_paths(self) -> tuple[Path, ...]:
        """Every file that decides what is read: the weight files in name order, then the adapter's."""
        paths = tuple(self.directory / name for name in self.weight_files)
        return paths if self.adapter is None else (*paths, *self.adapter.paths)

    def weights_sha256(self, *, progress: Callable[[int], None] | None = None) -> str:
        """The SHA-256 of `weight_paths`, one after the other.

        For a single file this is that file's own SHA-256; for shards, that of `cat model-*.safetensors`.

        Args:
            progress: Called with the bytes read since the last call.
        """
        return _sha256(self.weight_paths, progress=progress)


def open_checkpoint(model: str, *, revision: str | None = None) -> Checkpoint:
    """Open a checkpoint and read its table of contents, but no weight.

    Args:
        model: A directory, a .gguf file, a hub id such as "google/medsiglip-448", or "sample:NAME". What
            exists on disk wins over a hub id; only a hub id is ever downloaded.
        revision: A branch, tag or commit of the hub's repository; only with a hub id.

    Raises:
        CheckpointError: If there is nothing there, it is incomplete or damaged, or of an unsupported kind.
    """
    path = Path(model)
    is_sample = model.startswith("sample:")
    if revision is not None and (is_sample or path.exists()):
        raise CheckpointError(
            f"revision {revision!r} was given for {_shown_name(model)}, which does not come from the hub; "
            "leave the revision out"
        )
    if is_sample:
        from medgemma_export.samples import sample_path

        return _open_path(sample_path(model), id=model)
    if path.exists():
        return _open_path(path, id=path.resolve().name)
    if _HUB_ID.fullmatch(model) and path.suffix not in (".gguf", ".safetensors"):
        from medgemma_export.safetensors_checkpoint import open_directory

        directory = download(model, revision=revision)
        return open_directory(directory, id=model, revision=directory.name)
    raise CheckpointError(
        f"{model} does not exist and is no hub id; name a checkpoint's directory, a .gguf file, a hub id "
        "such as google/medsiglip-448, or a sample such as sample:medsiglip-tiny"
    )


def check_tensors(
    checkpoint: Checkpoint, expected: Mapping[str, tuple[int, ...]], *, ignored: Sequence[str] = ()
) -> None:
    """Hold a checkpoint's table of contents against what a model needs, before any weight is read.

    Args:
        checkpoint: An opened checkpoint.
        expected: Every tensor of the model and its shape.
        ignored: Patterns (`*` and `?` as in file names) of tensors that may be there without being used.

    Raises:
        CheckpointError: One error that names what is missing, left over, misshapen or of a dtype that
            cannot be read.
    """
    tensors = checkpoint.tensors
    extra = [
        name
        for name in tensors
        if name not in expected and not any(fnmatch.fnmatchcase(name, pattern) for pattern in ignored)
    ]
    missing = [name for name in expected if name not in tensors]
    present = [tensors[name] for name in expected if name in tensors]
    faults = {
        # A search for the nearest name is slow, and only the first names are shown.
        "missing": [name + _did_you_mean(name, extra) for name in missing[:_SHOWN]] + missing[_SHOWN:],
        "not part of the model": [f"{name} ({tensors[name].file})" for name in extra],
        "of another shape": [
            f"{info.name} ({info.file}) is {list(info.shape)} and should be {list(expected[info.name])}"
            for info in present
            if info.shape != expected[info.name]
        ],
        "of a dtype that does not convert to float32 exactly": [
            f"{info.name} ({info.file}, {info.dtype})"
            for info in present
            # The other types of a GGUF file are dequantized.
            if info.file.endswith(".safetensors") and info.dtype not in EXACT_DTYPES
        ],
    }
    found = [f"{listed(names)} {what}" for what, names in faults.items() if names]
    if found:
        raise CheckpointError(
            f"{checkpoint.id} does not hold this model's weights: {'; '.join(found)}. "
            "Check that config.json and the weights belong to the same checkpoint"
        )


def _open_path(path: Path, *, id: str) -> Checkpoint:
    from medgemma_export import safetensors_checkpoint

    if path.is_dir():
        return safetensors_checkpoint.open_directory(path, id=id, revision=None)
    if path.suffix == ".gguf":
        from medgemma_export.gguf_checkpoint import open_gguf

        return open_gguf(path, id=id)
    if safetensors_checkpoint.is_pickled(path.name):
        raise safetensors_checkpoint.pickled_error([path.name], holder="the file itself")
    raise CheckpointError(
        f"{path.name} is neither a directory nor a .gguf file; "
        "name the directory that holds config.json and the .safetensors files"
    )


def _sha256(paths: Sequence[Path], *, progress: Callable[[int], None] | None = None) -> str:
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as stream:
            while chunk := stream.read(_CHUNK_BYTES):
                digest.update(chunk)
                if progress is not None:
                    progress(len(chunk))
    return digest.hexdigest()


def _checked_rows(rows: slice, info: TensorInfo) -> slice:
    if not info.shape:
        raise ValueError(f"{info.name} is a scalar: it has no rows")
    start, stop, step = rows.indices(info.shape[0])
    if step != 1:
        raise ValueError(f"rows of {info.name} are read in order, without a step, and not with {step}")
    return slice(start, max(start, stop))


def _did_you_mean(name: str, candidates: Sequence[str] | Mapping[str, object]) -> str:
    close = difflib.get_close_matches(name, list(candidates), n=1, cutoff=0.8)
    return f" (did you mean {close[0]!r}?)" if close else ""


def listed(names: Sequence[str]) -> str:
    """The first names, and how many more there are: for messages."""
    shown = ", ".join(names[:_SHOWN])
    return shown if len(names) <= _SHOWN else f"{shown} and {len(names) - _SHOWN} more"


def _shown_name(model: str) -> str:
    return model if model.startswith("sample:") else Path(model).resolve().name
