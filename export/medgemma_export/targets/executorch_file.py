"""Writes a .pte file with the weights that were not there while it was lowered, and reads its parts.

ExecuTorch writes constants of kernels into one segment, and what a delegate asked for by name into others. A
table that is looked up and also multiplied would lie in both. A segment is a range of the file, so a named
one may lie inside the constants.

Weights may go into a .ptd file instead. Kernels then ask for constants by name too, so a table has one.
"""

import hashlib
import math
from collections.abc import Iterator
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
from executorch.exir.schema import (
    DataSegment,
    ExtraTensorInfo,
    Program,
    SubsegmentOffsets,
    Tensor,
    TensorDataLocation,
)
from executorch.exir.tensor import get_scalar_type
from executorch.exir.tensor_layout import TensorLayout
from numpy.typing import NDArray

from medgemma_export.targets.executorch_data import Named, write_data, write_weight
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


def write_program(lowered: Path, path: Path, stand_ins: StandIns, *, data: Path | None = None) -> None:
    """Write a .pte file anew, with weights in the places of their stand-ins.

    A weight that kernels read and a delegate has asked for by name is written once.

    Args:
        lowered: What ExecuTorch wrote.
        path: The new file.
        stand_ins: All that `lowered` may hold; each must have its place there.
        data: A .ptd file to write all constants to, by name; None leaves them in the program's file.
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
    if data is not None:
        write_data(data, _take_out(program, old, among_constants, named))
        among_constants, named = {}, {}

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
                write_weight(file, weight)
            else:
                _write_with(file, old[index], among_constants if index == constants else {})


def _write_with(file: BinaryIO, content: NDArray[np.uint8], weights: dict[int, LateWeight]) -> None:
    """Write a segment with weights in their places."""
    start = 0
    for offset, weight in sorted(weights.items()):
        content[start:offset].tofile(file)
        write_weight(file, weight)
        start = offset + weight.size
    content[start:].tofile(file)


def _take_out(
    program: Program,
    segments: list[NDArray[np.uint8]],
    among_constants: dict[int, LateWeight],
    named: dict[int, LateWeight],
) -> dict[str, Named]:
    """Take all constants out of a program and its segments, and have it ask for them by name.

    What is no weight is called by its content, as XNNPACK does it: a program that another file is given to
    finds that names are missing.
    """
    taken: dict[str, Named] = {}
    parts = constant_parts(program, segments)
    for tensor in _constant_tensors(program):
        place = program.constant_segment.offsets[tensor.data_buffer_idx]
        layout = TensorLayout(tensor.scalar_type, tensor.sizes, tensor.dim_order)
        size = math.prod(tensor.sizes) * get_scalar_type(tensor.scalar_type).itemsize
        if weight := among_constants.get(place):
            name, entry = weight.key, Named(content=weight, layout=layout)
        else:
            content = parts[place][:size]
            name, entry = _content_name(content, layout), Named(content=content, layout=layout)
        held = taken.setdefault(name, entry)
        assert held.layout == layout and held.size == size, f"kernels read {name} in two ways"
        info = tensor.extra_tensor_info or ExtraTensorInfo()
        info.fully_qualified_name, info.location = name, TensorDataLocation.EXTERNAL
        tensor.extra_tensor_info, tensor.data_buffer_idx = info, 0
    places = {data.key: data.segment_index for data in program.named_data or []}
    for key, place in places.items():
        taken.setdefault(key, Named(content=named.get(place, segments[place])))
    first = min(places.values(), default=len(segments))
    assert first + len(set(places.values())) == len(segments), "named data come last"
    del segments[first:]
    segments[program.constant_segment.segment_index] = np.empty(0, np.uint8)
    # Of tensors without content.
    program.constant_segment = SubsegmentOffsets(program.constant_segment.segment_index, [0])
    program.named_data = []
    return taken


def _constant_tensors(program: Program) -> Iterator[Tensor]:
    for plan in program.execution_plan:
        for value in plan.values:
            if isinstance(value.val, Tensor) and value.val.data_buffer_idx and not value.val.allocation_info:
                yield value.val


def _content_name(content: NDArray[np.uint8], layout: TensorLayout) -> str:
    return hashlib.sha256(repr(layout).encode() + content.tobytes()).hexdigest()


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
