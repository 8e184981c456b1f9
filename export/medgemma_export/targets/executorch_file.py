"""Writes a .pte file with the weights that were not there while it was lowered, and reads its parts.

ExecuTorch writes constants of kernels into one segment, and what a delegate asked for by name into others. A
table that is looked up and also multiplied would lie in both. A segment is a range of the file, so a named
one may lie inside the constants.
"""

from pathlib import Path
from typing import BinaryIO

import numpy as np
from executorch.exir._serialize._flatbuffer_program import _flatbuffer_to_program, _program_to_flatbuffer
from executorch.exir._serialize._program import (
    _ExtendedHeader,
    _get_extended_header,
    _insert_flatbuffer_header,
)
from executorch.exir._serialize.padding import aligned_size, pad_to
from executorch.exir.schema import DataSegment, Program
from numpy.typing import NDArray

from medgemma_export.targets.executorch_stand_ins import MARK_BYTES, LateWeight, StandIns

__all__ = ["constant_parts", "read_program", "write_program"]

# Segments begin at multiples of it, as ExecuTorch's own writer has it.
_ALIGNMENT = 128


def read_program(path: Path) -> tuple[Program, list[NDArray[np.uint8]]]:
    """A .pte file's description, and its segments, which are read when they are looked at."""
    with path.open("rb") as file:
        header = _get_extended_header(file.read(8 + _ExtendedHeader.EXPECTED_LENGTH))
        assert header is not None, "a program with weights has segments"
        file.seek(0)
        program = _flatbuffer_to_program(file.read(header.program_size))
    data = np.memmap(path, np.uint8, "r", offset=header.segment_base_offset)
    return program, [data[segment.offset : segment.offset + segment.size] for segment in program.segments]


def constant_parts(program: Program, segments: list[NDArray[np.uint8]]) -> dict[int, NDArray[np.uint8]]:
    """What kernels read, by where it begins; what ends where the next begins may have padding."""
    content = segments[program.constant_segment.segment_index]
    offsets = program.constant_segment.offsets
    return {
        offset: content[offset:end]
        for offset, end in zip(offsets, [*offsets[1:], len(content)], strict=True)
        if offset < end
    }


def write_program(lowered: Path, path: Path, stand_ins: StandIns) -> None:
    """Write a .pte file anew, with weights in the places of their stand-ins.

    A weight that kernels read and a delegate has asked for by name is written once.

    Args:
        lowered: What ExecuTorch wrote.
        path: The new file.
        stand_ins: All that `lowered` may hold; each must have its place there.
    """
    program, old = read_program(lowered)
    constants = program.constant_segment.segment_index
    assert constants == 0, "constants come first"
    among_constants = {
        offset: weight
        for offset, part in constant_parts(program, old).items()
        if (weight := stand_ins.find(part[:MARK_BYTES].tobytes()))
    }
    places = {weight.name: place for place, weight in among_constants.items()}
    named: dict[int, LateWeight] = {}
    for entry in program.named_data or []:
        if len(old[entry.segment_index]) == MARK_BYTES and (
            weight := stand_ins.find(old[entry.segment_index].tobytes())
        ):
            named[entry.segment_index] = weight
    lost = {weight.name for weight in stand_ins.weights} - places.keys()
    lost -= {weight.name for weight in named.values()}
    assert not lost, f"weights without a place in the program: {sorted(lost)}"

    program.segments, end = [], 0
    for index, content in enumerate(old):
        weight = named.get(index)
        size = len(content) if weight is None else weight.size
        if weight is not None and weight.name in places:
            program.segments.append(DataSegment(offset=places[weight.name], size=size))
            continue
        program.segments.append(DataSegment(offset=aligned_size(end, _ALIGNMENT), size=size))
        end = program.segments[-1].offset + size
    with path.open("wb") as file:
        base = file.write(_program_bytes(program, segment_bytes=end))
        for index, segment in enumerate(program.segments):
            weight = named.get(index)
            if weight is not None and weight.name in places:
                continue
            file.write(bytes(base + segment.offset - file.tell()))
            if weight is not None:
                _write(file, weight)
            else:
                _write_with(file, old[index], among_constants if index == constants else {})


def _write_with(file: BinaryIO, content: NDArray[np.uint8], weights: dict[int, LateWeight]) -> None:
    """Write a segment with weights in their places."""
    start = 0
    for offset, weight in sorted(weights.items()):
        content[start:offset].tofile(file)
        _write(file, weight)
        start = offset + weight.size
    content[start:].tofile(file)


def _write(file: BinaryIO, weight: LateWeight) -> None:
    size = 0
    for piece in weight.pieces():
        piece.tofile(file)
        size += piece.nbytes
    assert size == weight.size, f"{weight.name} has another size"


def _program_bytes(program: Program, *, segment_bytes: int) -> bytes:
    """All that comes before the segments."""
    packed = _program_to_flatbuffer(program)
    header_bytes = aligned_size(_ExtendedHeader.EXPECTED_LENGTH, packed.max_alignment)
    size = header_bytes + len(packed.data)
    base = aligned_size(size, _ALIGNMENT)
    header = _ExtendedHeader(program_size=size, segment_base_offset=base, segment_data_size=segment_bytes)
    content: bytes = _insert_flatbuffer_header(
        flatbuffer_data=packed.data,
        magic_regex=r"ET[0-9a-zA-Z][0-9a-zA-Z]",
        header_data=pad_to(header.to_bytes(), header_bytes),
    )
    return content.ljust(base, b"\0")
