"""The keys and values of a conversation so far, in buffers that the decoder appends to in place.

Layers with a window look back over `window - 1` positions only, so their buffers hold that many and some
room; when the room is used up, what is still looked at moves to the front. Layers without a window hold
everything.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medgemma_runtime.errors import TextError
from medgemma_runtime.manifest import TensorSpec

__all__ = ["KVCache", "STEP"]

STEP = 256
"""Tokens that a decoder reads at once at most: an image of MedGemma's, or as much text.

Attention is computed over all pairs of new tokens, seen or not, so longer steps waste more of it; shorter
ones gain nothing (measured on two cores with Gemma 3 270M: benchmarks/README.md).
"""

_PAST = "past_key_values."
_PRESENT = "present."


class KVCache:
    """Empty at first; `make_room` before a step, `advance` after it.

    Args:
        inputs: The decoder's inputs; those named `past_key_values.*` are its caches. Their third dimension is
            `past_local` for layers with a window, and `past_global` for the others.
        window: How many positions a layer with a window sees, the new one included; None if there is none.
        capacity: Positions that the conversation may have.
        step: Tokens of one step at most.

    Attributes:
        length: Positions so far.
        start: The first position that the buffers of layers with a window still hold.
        capacity: As given.
    """

    def __init__(
        self, inputs: Iterable[TensorSpec], *, window: int | None, capacity: int, step: int = STEP
    ) -> None:
        self.length = self.start = 0
        self.capacity = capacity
        self._kept = (window or 1) - 1
        self._local_rows = min(capacity, self._kept + step)
        self._local: dict[str, NDArray[Any]] = {}
        self._global: dict[str, NDArray[Any]] = {}
        for spec in inputs:
            if not spec.name.startswith(_PAST):
                continue
            is_local = spec.shape[2] == "past_local"
            shape = (1, int(spec.shape[1]), self._local_rows if is_local else capacity, int(spec.shape[3]))
            # Not cleared: a page that no position has reached takes no memory.
            (self._local if is_local else self._global)[spec.name] = np.empty(shape, spec.dtype)

    @property
    def inputs(self) -> Mapping[str, NDArray[Any]]:
        """The buffers by the names of the inputs they are given to."""
        return self._local | self._global

    @property
    def outputs(self) -> Mapping[str, NDArray[Any]]:
        """The same buffers by the names of the outputs that are written into them."""
        return {name.replace(_PAST, _PRESENT): buffer for name, buffer in self.inputs.items()}

    def make_room(self, tokens: int) -> None:
        """Prepare for so many new tokens.

        Raises:
            TextError: If the conversation would become longer than `capacity`.
        """
        if self.length + tokens > self.capacity:
            raise TextError(
                f"{self.length + tokens} tokens do not fit a cache for {self.capacity}; start a longer one"
            )
        held = self.length - self.start
        if not self._local or held + tokens <= self._local_rows:
            return
        moved = min(held, self._kept)
        if moved + tokens > self._local_rows:
            raise ValueError(f"a step of {tokens} tokens is longer than the cache was made for")
        for buffer in self._local.values():
            buffer[:, :, :moved] = buffer[:, :, held - moved : held].copy()
        self.start = self.length - moved

    def advance(self, tokens: int) -> None:
        """Note that a step appended so many tokens."""
        self.length += tokens
