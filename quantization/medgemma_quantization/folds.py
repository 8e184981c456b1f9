"""Where the inputs of matrices can be scaled for nothing: what makes them takes the factors back exactly.

Columns of the matrices that read an activation are multiplied by factors, and whatever makes the activation
is divided by them. Products stay as they were, and roundings fall elsewhere.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

__all__ = ["Fold", "SourceKind"]

SourceKind = Literal["gain less one", "gain", "rows"]


@dataclass(frozen=True, kw_only=True)
class Fold:
    """One activation, what makes it, and all matrices that read it.

    Attributes:
        source: The norm or the linear that makes it: `SOURCE.weight`, and `SOURCE.bias` where there is one.
        kind: `gain less one` is the gain of an RMS norm as Gemma stores it, w for 1 + w; `gain` that of a
            LayerNorm; `rows` a linear, each output of which is divided.
        readers: Names of the matrices.
        factors: How many there are: one for each output of the source.
        head_width: Where the readers see heads of an attention, their width; 0 elsewhere.
        group: Query heads that share a value head: readers have this many times the inputs.
    """

    source: str
    kind: SourceKind
    readers: tuple[str, ...]
    factors: int
    head_width: int = 0
    group: int = 1

    def expand(self, factors: NDArray[np.float32]) -> NDArray[np.float32]:
        """Factors for each input of the readers: [factors] to [factors * group]."""
        if self.group == 1:
            return factors
        return np.repeat(factors.reshape(-1, self.head_width), self.group, axis=0).reshape(-1)

    def largest(self, inputs: NDArray[np.float64]) -> NDArray[np.float64]:
        """The largest of the inputs that share a factor: [factors * group] to [factors]."""
        if self.group == 1:
            return inputs
        peaks: NDArray[np.float64] = inputs.reshape(-1, self.group, self.head_width).max(axis=1)
        return peaks.reshape(-1)

    def mean(self, inputs: NDArray[np.float64]) -> NDArray[np.float64]:
        """The mean over the inputs that share a factor: [factors * group] to [factors]."""
        if self.group == 1:
            return inputs
        means: NDArray[np.float64] = inputs.reshape(-1, self.group, self.head_width).mean(axis=1)
        return means.reshape(-1)
