"""The messages of a Core ML model that hold an ML Program, as plain dataclasses.

Field numbers are those of `MIL.proto`, `Model.proto` and `FeatureTypes.proto` of coremltools 9.0
(https://github.com/apple/coremltools/tree/9.0/mlmodel/format). What no evaluation needs is skipped.
"""

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import Any, Literal, TypeVar

import numpy as np
from numpy.typing import NDArray

from medgemma_runtime.backends.mil.wire import (
    Field,
    WireError,
    fields,
    floats,
    integers,
    message,
    signed,
    text,
)
from medgemma_runtime.errors import ArtifactError

__all__ = [
    "ModelSpec",
    "FunctionSpec",
    "Operation",
    "NamedType",
    "TensorType",
    "Value",
    "BlobReference",
    "Feature",
    "DTYPES",
    "NUMPY_DTYPES",
    "BITS",
    "read_model",
    "unpack_bits",
]

DTYPES = {
    1: "bool",
    2: "string",
    10: "fp16",
    11: "fp32",
    12: "fp64",
    21: "int8",
    22: "int16",
    23: "int32",
    24: "int64",
    25: "int4",
    31: "uint8",
    32: "uint16",
    33: "uint32",
    34: "uint64",
    35: "uint4",
    36: "uint2",
    37: "uint1",
    38: "uint6",
    39: "uint3",
}
"""Names of the element types, by their number in `MIL.proto`."""

BITS = {"int4": 4, "uint1": 1, "uint2": 2, "uint3": 3, "uint4": 4, "uint6": 6}
"""Widths of the types that are packed several to a byte."""

NUMPY_DTYPES = {"bool": "bool", "fp16": "float16", "fp32": "float32", "fp64": "float64"} | {
    name: name for name in ("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64")
}
"""numpy's names of the types that it has."""

_T = TypeVar("_T")

_COLORS = {10: "grayscale", 20: "rgb", 30: "bgr"}


@dataclass(frozen=True, kw_only=True)
class TensorType:
    """Element type, one of `DTYPES`, and sizes; None where a size is free."""

    dtype: str
    shape: tuple[int | None, ...]

    def __str__(self) -> str:
        return f"{self.dtype} [{', '.join('?' if size is None else str(size) for size in self.shape)}]"


@dataclass(frozen=True, kw_only=True)
class NamedType:
    """A value by its name; `is_state` where it is a state that the function reads and writes."""

    name: str
    type: TensorType
    is_state: bool = False


@dataclass(frozen=True, kw_only=True)
class BlobReference:
    """Where a constant lies: its metadata's offset in a file of the package."""

    file: str
    offset: int


@dataclass(frozen=True, kw_only=True)
class Value:
    """A constant: its elements, or where they are."""

    type: TensorType
    content: NDArray[Any] | BlobReference


@dataclass(frozen=True, kw_only=True)
class Operation:
    """One operation of a function.

    Attributes:
        type: The operator, such as `linear`.
        inputs: By parameter, the names or constants bound to it; several where it takes a tuple.
        outputs: What it computes.
        value: What a `const` holds.
    """

    type: str
    inputs: dict[str, tuple[str | Value, ...]]
    outputs: tuple[NamedType, ...]
    value: Value | None

    @property
    def name(self) -> str:
        """The name of its first output, or of its operator where it has none."""
        return self.outputs[0].name if self.outputs else self.type


@dataclass(frozen=True, kw_only=True)
class FunctionSpec:
    """A function as written: operations in the order they run."""

    name: str
    opset: str
    inputs: tuple[NamedType, ...]
    operations: tuple[Operation, ...]
    outputs: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Feature:
    """An input, output or state as the model describes it to an app.

    Attributes:
        name: As the function has it.
        description: What it is, for people.
        kind: What an app passes; `other` is nothing that ML Programs of tensors take.
        color: `rgb`, `bgr` or `grayscale` for an image.
        size: Rows and columns of an image.
    """

    name: str
    description: str
    kind: Literal["array", "image", "state", "other"]
    color: str | None
    size: tuple[int, int] | None


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """A whole model.

    Attributes:
        functions: By name.
        features: What is described, by function: inputs and states, then outputs.
        default_function: The one that runs unless an app names another.
        metadata: What the model says of itself: `author`, `license`, `version`, `description`, and all that
            its maker added under keys of their own.
    """

    functions: dict[str, FunctionSpec]
    features: dict[str, tuple[tuple[Feature, ...], tuple[Feature, ...]]]
    default_function: str
    metadata: dict[str, str]


def read_model(data: memoryview) -> ModelSpec:
    """Read `model.mlmodel`.

    Raises:
        ArtifactError: If the bytes are no Core ML model, or it is no ML Program.
    """
    try:
        content = _group(data)
        programs, descriptions = content[502], content[2]
        if not programs or not descriptions:
            raise ArtifactError(
                "the model holds no ML Program; convert it for iOS 18 or later, where coremltools writes one"
            )
        functions = _map(_group(message(programs[-1]))[2], _function)
        return _model(functions, message(descriptions[-1]))
    except (ValueError, KeyError, IndexError) as error:
        raise ArtifactError(f"the model is damaged ({error}); export it again") from None


def unpack_bits(data: NDArray[np.uint8], dtype: str, count: int) -> NDArray[Any]:
    """Integers that are packed several to a byte, lowest bits first, each in a byte of its own.

    Args:
        data: The bytes.
        dtype: A name of `BITS`; `int4` is two's complement.
        count: Integers to read.
    """
    bits = BITS[dtype]
    if 8 % bits == 0:
        # All that one byte can hold, as one wide element, so that a single lookup unpacks it.
        every_byte: NDArray[Any] = _parts(np.arange(256, dtype=np.uint8), bits)
        if dtype == "int4":
            every_byte = (every_byte ^ 8).view(np.int8) - np.int8(8)
        wide = every_byte.view(f"u{8 // bits}")[:, 0]
        return np.take(wide, data).view(every_byte.dtype)[:count]
    padded = np.zeros(-(-len(data) // 3) * 3, np.uint8)  # three bytes hold a whole number of any width
    padded[: len(data)] = data
    triples = padded.reshape(-1, 3).astype(np.uint32)
    return _parts(triples[:, 0] | triples[:, 1] << 8 | triples[:, 2] << 16, bits).reshape(-1)[:count]


def _parts(words: NDArray[Any], bits: int) -> NDArray[np.uint8]:
    """[n] words of 8 or 24 used bits as [n, used / bits] integers."""
    shifts = np.arange(0, 8 if words.dtype == np.uint8 else 24, bits, dtype=words.dtype)
    return np.asarray(((words[:, None] >> shifts) & words.dtype.type((1 << bits) - 1)).astype(np.uint8))


def _model(functions: dict[str, FunctionSpec], description: memoryview) -> ModelSpec:
    content = _group(description)
    if content[20]:
        features = {}
        for item in content[20]:
            function = _group(message(item))
            features[_text(function[1])] = _features(function[2] + function[6], function[3])
        default = _text(content[21])
    else:
        default = "main"
        features = {default: _features(content[1] + content[13], content[10])}
    metadata = _group(message(content[100][-1])) if content[100] else defaultdict(list)
    said = {"description": 1, "version": 2, "author": 3, "license": 4}
    return ModelSpec(
        functions=functions,
        features=features,
        default_function=default,
        metadata={key: _text(metadata[number]) for key, number in said.items() if metadata[number]}
        | _map(metadata[100], lambda _, value: text(value)),
    )


def _features(taken: list[Field], given: list[Field]) -> tuple[tuple[Feature, ...], tuple[Feature, ...]]:
    return tuple(map(_feature, taken)), tuple(map(_feature, given))


def _feature(field: Field) -> Feature:
    content = _group(message(field))
    kinds = _group(message(content[3][-1]))
    kind: Literal["array", "image", "state", "other"] = "other"
    color = size = None
    if kinds[5]:
        kind = "array"
    elif kinds[8]:
        kind = "state"
    elif kinds[4]:
        image = _group(message(kinds[4][-1]))
        kind = "image"
        color = _COLORS.get(_integer(image[3]))
        size = (_integer(image[2]), _integer(image[1]))
    return Feature(name=_text(content[1]), description=_text(content[2]), kind=kind, color=color, size=size)


def _function(name: str, field: Field) -> FunctionSpec:
    content = _group(message(field))
    opset = _text(content[2])
    blocks = _map(content[3], lambda _, block: _group(message(block)))
    if opset not in blocks:
        raise ValueError(f"function {name!r} has no block for its opset {opset!r}")
    block = blocks[opset]
    return FunctionSpec(
        name=name,
        opset=opset,
        inputs=tuple(map(_named_type, content[1])),
        operations=tuple(map(_operation, block[3])),
        outputs=tuple(map(text, block[2])),
    )


def _operation(field: Field) -> Operation:
    content = _group(message(field))
    values = [value for key, value in _entries(content[5]) if key == "val"]
    return Operation(
        type=_text(content[1]),
        inputs=_map(content[2], lambda _, argument: tuple(map(_binding, _group(message(argument))[1]))),
        outputs=tuple(map(_named_type, content[3])),
        value=_value(values[-1]) if values else None,
    )


def _binding(field: Field) -> str | Value:
    content = _group(message(field))
    return _value(content[2][-1]) if content[2] else _text(content[1])


def _named_type(field: Field) -> NamedType:
    content = _group(message(field))
    kinds = _group(message(content[2][-1]))
    if kinds[5]:
        wrapped = _group(message(kinds[5][-1]))[1][-1]
        return NamedType(name=_text(content[1]), type=_tensor_type(wrapped), is_state=True)
    return NamedType(name=_text(content[1]), type=_tensor_type(content[2][-1]))


def _tensor_type(field: Field) -> TensorType:
    kinds = _group(message(field))
    if not kinds[1]:
        raise ValueError("a list, tuple or dictionary where a tensor is due")
    content = _group(message(kinds[1][-1]))
    number = _integer(content[1])
    if number not in DTYPES:
        raise ValueError(f"element type {number}")
    dimensions = [_group(message(dimension)) for dimension in content[3]]
    if len(dimensions) != _integer(content[2]):
        raise ValueError(f"{len(dimensions)} sizes and rank {_integer(content[2])}")
    return TensorType(
        dtype=DTYPES[number],
        shape=tuple(
            _integer(_group(message(dimension[1][-1]))[1]) if dimension[1] else None
            for dimension in dimensions
        ),
    )


def _value(field: Field) -> Value:
    content = _group(message(field))
    kind = _tensor_type(content[2][-1])
    if content[5]:
        blob = _group(message(content[5][-1]))
        return Value(type=kind, content=BlobReference(file=_text(blob[1]), offset=_integer(blob[2])))
    immediate = _group(message(content[3][-1]))
    return Value(type=kind, content=_elements(kind, _group(message(immediate[1][-1]))))


def _elements(kind: TensorType, content: dict[int, list[Field]]) -> NDArray[Any]:
    """A `TensorValue`: which of its lists is used depends on the element type."""
    held = {number: _group(message(items[-1]))[1] for number, items in content.items() if items}
    count = prod(size or 0 for size in kind.shape)
    elements: NDArray[Any]
    if 7 in held:  # bytes
        data = np.frombuffer(b"".join(message(item) for item in held[7]), np.uint8)
        if kind.dtype in BITS:
            elements = unpack_bits(data, kind.dtype, count)
        else:
            elements = data.view(np.dtype(NUMPY_DTYPES[kind.dtype]).newbyteorder("<"))
    elif 4 in held:  # strings
        elements = np.array([text(item) for item in held[4]])
    elif 1 in held:  # floats
        elements = floats(held[1], 4).astype(NUMPY_DTYPES[kind.dtype])
    elif 6 in held:  # doubles
        elements = floats(held[6], 8).astype(NUMPY_DTYPES[kind.dtype])
    else:  # ints, bools or long ints
        numbers = [number for field in (2, 3, 5) for number in integers(held.get(field, []))]
        elements = np.array(numbers, np.int64).astype(NUMPY_DTYPES[kind.dtype])
    if elements.size != count:
        raise ValueError(f"{elements.size} elements of {kind}")
    return elements.reshape([size or 0 for size in kind.shape])


def _group(data: memoryview) -> defaultdict[int, list[Field]]:
    """The contents of a message by field number."""
    grouped: defaultdict[int, list[Field]] = defaultdict(list)
    for number, content in fields(data):
        grouped[number].append(content)
    return grouped


def _entries(items: list[Field]) -> list[tuple[str, Field]]:
    """The entries of a map field."""
    entries = [_group(message(item)) for item in items]
    return [(_text(entry[1]), entry[2][-1] if entry[2] else memoryview(b"")) for entry in entries]


def _map(items: list[Field], read: Callable[[str, Field], _T]) -> dict[str, _T]:
    """A map field, its values read; the last of equal keys holds, as in every protobuf reader."""
    return {key: read(key, value) for key, value in _entries(items)}


def _text(content: list[Field]) -> str:
    """A string field; empty where it was left out."""
    return text(content[-1]) if content else ""


def _integer(content: list[Field]) -> int:
    """An integer field; 0 where it was left out."""
    if not content:
        return 0
    if not isinstance(content[-1], int):
        raise WireError("bytes where an integer is due")
    return signed(content[-1])
