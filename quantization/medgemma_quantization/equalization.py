"""The factors of a model's folds, and the weights as they are with them.

Targets and methods see the changed weights only, through the reader, so that all of them get the same.
"""

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from medgemma_quantization.folds import Fold
from medgemma_quantization.plan import QuantPlan
from medgemma_quantization.weights import ReadWeight
from medgemma_runtime.errors import EdgeError

__all__ = ["Equalization", "FACTORS_NAME", "note_equalized", "read_factors"]

FACTORS_NAME: Final = "equalization.safetensors"
"""The file of factors, beside integers and in an artifact: one tensor for each fold, by its source."""


@dataclass(frozen=True, kw_only=True)
class Equalization:
    """Factors for some of a model's folds; those without any stay as they are.

    Attributes:
        folds: Of the model.
        factors: By the fold's source, float32 above zero.
    """

    folds: tuple[Fold, ...]
    factors: Mapping[str, NDArray[np.float32]]

    def __post_init__(self) -> None:
        known = {fold.source: fold for fold in self.folds}
        for source, values in self.factors.items():
            if source not in known or values.shape != (known[source].factors,):
                raise EdgeError(
                    f"the factors of {source} {values.shape} belong to another model; calibrate again"
                )
            if not (np.isfinite(values).all() and (values > 0).all()):
                raise EdgeError(f"a factor of {source} is not finite or not above zero; calibrate again")

    @cached_property
    def _columns(self) -> dict[str, NDArray[np.float32]]:
        return {
            name: fold.expand(self.factors[fold.source])
            for fold in self.folds
            if fold.source in self.factors
            for name in fold.readers
        }

    @cached_property
    def _sources(self) -> dict[str, Fold]:
        return {
            f"{fold.source}.{part}": fold
            for fold in self.folds
            if fold.source in self.factors
            for part in ("weight", "bias")
        }

    def reader(self, read: ReadWeight) -> ReadWeight:
        """Reads the changed weights."""

        def read_changed(name: str, rows: slice | None = None) -> NDArray[np.float32]:
            weight = read(name, rows)
            if name in self._sources:
                fold = self._sources[name]
                factors = self.factors[fold.source] if rows is None else self.factors[fold.source][rows]
                if fold.kind == "gain less one":
                    # In float64, or the sum with 1 would cost a gain near 0 its last digits.
                    weight = ((1 + weight.astype(np.float64)) / factors - 1).astype(np.float32)
                else:
                    weight = (weight.T / factors).T
            if name in self._columns:
                weight = weight * self._columns[name]
            return weight

        return read_changed

    def save(self, directory: Path) -> None:
        """Write the factors; the file is whole or absent."""
        from safetensors.numpy import save_file

        temporary = directory / f".{FACTORS_NAME}.partial"
        save_file(dict(self.factors), temporary)
        os.replace(temporary, directory / FACTORS_NAME)


def read_factors(directory: Path, folds: Iterable[Fold]) -> Equalization:
    """Read what `Equalization.save` wrote.

    Raises:
        EdgeError: If the file is absent, damaged, or of another model.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        factors = load_file(directory / FACTORS_NAME)
    except (OSError, SafetensorError) as error:
        raise EdgeError(
            f"{directory / FACTORS_NAME} holds no factors ({error}); calibrate again to make it"
        ) from None
    return Equalization(folds=tuple(folds), factors=factors)


def note_equalized(plan: QuantPlan, folds: Iterable[Fold]) -> QuantPlan:
    """The plan with a note on the weights that factors change: the same for all layers, to be summed up."""
    notes: dict[str, str] = {}
    for fold in folds:
        before = "matrix" if fold.kind == "rows" else "norm"
        for name in fold.readers:
            notes[name] = f"{notes.get(name, '')}; columns scaled, which the {before} before takes back"
        for part in ("weight", "bias"):
            name = f"{fold.source}.{part}"
            notes[name] = f"{notes.get(name, '')}; takes back the scale of what reads it"
    rows = tuple(
        replace(row, reason=row.reason + notes[row.name]) if row.name in notes else row for row in plan.rows
    )
    return replace(plan, rows=rows)
