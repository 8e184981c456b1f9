"""Protocol Buffers' wire format: the fields of a message, without a schema compiler.

A Core ML program is some twenty small messages of one stable schema. Reading them takes this page, so that
the runtime needs neither the protobuf package nor coremltools and its generated classes.

Source of the format: https://protobuf.dev/programming-guides/encoding/
"""

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

__all__ = ["Field", "WireError", "fields", "integers", "floats", "text", "signed", "message"]

Field = int | memoryview
"""What one field holds: an integer (varint), or bytes (fixed width or length-delimited)."""


class WireError(ValueError):
    """Bytes that are not what the format or the schema says."""


_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_MAX_VARINT_BYTES = 10


def fields(message: memoryview) -> Iterator[tuple[int, Field]]:
    """The fields of a message, in the order they were written.

    Args:
        message: The whole message as bytes.

    Yields:
        Field number and content.

    Raises:
        WireError: If the bytes are no message.
    """
    position = 0
    while position < len(message):
        tag, position = _varint(message, position)
        number, kind = tag >> 3, tag & 7
        if number == 0:
            raise WireError("field 0")
        if kind == _VARINT:
            integer, position = _varint(message, position)
            yield number, integer
            continue
        if kind == _BYTES:
            length, position = _varint(message, position)
        elif kind == _FIXED32:
            length = 4
        elif kind == _FIXED64:
            length = 8
        else:
            raise WireError(f"wire type {kind}")
        if length > len(message) - position:
            raise WireError(f"field {number} of {length} bytes")
        yield number, message[position : position + length]
        position += length


def message(field: Field) -> memoryview:
    """A field as a message in itself, or as bytes."""
    if isinstance(field, int):
        raise WireError("an integer where a message is due")
    return field


def text(field: Field) -> str:
    """A field as a string."""
    return bytes(message(field)).decode("utf-8")


def integers(content: list[Field]) -> list[int]:
    """All integers of a repeated field, packed or not, as two's complement of 64 bits."""
    found: list[int] = []
    for field in content:
        if isinstance(field, int):
            found.append(signed(field))
            continue
        position = 0
        while position < len(field):
            integer, position = _varint(field, position)
            found.append(signed(integer))
    return found


def floats(content: list[Field], width: int) -> NDArray[np.float64]:
    """All numbers of a repeated `float` (width 4) or `double` (width 8) field, packed or not."""
    data = b"".join(message(field) for field in content)
    if len(data) % width:
        raise WireError(f"{len(data)} bytes of numbers of {width}")
    return np.frombuffer(data, f"<f{width}").astype(np.float64)


def signed(integer: int) -> int:
    """The 64 bits of a varint as a signed integer."""
    return integer - (1 << 64) if integer >> 63 else integer


def _varint(data: memoryview, position: int) -> tuple[int, int]:
    """The integer that starts at a position, and the position after it."""
    if position < len(data) and data[position] < 0x80:  # nearly all are so short
        return data[position], position + 1
    integer = shift = 0
    for place in range(position, min(position + _MAX_VARINT_BYTES, len(data))):
        byte = data[place]
        integer |= (byte & 0x7F) << shift
        if byte < 0x80:
            if integer >> 64:
                break
            return integer, place + 1
        shift += 7
    raise WireError("an integer that does not end")
