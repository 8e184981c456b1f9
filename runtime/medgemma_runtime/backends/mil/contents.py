"""What a program is made of: its operators by kind, and how each weight is stored."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

import numpy as np

from medgemma_runtime.backends.mil.constants import Constant, Decompressed, Stored
from medgemma_runtime.backends.mil.function import Function
from medgemma_runtime.backends.mil.spec import BITS, NUMPY_DTYPES, TensorType

__all__ = ["Weight", "Contents", "contents"]

_FLOATS = {"fp16": "float16", "fp32": "float32"}


@dataclass(frozen=True, kw_only=True)
class Weight:
    """A constant that lies in a weight file.

    Attributes:
        name: As the program has it.
        storage: Such as `float16`, `int4 block 32`, `int8 per channel`, `lut4 group 16`.
        shape: Of what the program computes with.
        size_bytes: In the file, scales or tables included.
        is_float: Whether it is stored uncompressed, as floats.
    """

    name: str
    storage: str
    shape: tuple[int, ...]
    size_bytes: int
    is_float: bool


@dataclass(frozen=True, kw_only=True)
class Contents:
    """What a function is made of.

    Attributes:
        operators: How many operations of each kind run.
        weights: Those it uses, in the order of the program; functions may share them.
    """

    operators: Mapping[str, int]
    weights: tuple[Weight, ...]


def contents(function: Function) -> Contents:
    """Take stock of a function, without reading a weight."""
    parts = {
        part.name
        for constant in function.constants.values()
        if isinstance(constant, Decompressed)
        for part in constant.inputs.values()
        if isinstance(part, Stored)
    }
    found = {
        name: constant
        for name, constant in function.constants.items()
        if isinstance(constant, Stored | Decompressed) and constant.is_weight and name not in parts
    }
    return Contents(
        operators=dict(Counter(step.operation.type for step in function.steps).most_common()),
        weights=tuple(_weight(name, constant) for name, constant in found.items()),
    )


def _weight(name: str, constant: Stored | Decompressed) -> Weight:
    storage = _storage(constant)
    return Weight(
        name=name,
        storage=storage,
        shape=_sizes(constant.type),
        size_bytes=_size_bytes(constant),
        is_float=storage in _FLOATS.values(),
    )


def _storage(constant: Stored | Decompressed) -> str:
    if isinstance(constant, Stored):
        return _FLOATS.get(constant.type.dtype, constant.type.dtype)
    inputs = {name: part.type for name, part in constant.inputs.items()}
    shape = _sizes(constant.type)
    if "lut" in inputs:
        rows = shape[0] // _sizes(inputs["lut"])[0]
        return f"lut{BITS.get(inputs['indices'].dtype, 8)} group {rows}"
    block = shape[1] // _sizes(inputs["scale"])[1]
    return f"{inputs['data'].dtype} " + ("per channel" if block == shape[1] else f"block {block}")


def _size_bytes(constant: Constant) -> int:
    if isinstance(constant, Decompressed):
        return sum(_size_bytes(part) for part in constant.inputs.values())
    kind = constant.type
    bits = BITS.get(kind.dtype) or 8 * np.dtype(NUMPY_DTYPES[kind.dtype]).itemsize
    return -(-prod(_sizes(kind)) * bits // 8)


def _sizes(kind: TensorType) -> tuple[int, ...]:
    return tuple(size or 0 for size in kind.shape)
