"""One set of integers reaches every target: bit for bit, read back from what each of them ships."""

import os
from dataclasses import replace
from importlib.util import find_spec

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from medgemma_export.build import build  # noqa: E402
from medgemma_export.calibration.calibrate import ModelInput, calibrate  # noqa: E402
from medgemma_export.checkpoint import open_checkpoint  # noqa: E402
from medgemma_export.models import load_model  # noqa: E402
from medgemma_export.recipe import Recipe  # noqa: E402
from medgemma_export.targets import TARGETS  # noqa: E402
from medgemma_quantization.integer_hashes import INTEGERS_NAME, read_hashes  # noqa: E402
from medgemma_quantization.methods import METHODS  # noqa: E402
from medgemma_quantization.plan import compare_packed, make_plan, read_plan  # noqa: E402
from medgemma_quantization.scheme import INT8, SCHEMES  # noqa: E402
from medgemma_quantization.weights import quantize_weights, store_integers  # noqa: E402
from medgemma_runtime.errors import ArtifactError  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")  # of the targets' libraries, about their own insides

# The second layer's matrices in 8 bits, as a budget mixes them.
MIXED = replace(
    SCHEMES["int4"], name="mixed", overrides=((r".*layers\.[13579]\..*(proj|fc\d)\.weight", INT8),)
)
INSTALLED = {"onnx": "onnx_ir", "coreml": "coremltools", "executorch": "executorch"}


@pytest.fixture(scope="module")
def subject(tmp_path_factory):
    """Two layers of MedSigLIP's image tower, and the integers that GPTQ found for them."""
    checkpoint = open_checkpoint("sample:medsiglip-tiny")
    tower = {**checkpoint.config["vision_config"], "num_hidden_layers": 2}
    checkpoint = replace(checkpoint, config={**checkpoint.config, "vision_config": tower})
    model = load_model(checkpoint)
    model = replace(model, components=tuple(part for part in model.components if part.name == "image"))
    coarse = np.random.default_rng(2).uniform(-1, 1, (1, 3, 14, 14)).astype(np.float32)
    sample = ModelInput(pixels=np.kron(coarse, np.ones((16, 16), np.float32)))
    weights = calibrate(
        model,
        make_plan(MIXED, model.weights(), method="gptq"),
        model.reader(checkpoint),
        [sample],
        tmp_path_factory.mktemp("integers") / "weights",
        find=METHODS["gptq"].find,
        memory_bytes=1 << 30,
    )
    return checkpoint, model, weights


def compare(name, path, component, weights):
    if name == "onnx":
        from medgemma_export.unpack import compare_integers

        compare_integers(path, component, weights)
    elif name == "coreml":
        from medgemma_export.targets.coreml_unpack import compare_package

        compare_package(path, component, weights)
    else:
        from medgemma_export.targets.executorch_unpack import compare_program

        compare_program(path, component, weights)


@pytest.mark.parametrize("name", list(TARGETS))
def test_what_a_target_ships_are_the_integers_that_were_made(subject, tmp_path, name):
    if find_spec(INSTALLED[name]) is None:
        pytest.skip(f"{INSTALLED[name]} is not installed")
    checkpoint, model, made = subject
    scheme = replace(MIXED, activations=TARGETS[name].scheme("int4").activations)
    plan = make_plan(scheme, model.weights(), method="gptq")
    integers = [row for row in plan.rows if not row.storage.is_float]
    assert integers == [row for row in made.plan.rows if not row.storage.is_float]
    assert {str(row.storage) for row in integers} == {"int4 block 32", "int8 per channel"}
    weights = replace(made, plan=plan)
    TARGETS[name].check(model, plan)
    directory = tmp_path / "artifact"
    directory.mkdir()
    for extra in model.extra_files:
        (directory / extra).write_bytes(checkpoint.content(extra))
    components, packed = TARGETS[name].lower(model, weights, directory, progress=lambda *step: None)
    compare_packed(plan, packed)
    program = directory / components["image"].program
    compare(name, program, model.components[0], weights)

    # That the comparison sees a single integer, and that rounding again would not pass for what was made.
    row = next(row for row in integers if row.storage.bits == 8)
    other = tmp_path / "weights"
    other.mkdir()
    for path in made.directory.iterdir():
        (other / path.name).write_bytes(path.read_bytes())
    values = np.load(other / f"{row.name}.values.npy")
    values[-1, -1] ^= 1
    np.save(other / f"{row.name}.values.npy", values)
    with pytest.raises(ArtifactError, match=row.name.replace(".", r"\.")):
        compare(name, program, model.components[0], replace(weights, directory=other))
    for row in integers:
        store_integers(row, made.read, other, METHODS["rtn"].find(row.storage, None))
    with pytest.raises(ArtifactError):
        compare(name, program, model.components[0], replace(weights, directory=other))


def test_two_exports_apart_make_the_same_integers_and_their_files_say_so(tmp_path):
    found = []
    for name in ("onnx", "coreml"):
        if find_spec(INSTALLED[name]) is None:
            pytest.skip(f"{INSTALLED[name]} is not installed")
        recipe = Recipe(
            model="sample:medsiglip-tiny",
            revision=None,
            target=name,
            scheme=TARGETS[name].scheme("int4"),
            components=("image",),
            out=tmp_path / name,
        )
        artifact = build(recipe, progress=lambda *step: None)
        [entry] = [file for file in artifact.manifest.files if file.path == INTEGERS_NAME]
        found.append((entry.sha256, read_hashes(artifact.directory)))
    assert found[0] == found[1]
    plan = read_plan(artifact.path("plan.json"))
    assert set(found[0][1]) == {row.name for row in plan.rows if not row.storage.is_float}


@pytest.mark.weights
def test_onnx_and_core_ml_ship_the_same_int4_of_a_whole_decoder(tmp_path):
    """`MEDGEMMA_EDGE_CHECKPOINT=sample:gemma3-270m pytest -m weights`: bit for bit, scales too."""
    name = os.environ.get("MEDGEMMA_EDGE_CHECKPOINT")
    if name is None:
        pytest.skip("MEDGEMMA_EDGE_CHECKPOINT names no checkpoint")
    checkpoint = open_checkpoint(name)
    model = load_model(checkpoint)
    parts = tuple(part for part in model.components if part.name in ("embed", "decoder"))
    model = replace(model, components=parts, prompt=replace(model.prompt, context=512))
    made = None
    for target in ("onnx", "coreml"):
        scheme = replace(SCHEMES["int4"], activations=TARGETS[target].scheme("int4").activations)
        plan = make_plan(scheme, model.weights())
        if made is None:
            made = quantize_weights(plan, model.reader(checkpoint), tmp_path / "weights")
        assert [row for row in plan.rows if not row.storage.is_float] == [
            row for row in made.plan.rows if not row.storage.is_float
        ]
        directory = tmp_path / target
        directory.mkdir()
        for extra in model.extra_files:
            (directory / extra).write_bytes(checkpoint.content(extra))
        weights = replace(made, plan=plan)
        entries, _ = TARGETS[target].lower(model, weights, directory, progress=lambda *step: None)
        compare(target, directory / entries["decoder"].program, parts[1], weights)
