"""Scale search: for every block the scale with the least error among some below and above its range.

Clipping the largest weight of a block a little lets all others be rounded more finely. The error is that of
the weights, or, with activations, that of the outputs as far as the diagonal of the second moment knows it:
weights on large inputs count more.
"""

import numpy as np
from numpy.typing import NDArray

from medgemma_quantization.affine import (
    INTEGER_RANGE,
    QuantizedTensor,
    quantize,
    range_scales,
    round_scale,
)
from medgemma_quantization.methods.method import Rounder
from medgemma_quantization.observers import Moments
from medgemma_quantization.scheme import Storage

__all__ = ["searched", "search_scales", "CANDIDATES"]

# Shares of the range's scale that are tried. Beyond 1 nothing is clipped, and the last step may sit better.
CANDIDATES: NDArray[np.float32] = np.arange(1.08, 0.59, -0.04, dtype=np.float32)

# Outputs that are searched at a time: with blocks of 32 they stay in a processor's cache.
_ROWS = 2048


def searched(storage: Storage, moments: Moments | None) -> Rounder:
    """A `FindRounder`: nearest integers, for the scales with the least error."""
    importance = None if moments is None else moments.mean_square().astype(np.float32)

    def round_rows(weight: NDArray[np.float32]) -> QuantizedTensor:
        return quantize(weight, storage, search_scales(weight, storage, importance))

    return round_rows


def search_scales(
    weight: NDArray[np.float32], storage: Storage, importance: NDArray[np.floating] | None
) -> NDArray[np.float32]:
    """The scales of least error, [outputs, blocks].

    Args:
        weight: [outputs, inputs].
        storage: int4. For int8 the scales are those of the range: the bound on neighbours decides them, and
            clipping would break it.
        importance: Weight of each input's squared error, [inputs]; None for all the same.
    """
    ranges = range_scales(weight, storage)
    if storage.bits == 8:
        return ranges
    blocks = weight.reshape(*ranges.shape, -1).transpose(2, 0, 1)
    weights = None
    if importance is not None:
        weights = importance.astype(np.float32).reshape(ranges.shape[1], -1).T[:, None, :]
    low, high = INTEGER_RANGE[storage.bits]
    scales = np.empty_like(ranges)
    for start in range(0, len(weight), _ROWS):
        piece = slice(start, start + _ROWS)
        some = np.ascontiguousarray(blocks[:, piece])
        error = np.empty_like(some)
        best = np.full(ranges[piece].shape, np.inf, np.float32)
        for share in CANDIDATES:
            tried = round_scale(ranges[piece] * share)
            # In place: memory traffic is what this costs.
            np.divide(some, tried, out=error)
            np.rint(error, out=error)
            np.maximum(error, low, out=error)
            np.minimum(error, high, out=error)
            error *= tried
            error -= some
            np.square(error, out=error)
            if weights is not None:
                error *= weights
            total = error.sum(axis=0)
            is_better = total < best
            best[is_better] = total[is_better]
            scales[piece][is_better] = tried[is_better]
    return scales
