"""The number formats a program can be evaluated in.

Every floating tensor is held as float32. Where a program says fp16, an arithmetic decides what of that is
honoured:

* `fp32`: nothing. What differs from the original model is then the graph's or the weights' fault.
* `fp16`: the result of every operator is rounded to fp16; inside an operator sums stay in float32, as in the
  wide accumulators of the devices. This shows what range and precision the format itself costs.
* `fp16_accumulate`: also every sum inside an operator is kept in fp16, as a GPU may when it is allowed low
  precision accumulation. Worse than any device is known to be.

Tensors that a program says are fp32 are computed in float32 in all three.
"""

from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

__all__ = ["Mode", "Arithmetic", "arithmetic_of", "to_fp16", "FP16_LIMIT"]

Mode = Literal["fp32", "fp16", "fp16_accumulate"]

FP16_LIMIT = 65520.0
"""The smallest magnitude that rounds to infinity in fp16: halfway from 65504 to the next power of two."""

# Terms that are added at once before the sum is rounded: the 8 x 8 tiles of a Metal GPU's matrix units
# (simdgroup_matrix). One term at a time would let a sum of 4,096 equal terms stop growing at 2,048.
_LANES = 8


class Arithmetic(Protocol):
    """How an operator computes inside; its result is rounded by the evaluator."""

    def inner(self, x: NDArray[Any]) -> NDArray[Any]:
        """A value between two steps of one operator."""
        ...

    def matmul(self, x: NDArray[Any], y: NDArray[Any]) -> NDArray[Any]:
        """Matrix product, [..., M, K] by [..., K, N]."""
        ...

    def sum(self, x: NDArray[Any], axes: tuple[int, ...]) -> NDArray[Any]:
        """Sum over axes, which stay with size 1."""
        ...


class _Wide:
    """float32 throughout."""

    def inner(self, x: NDArray[Any]) -> NDArray[Any]:
        return x

    def matmul(self, x: NDArray[Any], y: NDArray[Any]) -> NDArray[Any]:
        return np.asarray(np.matmul(x, y))

    def sum(self, x: NDArray[Any], axes: tuple[int, ...]) -> NDArray[Any]:
        return np.asarray(np.sum(x, axis=axes, keepdims=True, dtype=x.dtype))


class _Narrow:
    """fp16 for all that is added up."""

    def inner(self, x: NDArray[Any]) -> NDArray[Any]:
        return to_fp16(x)

    def matmul(self, x: NDArray[Any], y: NDArray[Any]) -> NDArray[Any]:
        total = to_fp16(np.matmul(x[..., :_LANES], y[..., :_LANES, :]))
        for start in range(_LANES, x.shape[-1], _LANES):
            lanes = slice(start, start + _LANES)
            total = to_fp16(total + to_fp16(np.matmul(x[..., lanes], y[..., lanes, :])))
        return total

    def sum(self, x: NDArray[Any], axes: tuple[int, ...]) -> NDArray[Any]:
        kept = [axis for axis in range(x.ndim) if axis not in axes]
        terms = x.transpose(*kept, *axes).reshape([x.shape[axis] for axis in kept] + [-1])
        total = np.zeros(terms.shape[:-1], np.float32)
        for start in range(0, terms.shape[-1], _LANES):
            total = to_fp16(total + to_fp16(terms[..., start : start + _LANES].sum(-1)))
        return np.expand_dims(total, axes)


_WIDE, _NARROW = _Wide(), _Narrow()


def arithmetic_of(mode: Mode, dtype: str) -> Arithmetic:
    """The arithmetic of an operator whose result the program says is of a type."""
    return _NARROW if mode == "fp16_accumulate" and dtype == "fp16" else _WIDE


def to_fp16(x: NDArray[Any]) -> NDArray[Any]:
    """The nearest fp16 values, ties to even, held as float32; too large ones become infinite."""
    return np.asarray(x).astype(np.float16).astype(np.float32)
