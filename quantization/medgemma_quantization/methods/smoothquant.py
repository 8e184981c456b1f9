"""SmoothQuant: large inputs are made smaller and their weights larger, so that int8 holds both.

Xiao et al. 2023 (arXiv 2211.10438).
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from medgemma_quantization.folds import Fold
from medgemma_quantization.methods.awq import normalized
from medgemma_quantization.methods.method import FindFactors, InputPeaks
from medgemma_quantization.observers import Moments
from medgemma_quantization.scheme import Storage

__all__ = ["smooth", "ALPHA"]

ALPHA = 0.5
"""How much of the difficulty goes from the inputs to the weights; the paper's default."""

# Of the mean: what is never there, or read by zero weights only, must not make factors of 0 or infinity.
_LEAST = 1e-3


def smooth(alpha: float = ALPHA) -> FindFactors:
    """A `FindFactors`: `peak of input ** alpha / peak of weight ** (1 - alpha)` for each input."""
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha must lie between 0 and 1 and is {alpha}")

    def factors(
        fold: Fold,
        moments: Moments,
        peaks: InputPeaks,
        readers: Sequence[tuple[Storage, NDArray[np.float32]]],
    ) -> NDArray[np.float32]:
        weights = np.max([np.abs(weight).max(axis=0) for _, weight in readers], axis=0)
        # An input that shares its factor with others counts as the largest of them.
        both = [fold.largest(values.astype(np.float64)) for values in (peaks, weights)]
        if not all(values.any() for values in both):
            raise ValueError("the layer's inputs or weights are zero in every sample")
        inputs, columns = (np.maximum(values, _LEAST * values.mean()) for values in both)
        return normalized(inputs**alpha / columns ** (1 - alpha))

    return factors
