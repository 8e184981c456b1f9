"""Feeds a decoder: tokens and image features in, the next token's logits out, step by step."""

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medgemma_runtime.errors import EdgeError, NotFiniteError
from medgemma_runtime.kv_cache import STEP, KVCache
from medgemma_runtime.manifest import PromptSpec
from medgemma_runtime.session import Session

__all__ = ["Decoder"]


class Decoder:
    """The components `embed` and `decoder` of an artifact, run together.

    Args:
        embed: An open session of the component `embed`.
        decoder: An open session of the component `decoder`.
        spec: The artifact's prompt spec.
    """

    def __init__(self, embed: Session, decoder: Session, spec: PromptSpec) -> None:
        self._embed, self._decoder, self._spec = embed, decoder, spec
        [logits] = [tensor for tensor in decoder.entry.outputs if tensor.name == "logits"]
        self._logits_shape = tuple(1 if isinstance(dim, str) else dim for dim in logits.shape)
        self._takes = {tensor.name for tensor in decoder.entry.inputs}
        self._held: KVCache | None = None  # the conversation whose keys a program with caches inside holds

    def new_cache(self, capacity: int) -> KVCache:
        """An empty cache for a conversation of so many tokens at most."""
        return KVCache(
            self._decoder.entry.inputs,
            window=self._spec.window,
            capacity=min(capacity, self._spec.context),
            step=max(STEP, self._spec.tokens_per_image),
        )

    def read(
        self,
        cache: KVCache,
        ids: NDArray[np.int64],
        *,
        image_blocks: NDArray[np.int64] | None = None,
        image_features: NDArray[np.float32] | None = None,
    ) -> NDArray[np.float32]:
        """Append tokens to a conversation; the logits after the last of them.

        Args:
            cache: The conversation so far.
            ids: [S] token ids.
            image_blocks: [S], the same number for the tokens of one image, -1 for text; None for text only.
            image_features: [tokens, H] for all places of image tokens, in order.

        Returns:
            [vocabulary] float32, spare rows included.

        Raises:
            TextError: If the conversation would become longer than the cache.
            EdgeError: If there is not one image feature for each place.
            NotFiniteError: If the logits are not finite.
        """
        if image_blocks is None:
            image_blocks = np.full(len(ids), -1, np.int64)
        places = int((image_blocks >= 0).sum())
        given = 0 if image_features is None else len(image_features)
        if places != given:
            raise EdgeError(f"{places} places of image tokens and {given} image features; give one for each")
        taken = 0
        for part in _steps(image_blocks):
            places = int((image_blocks[part] >= 0).sum())
            features = (
                image_features[taken : taken + places] if image_features is not None and places else None
            )
            logits = self._step(cache, ids[part], image_blocks[part], features)
            taken += places
        if not np.isfinite(logits.sum()):  # a quarter of a million tests cost as much as a small layer
            raise NotFiniteError(
                "the decoder's logits are not finite; export the model at a higher precision"
            )
        return logits

    def _step(
        self,
        cache: KVCache,
        ids: NDArray[np.int64],
        blocks: NDArray[np.int64],
        features: NDArray[np.float32] | None,
    ) -> NDArray[np.float32]:
        count = len(ids)
        self._hold(cache)
        cache.make_room(count)
        embedded: dict[str, NDArray[Any]] = {"input_ids": ids[None]}
        if features is not None:
            embedded["image_features"] = features
        positions = np.arange(cache.length, cache.length + count, dtype=np.int64)
        known: dict[str, NDArray[Any]] = {
            "inputs_embeds": self._embed.run(embedded)["inputs_embeds"],
            "attention_mask": np.ones((1, cache.length + count), np.int64),
            "position_ids": positions[None],
            "cache_position": positions,
            "image_blocks": blocks[None],
            "local_start": np.array([cache.start], np.int64),
        }
        inputs = {name: array for name, array in known.items() if name in self._takes}
        logits: NDArray[np.float32] = np.empty(self._logits_shape, np.float32)
        self._decoder.run_into({**inputs, **cache.inputs}, {"logits": logits, **cache.outputs})
        cache.advance(count)
        return logits.reshape(-1)

    def _hold(self, cache: KVCache) -> None:
        """Refuse to go on with a conversation whose keys another one has overwritten."""
        if cache.inputs:
            return
        if cache.length and cache is not self._held:
            raise EdgeError(
                "this program holds the keys of one conversation at a time, and another one was begun since; "
                "read this conversation again from its start"
            )
        self._held = cache


def _steps(blocks: NDArray[np.int64]) -> Iterator[slice]:
    """Cut [S] tokens into steps of at most `STEP`, but never an image: its tokens see each other."""
    starts = np.flatnonzero(np.diff(blocks, prepend=-2) | (blocks < 0))
    start = 0
    while start < len(blocks):
        end = start + STEP
        if end >= len(blocks):
            end = len(blocks)
        else:
            allowed = starts[(starts > start) & (starts <= end)]
            later = starts[starts > end]
            end = int(allowed[-1]) if len(allowed) else int(later[0]) if len(later) else len(blocks)
        yield slice(start, end)
        start = end
