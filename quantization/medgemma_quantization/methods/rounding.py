"""Round to nearest: to the nearest integer, with scales that clip nothing, or to the nearest of a palette."""

import numpy as np
from numpy.typing import NDArray

from medgemma_quantization.affine import QuantizedTensor, quantize, range_scales
from medgemma_quantization.methods.method import Rounder
from medgemma_quantization.observers import Moments
from medgemma_quantization.palette import palettize
from medgemma_quantization.scheme import Storage

__all__ = ["nearest"]


def nearest(storage: Storage, moments: Moments | None) -> Rounder:
    """A `FindRounder` that needs no moments and ignores them."""

    def round_rows(weight: NDArray[np.float32]) -> QuantizedTensor:
        if storage.palette:
            return palettize(weight, storage)
        return quantize(weight, storage, range_scales(weight, storage))

    return round_rows
