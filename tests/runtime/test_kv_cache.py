"""Buffers for keys and values: what a local layer looks back at is always there, and moves as one."""

import numpy as np
import pytest

from medgemma_runtime.errors import TextError
from medgemma_runtime.kv_cache import KVCache
from medgemma_runtime.manifest import TensorSpec

WINDOW = 8


def cache_spec(layer, length):
    return TensorSpec(
        name=f"past_key_values.{layer}.key",
        dtype="float32",
        shape=("batch", 2, length, 4),
        description="keys",
        may_be_empty=True,
    )


INPUTS = (cache_spec(0, "past_local"), cache_spec(1, "past_global"))


def append(cache, tokens):
    """What a decoder does: write each new position, here its number, at its place in every buffer."""
    cache.make_room(tokens)
    new = np.arange(cache.length, cache.length + tokens, dtype=np.float32)
    for name, buffer in cache.inputs.items():
        first = cache.length - (cache.start if name.startswith("past_key_values.0") else 0)
        buffer[:, :, first : first + tokens] = new[:, None]
    cache.advance(tokens)


@pytest.mark.parametrize("steps", [[1] * 40, [5] * 8, [3, 5, 1, 5, 1, 1, 4], [5, 5, 1, 1, 1]])
def test_the_window_is_always_there(steps):
    cache = KVCache(INPUTS, window=WINDOW, capacity=64, step=5)
    for tokens in steps:
        append(cache, tokens)
        local, everything = cache.inputs.values()
        held = cache.length - cache.start
        assert held >= min(cache.length, WINDOW - 1)
        assert (local[0, 1, :held, 2] == np.arange(cache.start, cache.length)).all()
        assert (everything[0, 1, : cache.length, 2] == np.arange(cache.length)).all()
        assert local.shape[2] == WINDOW - 1 + 5 and everything.shape[2] == 64


def test_outputs_are_the_inputs_own_buffers():
    cache = KVCache(INPUTS, window=WINDOW, capacity=10)
    assert list(cache.outputs) == ["present.0.key", "present.1.key"]
    for given, written in zip(cache.inputs.values(), cache.outputs.values(), strict=True):
        assert given is written


def test_a_short_conversation_takes_no_more_than_it_needs():
    cache = KVCache(INPUTS, window=1024, capacity=10)
    assert {buffer.shape[2] for buffer in cache.inputs.values()} == {10}


def test_without_a_window_nothing_is_dropped():
    cache = KVCache((cache_spec(1, "past_global"),), window=None, capacity=12, step=4)
    for _ in range(12):
        append(cache, 1)
    assert (cache.start, cache.length) == (0, 12)


def test_what_does_not_fit_is_refused():
    cache = KVCache(INPUTS, window=WINDOW, capacity=64, step=5)
    append(cache, 5)
    with pytest.raises(TextError, match="65 tokens do not fit a cache for 64; start a longer one"):
        cache.make_room(60)
    with pytest.raises(ValueError, match="a step of 20 tokens is longer"):
        cache.make_room(20)
    assert (cache.start, cache.length) == (0, 5)
