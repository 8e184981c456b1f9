import json
from typing import Any

import numpy as np
import pytest

from medgemma_runtime.errors import TextError
from medgemma_runtime.host_cache import HostCache
from medgemma_runtime.static_cache import read_sizes

CHUNK, WINDOW, CONTEXT = 8, 12, 200
FACTS: dict[str, Any] = {
    "chunk": CHUNK,
    "context": CONTEXT,
    "window": WINDOW,
    "hidden": -30000.0,
    "local": {"rows": WINDOW, "rope_theta": 1e4, "rope_factor": 1.0, "rope_width": 4},
    "global": {"rows": CONTEXT, "rope_theta": 1e6, "rope_factor": 8.0, "rope_width": 4},
}
LAYERS = ("local", "global")


def new_cache() -> HostCache:
    return HostCache(read_sizes(json.dumps(FACTS)), LAYERS, width=2, dtype=np.float32)


def test_whatever_the_steps_every_token_sees_exactly_what_it_must() -> None:
    """A decoder is played whose keys are positions; padding's would be wrong everywhere."""
    rng = np.random.default_rng(3)
    for _ in range(20):
        cache, start = new_cache(), 0
        while start < CONTEXT:
            count = min(int(rng.choice([1, 1, 1, rng.integers(1, CHUNK + 1)])), CONTEXT - start)
            blocks = np.full(count, start if count > 2 and rng.random() < 0.5 else -1)
            step = cache.step(np.ones((count, 3)), blocks)
            tokens = 1 if count == 1 else CHUNK
            assert step.hidden.shape == (1, 3, 1, tokens)
            for layer, name in enumerate(LAYERS):
                new = np.where(np.arange(tokens) < count, start + np.arange(tokens), -7)
                held = cache.arrays[f"key_cache_{layer}"][0, 0, 0]
                keys = np.concatenate([held, new])
                mask = step.inputs[f"{name}_mask"]
                assert mask.shape == (1, len(keys), 1, tokens)
                for index in range(count):
                    position = start + index
                    seen = keys[mask[0, :, 0, index] == 0].tolist()
                    last = start + count - 1 if blocks[index] >= 0 else position
                    first = max(0, position - WINDOW + 1) if name == "local" else 0
                    assert sorted(seen) == list(range(first, last + 1)), (name, position)
                assert (mask[0, :, 0, count:] == -30000).all()
            new = np.broadcast_to(new.astype(np.float32), (1, 2, 1, tokens))
            cache.keep(step, {f"{kind}_{n}": new for kind in ("key", "value") for n in range(2)})
            start += count
        with pytest.raises(TextError, match="do not fit a decoder for 200"):
            cache.step(np.ones((1, 3)), np.full(1, -1))


def test_tables_are_those_of_the_positions_with_channels_first() -> None:
    cache = new_cache()
    cache.length = 5
    step = cache.step(np.ones((1, 2)), np.full(1, -1))
    np.testing.assert_allclose(step.inputs["local_cos"][0, 0, :, 0], np.cos([5.0, 0.05]), rtol=1e-6)
    np.testing.assert_allclose(step.inputs["global_sin"][0, 0, :, 0], np.sin([5 / 8, 5 / 8e3]), rtol=1e-6)


def test_what_is_held_is_float16_unless_asked() -> None:
    cache = HostCache(read_sizes(json.dumps(FACTS)), LAYERS, width=2)
    step = cache.step(np.ones((2, 3)), np.full(2, -1))
    assert {array.dtype for array in (step.hidden, *step.inputs.values(), *cache.arrays.values())} == {
        np.dtype(np.float16)
    }
