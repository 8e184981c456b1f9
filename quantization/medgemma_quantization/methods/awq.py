"""AWQ: inputs that are large get larger weights, so that these are rounded relatively more finely.

Lin et al. 2024 (arXiv 2306.00978). The factors are a power of each input's mean magnitude; the exponent is
the one with the least error of the readers' outputs, 0 (no change) included. That error is not that of a few
stored activations: the second moment of all of them gives it exactly.

Scale search must not follow unless it knows the inputs: the weights that were made large on purpose are those
that it clips.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from medgemma_quantization.folds import Fold
from medgemma_quantization.methods.method import InputPeaks
from medgemma_quantization.methods.rounding import nearest
from medgemma_quantization.observers import Moments
from medgemma_quantization.scheme import Storage

__all__ = ["awq_factors", "EXPONENTS"]

EXPONENTS: NDArray[np.float64] = np.arange(0, 1.01, 0.1)

# Outputs of each reader that errors are taken over, evenly spaced: the sum over all would be hours for 4B.
_ROWS = 512

# An input that is hardly ever there counts as one of this share of the mean.
_LEAST = 1e-3


def awq_factors(
    fold: Fold, moments: Moments, peaks: InputPeaks, readers: Sequence[tuple[Storage, NDArray[np.float32]]]
) -> NDArray[np.float32]:
    """A `FindFactors`."""
    magnitude = fold.mean(moments.mean_magnitude())
    if not magnitude.any():
        raise ValueError("the layer's inputs are zero in every sample")
    magnitude = np.maximum(magnitude, _LEAST * magnitude.mean())
    hessian = moments.hessian().astype(np.float32)
    sampled = [(storage, weight[:: max(1, len(weight) // _ROWS)]) for storage, weight in readers]
    best, least = np.ones(fold.factors, np.float32), np.inf
    for exponent in EXPONENTS:
        factors = normalized(magnitude**exponent)
        columns = fold.expand(factors)
        error = sum(_error(weight, storage, columns, hessian) for storage, weight in sampled)
        if error < least:
            best, least = factors, error
    return best


def normalized(factors: NDArray[np.float64]) -> NDArray[np.float32]:
    """Factors of geometric mean 1: only their ratios matter."""
    scaled: NDArray[np.float64] = factors / np.exp(np.log(factors).mean())
    return scaled.astype(np.float32)


def _error(
    weight: NDArray[np.float32],
    storage: Storage,
    columns: NDArray[np.float32],
    hessian: NDArray[np.float32],
) -> float:
    """Mean squared error of the outputs of a matrix that is rounded after its columns are scaled."""
    rounded = nearest(storage, None)(weight * columns).dequantize() / columns
    difference = rounded - weight
    return float(((difference @ hessian) * difference).sum())
