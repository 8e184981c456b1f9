"""A Core ML decoder fed as the runtime feeds it, held against transformers; then fed wrongly, and seen."""

import re
import shutil
from dataclasses import replace

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("medgemma_export.targets.coreml_mil")


import torch
from safetensors.torch import load_file, save_file

from medgemma_benchmarks import cli
from medgemma_benchmarks.bundle import open_bundle
from medgemma_benchmarks.prediction_parity import check_predictions, recorded_prompts
from medgemma_benchmarks.results import read_result
from medgemma_export.build import build
from medgemma_export.checkpoint import open_checkpoint
from medgemma_export.recipe import Recipe
from medgemma_export.reference.decoders import record_text_reference
from medgemma_export.targets import TARGETS
from medgemma_export.targets.coreml_package import MODEL_PATH
from medgemma_runtime.artifact import Artifact, open_artifact, sha256_file
from medgemma_runtime.backends import open_session
from medgemma_runtime.backends.mil_session import MilSession
from medgemma_runtime.errors import ArtifactError, EdgeError, TextError
from medgemma_runtime.generate import GenerateOptions, Generator
from medgemma_runtime.manifest import read_manifest
from medgemma_runtime.prompt import Image, Message, Text
from medgemma_runtime.static_cache import StaticCache
from tests import tiny_prompts

WINDOW, CHUNK, FORCED = 32, 16, 32
# Spelled letter by letter, so each answer is longer than the window.
PROMPTS = (
    tiny_prompts.prompt(
        "two images",
        "Left: no effusion. Right: a small effusion.",
        images=("right", "left"),
        question="Which?",
    ),
    tiny_prompts.prompt("text", "Blood pressure 128/70 mmHg.\n\nPulse 84/min, regular; 36.8 °C."),
)
QUIET = (tiny_prompts.prompt("text", "Pulse 84/min."),)
SHORT = (
    tiny_prompts.prompt("short", "A scan.", images=("left",), question="Describe this image, in one word"),
)


def export(out, scheme, *, model=tiny_prompts.MODEL, components=()):
    recipe = Recipe(
        model=model,
        revision=None,
        target="coreml",
        scheme=scheme,
        components=components,
        out=out,
        context=192,
    )
    return build(recipe, progress=lambda *step: None)


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    directory = tmp_path_factory.mktemp("coreml")
    export(directory / "fp32", TARGETS["coreml"].scheme("fp32"))
    tiny_prompts.record(directory / "reference", prompts=PROMPTS)
    tiny_prompts.record(directory / "short", prompts=SHORT)
    return directory


@pytest.fixture(scope="module")
def bundle(work):
    return open_bundle(work / "reference")


@pytest.fixture(scope="module")
def short(work):
    return open_bundle(work / "short")


def check(work, bundle, **options):
    return check_predictions(open_artifact(work / "fp32"), bundle, **options)


def test_images_chunks_the_windows_edge_and_decode_equal_transformers(work, bundle):
    [shown, read] = recorded_prompts(bundle)
    assert shown.prompt.predictions >= FORCED and read.prompt.predictions >= FORCED
    # Images of a chunk each; whole prompts, read at once, are several chunks and end far past the window.
    assert len(shown.image_features) == 2 * CHUNK
    assert len(shown.ids) > 2 * WINDOW and len(read.ids) > WINDOW
    report = check(work, bundle)
    assert report.verdict == "PASS" and report.question == "lowering"
    for found in report.predictions.values():
        assert found.max_abs_error < 1e-4
        assert found.kl_mean < 1e-9
    assert report.components["vision"].max_abs_error < 1e-4


def unmasked(name, inputs, count):
    return {"global_mask": inputs["global_mask"] * 0} if name == "prefill" else {}


def causal_images(name, inputs, count):
    """The masks without what tokens of an image see of its later tokens."""
    changed = {}
    for kind in ("local", "global"):
        slot, mask = int(inputs[f"{kind}_slot"][0]), inputs[f"{kind}_mask"].copy()
        size = mask.shape[2]
        mask[0, 0, :, slot : slot + size][~np.tri(size, dtype=bool)] = -30000
        changed[f"{kind}_mask"] = mask
    return changed


def next_slot(name, inputs, count):
    """Some tokens are written a row too far."""
    return {"local_slot": inputs["local_slot"] + np.int32(count % 3 == 0)}


def first_token(name, inputs, count):
    return {"last": inputs["last"] * 0} if "last" in inputs else {}


def other_tables(name, inputs, count):
    return {"global_cos": inputs["local_cos"], "global_sin": inputs["local_sin"]}


@pytest.mark.parametrize("wrong", [unmasked, causal_images, next_slot, first_token, other_tables])
def test_a_wrong_input_fails(work, short, monkeypatch, wrong):
    original = StaticCache.step

    def step(cache, embeddings, blocks):
        name, inputs = original(cache, embeddings, blocks)
        return name, inputs | wrong(name, inputs, cache.length)

    monkeypatch.setattr(StaticCache, "step", step)
    report = check(work, short)
    failed = {check.subject for check in report.checks if check.verdict == "FAIL"}
    assert failed <= {"decoder", "prefill"} and failed
    assert max(found.max_abs_error for found in report.predictions.values()) > 1e-2


def test_a_lost_row_of_the_state_fails(work, short, monkeypatch):
    original, calls = MilSession.run, []

    def run(session, inputs):
        outputs = original(session, inputs)
        calls.append(session)
        if "local_slot" in inputs and inputs["inputs_embeds"].shape[1] == 1:
            row = int(inputs["local_slot"][0])
            session._state["local_cache"][1, :, row] = 0  # the first layer's value of the token just read
        return outputs

    monkeypatch.setattr(MilSession, "run", run)
    report = check(work, short)
    assert calls
    assert report.predictions["decoder"].max_abs_error > 1e-2
    assert {check.subject for check in report.checks if check.verdict == "FAIL"} == {"decoder"}


def test_a_conversation_goes_on_where_it_stands_and_nowhere_else(work):
    session = open_session(open_artifact(work / "fp32"), "decoder")
    width = session.entry.inputs[0].shape[2]

    def given(start, count):
        return {
            "inputs_embeds": np.ones((1, count, width), np.float32),
            "cache_position": np.arange(start, start + count),
        }

    with pytest.raises(EdgeError, match=r"holds a conversation of 0 tokens and was given .* position 3 on"):
        session.run(given(3, 1))
    first = session.run(given(0, 20))["logits"]
    session.run(given(20, 1))
    with pytest.raises(EdgeError, match=r"holds a conversation of 21 tokens .* position 20 on; go on where"):
        session.run(given(20, 1))
    assert (session.run(given(0, 20))["logits"] == first).all()
    with pytest.raises(TextError, match="do not fit a decoder for 192"):
        session.run(given(20, 180))
    with pytest.raises(EdgeError, match="conversation of 0 tokens"):  # half of the step above was read
        session.run(given(20, 1))
    with pytest.raises(EdgeError, match="needs an array for every output"):
        session.run_into(given(0, 1), {})
    session.close()
    with pytest.raises(EdgeError, match="closed"):
        session.run(given(0, 1))


def altered(work, tmp_path, change):
    """The artifact with another program in its decoder, hashes renewed: as a defective exporter leaves it."""
    import coremltools

    directory = tmp_path / "artifact"
    shutil.copytree(work / "fp32", directory)
    package = directory / "coreml/decoder.mlpackage"
    spec = coremltools.utils.load_spec(str(package))
    change(spec)
    path = package / MODEL_PATH
    path.write_bytes(spec.SerializeToString())
    manifest = read_manifest(directory)
    name = path.relative_to(directory).as_posix()
    renewed = {"sha256": sha256_file(path), "size_bytes": path.stat().st_size}
    files = tuple(replace(entry, **(renewed if entry.path == name else {})) for entry in manifest.files)
    return Artifact(directory=directory, manifest=replace(manifest, files=files))


def drop_function(spec):
    del spec.mlProgram.functions["decode"]


def drop_function_wholly(spec):
    drop_function(spec)
    [index] = [i for i, function in enumerate(spec.description.functions) if function.name == "decode"]
    del spec.description.functions[index]
    spec.description.defaultFunctionName = "prefill"


def rename_described_state(spec):
    [state] = [state for state in spec.description.functions[0].state if state.name == "local_cache"]
    state.name = "local_cachf"


def rename_state_of_one_function(spec):
    [described] = [function for function in spec.description.functions if function.name == "decode"]
    [state] = [state for state in described.state if state.name == "local_cache"]
    state.name = "local_cachf"
    function = spec.mlProgram.functions["decode"]
    [given] = [item for item in function.inputs if item.name == "local_cache"]
    given.name = "local_cachf"
    [block] = function.block_specializations.values()
    for operation in block.operations:
        for argument in operation.inputs["input"].arguments if "input" in operation.inputs else ():
            if argument.name == "local_cache":
                argument.name = "local_cachf"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            drop_function,
            r"describes the functions \['decode', 'prefill'\] and has \['prefill'\]: 'decode'",
        ),
        (drop_function_wholly, r"the decoder has no function 'decode', only prefill; export again"),
        (rename_described_state, r"has the state 'local_cache' and the model's description lacks it"),
        (
            rename_state_of_one_function,
            r"prefill keeps .*'local_cache'\] and decode .*'local_cachf'\]",
        ),
    ],
)
def test_a_program_that_lost_a_function_or_a_states_name_is_refused(work, tmp_path, change, message):
    artifact = altered(work, tmp_path, change)
    with pytest.raises(ArtifactError, match=message):
        open_session(artifact, "decoder")


@pytest.mark.parametrize("part", ["model.mlmodel", "weight.bin", "embedding.json", "Manifest.json"])
def test_a_byte_that_changed_breaks_the_seal(work, tmp_path, part):
    directory = tmp_path / "artifact"
    shutil.copytree(work / "fp32", directory)
    path = next(directory.glob(f"coreml/**/{part}"))
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(ArtifactError, match=rf"{part} does not have the SHA-256 that the manifest states"):
        open_artifact(directory)


def test_an_artifact_answers_about_images(work):
    with Generator(open_artifact(work / "fp32")) as generator:
        message = Message(role="user", parts=(Image(), Text("What is this?")))
        image = tiny_prompts.images()[0].rgb
        result = generator.generate([message], [image], options=GenerateOptions(max_tokens=4))
        again = generator.generate([message], [image], options=GenerateOptions(max_tokens=4))
    assert len(result.ids) == 4 or result.ended == "stop"
    assert result.ids == again.ids


LAYER = 2
NORM = f"layers.{LAYER}.post_feedforward_layernorm.weight"


@pytest.fixture(scope="module")
def loud(tmp_path_factory):
    """A checkpoint whose third layer adds tens of thousands to the stream, as Gemma's do; its reference."""
    directory = tmp_path_factory.mktemp("loud")
    checkpoint = directory / "checkpoint"
    shutil.copytree(open_checkpoint(tiny_prompts.MODEL).directory, checkpoint)
    tensors = load_file(checkpoint / "model.safetensors")
    [name] = [name for name in tensors if name.endswith(NORM)]
    tensors[name] = torch.full_like(tensors[name], 30000)
    save_file(tensors, checkpoint / "model.safetensors", metadata={"format": "pt"})
    record_text_reference(str(checkpoint), directory / "reference", prompts=QUIET, images=())
    for scale in (1.0, 0.25):
        scheme = replace(TARGETS["coreml"].scheme("fp16"), residual_scale=scale)
        export(directory / str(scale), scheme, model=str(checkpoint), components=("embed", "decoder"))
    return directory


def parity(capsys, monkeypatch, *words):
    monkeypatch.setattr("sys.argv", ["medgemma-parity", *map(str, words)])
    code = cli.parity_main()
    return code, capsys.readouterr().out


def test_parity_in_float16_names_the_layer_that_overflows(loud, capsys, monkeypatch):
    out = loud / "overflow.json"
    words = ["--reference", loud / "reference", "--arithmetic", "fp16", "--out", out]
    code, printed = parity(capsys, monkeypatch, loud / "1.0", *words)
    assert code == 1
    assert "arithmetic fp16" in printed.replace("\n", " ")
    report = read_result(out)[0]
    assert report.arithmetic == "fp16"
    for found in report.predictions.values():
        assert re.search(
            rf"\((mul|add), fp16\) of function '(prefill|decode)', after weight '\w*"
            rf"layers_{LAYER}_post_feedforward_layernorm_weight', reaches [\d,]+ in mode fp16",
            found.undefined,
        )


def test_a_quarter_of_the_stream_is_finite_and_the_same(loud, bundle):
    reference = open_bundle(loud / "reference")
    scaled = open_artifact(loud / "0.25")
    found = {mode: check_predictions(scaled, reference, arithmetic=mode) for mode in ("fp32", "fp16")}
    assert found["fp32"].predictions["decoder"].kl_mean < 1e-6
    # Rounding to float16 alone; an overflow would be no number.
    assert found["fp16"].predictions["decoder"].kl_mean < 1e-3
    # Without the evaluator's rounding the program that overflows is right.
    plain = check_predictions(open_artifact(loud / "1.0"), reference)
    assert plain.predictions["decoder"].kl_mean < 1e-6
