"""A layer that is wrong is named, in artifacts of every target; in right ones none is."""

import json
from dataclasses import replace
from importlib.util import find_spec
from types import SimpleNamespace

import pytest

pytest.importorskip("torch")
pytest.importorskip("psutil")

from medgemma_benchmarks.bundle import open_bundle, write_bundle
from medgemma_benchmarks.layer_parity import prompt_of_layers
from medgemma_benchmarks.parity import check_parity
from medgemma_benchmarks.parity_inputs import ParityError
from medgemma_export.build import build
from medgemma_export.checkpoint import open_checkpoint
from medgemma_export.models import load_model
from medgemma_export.recipe import Recipe
from medgemma_export.reference.encoders import record_reference
from medgemma_export.reference.images import sample_images, sample_labels
from medgemma_export.reference.packing import record_packing
from medgemma_export.targets import TARGETS
from medgemma_runtime.errors import ArtifactError, EdgeError
from tests.wrong_artifacts import rewritten, with_scaled_weight, with_wrong_weight

# Of the targets' libraries, about their own insides.
pytestmark = pytest.mark.filterwarnings("ignore")

MODEL = "sample:medsiglip-tiny"
INSTALLED = {"onnx": "onnx_ir", "coreml": "coremltools", "executorch": "executorch"}
LAYERS = 3  # of the sample's text tower


def recipe_of(target, out, precision="fp32"):
    scheme = TARGETS[target].scheme(precision)
    return Recipe(model=MODEL, revision=None, target=target, scheme=scheme, components=("text",), out=out)


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    out = tmp_path_factory.mktemp("reference") / "bundle"
    return record_reference(
        MODEL, out, images=sample_images()[:1], labels=sample_labels()[:3], per_layer=True
    )


@pytest.fixture(scope="module", params=list(TARGETS))
def artifact(request, tmp_path_factory):
    if find_spec(INSTALLED[request.param]) is None:
        pytest.skip(f"{INSTALLED[request.param]} is not installed")
    out = tmp_path_factory.mktemp(request.param) / "artifact"
    return build(recipe_of(request.param, out), progress=lambda *_: None)


def test_a_right_artifact_departs_nowhere(artifact, reference):
    report = check_parity(artifact, reference, per_layer=True)
    assert report.verdict == "PASS"
    assert [layer.name for layer in report.layers["text"]] == [
        "embeddings",
        *(f"residual_{layer}" for layer in range(LAYERS)),
        "pooler_output",
    ]
    assert [layer.is_result for layer in report.layers["text"]] == [False] * (LAYERS + 1) + [True]
    assert all(layer.is_seen and layer.relative_error < 1e-5 for layer in report.layers["text"])


@pytest.fixture(scope="module")
def read():
    checkpoint = open_checkpoint(MODEL)
    return load_model(checkpoint).reader(checkpoint)


@pytest.mark.parametrize(
    ("weight", "named", "sound"),
    [
        ("encoder.layers.1.mlp.fc2", "residual_1", 2),
        ("encoder.layers.2.mlp.fc2", "residual_2", 3),
        ("head", "pooler_output: the head is wrong", 4),
    ],
)
def test_the_layer_whose_weight_is_wrong_is_named(artifact, reference, read, tmp_path, weight, named, sound):
    matrix = read(f"text_model.{weight}.weight")
    broken = with_scaled_weight(artifact, tmp_path / "broken", matrix, 1.01)
    report = check_parity(broken, reference, per_layer=True)
    [check] = [check for check in report.checks if check.subject == "layers"]
    assert (check.verdict, check.detail) == ("FAIL", f"text departs first at {named}")
    errors = [layer.relative_error for layer in report.layers["text"]]
    assert max(errors[:sound]) < 1e-5 < 1e-4 < min(errors[sound:])


@pytest.fixture(scope="module", params=["int8", "int4"])
def integers(request, tmp_path_factory):
    out = tmp_path_factory.mktemp(request.param) / "artifact"
    return build(recipe_of("onnx", out, request.param), progress=lambda *_: None)


@pytest.fixture(scope="module")
def packing(integers, reference, tmp_path_factory):
    out = tmp_path_factory.mktemp("packing") / "bundle"
    return record_packing(
        integers.directory, MODEL, reference.directory, out, per_layer=True, progress=lambda *_: None
    )


def test_integers_depart_nowhere_from_what_they_should_compute(integers, packing):
    assert packing.record.layers == ("text",)
    report = check_parity(integers, packing, per_layer=True)
    assert report.verdict == "PASS"
    assert all(layer.relative_error < 1e-5 for layer in report.layers["text"])


def test_the_layer_whose_integers_are_wrong_is_named(integers, packing, tmp_path):
    ir = pytest.importorskip("onnx_ir")
    program = ir.load(integers.path(integers.component("text").program))
    stored = program.graph.initializers["text_model.encoder.layers.1.mlp.fc2.weight"].const_value.numpy()
    wrong = stored.copy()
    wrong.flat[0] ^= 0x40
    broken = with_wrong_weight(integers, tmp_path / "broken", stored, wrong)
    report = check_parity(broken, packing, per_layer=True)
    [check] = [check for check in report.checks if check.subject == "layers"]
    assert (check.verdict, check.detail) == ("FAIL", "text departs first at residual_1")
    errors = [layer.relative_error for layer in report.layers["text"]]
    assert max(errors[:2]) < 1e-5 < 1e-4 < min(errors[2:])


@pytest.mark.parametrize("target", ["coreml", "executorch"])
def test_no_packing_reference_is_made_of_other_targets(integers, reference, tmp_path, target):
    named = replace(integers, manifest=replace(integers.manifest, target=target))
    other = rewritten(named, tmp_path / "other", lambda directory: None)
    with pytest.raises(EdgeError, match=r"exact form of an ONNX program; export .* with --target onnx"):
        record_packing(
            other.directory, MODEL, reference.directory, tmp_path / "out", progress=lambda *_: None
        )


def test_a_reference_without_layers_is_refused(artifact, reference, tmp_path):
    arrays = {name: array for name, array in reference.arrays.items() if not name.endswith(".layers")}
    record = reference.record
    bare = write_bundle(
        tmp_path / "bare",
        kind="float",
        model_id=record.model_id,
        revision=None,
        weights_sha256=record.weights_sha256,
        plan_sha256=None,
        producer=record.producer,
        image=record.image,
        images=sample_images()[:1],
        labels=record.labels,
        arrays=arrays,
        timings={},
    )
    with pytest.raises(ParityError, match=r"the reference holds none.*record --per-layer"):
        check_parity(artifact, bare, per_layer=True)


def test_an_artifact_without_names_is_refused(artifact, reference, tmp_path):
    if artifact.manifest.target != "executorch":
        pytest.skip("only ExecuTorch's artifacts say in a file where layers are seen")
    old = rewritten(artifact, tmp_path / "old", lambda directory: (directory / "layers.json").unlink())
    with pytest.raises(ArtifactError, match=r"has no layers\.json.*export again"):
        check_parity(old, reference, per_layer=True)


@pytest.mark.parametrize("what", ["memory", "disk"])
def test_what_no_memory_or_disk_holds_is_refused_before_the_run(
    artifact, reference, tmp_path, monkeypatch, what
):
    if artifact.manifest.target != "executorch":
        pytest.skip("only ExecuTorch records all of a run")

    def enlarge(directory):
        path = directory / "layers.json"
        layers = json.loads(path.read_text())
        layers["text_encoder"]["debug_bytes"] = 10**15
        path.write_text(json.dumps(layers))

    if what == "disk":
        monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=10**16))
    large = rewritten(artifact, tmp_path / "large", enlarge)
    with pytest.raises(EdgeError, match=rf"'text'.*000000.0 GB of {what}.*free some, or export.*onnx"):
        check_parity(large, reference, per_layer=True)


def test_layers_that_were_recorded_are_read_back(reference):
    opened = open_bundle(reference.directory)
    assert opened.record.layers == ("image", "text")
    assert opened.arrays["text.layers"].shape == (2, LAYERS + 1, 64, 64)
    assert opened.arrays["image.layers"].shape == (1, 5, 64, 64)  # of 256 patches
    assert prompt_of_layers(()) is None
