"""The result: integers and scales for every weight of a plan, some rows of one tensor in memory at a time.

They are kept in a directory, a pair of `.npy` files for each integer weight and a third that holds their
hashes and is written last: an interrupted run continues where it stopped, what is damaged is made again, and
every target reads the same numbers.
"""

import hashlib
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from medgemma_quantization.activations import ActivationRange
from medgemma_quantization.affine import (
    QuantizedTensor,
    pack_integers,
    unpack_integers,
)
from medgemma_quantization.methods.method import FindRounder, Rounder
from medgemma_quantization.methods.rounding import nearest
from medgemma_quantization.plan import PlanRow, QuantPlan
from medgemma_runtime.artifact import sha256_file
from medgemma_runtime.errors import CheckpointError

__all__ = [
    "QuantizedWeights",
    "ReadWeight",
    "quantize_weights",
    "store_integers",
    "keep_integers",
    "is_whole",
    "rounding_bytes",
    "source_fingerprint",
]

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
        inputs: Static ranges of what integer matrices multiply, by the matrices' names; empty for a plan
            without any.
    """

    plan: QuantPlan
    directory: Path
    read: ReadWeight
    inputs: Mapping[str, ActivationRange] = field(default_factory=dict)

    def has(self, name: str) -> bool:
        """Whether the integers of a weight have been made."""
        return (self.directory / f"{name}.sha256").exists()

    def quantized(self, name: str, rows: slice | None = None) -> QuantizedTensor:
        """Integers and scales of a weight that the plan stores as integers, or of some of its rows."""
        row = self.plan.by_name[name]
        values = unpack_integers(self.stored_values(name, rows), row.storage)
        return QuantizedTensor(
            storage=row.storage, values=values, scales=self.scales(name, rows), input=self.inputs.get(name)
        )

    def current(self, name: str, rows: slice | None = None) -> NDArray[np.float32]:
        """A weight as it is by now: what its integers stand for once they are made, float before."""
        if self.plan.by_name[name].storage.is_float or not self.has(name):
            return self.read(name, rows)
        return self.quantized(name, rows).dequantize()

    def stored_values(self, name: str, rows: slice | None = None) -> NDArray[Any]:
        """The integers as they lie on disk: as `pack_integers` packs them."""
        return _load(self.directory / f"{name}.values.npy", rows)

    def scales(self, name: str, rows: slice | None = None) -> NDArray[np.float32]:
        """The scales of a weight that the plan stores as integers, [outputs, blocks], or its palettes."""
        if rows is not None and (shared := self.plan.by_name[name].storage.palette):
            if rows.start % shared or rows.stop % shared:
                raise ValueError(f"rows {rows.start} to {rows.stop} of {name} cut a palette of {shared}")
            rows = slice(rows.start // shared, rows.stop // shared)
        return _load(self.directory / f"{name}.scales.npy", rows)

    def float(self, name: str) -> NDArray[np.float32]:
        """A weight that the plan keeps float, rounded to float16 and padded where the plan says so.

        Raises:
            CheckpointError: If a value is too large for float16.
        """
        row = self.plan.by_name[name]
        weight = _padded(self.read(name), row.stored_shape)
        if row.storage.bits == 32:
            return weight
        with np.errstate(over="ignore"):
            rounded = weight.astype(np.float16)
        if not np.isfinite(rounded).all():
            raise CheckpointError(f"{name} has values that float16 cannot hold; keep it float32")
        return rounded.astype(np.float32)


def quantize_weights(
    plan: QuantPlan,
    read: ReadWeight,
    directory: Path,
    *,
    find: FindRounder = nearest,
    progress: Callable[[int, int], None] | None = None,
) -> QuantizedWeights:
    """Round every integer weight of a plan, knowing nothing of its inputs.

    Args:
        plan: What to do.
        read: Reads a weight of the model by name.
        directory: Where the integers go; those that are there already, and whole, are kept.
        find: How to find them, such as a method of `METHODS` that needs no samples.
        progress: Called with the rows done and their number.

    Raises:
        CheckpointError: If a weight is not finite, or too large for a float16 scale.
    """
    directory.mkdir(parents=True, exist_ok=True)
    integer_rows = [row for row in plan.rows if not row.storage.is_float]
    for done, row in enumerate(integer_rows):
        if progress is not None:
            progress(done, len(integer_rows))
        if not is_whole(row, directory):
            store_integers(row, read, directory, find(row.storage, None))
    if progress is not None:
        progress(len(integer_rows), len(integer_rows))
    return QuantizedWeights(plan=plan, directory=directory, read=read)


def rounding_bytes(row: PlanRow) -> int:
    """Memory that rounding a weight takes, reading included: 17.5 bytes a value of a piece were measured."""
    if row.storage.is_float:
        return 0
    return 18 * min(math.prod(row.stored_shape), _PIECE_VALUES)


def source_fingerprint(readers: Path) -> str:
    """Hash of the code that makes integers: those made by other code are not taken over.

    Args:
        readers: A directory; the modules in and below it read the float weights.
    """
    digest = hashlib.sha256()
    for directory in (Path(__file__).parent, readers):
        for path in sorted(directory.rglob("*.py")):
            digest.update(path.read_bytes())
    return digest.hexdigest()


def store_integers(row: PlanRow, read: ReadWeight, directory: Path, round_rows: Rounder) -> None:
    """Round one weight, some of its rows at a time, and seal what is written.

    Raises:
        CheckpointError: If a weight is not finite, or too large for a float16 scale.
    """
    values, scales = _paths(row, directory)
    outputs, inputs = row.stored_shape
    shared = row.storage.palette or 1
    stored = np.lib.format.open_memmap(
        values,
        mode="w+",
        dtype=np.int8 if row.storage.bits == 8 else np.uint8,
        shape=(outputs, inputs * row.storage.bits // 8),
    )
    all_scales = np.empty((outputs // shared, row.scale_count // (outputs // shared)), np.float32)
    step = max(1, _PIECE_VALUES // (inputs * shared)) * shared
    for start in range(0, outputs, step):
        piece = slice(start, min(start + step, outputs))
        weight = read(row.name, slice(start, min(piece.stop, row.shape[0])))
        weight = _padded(weight, (piece.stop - start, inputs))
        try:
            tensor = round_rows(weight)
        except ValueError as error:
            raise CheckpointError(f"{row.name} cannot be quantized: {error}; check the checkpoint") from None
        stored[piece] = pack_integers(tensor.values, row.storage)
        all_scales[start // shared : piece.stop // shared] = tensor.scales
    stored.flush()
    del stored
    np.save(scales, all_scales, allow_pickle=False)
    _seal(row, directory)


def keep_integers(
    row: PlanRow, directory: Path, values: NDArray[np.int8], scales: NDArray[np.float32]
) -> None:
    """Keep a weight whose integers are known already.

    Args:
        row: How it is stored.
        directory: Where.
        values: [outputs, inputs].
        scales: [outputs, blocks].
    """
    values_path, scales_path = _paths(row, directory)
    np.save(values_path, pack_integers(np.ascontiguousarray(values), row.storage), allow_pickle=False)
    np.save(scales_path, scales, allow_pickle=False)
    _seal(row, directory)


def is_whole(row: PlanRow, directory: Path) -> bool:
    """Whether the integers of a weight are there and undamaged."""
    try:
        return _seal_path(row, directory).read_text(encoding="ascii") == _hashes(row, directory)
    except FileNotFoundError:
        return False


def _paths(row: PlanRow, directory: Path) -> tuple[Path, Path]:
    return directory / f"{row.name}.values.npy", directory / f"{row.name}.scales.npy"


def _seal(row: PlanRow, directory: Path) -> None:
    """Say that a weight is whole, with the hashes of its files; written last, and at once."""
    seal = _seal_path(row, directory)
    temporary = seal.with_suffix(".partial")
    temporary.write_text(_hashes(row, directory), encoding="ascii")
    os.replace(temporary, seal)


def _hashes(row: PlanRow, directory: Path) -> str:
    return " ".join(sha256_file(path) for path in _paths(row, directory))


def _seal_path(row: PlanRow, directory: Path) -> Path:
    return directory / f"{row.name}.sha256"


def _load(path: Path, rows: slice | None) -> NDArray[Any]:
    """An array, or some rows of it without reading the rest."""
    array: NDArray[Any] = np.load(path, mmap_mode=None if rows is None else "r", allow_pickle=False)
    return array if rows is None else np.array(array[rows])


def _padded(array: NDArray[np.float32], shape: tuple[int, ...]) -> NDArray[np.float32]:
    if array.shape == shape:
        return array
    grow = [(0, stored - true) for stored, true in zip(shape, array.shape, strict=True)]
    return np.pad(array, grow)
