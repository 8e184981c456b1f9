"""The result: integers and scales for every weight of a plan, one tensor in memory at a time.

They are kept in a directory, a pair of `.npy` files for each integer weight, written as they are made: an
interrupted run continues where it stopped, and every target reads the same numbers.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from medgemma_quantization.affine import (
    QuantizedTensor,
    pack_int4,
    quantize,
    range_scales,
    unpack_int4,
)
from medgemma_quantization.plan import PlanRow, QuantPlan
from medgemma_runtime.errors import CheckpointError

__all__ = ["QuantizedWeights", "ReadWeight", "quantize_weights"]

ReadWeight = Callable[[str], NDArray[np.float32]]
"""Reads a weight of the model by name, in its true shape."""


@dataclass(frozen=True, kw_only=True)
class QuantizedWeights:
    """Access to every weight of a plan, as the plan says it is stored.

    Attributes:
        plan: What was decided.
        directory: Where the integers lie.
        read: Reads the weights that stay float.
    """

    plan: QuantPlan
    directory: Path
    read: ReadWeight

    def quantized(self, name: str) -> QuantizedTensor:
        """Integers and scales of a weight that the plan stores as integers."""
        row = self.plan.by_name[name]
        values = np.load(self.directory / f"{name}.values.npy", allow_pickle=False)
        scales = np.load(self.directory / f"{name}.scales.npy", allow_pickle=False)
        if row.storage.bits == 4:
            values = unpack_int4(values)
        return QuantizedTensor(storage=row.storage, values=values, scales=scales)

    def float(self, name: str) -> NDArray[np.float32]:
        """A weight that the plan keeps float, padded as the plan says."""
        return _padded(self.read(name), self.plan.by_name[name])


def quantize_weights(
    plan: QuantPlan,
    read: ReadWeight,
    directory: Path,
    *,
    progress: Callable[[int, int], None] | None = None,
) -> QuantizedWeights:
    """Round every integer weight of a plan to nearest, with scales that cover its range.

    Args:
        plan: What to do.
        read: Reads a weight of the model by name.
        directory: Where the integers go; those that are there already are kept.
        progress: Called with the rows done and their number.

    Raises:
        CheckpointError: If a weight is not finite, or too large for a float16 scale.
    """
    directory.mkdir(parents=True, exist_ok=True)
    integer_rows = [row for row in plan.rows if row.storage.bits != 32]
    for done, row in enumerate(integer_rows):
        if progress is not None:
            progress(done, len(integer_rows))
        # The scales are written last: their presence means that the pair is complete.
        if not (directory / f"{row.name}.scales.npy").exists():
            _quantize_row(row, read, directory)
    if progress is not None:
        progress(len(integer_rows), len(integer_rows))
    return QuantizedWeights(plan=plan, directory=directory, read=read)


def _quantize_row(row: PlanRow, read: ReadWeight, directory: Path) -> None:
    weight = _padded(read(row.name), row)
    try:
        tensor = quantize(weight, row.storage, range_scales(weight, row.storage))
    except ValueError as error:
        raise CheckpointError(f"{row.name} cannot be quantized: {error}; check the checkpoint") from None
    values = pack_int4(tensor.values) if row.storage.bits == 4 else tensor.values
    _save(directory / f"{row.name}.values.npy", values)
    _save(directory / f"{row.name}.scales.npy", tensor.scales)


def _save(path: Path, array: NDArray[np.generic]) -> None:
    temporary = path.with_suffix(".partial")
    with temporary.open("wb") as stream:
        np.save(stream, array, allow_pickle=False)
    os.replace(temporary, path)


def _padded(array: NDArray[np.float32], row: PlanRow) -> NDArray[np.float32]:
    if array.shape == row.stored_shape:
        return array
    grow = [(0, stored - true) for stored, true in zip(row.stored_shape, array.shape, strict=True)]
    return np.pad(array, grow)
