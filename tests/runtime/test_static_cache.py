import json
from typing import Any

import numpy as np
import pytest

from medgemma_runtime.errors import ArtifactError, TextError
from medgemma_runtime.static_cache import StaticCache, read_sizes

CHUNK, WINDOW, CONTEXT = 8, 12, 200
FACTS: dict[str, Any] = {
    "chunk": CHUNK,
    "context": CONTEXT,
    "window": WINDOW,
    "hidden": -30000.0,
    "local": {"rows": WINDOW + 2 * CHUNK, "rope_theta": 1e4, "rope_factor": 1.0, "rope_width": 4},
    "global": {"rows": CONTEXT + CHUNK, "rope_theta": 1e6, "rope_factor": 8.0, "rope_width": 4},
}


def new_cache(**changes: Any) -> StaticCache:
    return StaticCache(read_sizes(json.dumps(FACTS | changes)), dtype=np.float32)


def test_whatever_the_steps_every_token_sees_exactly_what_it_must() -> None:
    """A decoder is played by arrays of positions: rows are written, padding over them, and looked up."""
    rng = np.random.default_rng(3)
    for _ in range(20):
        cache, start = new_cache(), 0
        written = {"local": np.full(WINDOW + 2 * CHUNK, -1), "global": np.full(CONTEXT + CHUNK, -1)}
        blocks = np.full(CONTEXT, -1)
        while start < CONTEXT:
            count = min(int(rng.choice([1, 1, 1, rng.integers(1, CHUNK + 1)])), CONTEXT - start)
            if count > 2 and rng.random() < 0.5:
                blocks[start : start + count] = start  # an image
            function, inputs = cache.step(np.ones((count, 2)), blocks[start : start + count])
            tokens = 1 if count == 1 else CHUNK
            assert (function, inputs["inputs_embeds"].shape) == (
                "decode" if count == 1 else "prefill",
                (1, tokens, 2),
            )
            for name, rows in written.items():
                slot = int(inputs[f"{name}_slot"][0])
                rows[slot : slot + tokens] = -7  # padding
                rows[slot : slot + count] = np.arange(start, start + count)
                for index in range(count):
                    position = start + index
                    seen = set(rows[inputs[f"{name}_mask"][0, 0, index] == 0].tolist())
                    first = max(0, position - WINDOW + 1) if name == "local" else 0
                    expected = set(range(first, position + 1))
                    if blocks[position] >= 0:
                        expected |= (
                            set(range(start, start + count))
                            if name == "global"
                            else {other for other in range(start, start + count) if position - other < WINDOW}
                        )
                    assert seen == expected, (name, position)
            start += count


def test_padding_sees_nothing_and_the_last_token_is_named() -> None:
    _, inputs = new_cache().step(np.ones((3, 2)), np.full(3, -1))
    assert inputs["last"].tolist() == [2]
    assert (inputs["local_mask"][0, 0, 3:] == -30000).all()
    assert (inputs["inputs_embeds"][0, 3:] == 0).all()


def test_tables_are_those_of_the_positions() -> None:
    cache = new_cache()
    cache.step(np.ones((5, 2)), np.full(5, -1))
    _, inputs = cache.step(np.ones((1, 2)), np.full(1, -1))
    np.testing.assert_allclose(inputs["local_cos"][0, 0, 0], np.cos([5.0, 0.05]), rtol=1e-6)
    np.testing.assert_allclose(inputs["global_sin"][0, 0, 0], np.sin([5 / 8, 5 / 8e3]), rtol=1e-6)


def test_steps_never_cut_an_image() -> None:
    blocks = np.array([-1] * 3 + [0] * 8 + [1] * 8 + [-1] * 20)
    assert [(step.start, step.stop) for step in new_cache().steps(blocks)] == [
        (0, 3),
        (3, 11),
        (11, 19),
        (19, 27),
        (27, 35),
        (35, 39),
    ]
    assert list(new_cache().steps(blocks[:0])) == []


def test_a_conversation_that_does_not_fit_is_refused() -> None:
    cache = new_cache(context=6)
    cache.step(np.ones((6, 2)), np.full(6, -1))
    with pytest.raises(TextError, match="7 tokens do not fit a decoder for 6"):
        cache.step(np.ones((1, 2)), np.full(1, -1))
    with pytest.raises(ValueError, match="1 to 8 tokens and not 9"):
        new_cache().step(np.ones((9, 2)), np.full(9, -1))


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{}", "[" * 100_000, json.dumps(FACTS | {"more": 1}), json.dumps(FACTS | {"chunk": "x"})],
)
def test_sizes_that_are_not_to_the_form_are_refused(text: str) -> None:
    with pytest.raises(ArtifactError, match="not to the form"):
        read_sizes(text)
