"""The files of a `.mlpackage`: which one is the model, and the constants in its weight files."""

import json
import mmap
from math import prod
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medgemma_runtime.backends.mil.spec import BITS, NUMPY_DTYPES, BlobReference, TensorType, unpack_bits
from medgemma_runtime.errors import ArtifactError

__all__ = ["model_path", "WeightFiles"]

_FORMAT = "1.0.0"

# A blob file, little-endian: a header of 64 bytes (u32 number of blobs, u32 version), then blobs. Each has
# metadata of 64 bytes (u32 sentinel, u32 element type, u64 bytes, u64 offset of the data, u64 unused bits at
# its end) and data, both on multiples of 64. Found by writing and parsing files of coremltools 9.0's writer.
_ALIGNMENT = 64
_VERSION = 2
_SENTINEL = 0xDEADBEEF
_METADATA = np.dtype(
    [("sentinel", "<u4"), ("dtype", "<u4"), ("size", "<u8"), ("start", "<u8"), ("unused_bits", "<u8")]
)
_BLOB_DTYPES = {
    1: "fp16",
    2: "fp32",
    3: "uint8",
    4: "int8",
    6: "int16",
    7: "uint16",
    8: "int4",
    9: "uint1",
    10: "uint2",
    11: "uint4",
    12: "uint3",
    13: "uint6",
    14: "int32",
    15: "uint32",
}

_MODEL_PREFIX = "@model_path/"  # how a model names files beside it


def model_path(package: Path) -> Path:
    """The `model.mlmodel` of a package, as its `Manifest.json` names it.

    Raises:
        ArtifactError: If the directory is no package of the version this reads.
    """
    manifest = package / "Manifest.json"
    try:
        content = json.loads(manifest.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ArtifactError(
            f"{package} has no Manifest.json, so it is no .mlpackage; give the directory of one"
        ) from None
    except (OSError, ValueError, RecursionError) as error:
        raise ArtifactError(f"{manifest} cannot be read ({error}); export the model again") from None
    try:
        version = content["fileFormatVersion"]
        root = content["itemInfoEntries"][content["rootModelIdentifier"]]["path"]
        relative = PurePosixPath(root)
    except (KeyError, TypeError):
        raise ArtifactError(f"{manifest} names no root model; export the model again") from None
    if version != _FORMAT:
        raise ArtifactError(f"{manifest} is of format {version!r} and this reads {_FORMAT!r}")
    path = package / "Data" / relative
    if relative.is_absolute() or ".." in relative.parts or not path.is_file():
        raise ArtifactError(f"{package} has no file {root!r} in Data, its model; export the model again")
    return path


class WeightFiles:
    """The blob files of one model, mapped and not read until a constant is wanted.

    Args:
        model: Path of `model.mlmodel`; the files lie beside it.
    """

    def __init__(self, model: Path) -> None:
        self._directory = model.parent
        self._files: dict[str, NDArray[np.uint8]] = {}

    def check(self, reference: BlobReference, kind: TensorType, owner: str) -> None:
        """Hold a blob's metadata against the type of the constant that names it.

        Args:
            reference: Where the constant says it is.
            kind: What it should hold.
            owner: The constant's name, for messages.

        Raises:
            ArtifactError: If they differ, or the blob is not wholly inside the file.
        """
        self._data(reference, kind, owner)

    def read(self, reference: BlobReference, kind: TensorType, owner: str) -> NDArray[Any]:
        """A constant's elements, in the file's own type; packed integers come one to a byte.

        Raises:
            ArtifactError: As `check`.
        """
        data = self._data(reference, kind, owner)
        shape = [size or 0 for size in kind.shape]
        if kind.dtype in BITS:
            return unpack_bits(data, kind.dtype, prod(shape)).reshape(shape)
        return data.view(np.dtype(NUMPY_DTYPES[kind.dtype]).newbyteorder("<")).reshape(shape)

    def _data(self, reference: BlobReference, kind: TensorType, owner: str) -> NDArray[np.uint8]:
        """The bytes of a blob whose metadata is as it must be."""
        data = self._file(reference.file, owner)
        where = f"{reference.file.removeprefix(_MODEL_PREFIX)} at {reference.offset}"
        metadata_end = reference.offset + _METADATA.itemsize
        if reference.offset < _ALIGNMENT or metadata_end > len(data):
            raise ArtifactError(
                f"constant {owner!r} should be in {where} and the file has {len(data)} bytes; "
                "it is cut short or the offset is wrong: export the model again"
            )
        metadata = data[reference.offset : metadata_end].view(_METADATA)[0]
        found = _BLOB_DTYPES.get(int(metadata["dtype"]), f"type {metadata['dtype']}")
        if metadata["sentinel"] != _SENTINEL or reference.offset % _ALIGNMENT:
            raise ArtifactError(
                f"constant {owner!r} should be in {where} and no constant starts there; "
                "the offset is wrong or the file is altered: export the model again"
            )
        bits = prod(size or 0 for size in kind.shape) * (
            BITS.get(kind.dtype) or 8 * np.dtype(NUMPY_DTYPES[kind.dtype]).itemsize
        )
        size, start = int(metadata["size"]), int(metadata["start"])
        if found != kind.dtype or size * 8 - int(metadata["unused_bits"]) != bits or size != -(-bits // 8):
            raise ArtifactError(
                f"constant {owner!r} is {kind} and {where} holds {size} bytes of {found}; "
                "the offset is wrong or the file is altered: export the model again"
            )
        if start < metadata_end or start % _ALIGNMENT or start + size > len(data):
            raise ArtifactError(
                f"constant {owner!r} should have {size} bytes from {start} on and the file has {len(data)}; "
                "it is cut short or altered: copy it again or export the model again"
            )
        return data[start : start + size]

    def _file(self, name: str, owner: str) -> NDArray[np.uint8]:
        if name not in self._files:
            relative = PurePosixPath(name.removeprefix(_MODEL_PREFIX))
            if not name.startswith(_MODEL_PREFIX) or relative.is_absolute() or ".." in relative.parts:
                raise ArtifactError(f"constant {owner!r} is in {name!r}, which is no file of the package")
            path = self._directory / relative
            try:
                with path.open("rb") as stream:
                    data = np.frombuffer(mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ), np.uint8)
            except (OSError, ValueError):
                raise ArtifactError(
                    f"{relative} is missing or empty and constant {owner!r} is in it; "
                    "copy the whole package or export the model again"
                ) from None
            if len(data) < _ALIGNMENT or int(data[4:8].view("<u4")[0]) != _VERSION:
                raise ArtifactError(
                    f"{relative} is no weight file of version {_VERSION}; it is damaged, or newer than "
                    "this reads: export the model again"
                )
            self._files[name] = data
        return self._files[name]
