"""Inputs for a decoder of fixed sizes whose caches are states inside it, as Core ML has them.

Such a decoder has two functions: `prefill` for a chunk of tokens, padded at the end, and `decode` for one. It
is told where the caches' rows for the new tokens begin, which rows each token sees, and the rotary tables.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import ConfigDict, TypeAdapter

from medgemma_runtime.errors import ArtifactError, TextError

__all__ = [
    "StaticCache",
    "StaticSizes",
    "LayerRows",
    "read_sizes",
    "cut_steps",
    "step_size",
    "rotary_tables",
]


@dataclass(frozen=True, kw_only=True)
class LayerRows:
    """The layers with a window, or those without.

    Attributes:
        rows: Rows of their cache.
        rope_theta: Base of their rotary embedding.
        rope_factor: What positions are divided by.
        rope_width: Width of a head.
    """

    __pydantic_config__ = ConfigDict(extra="forbid")

    rows: int
    rope_theta: float
    rope_factor: float
    rope_width: int


@dataclass(frozen=True, kw_only=True)
class StaticSizes:
    """What the decoder says of itself.

    Attributes:
        chunk: Tokens of `prefill`.
        context: Positions that a conversation may have.
        window: Positions that a layer with a window sees, itself included; None where there are none.
        hidden: What a mask adds to the score of a row that is not seen.
        local: The layers with a window, if any.
        all: The layers without one, if any.
    """

    __pydantic_config__ = ConfigDict(extra="forbid")

    chunk: int
    context: int
    window: int | None
    hidden: float
    local: LayerRows | None = None
    all: LayerRows | None = None


_SIZES: TypeAdapter[StaticSizes] = TypeAdapter(StaticSizes)


def read_sizes(text: str) -> StaticSizes:
    """Read what stands under `decoder` in a package's metadata.

    Raises:
        ArtifactError: If it is not to the form.
    """
    try:
        facts = json.loads(text)
        facts["all"] = facts.pop("global", None)  # `global` is no name in Python
        return _SIZES.validate_python(facts)
    except (ValueError, AttributeError, TypeError, RecursionError) as error:
        raise ArtifactError(
            f"the decoder's sizes are not to the form: {str(error).splitlines()[0]}; export again"
        ) from None


def cut_steps(blocks: NDArray[np.int64], chunk: int) -> Iterator[slice]:
    """Cut new tokens into chunks, but never an image: its tokens see each other.

    Args:
        blocks: [S], the same number for the tokens of one image, -1 for text.
        chunk: Tokens of a chunk, at most.
    """
    starts = np.flatnonzero(np.diff(blocks, prepend=-2) | (blocks < 0))
    bounds = [*starts.tolist(), len(blocks)]
    start = 0
    for bound, following in zip(bounds, [*bounds[1:], None], strict=True):
        if following is None or following - start > chunk:
            if bound > start:
                yield slice(start, bound)
            start = bound


def step_size(sizes: StaticSizes, length: int, count: int) -> int:
    """Tokens of the function that reads so many more after so many.

    Raises:
        TextError: If the conversation would become longer than the decoder's caches.
    """
    if length + count > sizes.context:
        raise TextError(
            f"{length + count} tokens do not fit a decoder for {sizes.context}; "
            "start a shorter conversation, or export with a longer --context"
        )
    if not 0 < count <= sizes.chunk:
        raise ValueError(f"a chunk has 1 to {sizes.chunk} tokens and not {count}")
    return 1 if count == 1 else sizes.chunk


def rotary_tables(
    layers: LayerRows, positions: NDArray[np.int64], tokens: int
) -> tuple[NDArray[Any], NDArray[Any]]:
    """Cosines and sines, [1, 1, tokens, D / 2], in the order of operations of transformers' float32."""
    width = np.float32(layers.rope_width)
    pairs = np.arange(0, layers.rope_width, 2, dtype=np.float32) / width
    frequencies = 1 / np.float32(layers.rope_theta) ** pairs / np.float32(layers.rope_factor)
    angles = np.zeros((1, 1, tokens, len(pairs)), np.float32)
    angles[0, 0, : len(positions)] = positions[:, None].astype(np.float32) * frequencies
    return np.cos(angles), np.sin(angles)


class _Rows:
    """Which position each row of one kind of cache holds."""

    def __init__(self, layers: LayerRows, *, window: int | None) -> None:
        self.layers, self.window = layers, window
        self.held = np.full(layers.rows, -1)
        self.next = 0

    def take(self, positions: NDArray[np.int64], tokens: int) -> int:
        """Rows for so many tokens, the first of which are at `positions`; the first row."""
        # What lies there is out of every window by then: the ring has two chunks more than the window.
        if self.next + tokens > len(self.held):
            self.next = 0
        start = self.next
        self.held[start : start + tokens] = -1
        self.held[start : start + len(positions)] = positions
        self.next = start + len(positions)
        return start

    def seen(self, positions: NDArray[np.int64], blocks: NDArray[np.int64], start: int) -> NDArray[np.bool_]:
        """[S, rows]: causal, within the window, and all of its own image."""
        distance = positions[:, None] - self.held
        row_blocks = np.full(len(self.held), -1)
        row_blocks[start : start + len(blocks)] = blocks
        seen = (distance >= 0) | ((blocks[:, None] == row_blocks) & (row_blocks >= 0))
        if self.window is not None:
            seen &= distance < self.window
        return np.asarray(seen & (self.held >= 0))


class StaticCache:
    """Follows a conversation, whose keys and values the decoder itself keeps.

    Args:
        sizes: What the decoder says of itself.
        dtype: Of its floating inputs.

    Attributes:
        length: Positions so far.
    """

    def __init__(self, sizes: StaticSizes, *, dtype: Any) -> None:
        self.sizes, self.length = sizes, 0
        self._dtype = dtype
        layers = (("local", sizes.local, sizes.window), ("global", sizes.all, None))
        self._kinds = {name: _Rows(rows, window=window) for name, rows, window in layers if rows}

    def steps(self, blocks: NDArray[np.int64]) -> Iterator[slice]:
        """Cut new tokens into chunks, but never an image: its tokens see each other.

        Args:
            blocks: [S], the same number for the tokens of one image, -1 for text.
        """
        return cut_steps(blocks, self.sizes.chunk)

    def step(
        self, embeddings: NDArray[Any], blocks: NDArray[np.int64]
    ) -> tuple[str, dict[str, NDArray[Any]]]:
        """Append tokens: the function to call, and its inputs.

        Args:
            embeddings: [S, H].
            blocks: [S], as `steps` takes them.

        Raises:
            TextError: If the conversation would become longer than the decoder's caches.
        """
        count = len(embeddings)
        tokens = step_size(self.sizes, self.length, count)
        positions = np.arange(self.length, self.length + count)
        padded = np.zeros((1, tokens, embeddings.shape[1]), self._dtype)
        with np.errstate(over="ignore"):  # the program says what is too large for it
            padded[0, :count] = embeddings
        inputs: dict[str, NDArray[Any]] = {"inputs_embeds": padded}
        if tokens > 1:
            inputs["last"] = np.array([count - 1], np.int32)
        for name, rows in self._kinds.items():
            start = rows.take(positions, tokens)
            mask = np.full((1, 1, tokens, len(rows.held)), self.sizes.hidden, self._dtype)
            mask[0, 0, :count][rows.seen(positions, blocks, start)] = 0
            cosines, sines = rotary_tables(rows.layers, positions, tokens)
            inputs |= {
                f"{name}_slot": np.array([start], np.int32),
                f"{name}_mask": mask,
                f"{name}_cos": cosines.astype(self._dtype),
                f"{name}_sin": sines.astype(self._dtype),
            }
        self.length += count
        return ("decode" if tokens == 1 else "prefill"), inputs
