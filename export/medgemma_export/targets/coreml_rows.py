"""The embedding of a decoder as rows that a host looks up.

Core ML's own lookup would widen the whole table in memory, and takes indices of 16 bits on some engines,
which 262,208 rows do not fit. A token needs one row. Where the decoder's package holds the table as its
output head, the rows are read from its weight file and are not stored twice.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medgemma_export.models.spec import Component
from medgemma_export.ops import Table
from medgemma_export.plan_ops import PlanOps
from medgemma_quantization.plan import PackedWeight
from medgemma_quantization.weights import QuantizedWeights

__all__ = ["RowPlaces", "Embedding", "describe_embedding", "write_rows"]


@dataclass(frozen=True, kw_only=True)
class RowPlaces:
    """Where a table lies: its path in the artifact, and where values and scales begin in that file."""

    path: str
    values: int
    scales: int | None


@dataclass(frozen=True, kw_only=True)
class Embedding:
    """What an `embed` component computes: rows of a table times a factor, image features in their places."""

    table: Table
    scale: float
    image_id: int | None


@dataclass
class _Survey(PlanOps):
    tables: list[tuple[Table, float]] = field(default_factory=list)
    image_id: int | None = None

    def scaled_embed(self, ids: None, table: Table, scale: float) -> None:
        self.tables.append((table, scale))

    def place_images(self, embeddings: None, ids: None, features: None, image_id: int) -> None:
        self.image_id = image_id


def describe_embedding(component: Component) -> Embedding:
    """The table and factor of an `embed` component."""
    survey = _Survey()
    component.forward(survey, dict.fromkeys((spec.name for spec in component.inputs), None))
    [(table, scale)] = survey.tables
    return Embedding(table=table, scale=scale, image_id=survey.image_id)


def write_rows(
    path: Path,
    embedding: Embedding,
    weights: QuantizedWeights,
    places: Mapping[str, RowPlaces],
    note: Callable[[PackedWeight], None],
    *,
    half: bool,
) -> None:
    """Write the description of the rows, and beside it the rows themselves where no package holds them.

    Args:
        path: The JSON file.
        embedding: What is looked up.
        weights: The table's values.
        places: Where its weights lie already, if they do.
        note: Told what was written.
        half: Whether a float table, and scales, are float16.
    """
    facts = {
        "width": embedding.table.width,
        "scale": embedding.scale,
        "image_id": embedding.image_id,
        "pieces": [
            _describe_piece(
                piece.weight,
                weights,
                places.get(piece.weight) or _write_piece(path, piece.weight, weights, note, half=half),
                half=half,
            )
            for piece in embedding.table.pieces
        ],
    }
    path.write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")


def _describe_piece(name: str, weights: QuantizedWeights, places: RowPlaces, *, half: bool) -> dict[str, Any]:
    row = weights.plan.by_name[name]
    return {
        "rows": row.stored_shape[0],
        "bits": row.storage.bits,
        "block": row.storage.block or row.stored_shape[1],
        "file": places.path,
        "values_offset": places.values,
        "scales_offset": places.scales,
        "scales_dtype": None if row.storage.is_float else "float16" if half else "float32",
    }


def _write_piece(
    path: Path, name: str, weights: QuantizedWeights, note: Callable[[PackedWeight], None], *, half: bool
) -> RowPlaces:
    """Append a weight to the file beside the description."""
    row = weights.plan.by_name[name]
    values, scales = _arrays(weights, name, half=half)
    file = path.with_suffix(".bin")
    with file.open("ab") as stream:
        start = stream.tell()
        values.tofile(stream)
        if scales is not None:
            scales.tofile(stream)
    note(PackedWeight(name=name, storage=row.storage, shape=row.stored_shape))
    return RowPlaces(
        path=f"{path.parent.name}/{file.name}",
        values=start,
        scales=None if scales is None else start + values.nbytes,
    )


def _arrays(weights: QuantizedWeights, name: str, *, half: bool) -> tuple[NDArray[Any], NDArray[Any] | None]:
    dtype = np.float16 if half else np.float32
    if weights.plan.by_name[name].storage.is_float:
        return weights.float(name).astype(dtype), None
    return weights.stored_values(name), weights.scales(name).astype(dtype)
