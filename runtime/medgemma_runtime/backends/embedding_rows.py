"""A decoder's embedding where a host looks it up: rows of a table in a file, described by a JSON file."""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import ConfigDict, TypeAdapter

from medgemma_runtime.artifact import Artifact
from medgemma_runtime.errors import ArtifactError, EdgeError
from medgemma_runtime.manifest import ComponentEntry
from medgemma_runtime.session import check_inputs

__all__ = ["EmbeddingRows", "RowLayout", "RowPiece"]

_STRICT = ConfigDict(extra="forbid", allow_inf_nan=False)


@dataclass(frozen=True, kw_only=True)
class RowPiece:
    """Some rows of the table that are stored alike, from where the piece before ends.

    Attributes:
        rows: How many.
        bits: Of a value: 4 (two to a byte, the first in the low half, two's complement), 8, or 16 and 32 for
            floats, which have no scales.
        block: Values that share a scale.
        file: Where values and scales are, in the artifact.
        values_offset: Where in it the first value begins.
        scales_offset: Where the first scale begins.
        scales_dtype: Of the scales.
    """

    __pydantic_config__ = _STRICT

    rows: int
    bits: Literal[4, 8, 16, 32]
    block: int
    file: str
    values_offset: int
    scales_offset: int | None
    scales_dtype: Literal["float16", "float32"] | None

    def __post_init__(self) -> None:
        if min(self.rows, self.block) < 1:
            raise ValueError(f"a piece has {self.rows} rows and blocks of {self.block}")
        if self.has_scales != (self.bits < 16):
            raise ValueError(f"a piece of {self.bits} bits has scales or lacks them")

    @property
    def has_scales(self) -> bool:
        """Whether it says where they are and what."""
        return self.scales_offset is not None and self.scales_dtype is not None


@dataclass(frozen=True, kw_only=True)
class RowLayout:
    """What the JSON file says: element [r, j] is `scale * scales[r, j // block] * values[r, j]`.

    Attributes:
        width: Of a row.
        scale: Factor of every row.
        image_id: The token whose places image features take; None if there is none.
        pieces: The rows, one piece after the other; more than one where a budget stores some in more bits.
    """

    __pydantic_config__ = _STRICT

    width: int
    scale: float
    image_id: int | None
    pieces: tuple[RowPiece, ...]

    def __post_init__(self) -> None:
        for piece in self.pieces:
            if (
                self.width < 1
                or (piece.has_scales and self.width % piece.block)
                or self.width * piece.bits % 8
            ):
                raise ValueError(f"rows of {self.width} values are not of blocks of {piece.block}")

    @property
    def rows(self) -> int:
        """Of the table."""
        return sum(piece.rows for piece in self.pieces)


_LAYOUT: TypeAdapter[RowLayout] = TypeAdapter(RowLayout)


class EmbeddingRows:
    """The component `embed` of a Core ML artifact, as an app computes it.

    Args:
        artifact: An opened artifact.
        component: Its name in the manifest, whose program is the JSON file.

    Attributes:
        entry: Its inputs and outputs as the manifest states them.
        load_seconds: Time that opening took; rows are read when they are looked up.

    Raises:
        ArtifactError: If the JSON file is not to the form, or the table is not where it says.
    """

    entry: ComponentEntry
    load_seconds: float

    def __init__(self, artifact: Artifact, component: str) -> None:
        started = time.perf_counter()
        self.entry = artifact.component(component)
        self._component = component
        path = artifact.path(self.entry.program)
        try:
            layout = _LAYOUT.validate_json(path.read_bytes())
        except (OSError, ValueError) as error:
            raise ArtifactError(
                f"{self.entry.program} is not to the form: {str(error).splitlines()[0]}; export again"
            ) from None
        self.layout = layout
        self._pieces: list[_MappedPiece] | None = [
            _map_piece(piece, layout.width, artifact.path(piece.file)) for piece in layout.pieces
        ]
        self.load_seconds = time.perf_counter() - started

    def run(self, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """See `Session`. In float32; a program that takes float16 rounds the result.

        Raises:
            EdgeError: If a name, dtype or shape differs from `entry`, an id is outside the table, there is
                not one image feature for each place, or the session is closed.
        """
        if self._pieces is None:
            raise EdgeError(f"component {self._component!r} is closed; open it again to run it")
        check_inputs(self.entry, inputs)
        ids = inputs["input_ids"]
        if ids.min() < 0 or ids.max() >= self.layout.rows:
            raise EdgeError(
                f"input_ids reach from {ids.min()} to {ids.max()} and the embedding has {self.layout.rows} "
                "rows; give ids of this model's tokenizer"
            )
        embeddings = self._rows(self._pieces, ids.reshape(-1)).reshape(*ids.shape, self.layout.width)
        embeddings *= np.float32(self.layout.scale)
        features = inputs.get("image_features")
        places = ids == (-1 if self.layout.image_id is None else self.layout.image_id)
        given = 0 if features is None else len(features)
        if given != places.sum():
            raise EdgeError(
                f"{int(places.sum())} places of image tokens and {given} image features; give one for each"
            )
        if features is not None:
            embeddings[places] = features
        return {self.entry.outputs[0].name: embeddings}

    def run_into(self, inputs: Mapping[str, NDArray[Any]], outputs: Mapping[str, NDArray[Any]]) -> None:
        """See `Session`.

        Raises:
            EdgeError: As `run`.
        """
        for name, array in self.run(inputs).items():
            np.copyto(outputs[name], array)

    def close(self) -> None:
        """See `Session`."""
        self._pieces = None

    def _rows(self, pieces: list["_MappedPiece"], ids: NDArray[np.int64]) -> NDArray[np.float32]:
        """[n] ids to [n, width] float32, without `scale`."""
        found = np.empty((len(ids), self.layout.width), np.float32)
        start = 0
        for piece in pieces:
            inside = (ids >= start) & (ids < start + len(piece.values))
            found[inside] = piece.look_up(ids[inside] - start)
            start += len(piece.values)
        return found


@dataclass(frozen=True, kw_only=True, eq=False)
class _MappedPiece:
    """A piece as it lies in its file."""

    values: NDArray[Any]
    scales: NDArray[Any] | None
    layout: RowPiece

    def look_up(self, rows: NDArray[np.int64]) -> NDArray[np.float32]:
        found = self.values[rows]
        if self.scales is None:
            return found.astype(np.float32)
        if self.layout.bits == 4:
            nibbles = np.stack([found & 0x0F, found >> 4], axis=-1).reshape(len(rows), -1)
            found = (nibbles ^ 8).astype(np.int8) - np.int8(8)
        scales = np.repeat(self.scales[rows].astype(np.float32), self.layout.block, axis=1)
        return np.asarray(found.astype(np.float32) * scales)


def _map_piece(piece: RowPiece, width: int, path: Path) -> _MappedPiece:
    data = np.memmap(path, mode="r")
    if piece.bits in (16, 32):
        values = _mapped(data, piece.values_offset, f"float{piece.bits}", piece.rows, width)
        return _MappedPiece(values=values, scales=None, layout=piece)
    kind, per_byte = ("uint8", 2) if piece.bits == 4 else ("int8", 1)
    values = _mapped(data, piece.values_offset, kind, piece.rows, width // per_byte)
    kind, blocks = str(piece.scales_dtype), width // piece.block
    scales = _mapped(data, piece.scales_offset or 0, kind, piece.rows, blocks)
    return _MappedPiece(values=values, scales=scales, layout=piece)


def _mapped(data: NDArray[np.uint8], offset: int, kind: str, *shape: int) -> NDArray[Any]:
    dtype = np.dtype(kind).newbyteorder("<")
    end = offset + prod(shape) * dtype.itemsize
    if offset < 0 or end > len(data):
        raise ArtifactError(
            f"the embedding's rows should end at byte {end} of a file of {len(data)}; export again"
        )
    return data[offset:end].view(dtype).reshape(shape)
