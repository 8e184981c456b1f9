"""ExecuTorch artifacts of the samples, run by our runtime and held against PyTorch over the same weights."""

import itertools
import json
import shutil
from dataclasses import replace
from functools import cached_property

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("executorch")

import torch

from medgemma_benchmarks import latency, prediction_parity
from medgemma_benchmarks.gates import load_gates
from medgemma_benchmarks.judge import Judge
from medgemma_benchmarks.latency import TimedImage, measure_latency
from medgemma_benchmarks.layer_parity import check_layers
from medgemma_benchmarks.operator_profile import profile_decoder
from medgemma_benchmarks.parity_inputs import ParityError, features_to_compare
from medgemma_benchmarks.prediction_parity import check_predictions
from medgemma_benchmarks.timing import Repetition
from medgemma_export import build as build_module
from medgemma_export.build import build, decide
from medgemma_export.recipe import Recipe
from medgemma_export.reference.decoders import record_text_reference
from medgemma_export.targets import TARGETS
from medgemma_export.torch_ops import compute
from medgemma_export.unpack import compare_integers
from medgemma_quantization.weights import QuantizedWeights, quantize_weights
from medgemma_runtime.artifact import open_artifact, sha256_file
from medgemma_runtime.backends import open_session
from medgemma_runtime.backends.executorch import METHODS, ExecutorchSession
from medgemma_runtime.decoder import Decoder
from medgemma_runtime.embed import Embedder
from medgemma_runtime.errors import ArtifactError, EdgeError
from medgemma_runtime.generate import GenerateOptions, Generator
from medgemma_runtime.images import normalize, resize
from medgemma_runtime.manifest import FileEntry, write_manifest
from medgemma_runtime.prompt import Image, Message, Text
from medgemma_runtime.text import load_tokenizer
from tests import tiny_prompts
from tests.export.short_models import load_short_model, write_short_checkpoint
from tests.wrong_artifacts import with_scaled_weight

# Of torch.export, about its own insides.
pytestmark = pytest.mark.filterwarnings("ignore")

LENGTH = 620  # longer than the sample's window of 32, a call of 512, and both
IMAGE = slice(40, 56)


class Built:
    """An artifact, what it was made of, and the integers."""

    def __init__(
        self,
        directory,
        *,
        model,
        precision,
        target="executorch",
        components=(),
        delegate=None,
        separate_weights=False,
    ):
        scheme = TARGETS["executorch"].scheme(precision)
        context = 700 if "medgemma" in model else None
        recipe = Recipe(
            model=model,
            revision=None,
            target=target,
            scheme=scheme,
            components=components,
            out=directory / f"{target}-{precision}",
            context=context,
            delegate=delegate,
            separate_weights=separate_weights,
        )
        self._other = directory / "other"
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(build_module, "load_model", load_short_model)
            patch.setattr(build_module, "check_tensors", lambda *_: None)  # it has more layers
            patch.setattr("medgemma_export.targets.executorch_lower.write_program", self._write_both)
            self.artifact, decision = build(recipe, progress=lambda *_: None), decide(recipe)
        self.parts = {component.name: component for component in decision.model.components}
        self.weights = quantize_weights(
            decision.plan, decision.model.reader(decision.checkpoint), directory / f"weights-{precision}"
        )

    def _write_both(self, lowered, path, stand_ins, *, data):
        from medgemma_export.targets.executorch_file import write_program

        write_program(lowered, path, stand_ins, data=data)
        self._other.mkdir()
        data = self._other / "model.ptd" if data is None else None
        write_program(lowered, self._other / "model.pte", stand_ins, data=data)

    @cached_property
    def other(self):
        """The same artifact, with weights apart if they lie in the program and in it if they lie apart."""
        for entry in self.artifact.manifest.files:
            if not entry.path.startswith("model.pt"):
                shutil.copy(self.artifact.path(entry.path), self._other)
        files = tuple(
            FileEntry(path=path.name, size_bytes=path.stat().st_size, sha256=sha256_file(path))
            for path in sorted(self._other.iterdir())
        )
        write_manifest(replace(self.artifact.manifest, files=files), self._other)
        return open_artifact(self._other)

    def decoder(self, artifact=None):
        sessions = (open_session(artifact or self.artifact, name, threads=1) for name in ("embed", "decoder"))
        return Decoder(*sessions, self.artifact.manifest.prompt)


@pytest.fixture(scope="module")
def floats(tmp_path_factory):
    return Built(tmp_path_factory.mktemp("floats"), model="sample:medgemma-tiny", precision="fp32")


@pytest.fixture(scope="module")
def integers(tmp_path_factory):
    directory = tmp_path_factory.mktemp("integers")
    return Built(directory, model="sample:medgemma-tiny", precision="int4", components=("embed", "decoder"))


@pytest.fixture(scope="module")
def apart(integers):
    return integers.other


@pytest.fixture(scope="module")
def conversation(floats):
    rng = np.random.default_rng(9)
    ids = rng.integers(5, 200, LENGTH)
    blocks = np.full(LENGTH, -1)
    ids[IMAGE], blocks[IMAGE] = floats.artifact.manifest.prompt.image_id, 0
    features = rng.normal(size=(16, 64)).astype(np.float32)
    return ids, blocks, features


def counted(features):
    """Features as the program's vision encoder gives them: one column more says how many follow."""
    return np.concatenate([features, np.arange(15, -1, -1, dtype=np.float32)[:, None]], 1)


def all_at_once(built, conversation, length, **rounding):
    """The logits after `length` tokens, without caches."""
    ids, blocks, features = conversation
    decoder = built.parts["decoder"]
    inputs = {"input_ids": ids[None, :length], "image_features": features}
    x = compute(built.parts["embed"], built.weights, inputs)["inputs_embeds"]
    past = {
        spec.name: np.zeros((1, spec.shape[1], 0, spec.shape[3]), np.float32)
        for spec in decoder.inputs
        if spec.name.startswith("past")
    }
    inputs = {
        "inputs_embeds": x,
        "position_ids": np.arange(length)[None],
        "image_blocks": blocks[None, :length],
        "attention_mask": np.ones((1, length), np.int64),
        "local_start": np.array([0]),
    }
    return compute(decoder, built.weights, inputs | past, **rounding)["logits"][0, 0]


def test_the_decoder_equals_everything_at_once(floats, conversation):
    ids, blocks, features = conversation
    decoder = floats.decoder()
    cache = decoder.new_cache(LENGTH)
    logits = decoder.read(cache, ids[:90], image_blocks=blocks[:90], image_features=counted(features))
    assert np.abs(logits - all_at_once(floats, conversation, 90)).max() < 1e-4
    logits = decoder.read(cache, ids[90:600])
    assert np.abs(logits - all_at_once(floats, conversation, 600)).max() < 1e-4
    for length in range(601, LENGTH + 1):
        logits = decoder.read(cache, ids[length - 1 : length])
    assert np.abs(logits - all_at_once(floats, conversation, LENGTH)).max() < 1e-4


def test_xnnpack_takes_all_between_two_attentions(integers):
    methods = json.loads(integers.artifact.path("delegation.json").read_text())["methods"]
    decoder = methods["text_decoder"]
    # One for each of two layers, one after them, and two that wait for the first angles and masks.
    assert decoder["calls"] <= 5
    assert decoder["delegated"] > 2 * decoder["kernels"]
    assert methods["token_embedding"]["delegated"] <= 2


def test_without_the_count_the_image_is_read_like_text(floats, conversation):
    """What the comparison above would miss if the mask did nothing."""
    ids, blocks, features = conversation
    decoder, features = floats.decoder(), counted(features)
    features[:, -1] = 0
    logits = decoder.read(decoder.new_cache(90), ids[:60], image_blocks=blocks[:60], image_features=features)
    assert np.abs(logits - all_at_once(floats, conversation, 60)).max() > 1e-3


def traced(built, component):
    """A component before it is lowered, and the weights that it holds stand-ins of."""
    from medgemma_export.targets.executorch_lower import trace
    from medgemma_export.targets.executorch_stand_ins import StandIns

    stand_ins, manifest = StandIns(), built.artifact.manifest
    exported = trace(
        built.parts[component],
        built.weights,
        lambda weight: None,
        stand_ins,
        image=manifest.image,
        prompt=manifest.prompt,
        step=512,
    )
    return exported, stand_ins


@pytest.mark.parametrize("component", ["vision", "decoder"])
def test_every_operator_is_a_core_one(floats, component):
    """Where one is not, ExecuTorch traces the whole program once more to decompose it."""
    from executorch.exir.tracer import _default_decomposition_table

    exported, _ = traced(floats, component)
    used = {node.target for node in exported.graph.nodes if node.op == "call_function"}
    aten = torch.ops.aten
    assert used & _default_decomposition_table().keys() <= {aten.linear.default, aten.sym_size.int}


@pytest.mark.parametrize("tokens", [1, 5])
def test_buffers_may_begin_with_anything(floats, tokens):
    """ExecuTorch clears no memory."""
    exported, stand_ins = traced(floats, "decoder")
    module = exported.module()
    with torch.no_grad():
        for parameter in module.parameters():
            if weight := stand_ins.find(parameter.numpy().tobytes()):
                [values] = weight.pieces()
                parameter.copy_(torch.from_numpy(values))
        for cache in module.buffers():
            cache.fill_(torch.nan)
    given = torch.ones(1, tokens, 65), torch.arange(tokens)
    assert module(*given).isfinite().all()


def test_one_conversation_at_a_time(floats, conversation):
    ids, _, _ = conversation
    decoder = floats.decoder()
    first, second = decoder.new_cache(50), decoder.new_cache(50)
    decoder.read(first, ids[:5])
    decoder.read(second, ids[:5])
    with pytest.raises(EdgeError, match="holds the keys of one conversation at a time"):
        decoder.read(first, ids[5:6])
    decoder.read(second, ids[5:6])


def test_pixels_go_in_as_they_are(floats):
    manifest = floats.artifact.manifest
    rng = np.random.default_rng(2)
    resized = resize(rng.integers(0, 256, (60, 80, 3), np.uint8), manifest.image)
    pixels = normalize(resized, manifest.image)[None]
    session = open_session(floats.artifact, "vision", threads=1)
    actual = session.run({"pixel_values": resized.transpose(2, 0, 1)[None]})["image_features"]
    expected = compute(floats.parts["vision"], floats.weights, {"pixel_values": pixels})["image_features"]
    assert np.abs(actual - counted(expected)).max() < 1e-4
    assert np.array_equal(session.run({"pixel_values": pixels})["image_features"], actual)
    with pytest.raises(EdgeError, match="8-bit image"):
        session.run({"pixel_values": pixels * np.float32(1.01)})


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    pytest.importorskip("transformers")
    return str(write_short_checkpoint(tiny_prompts.MODEL, tmp_path_factory.mktemp("short") / "checkpoint"))


@pytest.fixture(scope="module")
def reference(checkpoint, tmp_path_factory):
    """Prompts with images, and one that is text alone."""
    return record_text_reference(
        checkpoint,
        tmp_path_factory.mktemp("reference") / "bundle",
        prompts=tiny_prompts.PROMPTS,
        images=tiny_prompts.images(),
        per_layer=True,
    )


def test_prompts_and_layers_are_those_of_the_original(floats, reference):
    report = check_predictions(floats.artifact, reference, threads=1, per_layer=True)
    assert report.verdict == "PASS"
    assert [row.name for row in report.prompts] == ["one image", "two images", "text"]
    assert max(row.parity.max_abs_error for row in report.prompts) < 5e-5
    vision, decoder = report.layers["vision"], report.layers["decoder"]
    assert [layer.name for layer in vision] == ["embeddings", "residual_0", "image_features"]
    assert [layer.name for layer in decoder] == ["embeddings", "residual_0", "residual_1", "logits"]
    assert [layer.is_seen for layer in decoder] == [True, True, False, True]
    assert max(layer.relative_error for layer in (*vision, *decoder) if layer.is_seen) < 1e-5


@pytest.mark.parametrize("component", ["vision", "decoder"])
def test_there_is_room_for_what_is_recorded_and_little_more(floats, tmp_path, component):
    layers = json.loads(floats.artifact.path("layers.json").read_text())
    room = layers[METHODS[component]]["debug_bytes"]
    session = ExecutorchSession(
        floats.artifact,
        component,
        threads=1,
        profile_to=tmp_path / "profile",
        values_to=tmp_path / "values",
        values_bytes=room,
    )
    inputs = {
        "vision": {"pixel_values": np.ones((1, 3, 224, 224), np.uint8)},
        "decoder": {"inputs_embeds": np.ones((1, 64, 65), np.float32), "cache_position": np.arange(64)},
    }
    session.run(inputs[component])
    session.close()
    recorded = len((tmp_path / "values").read_bytes().rstrip(b"\0"))
    assert 0.7 * (room - (1 << 20)) < recorded <= room - (1 << 19)


@pytest.mark.parametrize(
    ("component", "weight", "named"),
    [
        ("decoder", "language_model.layers.0.mlp.gate_proj.weight", "residual_0"),
        (
            "decoder",
            "language_model.layers.1.mlp.gate_proj.weight",
            "logits: residual_1 or the head is wrong",
        ),
        ("vision", "vision_tower.encoder.layers.0.mlp.fc2.weight", "residual_0"),
        ("vision", "vision_tower.post_layernorm.weight", "image_features: the head is wrong"),
    ],
)
def test_the_layer_that_is_wrong_is_named(floats, reference, tmp_path, component, weight, named):
    broken = with_scaled_weight(floats.artifact, tmp_path / "broken", floats.weights.float(weight), 1.01)
    judge = Judge("lowering", "fp32", load_gates())
    layers = check_layers(broken, reference, judge, threads=1)
    verdicts = {check.detail.split("; ")[0]: check.verdict for check in judge.checks}
    assert verdicts.pop(f"{component} departs first at {named}") == "FAIL"
    assert list(verdicts.values()) == ["PASS"]  # of the other component
    seen = [layer for layer in layers[component] if layer.is_seen]
    place = [layer.name for layer in seen].index(named.partition(":")[0])
    assert max(layer.relative_error for layer in seen[:place]) < 1e-5


def test_features_given_without_their_count_fail(floats, reference, monkeypatch):
    def blind(artifact, features):
        return np.pad(features, ((0, 0), (0, 1)))

    monkeypatch.setattr(prediction_parity, "features_to_give", blind)
    report = check_predictions(floats.artifact, reference, threads=1)
    failed = {(check.question, check.subject) for check in report.checks if check.verdict == "FAIL"}
    assert failed == {("lowering", "decoder"), ("lowering", "prefill")}


def test_where_the_reference_predicts_nothing_the_result_is_not_judged(floats, checkpoint, tmp_path):
    question = tiny_prompts.prompt("asked", "No.", question="Is there any finding at all? " * 9)
    bundle = record_text_reference(checkpoint, tmp_path / "bundle", prompts=(question,), per_layer=True)
    assert bundle.record.prompts[0].given_tokens > 64
    judge = Judge("lowering", "fp32", load_gates())
    layers = check_layers(floats.artifact, bundle, judge, threads=1)["decoder"]
    assert [layer.name for layer in layers if layer.is_seen] == ["embeddings", "residual_0"]
    [check] = judge.checks
    assert check.verdict == "PASS"
    assert check.detail.endswith("inside a delegate's call and not seen: residual_1")


def test_features_that_do_not_count_their_image_down_are_refused(floats):
    features = counted(np.zeros((16, 64), np.float32))
    assert features_to_compare(floats.artifact, features).shape == (16, 64)
    with pytest.raises(ParityError, match=r"how many tokens of the same image follow.*begins with 0, 15, 14"):
        features_to_compare(floats.artifact, np.roll(features, 1, axis=0))


def test_an_image_is_answered_twice_alike(floats):
    image = np.random.default_rng(5).integers(0, 256, (50, 50, 3), np.uint8)
    with Generator(floats.artifact, threads=1) as generator:
        answers = [
            generator.generate(
                [Message(role="user", parts=(Image(), Text("What is this?")))],
                [image],
                options=GenerateOptions(max_tokens=6),
            )
            for _ in range(2)
        ]
    assert answers[0].ids == answers[1].ids
    assert len(answers[0].ids) > 0


def test_every_target_carries_the_same_integers(integers, tmp_path):
    from medgemma_export.targets.executorch_unpack import compare_program

    onnx = Built(
        tmp_path,
        model="sample:medgemma-tiny",
        precision="int4",
        target="onnx",
        components=("embed", "decoder"),
    )
    other = onnx.artifact.manifest.quantization.plan_sha256
    assert integers.artifact.manifest.quantization.plan_sha256 == other
    program = integers.artifact.path("model.pte")
    for name, component in integers.parts.items():
        compare_program(program, component, integers.weights)
        compare_integers(
            onnx.artifact.path(onnx.artifact.component(name).program), component, integers.weights
        )
    changed = OneChanged(**vars(integers.weights))
    for component in integers.parts.values():
        with pytest.raises(ArtifactError, match=r"model.pte does not carry language_model"):
            compare_program(program, component, changed)


class OneChanged(QuantizedWeights):
    def quantized(self, name, rows=None):
        tensor = super().quantized(name, rows)
        values = tensor.values.copy()
        values[-1, -1] ^= 1
        return replace(tensor, values=values)


def test_integers_compute_what_their_reference_says(integers, conversation):
    ids, blocks, features = conversation
    decoder = integers.decoder()
    cache = decoder.new_cache(90)
    actual = decoder.read(cache, ids[:90], image_blocks=blocks[:90], image_features=counted(features))
    rounding = TARGETS["executorch"].integer_linear()
    expected = all_at_once(integers, conversation, 90, integer_linear=rounding)
    assert np.abs(actual - expected).max() < 1e-3
    # What the comparison would miss if the reference left activations alone.
    assert np.abs(actual - all_at_once(integers, conversation, 90)).max() > 1e-2


def test_a_table_that_is_also_the_head_lies_in_the_file_once(integers):
    from medgemma_export.targets.executorch_program import pack_table

    [table] = [row.name for row in integers.weights.plan.rows if row.role == "table"]
    rows, _ = pack_table(integers.weights.quantized(table))
    assert integers.artifact.path("model.pte").read_bytes().count(rows.tobytes()) == 1


def test_weights_apart_compute_the_same(integers, apart, conversation):
    ids, blocks, features = conversation
    logits = []
    for artifact in (integers.artifact, apart):
        decoder = integers.decoder(artifact)
        cache = decoder.new_cache(LENGTH)
        found = [decoder.read(cache, ids[:90], image_blocks=blocks[:90], image_features=counted(features))]
        found += [decoder.read(cache, ids[90:619]), decoder.read(cache, ids[619:620])]
        logits.append(np.stack(found))
    assert np.isfinite(logits[0]).all()
    assert np.array_equal(*logits)


def test_weights_apart_are_the_same_integers(integers, apart):
    from medgemma_export.targets.executorch_unpack import compare_program

    program = apart.path("model.pte")
    changed = OneChanged(**vars(integers.weights))
    for component in integers.parts.values():
        compare_program(program, component, integers.weights)
        with pytest.raises(ArtifactError, match=r"model.pte does not carry language_model"):
            compare_program(program, component, changed)


def test_weights_apart_lie_in_their_file_once_and_not_in_the_program(integers, apart):
    from executorch.exir._serialize._cord import Cord
    from executorch.extension.flat_tensor.serialize.serialize import FlatTensorSerializer

    from medgemma_export.targets.executorch_file import read_program
    from medgemma_export.targets.executorch_program import pack_table

    program, data = apart.path("model.pte").read_bytes(), apart.path("model.ptd").read_bytes()
    [table] = [row.name for row in integers.weights.plan.rows if row.role == "table"]
    rows, scales = pack_table(integers.weights.quantized(table))
    for part in (rows, scales):
        assert (data.count(part.tobytes()), program.count(part.tobytes())) == (1, 0)
    description, _ = read_program(apart.path("model.pte"))
    assert not description.named_data
    # What is left is delegates' graphs.
    inside = {delegate.processed.index for plan in description.execution_plan for delegate in plan.delegates}
    assert [index for index, segment in enumerate(description.segments) if segment.size] == sorted(inside)
    stored = sum(row.stored_bits // 8 for row in integers.weights.plan.rows)
    assert integers.artifact.path("model.pte").stat().st_size - len(program) > stored
    # ExecuTorch's own writer, which holds all of it in memory, writes the same bytes.
    writer = FlatTensorSerializer()
    assert bytes(writer.serialize(writer.deserialize(Cord(data)))) == data


def test_missing_and_damaged_weights_are_refused(apart, tmp_path):
    copy = copied(apart, tmp_path)
    weights = copy.directory / "model.ptd"
    content = weights.read_bytes()
    for damaged in (content[:-1], content[:2000], content[:20], b"", bytes(len(content))):
        weights.write_bytes(damaged)
        with pytest.raises(ArtifactError, match=r"Failed to load data map.*model\.ptd.*a file is damaged"):
            ExecutorchSession(copy, "decoder")
    weights.unlink()
    with pytest.raises(ArtifactError, match=r"model\.ptd is missing from copy; copy it or export again"):
        ExecutorchSession(copy, "decoder")


@pytest.mark.parametrize("component", ["embed", "decoder"])
def test_weights_of_another_export_are_refused(floats, apart, tmp_path, component):
    """Their names are alike, and XNNPACK itself looks at no sizes."""
    for index, (artifact, foreign) in enumerate(itertools.permutations((apart, floats.other))):
        copy = copied(artifact, tmp_path / str(index))
        shutil.copy(foreign.path("model.ptd"), copy.directory)
        with pytest.raises(ArtifactError, match=r"model\.ptd is of another export and has not all"):
            ExecutorchSession(copy, component)


def copied(artifact, directory):
    shutil.copytree(artifact.directory, directory / "copy")
    return replace(artifact, directory=directory / "copy")


def test_the_shared_runners_constants_are_there(integers):
    from executorch.runtime import Runtime

    program = Runtime.get().load_program(integers.artifact.path("model.pte"))
    prompt = integers.artifact.manifest.prompt
    [table] = [row for row in integers.weights.plan.rows if row.role == "table"]
    for name, value in (
        ("get_bos_id", prompt.bos_id),
        ("get_eos_ids", list(prompt.stop_ids)),
        ("get_max_context_len", 700),
        ("get_max_seq_len", 512),
        ("get_vocab_size", table.shape[0]),
        ("use_kv_cache", True),
        ("use_sdpa_with_kv_cache", True),
        ("enable_dynamic_shape", True),
    ):
        given = program.load_method(name).execute([])
        assert given == (value if isinstance(value, list) else [value]), name


@pytest.mark.parametrize(("has_image", "is_apart"), [(False, False), (True, False), (True, True)])
def test_executorchs_own_runner_writes_the_same(floats, has_image, is_apart):
    from executorch.extension.llm.runner import (
        GenerationConfig,
        MultimodalRunner,
        make_image_input,
        make_text_input,
    )
    from tokenizers import Tokenizer

    directory, manifest = floats.artifact.directory, floats.artifact.manifest
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    rng = np.random.default_rng(4)
    size = (3, manifest.image.height, manifest.image.width)
    vision, decoder = open_session(floats.artifact, "vision", threads=1), floats.decoder()
    data = None
    if is_apart:
        directory = floats.other.directory
        data = str(directory / "model.ptd")
    runner = MultimodalRunner(str(directory / "model.pte"), str(directory / "tokenizer.json"), data)
    answers = set()
    # Its tokenizer takes a text that is a token whole, even where merges lead elsewhere (" of" here).
    for before, after in itertools.permutations(("a scan", "the chest", "liver"), 2):
        pixels = rng.integers(0, 256, size, np.uint8)
        parts = [make_text_input(before), make_text_input(after)]
        texts = [tokenizer.encode(text, add_special_tokens=False).ids for text in (before, after)]
        ids, features = np.array(texts[0] + texts[1]), None
        blocks = np.full(len(ids), -1)
        if has_image:
            parts.insert(1, make_image_input(torch.from_numpy(pixels)))
            tokens, place = manifest.prompt.tokens_per_image, len(texts[0])
            ids = np.insert(ids, [place] * tokens, manifest.prompt.image_id)
            blocks = np.insert(blocks, [place] * tokens, 0)
            features = vision.run({"pixel_values": pixels[None]})["image_features"]
        cache, written = decoder.new_cache(100), []
        logits = decoder.read(cache, ids, image_blocks=blocks, image_features=features)
        for _ in range(2):
            written.append(int(logits.argmax()))
            logits = decoder.read(cache, np.array(written[-1:]))
        if "\ufffd" in tokenizer.decode(written):
            continue  # a part of a character, which the runner's binding cannot hand on
        runner.reset()
        options = GenerationConfig(max_new_tokens=2, temperature=0.0, echo=False)
        assert runner.generate_text(parts, options) == tokenizer.decode(written)
        answers.add(tuple(written))
    assert len(answers) > 1  # they depend on what was asked


def test_a_damaged_or_foreign_program_is_refused(integers, tmp_path):
    directory = tmp_path / "copy"
    shutil.copytree(integers.artifact.directory, directory)
    artifact = replace(integers.artifact, directory=directory)
    with pytest.raises(ArtifactError, match="no method 'vision_encoder'"):
        entries = artifact.manifest.components | {"vision": artifact.component("embed")}
        ExecutorchSession(
            replace(artifact, manifest=replace(artifact.manifest, components=entries)), "vision"
        )
    program = directory / "model.pte"
    program.write_bytes(program.read_bytes()[:5000])
    with pytest.raises(ArtifactError, match="cannot be loaded by ExecuTorch"):
        ExecutorchSession(artifact, "decoder")


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    return Built(tmp_path_factory.mktemp("encoder"), model="sample:medsiglip-tiny", precision="int8")


def test_time_is_shared_out_by_operator(encoder, monkeypatch):
    # Fresh processes import PyTorch each, and are not what this is about.
    monkeypatch.setattr(latency, "measure_process_cost", lambda *_, **__: None)
    report = measure_latency(
        encoder.artifact,
        [TimedImage(name="grey", decode=lambda: np.full((40, 40, 3), 128, np.uint8))],
        ["a scan"],
        threads=1,
        repetition=Repetition(seconds=0, min_runs=1, warm_up_runs=0),
        profile=True,
    )
    for component in ("image", "text"):
        operators = {share.operator: share for share in report.profile[component]}
        assert sum(share.share for share in operators.values()) == pytest.approx(1)
        assert operators["llama::custom_sdpa.out"].calls >= 1
        # XNNPACK names its own: dynamically quantized int8 by int8 of each channel.
        assert any(name.startswith("Fully Connected (NC, QD8") for name in operators)


def test_time_of_a_decoder_is_shared_out_by_operator(integers):
    shares = profile_decoder(integers.artifact, list(range(5, 25)), steps=3, threads=1)
    assert shares.keys() == {"prefill", "decode"}
    for part in shares.values():
        operators = {share.operator: share for share in part}
        assert sum(share.share for share in part) == pytest.approx(1)
        # Two layers in one run, each with a call for several tokens and one for a single token.
        assert operators["llama::custom_sdpa.out"].calls == 4
        assert any(name.startswith("Fully Connected (NC, QD8, F32, QB4W)") for name in operators)


def test_an_encoder_embeds_images_and_texts(encoder):
    built = encoder
    image = np.random.default_rng(6).integers(0, 256, (40, 50, 3), np.uint8)
    with Embedder(built.artifact, threads=1) as embedder:
        seen, read = embedder.embed_images([image]), embedder.embed_texts(["a scan"])
    pixels = normalize(resize(image, built.artifact.manifest.image), built.artifact.manifest.image)[None]
    ids = load_tokenizer(built.artifact.directory, built.artifact.manifest.text).encode(["a scan"])
    rounding = TARGETS["executorch"].integer_linear()
    for name, actual, inputs in (
        ("image", seen, {"pixel_values": pixels}),
        ("text", read, {"input_ids": ids}),
    ):
        outputs = compute(built.parts[name], built.weights, inputs, integer_linear=rounding)
        expected = outputs["pooler_output"][0]
        assert np.abs(actual[0] - expected / np.linalg.norm(expected)).max() < 1e-3


def test_portable_kernels_alone_compute_the_same(tmp_path):
    built = Built(
        tmp_path,
        model="sample:medsiglip-tiny",
        precision="fp32",
        components=("text",),
        delegate="portable",
        separate_weights=True,
    )
    open_artifact(built.artifact.directory).path("model.ptd")  # the manifest lists it
    ids = load_tokenizer(built.artifact.directory, built.artifact.manifest.text).encode(["a scan"])
    actual, whole = (
        open_session(artifact, "text", threads=1).run({"input_ids": ids})["pooler_output"]
        for artifact in (built.artifact, built.other)
    )
    expected = compute(built.parts["text"], built.weights, {"input_ids": ids})["pooler_output"]
    assert np.abs(actual - expected).max() < 1e-4
    assert np.array_equal(actual, whole)
    said = json.loads(built.artifact.path("delegation.json").read_text())
    assert said["delegate"] == "portable"
    assert said["methods"]["text_encoder"]["delegated"] == said["methods"]["text_encoder"]["calls"] == 0


def test_encoders_are_lowered_to_core_ml_and_what_is_left_is_counted(tmp_path):
    pytest.importorskip("coremltools")
    built = Built(tmp_path, model="sample:medsiglip-tiny", precision="fp32", delegate="coreml")
    said = json.loads(built.artifact.path("delegation.json").read_text())
    assert said["delegate"] == "coreml"
    for method in ("image_encoder", "text_encoder"):
        share = said["methods"][method]
        assert share["delegated"] > 20
        assert 0 < share["kernels"] <= 3  # attention, and images' bytes turned into floats
    program = built.artifact.path("model.pte").read_bytes()
    assert b"CoreMLBackend" in program
    assert b"XnnpackBackend" not in program
