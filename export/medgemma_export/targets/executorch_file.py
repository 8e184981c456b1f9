"""Lets a program's kernels and its delegate read the same bytes of a .pte file.

ExecuTorch writes constants of kernels into one segment, and what a delegate asked for by name into others. A
table that is looked up and also multiplied would lie in both. A segment is a range of the file, so a named
one may lie inside the constants.
"""

import os
from pathlib import Path

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

__all__ = ["share_constants"]

# Segments begin at multiples of it, as ExecuTorch's own writer has it.
_ALIGNMENT = 128

# Less is not worth a look.
_LEAST_BYTES = 4096


def share_constants(path: Path) -> int:
    """Rewrite a .pte file without the named segments whose bytes its constants hold too.

    Returns:
        How many bytes shorter the file is.
    """
    with path.open("rb") as file:
        header = _get_extended_header(file.read(8 + _ExtendedHeader.EXPECTED_LENGTH))
        assert header is not None, "a program with weights has segments"
        file.seek(0)
        program = _flatbuffer_to_program(file.read(header.program_size))
    whole = np.memmap(path, np.uint8, "r")
    old = list(program.segments)
    inside = _places_in_constants(program, whole[header.segment_base_offset :])
    if not inside:
        return 0
    program.segments, end = [], 0
    for index, segment in enumerate(old):
        if index in inside:
            program.segments.append(segment)
            continue
        program.segments.append(DataSegment(offset=aligned_size(end, _ALIGNMENT), size=segment.size))
        end = program.segments[-1].offset + segment.size
    constants = program.segments[program.constant_segment.segment_index].offset
    for index, place in inside.items():
        program.segments[index] = DataSegment(offset=constants + place, size=old[index].size)
    partial = path.with_suffix(".partial")
    with partial.open("wb") as file:
        base = file.write(_program_bytes(program, segment_bytes=end))
        for index, segment in enumerate(program.segments):
            if index not in inside:
                file.write(bytes(base + segment.offset - file.tell()))
                start = header.segment_base_offset + old[index].offset
                whole[start : start + segment.size].tofile(file)
    saved = path.stat().st_size - partial.stat().st_size
    os.replace(partial, path)
    return saved


def _places_in_constants(program: Program, data: NDArray[np.uint8]) -> dict[int, int]:
    """Where in the segment of constants each named segment lies too, by its index."""
    constants = program.segments[program.constant_segment.segment_index]
    offsets = program.constant_segment.offsets
    held = data[constants.offset : constants.offset + constants.size]
    places: dict[int, int] = {}
    for named in program.named_data or []:
        segment = program.segments[named.segment_index]
        if segment.size < _LEAST_BYTES:
            continue
        content = data[segment.offset : segment.offset + segment.size]
        for offset, end in zip(offsets, [*offsets[1:], constants.size], strict=True):
            # What ends where the next begins may have padding.
            if 0 <= end - offset - segment.size < _ALIGNMENT and np.array_equal(
                held[offset : offset + segment.size], content
            ):
                places[named.segment_index] = offset
                break
    return places


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
