"""A decoder's embedding where a host looks it up: rows of a table in a file, described by a JSON file."""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import ConfigDict, TypeAdapter

from medgemma_runtime.artifact import Artifact
from medgemma_runtime.errors import ArtifactError, EdgeError
from medgemma_runtime.manifest import ComponentEntry
from medgemma_runtime.session import check_inputs

__all__ = ["EmbeddingRows", "RowLayout"]


@dataclass(frozen=True, kw_only=True)
class RowLayout:
    """What the JSON file says: element [r, j] is `scale * scales[r, j // block] * values[r, j]`.

    Attributes:
        rows: Of the table.
        width: Of a row.
        bits: Of a value: 4 (two to a byte, the first in the low half, two's complement), 8, or 16 and 32 for
            floats, which have no scales.
        block: Values that share a scale.
        scale: Factor of every row.
        image_id: The token whose places image features take; None if there is none.
        file: Where values and scales are, in the artifact.
        values_offset: Where in it the first value begins.
        scales_offset: Where the first scale begins.
        scales_dtype: Of the scales.
    """

    __pydantic_config__ = ConfigDict(extra="forbid")

    rows: int
    width: int
    bits: Literal[4, 8, 16, 32]
    block: int
    scale: float
    image_id: int | None
    file: str
    values_offset: int
    scales_offset: int | None
    scales_dtype: Literal["float16", "float32"] | None


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
        data = np.memmap(artifact.path(layout.file), mode="r")
        self.layout = layout
        values: NDArray[Any]
        if layout.bits in (16, 32):
            values = _mapped(data, layout.values_offset, f"float{layout.bits}", layout.rows, layout.width)
        else:
            kind, per_byte = ("uint8", 2) if layout.bits == 4 else ("int8", 1)
            values = _mapped(data, layout.values_offset, kind, layout.rows, layout.width // per_byte)
        self._values: NDArray[Any] | None = values
        self._scales: NDArray[Any] | None = None
        if layout.bits in (4, 8):
            blocks = layout.width // layout.block
            kind = str(layout.scales_dtype)
            self._scales = _mapped(data, layout.scales_offset or 0, kind, layout.rows, blocks)
        self.load_seconds = time.perf_counter() - started

    def run(self, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """See `Session`. In float32; a program that takes float16 rounds the result.

        Raises:
            EdgeError: If a name, dtype or shape differs from `entry`, an id is outside the table, there is
                not one image feature for each place, or the session is closed.
        """
        if self._values is None:
            raise EdgeError(f"component {self._component!r} is closed; open it again to run it")
        check_inputs(self.entry, inputs)
        ids = inputs["input_ids"]
        if ids.min() < 0 or ids.max() >= self.layout.rows:
            raise EdgeError(
                f"input_ids reach from {ids.min()} to {ids.max()} and the embedding has {self.layout.rows} "
                "rows; give ids of this model's tokenizer"
            )
        embeddings = self._rows(self._values, ids.reshape(-1)).reshape(*ids.shape, self.layout.width)
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
        self._values = self._scales = None

    def _rows(self, values: NDArray[Any], ids: NDArray[np.int64]) -> NDArray[np.float32]:
        """[n] ids to [n, width] float32, without `scale`."""
        found = values[ids]
        if self._scales is None:
            return found.astype(np.float32)
        if self.layout.bits == 4:
            nibbles = np.stack([found & 0x0F, found >> 4], axis=-1).reshape(len(ids), -1)
            found = (nibbles ^ 8).astype(np.int8) - np.int8(8)
        scales = np.repeat(self._scales[ids].astype(np.float32), self.layout.block, axis=1)
        return np.asarray(found.astype(np.float32) * scales)


def _mapped(data: NDArray[np.uint8], offset: int, kind: str, *shape: int) -> NDArray[Any]:
    dtype = np.dtype(kind).newbyteorder("<")
    end = offset + prod(shape) * dtype.itemsize
    if offset < 0 or end > len(data):
        raise ArtifactError(
            f"the embedding's rows should end at byte {end} of a file of {len(data)}; export again"
        )
    return data[offset:end].view(dtype).reshape(shape)
