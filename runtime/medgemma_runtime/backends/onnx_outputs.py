"""Makes values inside an ONNX program its outputs, in memory and without a package that knows ONNX.

A protobuf parser merges a message that is given twice, so outputs are added by writing a second `graph` that
has nothing else behind the file's bytes.

Sources: https://protobuf.dev/programming-guides/encoding/#last-one-wins; field numbers from onnx.proto of
ONNX 1.23: `ModelProto.graph` 7, `GraphProto.output` 12, `ValueInfoProto.name` 1.
"""

from collections.abc import Sequence

__all__ = ["with_outputs"]

_GRAPH, _OUTPUT, _NAME = 7, 12, 1
_LENGTH_DELIMITED = 2


def with_outputs(program: bytes, names: Sequence[str]) -> bytes:
    """The same program with further outputs; whoever loads it finds their types.

    Args:
        program: A serialized `ModelProto`.
        names: Of values of its graph.
    """
    outputs = b"".join(_field(_OUTPUT, _field(_NAME, name.encode())) for name in names)
    return program + _field(_GRAPH, outputs)


def _field(number: int, content: bytes) -> bytes:
    return _varint(number << 3 | _LENGTH_DELIMITED) + _varint(len(content)) + content


def _varint(integer: int) -> bytes:
    groups = []
    while integer > 0x7F:
        groups.append(integer & 0x7F | 0x80)
        integer >>= 7
    return bytes([*groups, integer])
