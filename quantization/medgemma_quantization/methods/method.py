"""What every quantization method is: from a storage and what a layer's inputs were, to a rounder of rows.

Rows of a weight are independent once the inputs are known, so a rounder takes any number of them at a time
and large tables stream.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from medgemma_quantization.affine import QuantizedTensor
from medgemma_quantization.folds import Fold
from medgemma_quantization.observers import Moments
from medgemma_quantization.scheme import Storage

__all__ = ["Method", "FindRounder", "FindFactors", "InputPeaks", "Rounder"]

Rounder = Callable[[NDArray[np.float32]], QuantizedTensor]
"""Rounds rows of one weight, [rows, inputs]."""

FindRounder = Callable[[Storage, Moments | None], Rounder]
"""Prepares for one weight of a storage; the moments are those of its inputs, None if nothing is known.

It raises a ValueError where it cannot do without moments, or these are of no use.
"""

InputPeaks = NDArray[np.float32]
"""The largest magnitude of each input, [inputs]."""

FindFactors = Callable[
    [Fold, Moments, InputPeaks, Sequence[tuple[Storage, NDArray[np.float32]]]], NDArray[np.float32]
]
"""Finds the factors of one fold, [factors], from what its activation was and the matrices that read it.

It raises a ValueError where the activation is of no use.
"""


@dataclass(frozen=True, kw_only=True)
class Method:
    """A way to find integers.

    Attributes:
        find: Prepares for a weight.
        samples: Whether it makes use of calibration samples.
        sees_inputs: Whether rounding does, where there are samples: integers that follow from weights and
            factors alone can be made again without them.
        factors: Scales inputs before anything is rounded; None for a method that does not.
    """

    find: FindRounder
    samples: Literal["none", "optional", "needed"]
    sees_inputs: bool
    factors: FindFactors | None = None
