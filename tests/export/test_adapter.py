"""Adapters are merged as PEFT merges them, tensor by tensor and in what the model says, or refused."""

import hashlib
import json
import warnings
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
safetensors_torch = pytest.importorskip("safetensors.torch")

from medgemma_export.adapter import merge_adapter  # noqa: E402
from medgemma_export.build import build  # noqa: E402
from medgemma_export.checkpoint import Checkpoint, check_tensors, open_checkpoint  # noqa: E402
from medgemma_export.models import load_model  # noqa: E402
from medgemma_export.recipe import Recipe  # noqa: E402
from medgemma_export.safetensors_checkpoint import (  # noqa: E402
    ADAPTER_CONFIG_NAME,
    ADAPTER_WEIGHTS_NAME,
)
from medgemma_quantization.scheme import SCHEMES  # noqa: E402
from medgemma_runtime.backends import open_session  # noqa: E402
from medgemma_runtime.decoder import Decoder  # noqa: E402
from medgemma_runtime.errors import CheckpointError  # noqa: E402
from medgemma_runtime.manifest import AdapterInfo  # noqa: E402

# The largest differences seen are 5e-7 of weights up to 5, and 2e-5 of logits up to 60; a fault below moves
# weights by 0.02 at least.
EQUAL, EQUAL_LOGITS, BROKEN = 2e-6, 1e-4, 1e-2


@dataclass(frozen=True, kw_only=True)
class Trained:
    """An adapter with random weights, on disk and in PEFT."""

    directory: Path
    network: "peft.PeftModel"

    def logits(self) -> np.ndarray:
        """What was trained: computed with the adapter beside the base, not merged."""
        return logits_of(self.network)

    def merged_state(self) -> dict[str, np.ndarray]:
        """PEFT's own merge, by the names that transformers has in memory; the network is used up."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            merged = self.network.merge_and_unload()
        return {name: value.detach().numpy() for name, value in merged.state_dict().items()}


def train(directory: Path, *, sample: str = "sample:medgemma-tiny", **settings: object) -> Trained:
    """Everything but the training: what it would have changed is random."""
    architecture = {
        "sample:medgemma-tiny": transformers.Gemma3ForConditionalGeneration,
        "sample:medsiglip-tiny": transformers.SiglipModel,
    }[sample]
    options = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"} | settings
    with warnings.catch_warnings():
        # Tied weights, deprecations: PEFT and transformers warn about much that is meant here.
        warnings.simplefilter("ignore")
        base = architecture.from_pretrained(
            open_checkpoint(sample).directory, dtype=torch.float32, attn_implementation="eager"
        ).eval()
        network = peft.get_peft_model(base, peft.LoraConfig(**options))
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for name, parameter in network.named_parameters():
                if parameter.requires_grad:
                    noise = torch.randn(parameter.shape, generator=generator)
                    parameter.copy_(parameter + 0.1 * noise if "modules_to_save" in name else 0.2 * noise)
        network.save_pretrained(directory)
    return Trained(directory=directory, network=network.eval())


def make_prompt(image_id: int) -> tuple["torch.Tensor", "torch.Tensor"]:
    """Ids [1, 40] with an image among them, and its pixels."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(8, 290, (1, 40), generator=generator)
    ids[0, 5:21] = image_id
    return ids, torch.randn(1, 3, 224, 224, generator=generator)


def logits_of(network: torch.nn.Module) -> np.ndarray:
    """After every token of a prompt with an image."""
    image_id = network.config.image_token_id
    ids, pixels = make_prompt(image_id)
    with torch.inference_mode():
        output = network(input_ids=ids, pixel_values=pixels, token_type_ids=(ids == image_id).long())
    return output.logits[0].numpy()


def network_of(checkpoint: Checkpoint) -> torch.nn.Module:
    """transformers' model over the tensors that the checkpoint says it has."""
    config = transformers.Gemma3Config.from_dict(dict(checkpoint.config))
    network = transformers.Gemma3ForConditionalGeneration._from_config(
        config, dtype=torch.float32, attn_implementation="eager"
    )
    state = {in_memory(name): torch.from_numpy(checkpoint.read(name)) for name in checkpoint.tensors}
    table = state["model.language_model.embed_tokens.weight"]
    network.lm_head.weight = torch.nn.Parameter(state.get("lm_head.weight", table).clone())
    network.load_state_dict({"lm_head.weight": table, **state})
    return network.eval()


def in_memory(name: str) -> str:
    """transformers 5's name in memory of a tensor that it stores under an older one."""
    for then, now in (
        ("language_model.model.", "model.language_model."),
        ("vision_tower.", "model.vision_tower."),
        ("multi_modal_projector.", "model.multi_modal_projector."),
    ):
        if name.startswith(then):
            return now + name.removeprefix(then)
    return name


def distance(merged: Checkpoint, state: dict[str, np.ndarray]) -> float:
    """The largest difference between the same tensors, of which each must be in both."""
    names = {in_memory(name): name for name in merged.tensors}
    if "lm_head.weight" not in names and "lm_head.weight" in state:
        table = state["model.language_model.embed_tokens.weight"]
        np.testing.assert_array_equal(state["lm_head.weight"], table)
        names["lm_head.weight"] = names["model.language_model.embed_tokens.weight"]
    assert names.keys() == state.keys()
    return max(float(np.abs(merged.read(names[name]) - value).max()) for name, value in state.items())


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Networks this small wait for threads longer than they compute."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def tiny() -> Checkpoint:
    return open_checkpoint("sample:medgemma-tiny")


PATTERNS = {
    "rank_pattern": {
        "model.vision_tower.encoder.layers.0.mlp.fc1": 6,
        "q_proj": 2,
        r"up_proj|layers\.1\.mlp\.down_proj": 3,
    },
    "alpha_pattern": {r"layers\.\d\.self_attn\.k_proj": 1.5, "[qv]_proj": 9, "fc2": 3},
}
SETTINGS = {
    "all-linear": {},
    "rank-stabilized": {"use_rslora": True, "r": 3},
    "some modules": {"target_modules": ["q_proj", "fc1"], "lora_alpha": 3},
    "patterns": PATTERNS,
    "rank-stabilized patterns": PATTERNS | {"use_rslora": True},
    # For modules that hold their matrix as nn.Linear does, which all of these do, PEFT itself ignores it.
    "fan_in_fan_out": {"fan_in_fan_out": True},
    "as MedGemma's notebook": {"modules_to_save": ["lm_head", "embed_tokens"], "r": 16, "lora_alpha": 16},
    "head saved": {"modules_to_save": ["lm_head"]},
    "table saved": {"modules_to_save": ["embed_tokens"]},
    "both saved and tied": {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    "projector and q_norm saved": {"modules_to_save": ["multi_modal_projector", "q_norm"]},
    "every module saved whose name ends so": {"modules_to_save": ["norm"]},
}
UNTIED = {"as MedGemma's notebook", "head saved", "table saved"}


@pytest.mark.parametrize("kind", SETTINGS)
def test_tensors_and_logits_are_those_of_peft(tiny, tmp_path, kind):
    trained = train(tmp_path / "adapter", **SETTINGS[kind])
    merged = merge_adapter(tiny, trained.directory)
    model = load_model(merged)
    check_tensors(merged, model.checkpoint_shapes())
    assert ("lm_head.weight" in merged.tensors) is (kind in UNTIED)
    assert any(weight.name == "lm_head.weight" for weight in model.weights()) is (kind in UNTIED)
    as_trained = trained.logits()
    assert np.abs(logits_of(network_of(merged)) - as_trained).max() < EQUAL_LOGITS
    assert np.abs(logits_of(network_of(tiny)) - as_trained).max() > 1
    assert distance(merged, trained.merged_state()) < EQUAL


def test_an_artifact_says_what_was_trained(tmp_path):
    """The notebook's adapter down to the device: tower, table, and a head of its own."""
    trained = train(tmp_path / "my-lora", **SETTINGS["as MedGemma's notebook"])
    recipe = Recipe(
        model="sample:medgemma-tiny",
        revision=None,
        target="onnx",
        scheme=SCHEMES["fp32"],
        components=(),
        out=tmp_path / "artifact",
        adapter=trained.directory,
    )
    artifact = build(recipe, progress=lambda *step: None)
    info = artifact.manifest.model
    base = open_checkpoint("sample:medgemma-tiny")
    assert info.adapter == AdapterInfo(name="my-lora", sha256=adapter_sha256(trained.directory))
    assert info.weights_sha256 != base.weights_sha256()
    ids, pixels = make_prompt(artifact.manifest.prompt.image_id)
    vision, embed, decoder = (
        open_session(artifact, name, threads=1) for name in ("vision", "embed", "decoder")
    )
    running = Decoder(embed, decoder, artifact.manifest.prompt)
    logits = running.read(
        running.new_cache(64),
        ids[0].numpy(),
        image_blocks=np.where(ids[0].numpy() == artifact.manifest.prompt.image_id, 0, -1),
        image_features=vision.run({"pixel_values": pixels.numpy()})["image_features"],
    )
    for session in (vision, embed, decoder):
        session.close()
    assert np.abs(logits - trained.logits()[-1]).max() < EQUAL_LOGITS


def adapter_sha256(directory: Path) -> str:
    files = (directory / ADAPTER_CONFIG_NAME, directory / ADAPTER_WEIGHTS_NAME)
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()


def test_integers_of_another_adapter_are_not_taken_over(tmp_path, plain):
    """Interrupted, then asked for again with another alpha: nothing of the first may stay."""

    def interrupt(what: str, done: int, total: int) -> None:
        if what.startswith("lower"):
            raise KeyboardInterrupt

    def export(name: str, progress=lambda *step: None):
        recipe = Recipe(
            model="sample:medgemma-tiny",
            revision=None,
            target="onnx",
            scheme=SCHEMES["int4"],
            components=("decoder",),
            out=tmp_path / name,
            adapter=plain,
        )
        return [entry.sha256 for entry in build(recipe, progress=progress).manifest.files]

    before = export("before")
    with pytest.raises(KeyboardInterrupt):
        export("artifact", interrupt)
    edit(plain, lora_alpha=40)
    after = export("artifact")
    assert after == export("fresh") != before


def adapter_config(directory: Path) -> dict:
    return json.loads((directory / ADAPTER_CONFIG_NAME).read_text())


def edit(directory: Path, **settings: object) -> None:
    (directory / ADAPTER_CONFIG_NAME).write_text(json.dumps(adapter_config(directory) | settings))


def adapter_tensors(directory: Path) -> dict[str, "torch.Tensor"]:
    return safetensors_torch.load_file(directory / ADAPTER_WEIGHTS_NAME)


def write_tensors(directory: Path, tensors: dict[str, "torch.Tensor"]) -> None:
    safetensors_torch.save_file(
        {name: value.contiguous() for name, value in tensors.items()}, directory / ADAPTER_WEIGHTS_NAME
    )


@pytest.mark.parametrize(
    "fault",
    [
        {"lora_alpha": 8.5},
        {"use_rslora": True},
        {"alpha_pattern": {}},
        {"alpha_pattern": {"k_proj": 1.5, "[qv]_proj": 10, "fc2": 3}},
    ],
)
def test_a_wrong_factor_is_seen(tiny, tmp_path, fault):
    """The first comparison can fail: the same adapter under other settings is another model."""
    trained = train(tmp_path / "adapter", **PATTERNS)
    edit(trained.directory, **fault)
    assert distance(merge_adapter(tiny, trained.directory), trained.merged_state()) > BROKEN


def test_one_matrix_by_hand(tiny, tmp_path):
    """Without PEFT: bfloat16 factors, multiplied and added in float32 and not before."""
    name = "language_model.model.layers.3.mlp.down_proj"
    generator = torch.Generator().manual_seed(2)
    a = torch.randn(3, 160, generator=generator).bfloat16()
    b = torch.randn(64, 3, generator=generator).bfloat16()
    directory = write_adapter(
        tmp_path, {f"{name}.lora_A.weight": a, f"{name}.lora_B.weight": b}, r=3, lora_alpha=7
    )
    merged = merge_adapter(tiny, directory)
    weight = f"{name}.weight"
    exact = tiny.read(weight).astype(np.float64) + 7 / 3 * (b.double() @ a.double()).numpy()
    assert np.abs(merged.read(weight) - exact).max() < EQUAL
    for other in tiny.tensors.keys() - {weight}:
        np.testing.assert_array_equal(merged.read(other), tiny.read(other))


def write_adapter(directory: Path, tensors: dict[str, "torch.Tensor"], **settings: object) -> Path:
    (directory / ADAPTER_CONFIG_NAME).write_text(json.dumps({"peft_type": "LORA", **settings}))
    write_tensors(directory, tensors)
    return directory


def test_rows_are_those_of_the_whole(tiny, tmp_path):
    trained = train(tmp_path / "adapter", modules_to_save=["embed_tokens"])
    merged = merge_adapter(tiny, trained.directory)
    for name in (
        "language_model.model.layers.0.self_attn.q_proj.weight",
        "vision_tower.encoder.layers.1.mlp.fc1.weight",
        "language_model.model.embed_tokens.weight",
        "lm_head.weight",
        "language_model.model.norm.weight",
    ):
        whole = merged.read(name)
        for rows in (slice(0, 3), slice(5, 60), slice(-2, None)):
            np.testing.assert_allclose(merged.read(name, rows=rows), whole[rows], atol=EQUAL, rtol=0)
    head = merged.read("lm_head.weight", rows=slice(7, 9))
    np.testing.assert_array_equal(head, tiny.read("language_model.model.embed_tokens.weight")[7:9])


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
def test_rows_of_a_large_matrix_take_little_memory(tmp_path):
    """8 rows of a matrix of 2 GB, with a pair of rank 4: the product is never whole."""
    tracemalloc = pytest.importorskip("tracemalloc")
    rows, width = 1 << 17, 4096
    base = tmp_path / "base"
    base.mkdir()
    (base / "config.json").write_text("{}")
    header = {"large.weight": {"dtype": "F32", "shape": [rows, width], "data_offsets": [0, rows * width * 4]}}
    encoded = json.dumps(header).encode()
    with (base / "model.safetensors").open("wb") as stream:
        stream.write(len(encoded).to_bytes(8, "little") + encoded)
        stream.truncate(stream.tell() + rows * width * 4)  # sparse: zeros that take no room
    directory = tmp_path / "adapter"
    directory.mkdir()
    write_adapter(
        directory,
        {"large.lora_A.weight": torch.ones(4, width), "large.lora_B.weight": torch.ones(rows, 4)},
        r=4,
        lora_alpha=4,
    )
    merged = merge_adapter(open_checkpoint(str(base)), directory)
    tracemalloc.start()
    values = merged.read("large.weight", rows=slice(rows - 8, rows))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (values == 4).all() and values.shape == (8, width)
    assert 8 * width * 4 <= peak < 1_000_000


# How the modules are called by those who train: transformers 5, before it, and before 4.52.
SPELLINGS = {
    "now": {},
    "as transformers 4.52 had it": {"vision_tower.": "vision_tower.vision_model."},
    "as transformers 4.51 had it": {
        "model.language_model.": "language_model.model.",
        "model.vision_tower.": "vision_tower.vision_model.",
        "model.multi_modal_projector.": "multi_modal_projector.",
        "lm_head": "language_model.lm_head",
    },
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_spelling_of_an_adapter_fits_every_spelling_of_the_base(tiny, tmp_path, spelling):
    settings = {"modules_to_save": ["lm_head", "embed_tokens", "multi_modal_projector"], **PATTERNS}
    trained = train(tmp_path / "adapter", **settings)
    merged = merge_adapter(tiny, trained.directory)
    expected = {in_memory(name): merged.read(name) for name in merged.tensors}

    def respell(name: str) -> str:
        for new, old in SPELLINGS[spelling].items():
            name = name.replace(new, old)
        return name

    tensors = adapter_tensors(trained.directory)
    renamed = {respell(name): value for name, value in tensors.items()}
    assert (renamed.keys() == tensors.keys()) is (spelling == "now")
    write_tensors(trained.directory, renamed)
    # A pattern names a module as it was called when it was trained.
    patterns = {respell(pattern): value for pattern, value in PATTERNS["rank_pattern"].items()}
    edit(trained.directory, rank_pattern=patterns)
    in_memory_names = {in_memory(name): info for name, info in tiny.tensors.items()}
    originals = {in_memory(name): name for name in tiny.tensors}
    respelled = replace(
        tiny,
        tensors={name: replace(info, name=name) for name, info in in_memory_names.items()},
        reader=lambda info, rows: tiny.read(originals[info.name], rows=rows),
    )
    for base in (tiny, respelled):
        merged = merge_adapter(base, trained.directory)
        check_tensors(merged, load_model(merged).checkpoint_shapes())
        assert {in_memory(name) for name in merged.tensors} == expected.keys()
        for name in merged.tensors:
            np.testing.assert_array_equal(merged.read(name), expected[in_memory(name)], err_msg=name)


def test_a_text_model_and_medsiglip_take_adapters_too(tmp_path):
    trained = train(tmp_path / "adapter", sample="sample:medsiglip-tiny", target_modules=["q_proj", "fc2"])
    siglip = open_checkpoint("sample:medsiglip-tiny")
    merged = merge_adapter(siglip, trained.directory)
    check_tensors(merged, load_model(merged).checkpoint_shapes())
    state = trained.merged_state()
    assert state.keys() == merged.tensors.keys()
    assert max(float(np.abs(merged.read(name) - value).max()) for name, value in state.items()) < EQUAL
    changed = [name for name in siglip.tensors if not np.array_equal(siglip.read(name), merged.read(name))]
    assert len(changed) == len(adapter_tensors(trained.directory)) // 2 > 10


PAIR = "base_model.model.model.language_model.layers.2.mlp.up_proj"
HEAD = "base_model.model.lm_head.weight"


@pytest.fixture
def plain(tmp_path) -> Path:
    """The smallest adapter that is merged: one pair."""
    directory = tmp_path / "my-adapter"
    directory.mkdir()
    tensors = {f"{PAIR}.lora_A.weight": torch.ones(2, 64), f"{PAIR}.lora_B.weight": torch.ones(160, 2)}
    return write_adapter(directory, tensors, r=2, lora_alpha=4)


def test_the_plain_adapter_is_merged(tiny, plain):
    merged = merge_adapter(tiny, plain)
    name = "language_model.model.layers.2.mlp.up_proj.weight"
    np.testing.assert_array_equal(merged.read(name), tiny.read(name) + 4)
    assert merged.adapter.name == "my-adapter" and merged.id == tiny.id


def refusal(base: Checkpoint, directory: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        merge_adapter(base, directory)
    message = str(caught.value)
    assert "\n" not in message and str(directory.parent) not in message
    return message


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"use_dora": True}, "use_dora True and only plain LoRA is merged; merge it with PEFT"),
        ({"bias": "all"}, "bias 'all' and only plain LoRA is merged"),
        ({"bias": "lora_only"}, "bias 'lora_only'"),
        ({"lora_bias": True}, "lora_bias True"),
        ({"layer_replication": [[0, 4], [2, 5]]}, "layer_replication"),
        ({"target_parameters": ["mm_input_projection_weight"]}, "target_parameters"),
        ({"trainable_token_indices": [5]}, "trainable_token_indices"),
        ({"alora_invocation_tokens": [1, 2]}, "alora_invocation_tokens"),
        ({"use_qalora": True}, "use_qalora"),
        ({"kasa_config": {"beta": 1.0}}, "kasa_config"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights 'pissa', which changed the base before training"),
        ({"init_lora_weights": "olora"}, "init_lora_weights 'olora'"),
        ({"init_lora_weights": "loftq"}, "init_lora_weights 'loftq'"),
        ({"init_lora_weights": 1}, "init_lora_weights 1"),
        ({"peft_type": "IA3"}, "of type 'IA3' and only LORA is merged"),
        ({"peft_type": None}, "of type None"),
        ({"r": 0}, "a rank is below 1"),
        ({"rank_pattern": {"up_proj": 0}}, "a rank is below 1"),
        ({"r": "2"}, "not to the form: r: Input should be a valid integer"),
        ({"lora_alpha": None}, "lora_alpha: Input should be a valid number"),
        ({"alpha_pattern": {"(": 1}}, "the pattern '(' is no regular expression"),
        ({"alpha_pattern": {"up_proj": 1, "mlp.up_proj": 2}}, "several ranks or alphas, by up_proj, mlp.up"),
        ({"r": 3}, "lora_A.weight is [2, 64] and should be [3, 64]"),
        ({"modules_to_save": ["lm_head"]}, "lm_head.weight named in modules_to_save and not in the file"),
        (
            {"base_model_name_or_path": "google/medgemma-4b-it"},
            "was trained on medgemma-4b-it and the model is",
        ),
    ],
)
def test_what_is_not_plain_lora_is_refused(tiny, plain, settings, says):
    edit(plain, **settings)
    assert says in refusal(tiny, plain)


@pytest.mark.parametrize(
    "settings",
    [
        {"use_dora": False, "bias": "none", "layer_replication": None, "target_parameters": []},
        {"init_lora_weights": "gaussian"},
        {"init_lora_weights": True},
        {"base_model_name_or_path": "/somewhere/medgemma-tiny/"},
        {"base_model_name_or_path": "C:\\models\\medgemma-tiny"},
        {"base_model_name_or_path": ""},
        {"a_field_of_a_later_peft": {"x": 1}},
    ],
)
def test_what_says_the_same_in_other_words_is_merged(tiny, plain, settings):
    edit(plain, **settings)
    merge_adapter(tiny, plain)


def without(name: str):
    return lambda tensors: tensors.pop(name)


CHANGES = {
    "no A": (without(f"{PAIR}.lora_A.weight"), "lora_B.weight without the other half of the pair"),
    "no B": (without(f"{PAIR}.lora_B.weight"), "lora_A.weight without the other half of the pair"),
    "nothing": (dict.clear, "it holds no tensor"),
    "unknown module": (
        lambda tensors: tensors.update({"base_model.model.x.lora_A.weight": torch.ones(2, 64)}),
        "base_model.model.x.lora_A.weight without a place in the model",
    ),
    "unknown kind": (
        lambda tensors: tensors.update({f"{PAIR}.lora_magnitude_vector": torch.ones(160)}),
        "lora_magnitude_vector without a place in the model",
    ),
    "A too wide": (
        lambda tensors: tensors.update({f"{PAIR}.lora_A.weight": torch.ones(2, 65)}),
        "lora_A.weight is [2, 65] and should be [2, 64] of another shape",
    ),
    "B too long": (
        lambda tensors: tensors.update({f"{PAIR}.lora_B.weight": torch.ones(161, 2)}),
        "lora_B.weight is [161, 2] and should be [160, 2]",
    ),
    "integers": (
        lambda tensors: tensors.update({f"{PAIR}.lora_B.weight": torch.ones(160, 2, dtype=torch.int8)}),
        "lora_B.weight (I8) of a dtype that does not convert to float32 exactly",
    ),
    "a whole tensor that nobody asked to save": (
        lambda tensors: tensors.update({HEAD: torch.ones(1896, 64)}),
        "lm_head.weight neither half of a LoRA pair nor part of modules_to_save",
    ),
    "a pair on the head": (
        lambda tensors: tensors.update({"base_model.model.lm_head.lora_A.weight": torch.ones(2, 64)}),
        "lora_A.weight part of a LoRA pair on table or head, which only modules_to_save may change",
    ),
    "a pair on the table": (
        lambda tensors: tensors.update(
            {"base_model.model.model.language_model.embed_tokens.lora_embedding_A": torch.ones(2, 1896)}
        ),
        "lora_embedding_A part of a LoRA pair on table or head",
    ),
    "a pair on the convolution": (
        lambda tensors: tensors.update(
            {
                "model.vision_tower.embeddings.patch_embedding.lora_A.weight": torch.ones(2, 3, 14, 14),
                "model.vision_tower.embeddings.patch_embedding.lora_B.weight": torch.ones(64, 2, 1, 1),
            }
        ),
        "patch_embedding.lora_B.weight is [64, 2, 1, 1] and should be [64, 2]",
    ),
    "the same in two spellings": (
        lambda tensors: tensors.update(
            {"language_model.model.layers.2.mlp.up_proj.lora_A.weight": torch.ones(2, 64)}
        ),
        "lora_A.weight for a weight that another tensor changes too",
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_tensor_without_a_place_is_refused(tiny, plain, change):
    alter, says = CHANGES[change]
    tensors = adapter_tensors(plain)
    alter(tensors)
    write_tensors(plain, tensors)
    assert says in refusal(tiny, plain)


def test_a_weight_cannot_be_both_changed_and_saved(tiny, plain):
    tensors = adapter_tensors(plain) | {f"{PAIR}.weight": torch.ones(160, 64)}
    write_tensors(plain, tensors)
    edit(plain, modules_to_save=["up_proj"])
    assert "for one weight, which cannot be both a pair and saved" in refusal(tiny, plain)


def test_a_saved_module_must_be_whole(tiny, plain):
    fc1 = "base_model.model.model.vision_tower.encoder.layers.0.mlp.fc1"
    write_tensors(plain, adapter_tensors(plain) | {f"{fc1}.weight": torch.ones(216, 64)})
    edit(plain, modules_to_save=["layers.0.mlp.fc1"])
    said = refusal(tiny, plain)
    assert "vision_tower.encoder.layers.0.mlp.fc1.bias named in modules_to_save and not in the file" in said


def test_a_resized_table_is_refused(tiny, plain):
    name = "base_model.model.model.language_model.embed_tokens.weight"
    write_tensors(plain, adapter_tensors(plain) | {name: torch.ones(1900, 64)})
    edit(plain, modules_to_save=["embed_tokens"])
    assert "embed_tokens.weight is [1900, 64] and should be [1896, 64]" in refusal(tiny, plain)


def test_a_broken_tie_is_refused(tiny, tmp_path):
    trained = train(tmp_path / "adapter", modules_to_save=["embed_tokens"], ensure_weight_tying=True)
    tensors = adapter_tensors(trained.directory)
    tensors[HEAD] = tensors[HEAD].clone()
    tensors[HEAD][-1, -1] += 1
    write_tensors(trained.directory, tensors)
    assert "says ensure_weight_tying, and table and output head are not equal" in refusal(
        tiny, trained.directory
    )
    edit(trained.directory, ensure_weight_tying=False, modules_to_save=["lm_head", "embed_tokens"])
    assert "lm_head.weight" in merge_adapter(tiny, trained.directory).tensors


def test_an_adapter_of_another_size_is_refused(tiny, plain):
    small = {name: replace(info, shape=(8, 8)) for name, info in tiny.tensors.items() if len(info.shape) == 2}
    said = refusal(replace(tiny, id="sample:other", tensors=dict(tiny.tensors) | small), plain)
    assert said.startswith("adapter my-adapter does not fit sample:other: ")
    assert "lora_A.weight is [2, 64] and should be [2, 8]" in said
    assert said.endswith("Check that it was trained on this model, and save it with PEFT again")


def test_values_that_are_not_finite_are_named(tiny, plain):
    tensors = adapter_tensors(plain)
    tensors[f"{PAIR}.lora_B.weight"][3, 1] = float("nan")
    write_tensors(plain, tensors)
    merged = merge_adapter(tiny, plain)
    with pytest.raises(
        CheckpointError, match=r"lora_B.weight in adapter_model.safetensors of my-adapter holds NaN"
    ):
        merged.read("language_model.model.layers.2.mlp.up_proj.weight")


def test_what_is_no_adapter_directory_is_refused(tiny, plain, tmp_path):
    with pytest.raises(CheckpointError, match=r"is no directory; name one that holds adapter_config\.json"):
        merge_adapter(tiny, tmp_path / "absent")
    (plain / ADAPTER_CONFIG_NAME).rename(plain / "kept.json")
    assert "my-adapter has no adapter_config.json" in refusal(tiny, plain)
    (plain / "kept.json").rename(plain / ADAPTER_CONFIG_NAME)
    (plain / ADAPTER_WEIGHTS_NAME).unlink()
    assert "my-adapter has no adapter_model.safetensors; save the adapter with PEFT again" in refusal(
        tiny, plain
    )
    (plain / "adapter_model.bin").write_bytes(b"")
    assert "adapter_model.bin (my-adapter) is a pickled checkpoint" in refusal(tiny, plain)
    (plain / ADAPTER_WEIGHTS_NAME).write_bytes(b"version https://git-lfs.github.com/spec/v1")
    assert "cannot be read as safetensors" in refusal(tiny, plain)


def test_settings_and_tensors_both_count_in_the_hash(tiny, plain):
    merged = merge_adapter(tiny, plain)
    hashes = {tiny.weights_sha256(), merged.weights_sha256(), merged.adapter.sha256()}
    edit(plain, lora_alpha=5)
    hashes |= {merge_adapter(tiny, plain).weights_sha256(), merge_adapter(tiny, plain).adapter.sha256()}
    tensors = adapter_tensors(plain)
    write_tensors(plain, {name: value + 1 for name, value in tensors.items()})
    hashes |= {merge_adapter(tiny, plain).weights_sha256(), merge_adapter(tiny, plain).adapter.sha256()}
    assert len(hashes) == 7
    assert merged.weight_paths[-2:] == (plain / ADAPTER_CONFIG_NAME, plain / ADAPTER_WEIGHTS_NAME)
