"""GPTQ: each input's rounding error is made up for by the inputs that are not rounded yet.

Frantar et al. 2023 (arXiv 2210.17323). Three things are different here. Scales are chosen block by block,
from the weights as the errors so far have left them, among representable ones and by the error that cannot be
made up for. Blocks with large inputs go first, and within a block the largest inputs, which changes no stored
format. And the weights are first moved to where the layer gives what it gave before the layers in front of it
were rounded, as far as its changed inputs can (asymmetric calibration, Li et al. 2025, arXiv 2504.02692).
"""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from medgemma_quantization.affine import (
    INTEGER_RANGE,
    QuantizedTensor,
    quantize,
    range_scales,
)
from medgemma_quantization.linear_algebra import factorize, solve_lower, solve_upper
from medgemma_quantization.methods.method import Rounder
from medgemma_quantization.methods.search import search_scales
from medgemma_quantization.observers import Moments
from medgemma_quantization.scheme import Storage

__all__ = ["gptq", "DAMPING", "DRIFT_DAMPING"]

# Added to the diagonal of the second moment, as shares of its mean.
DAMPING = 0.01
DRIFT_DAMPING = 0.1

# Columns of an inverse, or rows of a drift, that are computed at a time: of 10,240 inputs 84 MB.
_COLUMNS = 1024

# Outputs that are rounded at a time: a block of theirs stays in a processor's cache.
_ROWS = 4096


def gptq(storage: Storage, moments: Moments | None) -> Rounder:
    """A `FindRounder`.

    A second moment that is singular (fewer samples than inputs, an input that is always zero) is damped:
    what is unknown about the inputs is then taken to be uncorrelated and small.

    Raises:
        ValueError: If nothing is known about the inputs, or they were always zero.
    """
    if moments is None or moments.rows == 0:
        raise ValueError("GPTQ needs inputs of the layer and no sample reached it")
    squares = moments.mean_square()
    mean = float(squares.mean())
    if mean == 0:
        raise ValueError("the layer's inputs are zero in every sample")
    if storage.bits == 8:
        move = _mover(moments, DRIFT_DAMPING * mean)
        return lambda weight: _nearest(move(weight), storage)
    order = _order(squares, storage.block)
    # Before the mover, which keeps a factor of its own: two of them are 1.7 GB at 10,240 inputs.
    factor = _inverse_factor(moments, order, DAMPING * mean)
    move = _mover(moments, DRIFT_DAMPING * mean)

    def round_rows(weight: NDArray[np.float32]) -> QuantizedTensor:
        pieces = [
            _round(move(weight[start : start + _ROWS]), storage, order, factor)
            for start in range(0, len(weight), _ROWS)
        ]
        return QuantizedTensor(
            storage=storage,
            values=np.concatenate([piece.values for piece in pieces]),
            scales=np.concatenate([piece.scales for piece in pieces]),
        )

    return round_rows


def _nearest(weight: NDArray[np.float32], storage: Storage) -> QuantizedTensor:
    """int8's own error is a hundredth of int4's, and its neighbours' bound leaves no room to shift it."""
    return quantize(weight, storage, range_scales(weight, storage))


def _mover(moments: Moments, damping: float) -> Callable[[NDArray[np.float32]], NDArray[np.float32]]:
    """Moves weights to where the layer gives what it gave before its inputs changed, as far as they can.

    By `weight @ drift @ inverse(second moment)`: solved for the weight where it has fewer rows than inputs,
    and else for the identity, once.
    """
    if not moments.has_drift:
        return lambda weight: weight
    factor = factorize(_damped(moments.hessian(), damping))
    inputs = len(factor)

    def movement(weight: NDArray[np.float32]) -> NDArray[np.float32]:
        right = np.zeros((inputs, len(weight)))
        for start in range(0, inputs, _COLUMNS):
            strip = slice(start, start + _COLUMNS)
            right += moments.mean_drift(strip).T @ weight[:, strip].T
        solve_lower(factor, right)
        solve_upper(factor, right)
        return np.ascontiguousarray(right.T, dtype=np.float32)

    matrix: NDArray[np.float32] | None = None

    def move(weight: NDArray[np.float32]) -> NDArray[np.float32]:
        nonlocal matrix
        if matrix is None and len(weight) > inputs:
            matrix = movement(np.eye(inputs, dtype=np.float32))
        return weight + (movement(weight) if matrix is None else weight @ matrix)

    return move


def _damped(matrix: NDArray[np.float64], damping: float) -> NDArray[np.float64]:
    """The same array with something added to its diagonal."""
    matrix[np.diag_indices_from(matrix)] += damping
    return matrix


def _order(diagonal: NDArray[np.float64], block: int) -> NDArray[np.intp]:
    """Inputs in the order in which they are rounded: blocks by their sum, and inputs within them."""
    blocks = diagonal.reshape(-1, block or len(diagonal))
    first = np.argsort(-blocks.sum(axis=1), kind="stable")
    within = np.argsort(-blocks, axis=1, kind="stable")
    return (first[:, None] * blocks.shape[1] + within[first]).reshape(-1)


def _inverse_factor(moments: Moments, order: NDArray[np.intp], damping: float) -> NDArray[np.float32]:
    """The upper Cholesky factor U of the inverse, `inverse = U.T @ U`: [inputs, inputs].

    Computed without inverting: if `J A J = L L.T` with J reversing the order, `inverse(A) = U.T U` for
    `U = J inverse(L) J`. Columns of a lower triangle's inverse begin at its diagonal.
    """
    lower = factorize(_damped(moments.hessian(order[::-1]), damping))
    size = len(lower)
    upper = np.zeros((size, size), np.float32)
    for start in range(0, size, _COLUMNS):
        stop = min(start + _COLUMNS, size)
        column = np.eye(size - start, stop - start)
        solve_lower(lower[start:, start:], column)
        upper[: size - start, size - stop : size - start] = column[::-1, ::-1]
    return upper


def _round(
    weight: NDArray[np.float32], storage: Storage, order: NDArray[np.intp], factor: NDArray[np.float32]
) -> QuantizedTensor:
    # Inputs along the first axis: every step then reads and writes whole rows.
    left = np.ascontiguousarray(weight.T[order])
    inputs, outputs = left.shape
    width = storage.block or inputs
    values = np.empty((inputs, outputs), np.int8)
    scales = np.empty((inputs // width, outputs), np.float32)
    for start in range(0, inputs, width):
        block, later = slice(start, start + width), slice(start + width, inputs)
        # The error of an input that its successors cannot make up for is this much of its square.
        importance = 1 / np.square(np.diagonal(factor)[block])
        scale = search_scales(left[block].T, storage, importance)[:, 0]
        values[order[block]], errors = _round_block(left[block], scale, factor[block, block], storage)
        scales[order[start] // width] = scale
        left[later] -= factor[block, later].T @ errors
    return QuantizedTensor(
        storage=storage, values=np.ascontiguousarray(values.T), scales=np.ascontiguousarray(scales.T)
    )


def _round_block(
    left: NDArray[np.float32], scale: NDArray[np.float32], factor: NDArray[np.float32], storage: Storage
) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """Round the inputs of one block in turn: the integers, and the errors to spread over later blocks.

    Shapes:
        left: [block, outputs], changed in place
        scale: [outputs]
        factor: [block, block]
        results: [block, outputs]
    """
    low, high = INTEGER_RANGE[storage.bits]
    values = np.empty(left.shape, np.int8)
    errors = np.empty_like(left)
    for step in range(len(left)):
        rounded = np.clip(np.rint(left[step] / scale), low, high)
        values[step] = rounded
        errors[step] = (left[step] - rounded * scale) / factor[step, step]
        left[step + 1 :] -= factor[step, step + 1 :, None] * errors[step]
    return values, errors
