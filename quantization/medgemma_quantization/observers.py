"""Statistics of activations that merge exactly: a large set can be split over processes or machines.

Floating-point sums depend on their order, so each sample's contribution is rounded to a fixed grid and added
as integers. However samples are dealt out, and in whatever order the parts are merged, the result is the
same bit for bit, as long as the contribution of each sample is (one machine, or machines with the same
linear algebra).
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from medgemma_runtime.errors import EdgeError

__all__ = ["ExactSum", "Moments", "Range", "HISTOGRAM_EDGES"]

# An ExactSum holds multiples of 2**-64 (5e-20) up to 2**40 (1e12) in two int64 arrays. The low one takes a
# million terms before its carries must go to the high one.
_LOW_BITS = 42
_LOW_STEP = 2.0**-64
_HIGH_STEP = _LOW_STEP * 2.0**_LOW_BITS
_TERMS_PER_CARRY = 1 << 20
_LARGEST = 2.0**40

# Rows of a second moment that are added at a time: 512 x 10240 doubles are 42 MB.
_STRIP = 512

# Sixteen bins for each doubling from 2**-24 to 2**24, on either side of zero.
_BINS_PER_DOUBLING, _OCTAVES = 16, 24
_MAGNITUDES = 2.0 ** (
    np.arange(-_OCTAVES * _BINS_PER_DOUBLING, _OCTAVES * _BINS_PER_DOUBLING + 1) / _BINS_PER_DOUBLING
)
HISTOGRAM_EDGES: NDArray[np.float64] = np.concatenate((-_MAGNITUDES[::-1], _MAGNITUDES))
"""Edges of the bins of `Range.histogram`, fixed so that counts add; the middle bin holds zero."""


@dataclass(kw_only=True, eq=False)
class ExactSum:
    """A sum of float arrays that does not depend on the order of its terms.

    Each term is cut to a multiple of 2**-64, once, when it is added.

    Attributes:
        high: int64 multiples of 2**-22.
        low: int64 multiples of 2**-64.
        uncarried: Terms since the low part was last brought into [0, 2**42).
    """

    high: NDArray[np.int64]
    low: NDArray[np.int64]
    uncarried: int = 0

    @staticmethod
    def zeros(shape: tuple[int, ...]) -> "ExactSum":
        """The empty sum."""
        return ExactSum(high=np.zeros(shape, np.int64), low=np.zeros(shape, np.int64))

    def add(self, term: NDArray[np.floating], part: tuple[slice, ...] = (slice(None),)) -> None:
        """Add a term to all of the sum, or to a part of it; each call counts as one term.

        The caller sees to it that the sum stays below 2**40 in magnitude.
        """
        if self.uncarried == _TERMS_PER_CARRY:
            self.carry()
        scaled = term * (1 / _HIGH_STEP)
        high = scaled.astype(np.int64)
        self.high[part] += high
        # Exact: what is left has the last bits of the term.
        rest = scaled.astype(np.float64) - high
        self.low[part] += (rest * 2.0**_LOW_BITS).astype(np.int64)
        self.uncarried += 1

    def merge(self, other: "ExactSum") -> None:
        """Add another sum."""
        for part in (self, other):
            part.carry()
        self.high += other.high
        self.low += other.low
        self.carry()

    def value(self, rows: slice = slice(None)) -> NDArray[np.float64]:
        """The sum, or some of its first axis, rounded to float64."""
        if self.uncarried:
            self.carry()
        total = self.low[rows].astype(np.float64) * _LOW_STEP
        total += self.high[rows] * _HIGH_STEP
        return total

    def carry(self) -> None:
        """Bring the low part into its range: sums that are equal then have equal parts."""
        for start in range(0, len(self.low), _STRIP):
            piece = slice(start, start + _STRIP)
            carried = self.low[piece] >> _LOW_BITS
            self.high[piece] += carried
            self.low[piece] -= carried << _LOW_BITS
        self.uncarried = 0


def _strips(inputs: int) -> list[slice]:
    return [slice(start, min(start + _STRIP, inputs)) for start in range(0, inputs, _STRIP)]


@dataclass(kw_only=True, eq=False)
class Moments:
    """What a layer's inputs were: how many, their mean magnitudes and their second moment.

    Attributes:
        rows: Input vectors seen.
        magnitude: Sum of |x|, [inputs].
        second: Sum of the outer products of x with itself: of each strip of rows what lies right of its
            first column. Below the diagonal the matrix says nothing new, and at 10,240 inputs it has 1.7 GB.
        drift: Sum of the outer products of what x lacks with x, [inputs, inputs]: the input of the float
            model, less x, which rounded layers before this one have changed.
        bound: What no element of the sums exceeds in magnitude.
    """

    rows: int
    magnitude: ExactSum
    second: tuple[ExactSum, ...]
    drift: ExactSum
    bound: float = 0.0

    @staticmethod
    def zeros(inputs: int) -> "Moments":
        """Nothing seen yet."""
        return Moments(
            rows=0,
            magnitude=ExactSum.zeros((inputs,)),
            second=tuple(
                ExactSum.zeros((strip.stop - strip.start, inputs - strip.start)) for strip in _strips(inputs)
            ),
            drift=ExactSum.zeros((inputs, inputs)),
        )

    @property
    def inputs(self) -> int:
        """Width of the input vectors."""
        return int(self.magnitude.low.shape[0])

    def add(self, x: NDArray[np.float32], original: NDArray[np.float32] | None = None) -> None:
        """Add one sample. It must not be split, or its rounding would differ.

        Args:
            x: [rows, inputs].
            original: What the float model has in its place; None where that is the same.

        Raises:
            ValueError: If a value is not finite, or so large that sums of squares leave 2**40.
        """
        lacking = None if original is None else original - x
        magnitudes = np.abs(x).sum(axis=0, dtype=np.float64)
        # Not the peak's square for every row: a few activations may be thousands of times the others.
        # A sum of products is at most the larger of the sums of squares.
        squares = [
            np.einsum("ij,ij->j", part, part, dtype=np.float64) for part in (x, lacking) if part is not None
        ]
        # NaN fails every comparison. float32 holds the sums of products of a sample to six digits.
        bound = self.bound + float(np.max([magnitudes, *squares], initial=0))
        if not bound < _LARGEST:
            peak = np.max([np.abs(part).max() for part in (x, original) if part is not None])
            raise ValueError(f"activations of {peak:.4g} are not finite, or too large for their squares' sum")
        self.bound = bound
        self.rows += len(x)
        self.magnitude.add(magnitudes)
        for strip, total in zip(_strips(self.inputs), self.second, strict=True):
            total.add(x[:, strip].T @ x[:, strip.start :])
            if lacking is not None:
                self.drift.add(lacking[:, strip].T @ x, (strip,))

    def merge(self, other: "Moments") -> None:
        """Add what another process saw.

        Raises:
            ValueError: If the widths differ, or sums of squares leave 2**40.
        """
        if other.inputs != self.inputs:
            raise ValueError(f"statistics of {other.inputs} inputs cannot join those of {self.inputs}")
        if not self.bound + other.bound < _LARGEST:
            raise ValueError("two processes' activations are too large together for their squares' sum")
        self.bound += other.bound
        self.rows += other.rows
        self.magnitude.merge(other.magnitude)
        for mine, theirs in zip(self.second, other.second, strict=True):
            mine.merge(theirs)
        self.drift.merge(other.drift)

    def hessian(self, order: NDArray[np.intp] | None = None) -> NDArray[np.float64]:
        """The mean outer product, [inputs, inputs], exactly symmetric.

        For the squared error of a layer's outputs this is half the matrix of second derivatives with respect
        to the weights of one output.

        Args:
            order: The inputs in the order of the result; None for their own.
        """
        place = np.arange(self.inputs)
        if order is not None:
            place[order] = np.arange(self.inputs)
        result = np.empty((self.inputs, self.inputs))
        for strip, block in self._mean_strips():
            size = len(block)
            corner = np.triu(block[:, :size])
            block[:, :size] = corner + np.triu(corner, 1).T
            rows, columns = place[strip], place[strip.start :]
            result[np.ix_(rows, columns)] = block
            result[np.ix_(columns, rows)] = block.T
        return result

    def mean_square(self) -> NDArray[np.float64]:
        """The diagonal of `hessian`, [inputs]."""
        return np.concatenate([np.diagonal(block) for _, block in self._mean_strips()])

    def _mean_strips(self) -> Iterator[tuple[slice, NDArray[np.float64]]]:
        for strip, total in zip(_strips(self.inputs), self.second, strict=True):
            yield strip, total.value() / max(self.rows, 1)

    def mean_drift(self, rows: slice = slice(None)) -> NDArray[np.float64]:
        """The mean of `drift`, [inputs, inputs], or some rows of it."""
        return self.drift.value(rows) / max(self.rows, 1)

    @property
    def has_drift(self) -> bool:
        """Whether any input differed from the float model's."""
        return bool(self.drift.high.any() or self.drift.low.any())

    def mean_magnitude(self) -> NDArray[np.float64]:
        """Mean of |x| for each input, [inputs]."""
        return self.magnitude.value() / max(self.rows, 1)

    def save(self, path: Path) -> None:
        """Write as .npz, without pickle. Equal statistics make equal arrays."""
        for part in (self.magnitude, *self.second, self.drift):
            part.carry()
        halves = [(part.high, part.low) for part in self.second]
        with path.open("wb") as file:
            np.savez(
                file,
                rows=np.int64(self.rows),
                magnitude=np.stack((self.magnitude.high, self.magnitude.low)),
                second=np.stack(
                    [np.concatenate([part.ravel() for part in parts]) for parts in zip(*halves, strict=True)]
                ),
                drift=np.stack((self.drift.high, self.drift.low)),
            )

    @staticmethod
    def load(path: Path) -> "Moments":
        """Read what `save` wrote.

        Raises:
            EdgeError: If the file is absent or something else.
        """
        try:
            with np.load(path, allow_pickle=False) as data:
                magnitude, drift = (
                    ExactSum(high=data[name][0], low=data[name][1]) for name in ("magnitude", "drift")
                )
                found = Moments(
                    rows=int(data["rows"]),
                    magnitude=magnitude,
                    second=Moments.zeros(magnitude.low.shape[0]).second,
                    drift=drift,
                )
                ends = np.cumsum([part.low.size for part in found.second])
                for half, name in enumerate(("high", "low")):
                    pieces = np.split(data["second"][half], ends[:-1])
                    for part, piece in zip(found.second, pieces, strict=True):
                        getattr(part, name)[...] = piece.reshape(part.low.shape)
                found.bound = max(
                    float(np.abs(part.value()).max(initial=0))
                    for part in (found.magnitude, *found.second, found.drift)
                )
                return found
        except (OSError, EOFError, KeyError, ValueError, IndexError) as error:
            raise EdgeError(
                f"{path} holds no calibration statistics ({error}); calibrate again to make it"
            ) from None


@dataclass(kw_only=True, eq=False)
class Range:
    """The values of one activation: their ends, and how they are spread.

    Attributes:
        low: The smallest value; infinite before the first.
        high: The largest value.
        histogram: Counts between `HISTOGRAM_EDGES`, with what lies beyond them in the outer bins.
    """

    low: float = float("inf")
    high: float = float("-inf")
    histogram: NDArray[np.int64] = field(default_factory=lambda: np.zeros(len(HISTOGRAM_EDGES) - 1, np.int64))

    def add(self, x: NDArray[np.float32]) -> None:
        """Add values of any shape.

        Raises:
            ValueError: If one is not finite.
        """
        if x.size == 0:
            return
        low, high = float(x.min()), float(x.max())
        if not np.isfinite((low, high)).all():
            raise ValueError("an activation is not finite")
        self.low, self.high = min(self.low, low), max(self.high, high)
        inside = np.clip(x.reshape(-1).astype(np.float64), HISTOGRAM_EDGES[0], HISTOGRAM_EDGES[-1])
        bins = np.searchsorted(HISTOGRAM_EDGES, inside, side="right") - 1
        self.histogram += np.bincount(
            np.minimum(bins, len(self.histogram) - 1), minlength=len(self.histogram)
        )

    def merge(self, other: "Range") -> None:
        """Add what another process saw."""
        self.low, self.high = min(self.low, other.low), max(self.high, other.high)
        self.histogram += other.histogram
