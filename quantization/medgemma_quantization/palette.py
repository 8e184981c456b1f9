"""Palettes: a few values that the weights of some output channels share, found by k-means.

Core ML calls it palettization, and its Neural Engine takes such weights as they are. A palette fits weights
of any distribution; a scale spreads its steps evenly.
"""

import numpy as np
from numpy.typing import NDArray

from medgemma_quantization.affine import QuantizedTensor
from medgemma_quantization.scheme import Storage

__all__ = ["palettize"]

# k-means from a start at random or in even steps ends where it must not: of 64 entries for 20,480 weights of
# Student's t with twice the least error. The best cuts at points of a grid lie within 0.3 % of it with 16
# entries and 2 % with 64, k-means after them, for 1 and 10 ms a group.
_POINTS = 4  # of the grid, for each entry
_BINS = 4096  # of the histogram that the grid follows
_SMOOTHING = 33  # bins
_STEPS = 60  # of k-means at most; 10 to 30 are taken
_FLOAT16_MAX = 65504.0


def palettize(weight: NDArray[np.float32], storage: Storage) -> QuantizedTensor:
    """The palettes with the least squared error that k-means finds, and for each weight its nearest entry.

    The same weights give the same palettes: there is nothing random.

    Args:
        weight: [outputs, inputs]; outputs are a multiple of `storage.palette`.
        storage: A palette.

    Raises:
        ValueError: If a weight is not finite, or too large for float16.
    """
    if not np.isfinite(weight).all() or np.abs(weight).max(initial=0) > _FLOAT16_MAX:
        raise ValueError("a weight is not finite, or too large for the float16 of a palette")
    outputs, inputs = weight.shape
    entries = 1 << storage.bits
    groups = weight.reshape(outputs // storage.palette, storage.palette * inputs)
    palettes = np.stack([_palette(group, entries) for group in groups])
    values = np.empty(groups.shape, np.uint8)
    for group, palette, found in zip(groups, palettes, values, strict=True):
        found[:] = np.searchsorted(_middles(palette), group)
    return QuantizedTensor(
        storage=storage, values=values.view(np.int8).reshape(outputs, inputs), scales=palettes
    )


def _palette(weights: NDArray[np.float32], entries: int) -> NDArray[np.float32]:
    """[entries] in ascending order, rounded to float16."""
    ordered = np.sort(weights).astype(np.float64)
    sums = np.concatenate([[0.0], np.cumsum(ordered)])
    bounds = _best_cuts(ordered, sums, entries)
    for _ in range(_STEPS):
        # On a line, an entry's weights lie between the middles to its neighbours.
        palette = np.diff(sums[bounds]) / np.diff(bounds)
        inner = np.searchsorted(ordered, _middles(palette))
        moved = np.unique(np.concatenate([[0], inner, [len(ordered)]]))
        if np.array_equal(moved, bounds):
            break
        bounds = moved
    palette = np.diff(sums[bounds]) / np.diff(bounds)
    spare = np.full(entries - len(palette), palette[-1])  # where there are fewer weights to tell apart
    return np.concatenate([palette, spare]).astype(np.float16).astype(np.float32)


def _best_cuts(ordered: NDArray[np.float64], sums: NDArray[np.float64], entries: int) -> NDArray[np.int64]:
    """Cut sorted weights into at most so many pieces, with the least error of all cuts at a grid's points.

    By dynamic programming: the best cut of the weights up to a point into n pieces is the best of those into
    n - 1 up to an earlier point, with one piece more.

    Returns:
        Where pieces begin, and the end of the last.
    """
    points = np.unique(
        np.concatenate([[0], np.searchsorted(ordered, _grid(ordered, _POINTS * entries)), [len(ordered)]])
    )
    count = len(points) - 1
    squares = np.concatenate([[0.0], np.cumsum(ordered**2)])[points]
    totals = sums[points]
    # [end, start]: the error of a piece between two points.
    size = np.maximum(points[1:, None] - points[None, :-1], 1)
    error = squares[1:, None] - squares[None, :-1] - (totals[1:, None] - totals[None, :-1]) ** 2 / size
    error[np.triu_indices(count, 1)] = np.inf
    best, choices = error[:, 0], []
    for _ in range(min(entries, count) - 1):
        tried = error + np.concatenate([[np.inf], best[:-1]])
        choices.append(tried.argmin(axis=1))
        best = tried[np.arange(count), choices[-1]]
    cuts = [count]
    for choice in reversed(choices):
        cuts.append(int(choice[cuts[-1] - 1]))
    return np.asarray(points[[0, *reversed(cuts)]])


def _grid(ordered: NDArray[np.float64], count: int) -> NDArray[np.float64]:
    """Points as dense as the entries of a good palette are: as the cube root of the weights' density.

    Panter and Dite, Quantization Distortion in Pulse-Count Modulation with Nonuniform Spacing, 1951.
    """
    edges = np.linspace(ordered[0], ordered[-1], _BINS + 1)
    density = np.diff(np.searchsorted(ordered, edges)).astype(np.float64)
    density = np.convolve(density, np.full(_SMOOTHING, 1 / _SMOOTHING), mode="same")
    reached = np.concatenate([[0.0], np.cumsum(np.cbrt(density))])
    return np.interp(np.arange(1, count) / count, reached / max(reached[-1], 1e-30), edges)


def _middles(palette: NDArray[np.floating]) -> NDArray[np.floating]:
    return (palette[:-1] + palette[1:]) / 2
