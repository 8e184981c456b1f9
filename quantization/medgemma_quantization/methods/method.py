"""What every quantization method is: from a storage and what a layer's inputs were, to a rounder of rows.

Rows of a weight are independent once the inputs are known, so a rounder takes any number of them at a time
and large tables stream.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from medgemma_quantization.affine import QuantizedTensor
from medgemma_quantization.observers import Moments
from medgemma_quantization.scheme import Storage

__all__ = ["Method", "FindRounder", "Rounder"]

Rounder = Callable[[NDArray[np.float32]], QuantizedTensor]
"""Rounds rows of one weight, [rows, inputs]."""

FindRounder = Callable[[Storage, Moments | None], Rounder]
"""Prepares for one weight of a storage; the moments are those of its inputs, None if nothing is known.

It raises a ValueError where it cannot do without moments, or these are of no use.
"""


@dataclass(frozen=True, kw_only=True)
class Method:
    """A way to find integers.

    Attributes:
        find: Prepares for a weight.
        samples: Whether it makes use of calibration samples.
    """

    find: FindRounder
    samples: Literal["none", "optional", "needed"]
