"""Writes and reads a .ptd file, ExecuTorch's own format for what programs ask for by name.

It begins with names, layouts and places, and what they name follows. ExecuTorch's writer takes all of it in
memory; here it comes piece by piece.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from executorch.exir._serialize._program import _insert_flatbuffer_header
from executorch.exir._serialize.padding import aligned_size, pad_to
from executorch.exir.tensor_layout import TensorLayout
from executorch.extension.flat_tensor.serialize.flat_tensor_schema import DataSegment, FlatTensor, NamedData
from executorch.extension.flat_tensor.serialize.serialize import (
    _FLAT_TENSOR_VERSION,
    _FLATBUFFER_ALIGNMENT,
    FlatTensorHeader,
    _deserialize_to_flat_tensor,
    _serialize_to_flatbuffer,
)
from numpy.typing import NDArray

from medgemma_export.targets.executorch_stand_ins import LateWeight

__all__ = ["Named", "read_data", "write_data", "write_weight"]

# Segments begin at multiples of it, as ExecuTorch's own writer has it.
_ALIGNMENT = 128

# Of the file's kind, and of where its content begins; the header follows them.
_BEFORE_HEADER = 8


@dataclass(frozen=True, kw_only=True)
class Named:
    """What a program asks for by name.

    Attributes:
        content: The bytes, or the weight that makes them.
        layout: What kernels hold the tensor against; None for what delegates alone read.
    """

    content: LateWeight | NDArray[np.uint8]
    layout: TensorLayout | None = None

    @property
    def size(self) -> int:
        """Bytes."""
        return len(self.content) if isinstance(self.content, np.ndarray) else self.content.size


def write_data(path: Path, named: Mapping[str, Named]) -> None:
    """Write a .ptd file, one weight at a time.

    Args:
        path: The new file.
        named: By name, in the order that the file gets.
    """
    segments: list[DataSegment] = []
    end = 0
    for entry in named.values():
        segments.append(DataSegment(offset=aligned_size(end, _ALIGNMENT), size=entry.size))
        end = segments[-1].offset + entry.size
    description = FlatTensor(
        version=_FLAT_TENSOR_VERSION,
        segments=segments,
        named_data=[
            NamedData(key=name, segment_index=index, tensor_layout=entry.layout)
            for index, (name, entry) in enumerate(named.items())
        ],
    )
    with path.open("wb") as file:
        base = file.write(_description_bytes(description, segment_bytes=end))
        for segment, entry in zip(segments, named.values(), strict=True):
            file.write(bytes(base + segment.offset - file.tell()))
            if isinstance(entry.content, np.ndarray):
                entry.content.tofile(file)
            else:
                write_weight(file, entry.content)


def read_data(path: Path) -> tuple[FlatTensor, list[NDArray[np.uint8]]]:
    """A .ptd file's description, and its segments, which are read when they are looked at."""
    with path.open("rb") as file:
        file.seek(_BEFORE_HEADER)
        header = FlatTensorHeader.from_bytes(file.read(FlatTensorHeader.EXPECTED_LENGTH))
        file.seek(0)
        description = _deserialize_to_flat_tensor(
            file.read(header.flatbuffer_offset + header.flatbuffer_size)
        )
    data = np.memmap(path, np.uint8, "r", offset=header.segment_base_offset)
    segments = description.segments
    return description, [data[segment.offset : segment.offset + segment.size] for segment in segments]


def write_weight(file: BinaryIO, weight: LateWeight) -> None:
    """Write a weight as its pieces come."""
    size = 0
    for piece in weight.pieces():
        piece.tofile(file)
        size += piece.nbytes
    assert size == weight.size, f"{weight.name} has another size"


def _description_bytes(description: FlatTensor, *, segment_bytes: int) -> bytes:
    """All that comes before the segments."""
    packed = bytes(_serialize_to_flatbuffer(description))
    header_bytes = aligned_size(FlatTensorHeader.EXPECTED_LENGTH, _FLATBUFFER_ALIGNMENT)
    base = aligned_size(header_bytes + len(packed), _ALIGNMENT)
    header = FlatTensorHeader(
        flatbuffer_offset=header_bytes,
        flatbuffer_size=len(packed),
        segment_base_offset=base,
        segment_data_size=segment_bytes,
    )
    content: bytes = _insert_flatbuffer_header(
        flatbuffer_data=packed,
        magic_regex=r"FT[0-9a-zA-Z][0-9a-zA-Z]",
        header_data=pad_to(header.to_bytes(), header_bytes),
    )
    return content.ljust(base, b"\0")
