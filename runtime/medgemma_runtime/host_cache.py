"""Inputs for a decoder of fixed sizes whose caches the host holds, as Core ML's has for the Neural Engine.

A call takes the caches and gives keys and values of the new tokens; the host writes them to the caches
afterwards, the position p to row p modulo the number of rows. Channels come first: a cache is
[1, heads * D, 1, rows].
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medgemma_runtime.static_cache import LayerRows, StaticSizes, cut_steps, rotary_tables, step_size

__all__ = ["HostCache", "Step"]


@dataclass(frozen=True, kw_only=True)
class Step:
    """New tokens, as every part of the decoder takes them.

    Attributes:
        hidden: [1, H, 1, tokens]: embeddings of the new tokens, then padding.
        inputs: Rotary tables and masks by name.
        positions: Of the new tokens.
    """

    hidden: NDArray[Any]
    inputs: Mapping[str, NDArray[Any]]
    positions: NDArray[np.int64]


class HostCache:
    """Keys and values of a conversation, and which position each row of them holds.

    Args:
        sizes: What the decoder says of itself.
        layers: For each layer `local` or `global`.
        width: Of the keys of all heads.
        dtype: Of caches, tables, masks and the stream: float16, or float32 to see what float16 costs.

    Attributes:
        length: Positions so far.
        arrays: For each layer `key_cache_0` and `value_cache_0`, [1, width, 1, rows].
    """

    def __init__(
        self, sizes: StaticSizes, layers: Sequence[str], *, width: int, dtype: Any = np.float16
    ) -> None:
        self.sizes, self.length = sizes, 0
        self._dtype = dtype
        known = {"local": sizes.local, "global": sizes.all}
        self._kinds: dict[str, LayerRows] = {name: rows for name, rows in known.items() if rows}
        self._layers = tuple(layers)
        self.arrays: dict[str, NDArray[Any]] = {
            f"{kind}_cache_{layer}": np.zeros((1, width, 1, self._kinds[name].rows), self._dtype)
            for layer, name in enumerate(layers)
            for kind in ("key", "value")
        }

    def steps(self, blocks: NDArray[np.int64]) -> Iterator[slice]:
        """Cut new tokens into chunks, see `cut_steps`."""
        return cut_steps(blocks, self.sizes.chunk)

    def step(self, embeddings: NDArray[Any], blocks: NDArray[np.int64]) -> Step:
        """What the parts are given for more tokens; `keep` is called when all of them have run.

        Args:
            embeddings: [S, H].
            blocks: [S], the same number for the tokens of one image, -1 for text.

        Raises:
            TextError: If the conversation would become longer than the decoder's caches.
        """
        count = len(embeddings)
        tokens = step_size(self.sizes, self.length, count)
        positions = np.arange(self.length, self.length + count)
        hidden = np.zeros((1, embeddings.shape[1], 1, tokens), self._dtype)
        with np.errstate(over="ignore"):  # the program says what is too large for it
            hidden[0, :, 0, :count] = embeddings.T
        inputs: dict[str, NDArray[Any]] = {}
        for name, rows in self._kinds.items():
            tables = rotary_tables(rows, positions, tokens)
            cosines, sines = (table.astype(self._dtype).swapaxes(2, 3) for table in tables)
            mask = np.full((1, rows.rows + tokens, 1, tokens), self.sizes.hidden, self._dtype)
            held, new = self._seen(name, positions, blocks)
            mask[0, : rows.rows, 0, :count][held.T] = 0
            mask[0, rows.rows : rows.rows + count, 0, :count][new.T] = 0
            inputs |= {f"{name}_cos": cosines, f"{name}_sin": sines, f"{name}_mask": mask}
        return Step(hidden=hidden, inputs=inputs, positions=positions)

    def keep(self, step: Step, outputs: Mapping[str, NDArray[Any]]) -> None:
        """Write the new keys and values of all layers, `key_0` and so on, to their rows."""
        count = len(step.positions)
        for layer, name in enumerate(self._layers):
            rows = step.positions % self._kinds[name].rows
            for kind in ("key", "value"):
                new = outputs[f"{kind}_{layer}"][:, :, :, :count]
                self.arrays[f"{kind}_cache_{layer}"][:, :, :, rows] = new
        self.length += count

    def _seen(
        self, name: str, positions: NDArray[np.int64], blocks: NDArray[np.int64]
    ) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
        """[S, rows] and [S, S]: what each new token sees of the cache and of the new tokens."""
        window = self.sizes.window if name == "local" else None
        size = self._kinds[name].rows
        rows = np.arange(size)
        # The last position before the new ones that is in each row; negative where there is none.
        held = self.length - 1 - (self.length - 1 - rows) % size
        distances = positions[:, None] - held, positions[:, None] - positions
        same_image = (blocks[:, None] == blocks) & (blocks[:, None] >= 0)
        seen = np.broadcast_to(held >= 0, distances[0].shape), (distances[1] >= 0) | same_image
        if window is None:
            return seen
        return seen[0] & (distances[0] < window), seen[1] & (distances[1] < window)
