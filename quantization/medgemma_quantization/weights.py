"""The result: integers and scales for every weight of a plan, some rows of one tensor in memory at a time.

They are kept in a directory, a pair of `.npy` files for each integer weight and a third that holds their
hashes and is written last: an interrupted run continues where it stopped, what is damaged is made again, and
every target reads the same numbers.
"""

import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

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
from medgemma_runtime.artifact import sha256_file
from medgemma_runtime.errors import CheckpointError

__all__ = ["QuantizedWeights", "ReadWeight", "quantize_weights", "source_fingerprint"]

# Weights are rounded in pieces of at most this many values: 64 MB as float32, with a few copies.
_PIECE_VALUES = 1 << 24


class ReadWeight(Protocol):
    """Reads a weight of the model by name, in its true shape, or some of its rows."""

    def __call__(self, name: str, rows: slice | None = None) -> NDArray[np.float32]:
        """The values as float32."""
        ...


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
        values = self.stored_values(name)
        unpacked = unpack_int4(values.view(np.uint8)) if row.storage.bits == 4 else values.view(np.int8)
        return QuantizedTensor(storage=row.storage, values=unpacked, scales=self.scales(name))

    def stored_values(self, name: str) -> NDArray[Any]:
        """The integers as they lie on disk: int8, or int4 as `pack_int4` packs it, in two's complement."""
        values: NDArray[Any] = np.load(self.directory / f"{name}.values.npy", allow_pickle=False)
        return values

    def scales(self, name: str) -> NDArray[np.float32]:
        """The scales of a weight that the plan stores as integers: [outputs, blocks]."""
        scales: NDArray[np.float32] = np.load(self.directory / f"{name}.scales.npy", allow_pickle=False)
        return scales

    def float(self, name: str) -> NDArray[np.float32]:
        """A weight that the plan keeps float, padded as the plan says."""
        return _padded(self.read(name), self.plan.by_name[name].stored_shape)


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
        directory: Where the integers go; those that are there already, and whole, are kept.
        progress: Called with the rows done and their number.

    Raises:
        CheckpointError: If a weight is not finite, or too large for a float16 scale.
    """
    directory.mkdir(parents=True, exist_ok=True)
    integer_rows = [row for row in plan.rows if row.storage.bits != 32]
    for done, row in enumerate(integer_rows):
        if progress is not None:
            progress(done, len(integer_rows))
        if not _is_whole(row, directory):
            _quantize_row(row, read, directory)
    if progress is not None:
        progress(len(integer_rows), len(integer_rows))
    return QuantizedWeights(plan=plan, directory=directory, read=read)


def source_fingerprint() -> str:
    """Hash of the code that makes integers: those made by other code are not taken over."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _quantize_row(row: PlanRow, read: ReadWeight, directory: Path) -> None:
    values, scales = _paths(row, directory)
    outputs, inputs = row.stored_shape
    blocks = inputs // row.storage.block if row.storage.block else 1
    is_packed = row.storage.bits == 4
    stored = np.lib.format.open_memmap(
        values,
        mode="w+",
        dtype=np.uint8 if is_packed else np.int8,
        shape=(outputs, inputs // 2 if is_packed else inputs),
    )
    all_scales = np.empty((outputs, blocks), np.float32)
    step = max(1, _PIECE_VALUES // inputs)
    for start in range(0, outputs, step):
        piece = slice(start, min(start + step, outputs))
        weight = read(row.name, slice(start, min(piece.stop, row.shape[0])))
        weight = _padded(weight, (piece.stop - start, inputs))
        try:
            tensor = quantize(weight, row.storage, range_scales(weight, row.storage))
        except ValueError as error:
            raise CheckpointError(f"{row.name} cannot be quantized: {error}; check the checkpoint") from None
        stored[piece] = pack_int4(tensor.values) if is_packed else tensor.values
        all_scales[piece] = tensor.scales
    stored.flush()
    del stored
    np.save(scales, all_scales, allow_pickle=False)
    seal = _seal(row, directory)
    temporary = seal.with_suffix(".partial")
    temporary.write_text(f"{sha256_file(values)} {sha256_file(scales)}", encoding="ascii")
    os.replace(temporary, seal)


def _is_whole(row: PlanRow, directory: Path) -> bool:
    try:
        sealed = _seal(row, directory).read_text(encoding="ascii")
        return sealed == " ".join(sha256_file(path) for path in _paths(row, directory))
    except FileNotFoundError:
        return False


def _paths(row: PlanRow, directory: Path) -> tuple[Path, Path]:
    return directory / f"{row.name}.values.npy", directory / f"{row.name}.scales.npy"


def _seal(row: PlanRow, directory: Path) -> Path:
    return directory / f"{row.name}.sha256"


def _padded(array: NDArray[np.float32], shape: tuple[int, ...]) -> NDArray[np.float32]:
    if array.shape == shape:
        return array
    grow = [(0, stored - true) for stored, true in zip(shape, array.shape, strict=True)]
    return np.pad(array, grow)
