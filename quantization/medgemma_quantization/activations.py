"""Static ranges: how the inputs of integer matrices are rounded where no engine looks at them at run time.

A range is chosen from what a `Range` has counted: `minmax` clips nothing and leaves a margin, `percentile`
clips the rarest values, `entropy` keeps the distribution (Migacz 2017, TensorRT), `mse` has the least squared
error expected. onnxruntime.quantization has calibrators of these names; their linear bins are drawn anew as
values grow, which does not merge bit for bit. Ours are held against them in
tests/quantization/test_activations.py.
"""

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from medgemma_quantization.observers import HISTOGRAM_EDGES, Range
from medgemma_quantization.scheme import RangeMethod
from medgemma_runtime.errors import EdgeError

__all__ = [
    "ActivationRange",
    "RANGE_METHODS",
    "MARGIN",
    "RANGES_NAME",
    "choose_range",
    "read_ranges",
    "save_ranges",
]

RANGES_NAME: Final = "activation_ranges.json"
"""The file of ranges, beside integers and in an artifact."""

MARGIN: Final = 1.25
"""How far `minmax` goes beyond what was seen: other inputs may be larger, and clipping costs far more than a
coarser step. On one held-out image a layer of the sample's tower has 1.3 times the range of the others.
"""

_LEVELS = 255
_PERCENTILE = 99.99

# Shares of either end that are tried, for the least squared error.
_SHARES: NDArray[np.float64] = np.arange(1.0, 0.19, -0.05)

# Even bins to either side of the one around zero; every so many a threshold is tried.
_ENTROPY_BINS, _ENTROPY_STEP = 1024, 8


@dataclass(frozen=True, kw_only=True)
class ActivationRange:
    """`x` is rounded to `scale * (q - zero)`, q an integer in [0, 255].

    Attributes:
        scale: A float32 above zero.
        zero: The integer of 0.0, which is exact.
    """

    scale: float
    zero: int

    def __post_init__(self) -> None:
        if not (np.isfinite(self.scale) and self.scale > 0 and np.float32(self.scale) == self.scale):
            raise ValueError(f"the scale {self.scale} is no float32 above zero")
        if not 0 <= self.zero <= _LEVELS:
            raise ValueError(f"the zero point {self.zero} is not in [0, 255]")

    @staticmethod
    def between(low: float, high: float) -> "ActivationRange":
        """The range that has both ends in it, and zero."""
        low, high = min(low, 0.0), max(high, 0.0)
        scale = float(np.float32((high - low) / _LEVELS)) or 1.0
        return ActivationRange(scale=scale, zero=int(np.clip(np.rint(-low / scale), 0, _LEVELS)))


def choose_range(seen: Range, method: RangeMethod) -> ActivationRange:
    """The range for what an input was.

    Raises:
        ValueError: If nothing was seen.
    """
    if not seen.histogram.any():
        raise ValueError("no sample reached it, and a static range needs one")
    return ActivationRange.between(*RANGE_METHODS[method](seen))


def _minmax(seen: Range) -> tuple[float, float]:
    return seen.low * MARGIN, seen.high * MARGIN


def _percentile(seen: Range) -> tuple[float, float]:
    """Half of what lies beyond on either side; within a bin values are taken to be spread evenly."""
    lower, upper, counts = _bins(seen)
    # Bins between those that hold something are empty: both ends of each are points of the distribution.
    edges = np.stack((lower, upper), axis=1).reshape(-1)
    ends = np.cumsum(counts) / counts.sum()
    shares = np.stack((np.append(0, ends[:-1]), ends), axis=1).reshape(-1)
    beyond = (1 - _PERCENTILE / 100) / 2
    low, high = np.interp([beyond, 1 - beyond], shares, edges)
    return float(low), float(high)


def _least_error(seen: Range) -> tuple[float, float]:
    """Both ends are moved in by turns of a grid; zero stays inside."""
    lower, upper, counts = _bins(seen)
    middles = (lower + upper) / 2
    low, high = min(seen.low, 0.0), max(seen.high, 0.0)
    best, least = (low, high), np.inf
    for below in _SHARES if low < 0 else (1.0,):
        for above in _SHARES if high > 0 else (1.0,):
            ends = (low * below, high * above)
            scale = (ends[1] - ends[0]) / _LEVELS
            # Rounding errs evenly up to half a step, except for what rounds to zero.
            inside = np.where(np.abs(middles) < scale / 2, np.square(middles), scale**2 / 12)
            outside = np.maximum(ends[0] - middles, 0) + np.maximum(middles - ends[1], 0)
            error = float((counts * np.where(outside > 0, np.square(outside), inside)).sum())
            if error < least:
                best, least = ends, error
    return float(best[0]), float(best[1])


def _entropy(seen: Range) -> tuple[float, float]:
    """The threshold whose clipped distribution loses least information when it is rounded to levels."""
    peak = max(-seen.low, seen.high)
    if peak == 0:
        return 0.0, 0.0
    histogram = _even_bins(seen, peak)
    best, least = _ENTROPY_BINS, np.inf
    for bins in range(_LEVELS // 2, _ENTROPY_BINS + 1, _ENTROPY_STEP):
        inside = slice(_ENTROPY_BINS - bins, _ENTROPY_BINS + bins + 1)
        kept = histogram[inside]
        clipped = kept.copy()
        clipped[0] += histogram[: inside.start].sum()
        clipped[-1] += histogram[inside.stop :].sum()
        is_there = clipped > 0
        group = np.arange(len(kept)) * _LEVELS // len(kept)
        sums, members = np.bincount(group, kept, _LEVELS), np.bincount(group, is_there, _LEVELS)
        rounded = np.where(is_there, (sums / np.maximum(members, 1))[group], 0)
        if not rounded.any():
            continue  # all of it would be clipped
        p, q = clipped[is_there] / clipped.sum(), rounded[is_there] / rounded.sum()
        # What is clipped into an empty level has no counterpart: a small one keeps the divergence finite.
        divergence = float((p * np.log(p / np.maximum(q, 1e-12))).sum())
        if divergence < least:
            best, least = bins, divergence
    threshold = peak * (best + 0.5) / (_ENTROPY_BINS + 0.5)
    return max(seen.low, -threshold), min(seen.high, threshold)


def _even_bins(seen: Range, peak: float) -> NDArray[np.float64]:
    """Counts in even bins from -peak to peak, zero in the middle one; the histogram is spread over them."""
    edges = np.linspace(-peak, peak, 2 * _ENTROPY_BINS + 2)
    lower, upper, counts = _bins(seen)
    # A bin without width, where all values are one, becomes the narrowest that float64 knows.
    points = np.stack((lower, np.maximum(upper, np.nextafter(lower, np.inf))), axis=1).reshape(-1)
    ends = np.cumsum(counts)
    amounts = np.stack((np.append(0, ends[:-1]), ends), axis=1).reshape(-1)
    inside: NDArray[np.float64] = np.diff(np.interp(edges, points, amounts, left=0))
    return np.maximum(inside, 0)


def _bins(seen: Range) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.int64]]:
    """Lower ends, upper ends and counts of the bins that hold something."""
    held = seen.histogram > 0
    lower, upper = HISTOGRAM_EDGES[:-1][held].copy(), HISTOGRAM_EDGES[1:][held].copy()
    lower[0], upper[-1] = seen.low, seen.high
    return lower, np.maximum(upper, lower), seen.histogram[held]


RANGE_METHODS: dict[RangeMethod, Callable[[Range], tuple[float, float]]] = {
    "minmax": _minmax,
    "percentile": _percentile,
    "entropy": _entropy,
    "mse": _least_error,
}


def save_ranges(ranges: Mapping[str, ActivationRange], directory: Path) -> None:
    """Write the ranges of weights' inputs by the weights' names; the file is whole or absent."""
    content = {name: [entry.scale, entry.zero] for name, entry in ranges.items()}
    temporary = directory / f".{RANGES_NAME}.partial"
    temporary.write_text(json.dumps(content, indent=0) + "\n", encoding="utf-8")
    os.replace(temporary, directory / RANGES_NAME)


def read_ranges(directory: Path) -> dict[str, ActivationRange]:
    """Read what `save_ranges` wrote.

    Raises:
        EdgeError: If the file is absent or something else.
    """
    path = directory / RANGES_NAME
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return {name: ActivationRange(scale=scale, zero=zero) for name, (scale, zero) in content.items()}
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise EdgeError(f"{path} holds no activation ranges ({error}); calibrate again to make it") from None
