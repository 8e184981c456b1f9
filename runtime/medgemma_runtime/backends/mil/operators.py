"""The operators of ML Programs, as numpy computes them.

Semantics and defaults are those of coremltools 9.0's operator set for iOS 18 (`ops/defs/iOS15` to `iOS18`,
the newest definition of each). `MOVES` only rearranges or picks elements, so its results need no rounding;
`COMPUTES` makes new ones. Products, norms and attention are in `products.py`.
"""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medgemma_runtime.backends.mil import products
from medgemma_runtime.backends.mil.arguments import Arguments
from medgemma_runtime.backends.mil.arithmetic import Arithmetic
from medgemma_runtime.errors import EdgeError

__all__ = ["MOVES", "COMPUTES", "Move", "Compute", "Result", "slice_update"]

Result = NDArray[Any] | tuple[NDArray[Any], ...]
"""One tensor, or the several of an operator that gives several."""

Move = Callable[[Arguments], Result]
Compute = Callable[[Arguments, Arithmetic], Result]


def _reshape(arguments: Arguments) -> NDArray[Any]:
    x, shape = arguments.array("x"), list(arguments.integers("shape"))
    # A 0 takes the size of x at the same place, counted from the right.
    for place in range(1, len(shape) + 1):
        if shape[-place] == 0:
            shape[-place] = x.shape[-place] if place <= x.ndim else 1
    return x.reshape(shape)


def _slice_by_index(arguments: Arguments) -> NDArray[Any]:
    x = arguments.array("x")
    places, squeezed = _slices(arguments, x.shape)
    return np.squeeze(x[places], squeezed)


def slice_update(arguments: Arguments, *, in_place: bool = False) -> NDArray[Any]:
    """`x` with some elements replaced; in place where nothing else needs `x` as it is."""
    x, update = arguments.array("x"), arguments.array("update")
    places, squeezed = _slices(arguments, x.shape)
    updated = x if in_place else x.copy()
    target = updated[places]
    if np.squeeze(target, squeezed).shape != update.shape:
        raise EdgeError(f"an update of shape {list(update.shape)} for a slice of {list(target.shape)}")
    target[...] = np.expand_dims(update, squeezed)
    return updated


def _slices(arguments: Arguments, shape: tuple[int, ...]) -> tuple[tuple[slice, ...], tuple[int, ...]]:
    """Where a slice lies, and the axes that it drops."""
    rank = len(shape)
    begin, end = arguments.integers("begin"), arguments.integers("end")
    stride = arguments.integers("stride", (1,) * rank)
    from_start, to_end = arguments.flags("begin_mask", rank), arguments.flags("end_mask", rank)
    single = arguments.flags("squeeze_mask", rank)
    places = []
    for axis, size in enumerate(shape):
        if single[axis]:
            index = 0 if from_start[axis] else begin[axis] + (size if begin[axis] < 0 else 0)
            places.append(slice(index, index + 1))
        else:
            places.append(
                slice(
                    None if from_start[axis] else begin[axis],
                    None if to_end[axis] else end[axis],
                    stride[axis],
                )
            )
    return tuple(places), tuple(axis for axis in range(rank) if single[axis])


def _slice_by_size(arguments: Arguments) -> NDArray[Any]:
    x = arguments.array("x")
    begin, size = arguments.integers("begin"), arguments.integers("size")
    return x[
        tuple(
            slice(start, None if count == -1 else start + count)
            for start, count in zip(begin, size, strict=True)
        )
    ]


def _concat(arguments: Arguments) -> NDArray[Any]:
    values, axis = arguments.arrays("values"), arguments.integer("axis")
    if not arguments.flag("interleave"):
        return np.concatenate(values, axis)
    axis %= values[0].ndim
    shape = list(values[0].shape)
    shape[axis] *= len(values)
    return np.stack(values, axis + 1).reshape(shape)


def _split(arguments: Arguments) -> tuple[NDArray[Any], ...]:
    x, axis = arguments.array("x"), arguments.integer("axis")
    sizes = arguments.integers("split_sizes", ())
    count = arguments.integer("num_splits", len(sizes))
    if not sizes:
        return tuple(np.split(x, count, axis))
    if sum(sizes) != x.shape[axis] or len(sizes) != count:
        raise EdgeError(f"split_sizes {list(sizes)} of an axis of {x.shape[axis]}")
    return tuple(np.split(x, np.cumsum(sizes)[:-1], axis))


def _gather(arguments: Arguments) -> NDArray[Any]:
    x, indices = arguments.array("x"), arguments.array("indices")
    axis = arguments.integer("axis", 0)
    arguments.flag("validate_indices")  # they are always validated here
    if arguments.integer("batch_dims", 0):
        raise EdgeError("batch_dims other than 0 is not evaluated")
    if indices.size and not (indices.min() >= 0 and indices.max() < x.shape[axis]):
        raise EdgeError(
            f"indices from {indices.min()} to {indices.max()} into an axis of {x.shape[axis]}; "
            "what a device reads there is undefined"
        )
    return np.take(x, indices, axis)


def _squeeze(arguments: Arguments) -> NDArray[Any]:
    x = arguments.array("x")
    axes = arguments.optional("axes")
    return np.squeeze(x, None if axes is None else tuple(int(axis) for axis in axes.reshape(-1)))


def _select(arguments: Arguments) -> NDArray[Any]:
    return np.where(arguments.array("cond"), arguments.array("a"), arguments.array("b"))


MOVES: dict[str, Move] = {
    "identity": lambda arguments: arguments.array("x"),
    "reshape": _reshape,
    "transpose": lambda arguments: arguments.array("x").transpose(arguments.integers("perm")),
    "expand_dims": lambda arguments: np.expand_dims(arguments.array("x"), arguments.integers("axes")),
    "squeeze": _squeeze,
    "slice_by_index": _slice_by_index,
    "slice_by_size": _slice_by_size,
    "slice_update": slice_update,
    "concat": _concat,
    "split": _split,
    "stack": lambda arguments: np.stack(arguments.arrays("values"), arguments.integer("axis")),
    "gather": _gather,
    "tile": lambda arguments: np.tile(arguments.array("x"), arguments.integers("reps")),
    "select": _select,
}
"""Operators that compute nothing new."""


def _unary(function: Callable[[NDArray[Any]], NDArray[Any]]) -> Compute:
    return lambda arguments, _: function(arguments.array("x"))


def _binary(function: Callable[[NDArray[Any], NDArray[Any]], NDArray[Any]]) -> Compute:
    return lambda arguments, _: function(arguments.array("x"), arguments.array("y"))


def _gelu(arguments: Arguments, _: Arithmetic) -> NDArray[Any]:
    x, mode = arguments.array("x"), arguments.text("mode", "EXACT")
    if mode == "TANH_APPROXIMATION":
        slope = np.float32(math.sqrt(2 / math.pi))
        return np.asarray(x * (np.tanh(slope * (x + np.float32(0.044715) * x * x * x)) + 1) / 2)
    if mode == "SIGMOID_APPROXIMATION":
        return np.asarray(x * _sigmoid(np.float32(1.702) * x))
    if mode == "EXACT":
        erf = np.vectorize(math.erf, otypes=[np.float32])  # numpy has none
        return np.asarray(x * (erf(x / np.float32(math.sqrt(2))) + 1) / 2)
    raise EdgeError(f"mode {mode!r} is not evaluated")


def _sigmoid(x: NDArray[Any]) -> NDArray[Any]:
    return np.asarray((np.tanh(x / 2) + 1) / 2)  # no overflow on either side


def _clip(arguments: Arguments, _: Arithmetic) -> NDArray[Any]:
    low, high = arguments.number("alpha", -math.inf), arguments.number("beta", math.inf)
    return np.asarray(np.clip(arguments.array("x"), low, high))


_CASTS = {
    "fp16": np.float32,
    "fp32": np.float32,
    "bool": np.bool_,
    "int8": np.int8,
    "int16": np.int16,
    "int32": np.int32,
    "uint8": np.uint8,
    "uint16": np.uint16,
}


def _cast(arguments: Arguments, _: Arithmetic) -> NDArray[Any]:
    x, dtype = arguments.array("x"), arguments.text("dtype")
    if dtype not in _CASTS:
        raise EdgeError(f"a cast to {dtype!r} is not evaluated")
    target = np.dtype(_CASTS[dtype])
    if target.kind in "iu":
        return _to_integers(x, target)
    return x.astype(target)


def _to_integers(x: NDArray[Any], target: np.dtype[Any]) -> NDArray[Any]:
    """Truncated towards zero, and held against the range that the type has."""
    truncated = np.trunc(x).astype(np.float64)
    limits = np.iinfo(target)
    if x.size and not (truncated.min() >= limits.min and truncated.max() <= limits.max):
        raise EdgeError(f"values from {x.min()} to {x.max()} do not fit {target}")
    return np.asarray(truncated.astype(target))


def _reduce(
    function: Callable[[NDArray[Any], tuple[int, ...], Arithmetic], NDArray[Any]],
) -> Compute:
    """A reduction over `axes`, all of them where left out; `function` keeps them with size 1."""

    def reduce(arguments: Arguments, arithmetic: Arithmetic) -> NDArray[Any]:
        x = arguments.array("x")
        axes = tuple(axis % x.ndim for axis in arguments.integers("axes", range(x.ndim)))
        reduced = function(x, axes, arithmetic)
        return reduced if arguments.flag("keep_dims") else np.squeeze(reduced, axes)

    return reduce


def _mean(x: NDArray[Any], axes: tuple[int, ...], arithmetic: Arithmetic) -> NDArray[Any]:
    count = np.float32(math.prod(x.shape[axis] for axis in axes))
    return np.asarray(arithmetic.sum(x, axes) / count)


def _sum_of_squares(x: NDArray[Any], axes: tuple[int, ...], arithmetic: Arithmetic) -> NDArray[Any]:
    return arithmetic.sum(arithmetic.inner(x * x), axes)


def _argmax(arguments: Arguments, _: Arithmetic) -> NDArray[Any]:
    found = np.argmax(
        arguments.array("x"), arguments.integer("axis", -1), keepdims=arguments.flag("keep_dims")
    )
    return _to_integers(np.asarray(found), np.dtype(arguments.text("output_dtype", "int32")))


COMPUTES: dict[str, Compute] = {
    "abs": _unary(np.abs),
    "cos": _unary(np.cos),
    "exp": _unary(np.exp),
    "logical_not": _unary(np.logical_not),
    "relu": _unary(lambda x: np.maximum(x, 0)),
    "sigmoid": _unary(_sigmoid),
    "silu": _unary(lambda x: x * _sigmoid(x)),
    "sin": _unary(np.sin),
    "sqrt": _unary(np.sqrt),
    "square": _unary(np.square),
    "tanh": _unary(np.tanh),
    "add": _binary(np.add),
    "sub": _binary(np.subtract),
    "mul": _binary(np.multiply),
    "real_div": _binary(np.divide),
    "pow": _binary(np.power),
    "maximum": _binary(np.maximum),
    "minimum": _binary(np.minimum),
    "equal": _binary(np.equal),
    "not_equal": _binary(np.not_equal),
    "less": _binary(np.less),
    "less_equal": _binary(np.less_equal),
    "greater": _binary(np.greater),
    "greater_equal": _binary(np.greater_equal),
    "logical_and": _binary(np.logical_and),
    "logical_or": _binary(np.logical_or),
    # epsilon is added to x itself.
    "inverse": lambda arguments, _: 1 / (arguments.array("x") + arguments.number("epsilon", 1e-4)),
    "rsqrt": lambda arguments, _: 1 / np.sqrt(arguments.array("x") + arguments.number("epsilon", 1e-12)),
    "gelu": _gelu,
    "clip": _clip,
    "cast": _cast,
    "reduce_sum": _reduce(lambda x, axes, arithmetic: arithmetic.sum(x, axes)),
    "reduce_mean": _reduce(_mean),
    "reduce_max": _reduce(lambda x, axes, _: x.max(axes, keepdims=True)),
    "reduce_min": _reduce(lambda x, axes, _: x.min(axes, keepdims=True)),
    "reduce_sum_square": _reduce(_sum_of_squares),
    "reduce_l2_norm": _reduce(lambda *given: np.sqrt(_sum_of_squares(*given))),
    "reduce_argmax": _argmax,
    "softmax": products.softmax,
    "layer_norm": products.layer_norm,
    "linear": products.linear,
    "matmul": products.matmul,
    "conv": products.conv,
    "avg_pool": products.avg_pool,
    "scaled_dot_product_attention": products.attention,
}
"""Operators whose results are new values."""
