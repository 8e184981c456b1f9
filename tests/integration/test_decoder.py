"""The decoder through its buffers, in place, held against the whole conversation at once in PyTorch."""

import numpy as np
import pytest

from medgemma_export.build import build, decide
from medgemma_export.recipe import Recipe
from medgemma_export.torch_ops import compute
from medgemma_quantization.scheme import SCHEMES
from medgemma_quantization.weights import quantize_weights
from medgemma_runtime import decoder as decoder_module
from medgemma_runtime import kv_cache
from medgemma_runtime.backends import open_session
from medgemma_runtime.decoder import Decoder
from medgemma_runtime.errors import EdgeError, TextError

LENGTH = 150  # the sample's window is 32
IMAGE = slice(40, 56)


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    out = tmp_path_factory.mktemp("decoder") / "artifact"
    recipe = Recipe(
        model="sample:medgemma-tiny",
        revision=None,
        target="onnx",
        scheme=SCHEMES["fp32"],
        components=("embed", "decoder"),
        out=out,
    )
    artifact, decision = build(recipe, progress=lambda *step: None), decide(recipe)
    weights = quantize_weights(
        decision.plan, decision.model.reader(decision.checkpoint), out.parent / "weights"
    )
    sessions = [open_session(artifact, name, threads=1) for name in ("embed", "decoder")]
    yield artifact, Decoder(*sessions, artifact.manifest.prompt), decision.model, weights
    for session in sessions:
        session.close()


@pytest.fixture(scope="module")
def conversation(opened):
    artifact, _, _, _ = opened
    rng = np.random.default_rng(9)
    ids = rng.integers(5, 200, LENGTH)
    blocks = np.full(LENGTH, -1)
    ids[IMAGE], blocks[IMAGE] = artifact.manifest.prompt.image_id, 0
    features = rng.normal(size=(16, 64)).astype(np.float32)
    return ids, blocks, features


@pytest.fixture(scope="module")
def reference(opened, conversation):
    """Logits after every one of the last tokens, each a forward over everything, without caches."""
    _, _, model, weights = opened
    parts = {component.name: component for component in model.components}
    ids, blocks, features = conversation
    x = compute(parts["embed"], weights, {"input_ids": ids[None], "image_features": features})
    past = {
        spec.name: np.zeros((1, spec.shape[1], 0, spec.shape[3]), np.float32)
        for spec in parts["decoder"].inputs
        if spec.name.startswith("past")
    }

    def after(length):
        inputs = {
            "inputs_embeds": x["inputs_embeds"][:, :length],
            "position_ids": np.arange(length)[None],
            "image_blocks": blocks[None, :length],
            "attention_mask": np.ones((1, length), np.int64),
            "local_start": np.array([0]),
        }
        return compute(parts["decoder"], weights, inputs | past)["logits"][0, 0]

    return after


# 20 forces a step that is longer than it, because the image is not cut.
@pytest.mark.parametrize("step", [20, 64, 256])
def test_in_place_equals_everything_at_once(opened, conversation, reference, monkeypatch, step):
    _, decoder, _, _ = opened
    monkeypatch.setattr(decoder_module, "STEP", step)
    monkeypatch.setattr(kv_cache, "STEP", step)
    ids, blocks, features = conversation
    cache = decoder.new_cache(LENGTH)
    prefill = 100
    logits = decoder.read(cache, ids[:prefill], image_blocks=blocks[:prefill], image_features=features)
    assert np.abs(logits - reference(prefill)).max() < 1e-4
    for length in range(prefill + 1, LENGTH + 1):
        logits = decoder.read(cache, ids[length - 1 : length])
        if length % 10 == 0:
            assert np.abs(logits - reference(length)).max() < 1e-4, length
    with pytest.raises(TextError, match="151 tokens do not fit a cache for 150"):
        decoder.read(cache, ids[:1])


def test_a_cache_that_lost_a_position_is_seen(opened, conversation, reference):
    """What the comparison above would miss if local caches were not looked at."""
    _, decoder, _, _ = opened
    ids, blocks, features = conversation
    cache = decoder.new_cache(LENGTH)
    decoder.read(cache, ids[:99], image_blocks=blocks[:99], image_features=features)
    cache.inputs["past_key_values.0.value"][0, 0, 98 - 5 - cache.start] = 0
    assert np.abs(decoder.read(cache, ids[99:100]) - reference(100)).max() > 1e-3


def test_a_corrupt_cache_is_an_error_and_not_an_answer(opened, conversation):
    _, decoder, _, _ = opened
    ids, _, _ = conversation
    cache = decoder.new_cache(LENGTH)
    decoder.read(cache, ids[:5])
    cache.inputs["past_key_values.0.key"][0, 0, 2] = np.nan
    with pytest.raises(EdgeError, match="logits are not finite"):
        decoder.read(cache, ids[5:6])


def test_features_must_fit_their_places(opened, conversation):
    artifact, decoder, _, _ = opened
    ids, blocks, features = conversation
    for given in (None, features[:15]):
        with pytest.raises(
            EdgeError, match=f"16 places of image tokens and {0 if given is None else 15} image features"
        ):
            decoder.read(decoder.new_cache(LENGTH), ids[:60], image_blocks=blocks[:60], image_features=given)
    with pytest.raises(EdgeError, match="failed while running"):
        open_session(artifact, "embed").run({"input_ids": ids[None], "image_features": features[:15]})
