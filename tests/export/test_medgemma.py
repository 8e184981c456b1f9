"""Every form in which MedGemma's checkpoints are found describes the same model.

The forms are those of Google's releases, written with transformers 4.50 (Gemma 3, MedGemma 1.0), 4.5x (27B)
and later (1.5), and of what today's version writes. Sizes are the tiny sample's; what a form leaves out is
what the released files leave out, where the sizes allow it.
"""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

from medgemma_export.checkpoint import Checkpoint, check_tensors, open_checkpoint
from medgemma_export.models import ModelSpec, load_model, medgemma
from medgemma_export.models.gemma3 import Decoder
from medgemma_export.models.medgemma import text_decoder
from medgemma_export.models.spec import read_json
from medgemma_export.ops import Heads, Rotary
from medgemma_runtime.errors import CheckpointError

IMAGE_ID, STOP_IDS = 1832, (1, 5)

# What even the shortest released file says of the text decoder: all else is the class's default there.
SIZES = {
    "hidden_size": 64,
    "intermediate_size": 160,
    "model_type": "gemma3_text",
    "num_hidden_layers": 8,
    "sliding_window": 32,
    # Said by none of them, because the released models have the defaults.
    "head_dim": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "query_pre_attn_scalar": 16,
    "vocab_size": 1896,
}
VISION = {
    "hidden_size": 64,
    "image_size": 224,
    "intermediate_size": 216,
    "model_type": "siglip_vision_model",
    "num_attention_heads": 4,
    "num_hidden_layers": 3,
    "patch_size": 14,
    "vision_use_head": False,
}
OLD_ROPE = {"rope_scaling": {"factor": 8.0, "rope_type": "linear"}}
OLD_ROPE_IN_FULL = {**OLD_ROPE, "rope_theta": 1_000_000.0, "rope_local_base_freq": 10_000.0}
NEW_ROPE = {
    "rope_parameters": {
        "full_attention": {"factor": 8.0, "rope_theta": 1_000_000.0, "rope_type": "linear"},
        "sliding_attention": {"rope_theta": 10_000.0, "rope_type": "default"},
    }
}
IN_FULL = {
    "attention_bias": False,
    "attention_dropout": 0.0,
    "attn_logit_softcapping": None,
    "final_logit_softcapping": None,
    "hidden_activation": "gelu_pytorch_tanh",
    "initializer_range": 0.02,
    "max_position_embeddings": 131_072,
    "rms_norm_eps": 1e-06,
    "use_cache": True,
}
LAYER_TYPES = {"layer_types": [*["sliding_attention"] * 5, "full_attention", *["sliding_attention"] * 2]}
TOKENS = {"boi_token_index": 6, "eoi_token_index": 7, "image_token_index": IMAGE_ID}
TOP = {
    "architectures": ["Gemma3ForConditionalGeneration"],
    "mm_tokens_per_image": 16,
    "model_type": "gemma3",
    "vision_config": VISION,
}
EOS = {"eos_token_id": [1, 5]}

MULTIMODAL = {
    "as transformers 4.50 wrote it": {
        **TOP,
        **TOKENS,
        **EOS,
        "initializer_range": 0.02,
        "text_config": {**SIZES, **OLD_ROPE},
        "torch_dtype": "bfloat16",
        "transformers_version": "4.50.0.dev0",
    },
    "with every default, as later 4.5x wrote it": {
        **TOP,
        **TOKENS,
        **EOS,
        "text_config": {
            **SIZES,
            **IN_FULL,
            **OLD_ROPE_IN_FULL,
            "cache_implementation": "hybrid",
            "sliding_window_pattern": 6,
            "torch_dtype": "bfloat16",
        },
        "torch_dtype": "bfloat16",
        "transformers_version": "4.51.3",
    },
    "with layer types": {
        **TOP,
        **TOKENS,
        **EOS,
        "dtype": "bfloat16",
        "text_config": {
            **SIZES,
            **IN_FULL,
            **OLD_ROPE_IN_FULL,
            **LAYER_TYPES,
            "_sliding_window_pattern": 6,
            "dtype": "bfloat16",
            "use_bidirectional_attention": False,
        },
        "transformers_version": "4.57.1",
    },
    "as transformers 5 writes it": {
        **TOP,
        **TOKENS,
        **EOS,
        "dtype": "bfloat16",
        "text_config": {
            **SIZES,
            **IN_FULL,
            **NEW_ROPE,
            **LAYER_TYPES,
            "bos_token_id": 2,
            "eos_token_id": 1,
            "pad_token_id": 0,
            "tie_word_embeddings": True,
        },
        "tie_word_embeddings": True,
        "transformers_version": "5.23.0",
    },
    "with ids called ids": {
        **TOP,
        **EOS,
        "boi_token_id": 6,
        "eoi_token_id": 7,
        "image_token_id": IMAGE_ID,
        "text_config": {**SIZES, **NEW_ROPE},
    },
    "without begin and end of image, dtype and version": {
        **TOP,
        **EOS,
        "image_token_index": IMAGE_ID,
        "text_config": {**SIZES, **OLD_ROPE},
    },
    "with nothing that ends an answer": {**TOP, **TOKENS, "text_config": {**SIZES, **OLD_ROPE}},
}
TEXT_ONLY = {
    "as transformers 4.50 wrote it": {**SIZES, **EOS, **OLD_ROPE_IN_FULL, **IN_FULL, "bos_token_id": 2},
    "as transformers 5 writes it": {**SIZES, **EOS, **NEW_ROPE, **IN_FULL, **LAYER_TYPES},
    "with nothing that ends an answer": {**SIZES, **OLD_ROPE},
}

# What the parts are called: in Google's files, in those that transformers writes, and in memory.
SPELLINGS = {
    "released": ("language_model.model.", "vision_tower.vision_model.", "multi_modal_projector."),
    "written by transformers 5": ("language_model.model.", "vision_tower.", "multi_modal_projector."),
    "saved from memory, 4.52": (
        "model.language_model.",
        "model.vision_tower.vision_model.",
        "model.multi_modal_projector.",
    ),
    "saved from memory, 5": ("model.language_model.", "model.vision_tower.", "model.multi_modal_projector."),
}
PARTS = SPELLINGS["written by transformers 5"]


@pytest.fixture(scope="module")
def tiny() -> Checkpoint:
    return open_checkpoint("sample:medgemma-tiny")


@pytest.fixture(scope="module")
def model(tiny) -> ModelSpec:
    return load_model(tiny)


def found_as(tiny: Checkpoint, directory: Path, config: dict, names: dict[str, str]) -> Checkpoint:
    """The sample's weights under other names, beside a config.json of another form.

    Args:
        names: A tensor's name in this checkpoint to that in the sample.
    """
    for name in ("tokenizer.json", "tokenizer_config.json", "preprocessor_config.json"):
        shutil.copyfile(tiny.file(name), directory / name)
    return replace(
        tiny,
        id="found",
        config=config,
        directory=directory,
        tensors={name: replace(tiny.tensors[old], name=name) for name, old in names.items()},
        reader=lambda info, rows: tiny.read(names[info.name], rows=rows),
    )


def respelled(tiny: Checkpoint, spelling: str) -> dict[str, str]:
    names = {}
    for name in tiny.tensors:
        part = next(index for index, prefix in enumerate(PARTS) if name.startswith(prefix))
        names[SPELLINGS[spelling][part] + name.removeprefix(PARTS[part])] = name
    return names


@pytest.fixture
def decoders(monkeypatch) -> list[Decoder]:
    """The decoders that models were described with."""
    described: list[Decoder] = []

    def note(*arguments, **options):
        described.append(text_decoder(*arguments, **options))
        return described[-1]

    monkeypatch.setattr(medgemma, "text_decoder", note)
    return described


DECODER = Decoder(
    prefix="language_model",
    width=64,
    mlp_width=160,
    vocabulary=1896,
    heads=Heads(query=4, kv=2, width=32),
    windows=(32, 32, 32, 32, 32, None, 32, 32),
    local_rotary=Rotary(theta=1e4, factor=1.0, width=32),
    global_rotary=Rotary(theta=1e6, factor=8.0, width=32),
    attention_scale=0.25,
    embedding_scale=8.0,
    eps=1e-6,
    head=None,
)


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("form", MULTIMODAL)
def test_a_vision_language_model_in_any_form(tiny, model, decoders, tmp_path, form, spelling):
    found = found_as(tiny, tmp_path, MULTIMODAL[form], respelled(tiny, spelling))
    described = load_model(found)
    check_tensors(found, described.checkpoint_shapes())
    assert decoders == [DECODER]
    prompt = described.prompt
    assert (prompt.image_id, prompt.tokens_per_image, prompt.bos_id) == (IMAGE_ID, 16, 2)
    assert prompt.stop_ids == ((1, 106) if "nothing" in form else STOP_IDS)
    assert prompt.context == 131_072
    assert [(part.name, part.inputs, part.outputs) for part in described.components] == [
        (part.name, part.inputs, part.outputs) for part in model.components
    ]
    assert described.weights() == model.weights()
    read, expected = described.reader(found), model.reader(tiny)
    for weight in described.weights():
        np.testing.assert_array_equal(read(weight.name), expected(weight.name), err_msg=weight.name)


@pytest.mark.parametrize("form", TEXT_ONLY)
def test_a_text_model_in_any_form(tiny, model, decoders, tmp_path, form):
    """As 27B's text model: no tower, and the decoder's names without a prefix of their own."""
    names = {
        "model." + name.removeprefix(PARTS[0]): name for name in tiny.tensors if name.startswith(PARTS[0])
    }
    config = {**TEXT_ONLY[form], "architectures": ["Gemma3ForCausalLM"]}
    found = found_as(tiny, tmp_path, config, names)
    described = load_model(found)
    check_tensors(found, described.checkpoint_shapes())
    assert decoders == [DECODER]
    assert (described.prompt.image_id, described.prompt.tokens_per_image) == (None, 0)
    assert described.prompt.stop_ids == ((1, 106) if "nothing" in form else STOP_IDS)
    assert [component.name for component in described.components] == ["embed", "decoder"]
    read, expected = described.reader(found), model.reader(tiny)
    for weight in described.weights():
        np.testing.assert_array_equal(read(weight.name), expected(weight.name), err_msg=weight.name)


def test_what_ends_an_answer_is_said_by_the_generation_config(tiny, tmp_path):
    config = MULTIMODAL["as transformers 4.50 wrote it"]
    found = found_as(tiny, tmp_path, config, respelled(tiny, "released"))
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 5, 9]}))
    assert load_model(found).prompt.stop_ids == (1, 5, 9)
    (tmp_path / "generation_config.json").write_text(json.dumps({"do_sample": True}))
    assert load_model(found).prompt.stop_ids == STOP_IDS


# Fine-tunes are saved with either; a head that the config calls tied, and is there, was trained.
@pytest.mark.parametrize("head", ["lm_head.weight", "language_model.lm_head.weight"])
@pytest.mark.parametrize("says_tied", [True, False, None])
def test_a_head_that_is_there_is_used(tiny, decoders, tmp_path, head, says_tied):
    names = respelled(tiny, "released") | {head: "language_model.model.embed_tokens.weight"}
    config = MULTIMODAL["with layer types"]
    if says_tied is not None:
        config = config | {"tie_word_embeddings": says_tied}
    found = found_as(tiny, tmp_path, config, names)
    check_tensors(found, load_model(found).checkpoint_shapes())
    assert decoders == [replace(DECODER, head="lm_head")]


def test_a_head_that_should_be_there_is_missed(tiny, tmp_path):
    config = MULTIMODAL["with layer types"] | {"tie_word_embeddings": False}
    found = found_as(tiny, tmp_path, config, respelled(tiny, "released"))
    with pytest.raises(CheckpointError, match=r"lm_head\.weight missing"):
        check_tensors(found, load_model(found).checkpoint_shapes())


def test_a_form_that_says_something_else_is_seen(tiny, decoders, tmp_path):
    """The comparison can fail: another window, another factor, and a pattern of layers of its own."""
    changes = (
        {"sliding_window": 33},
        {"rope_scaling": {"factor": 4.0, "rope_type": "linear"}},
        {"layer_types": ["sliding_attention"] * 8},
        {"query_pre_attn_scalar": 32},
    )
    for change in changes:
        form = MULTIMODAL["as transformers 4.50 wrote it"]
        config = form | {"text_config": form["text_config"] | change}
        load_model(found_as(tiny, tmp_path, config, respelled(tiny, "released")))
    assert DECODER not in decoders and len(decoders) == len(changes)


@pytest.mark.parametrize("content", ["{", "[" * 100_000, '{"rescale_factor": ' + "9" * 5000 + "}"])
def test_a_file_beside_the_weights_that_is_no_json_is_named(tiny, tmp_path, content):
    (tmp_path / "preprocessor_config.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"preprocessor_config\.json is no JSON"):
        read_json(replace(tiny, directory=tmp_path), "preprocessor_config.json")


@pytest.mark.parametrize(
    ("part", "changes", "message"),
    [
        (None, {"architectures": [["Gemma3ForCausalLM"]]}, "of architecture .* this version exports"),
        (None, {"text_config": 3}, r"config\.json is no Gemma3Config"),
        ("text_config", {"hidden_size": "wide"}, r"config\.json is no Gemma3Config"),
        ("vision_config", {"num_attention_heads": 2.5}, r"config\.json is no Gemma3Config"),
        ("text_config", {"num_hidden_layers": 10**9}, r"1000000000 layers and there are \d+ tensors"),
        ("vision_config", {"num_attention_heads": 0}, r"as config\.json says \(integer modulo by zero\)"),
        ("text_config", {"sliding_window": 0}, r"as config\.json says \(window 0 sees nothing\)"),
        ("vision_config", {"patch_size": [14, 14]}, r"as config\.json says \(unsupported operand"),
    ],
)
def test_a_config_of_no_model_is_refused(tiny, part, changes, message):
    config = dict(tiny.config)
    config |= changes if part is None else {part: dict(config[part]) | changes}
    with pytest.raises(CheckpointError, match=message):
        load_model(replace(tiny, config=config))
