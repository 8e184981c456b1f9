"""A layer that is wrong is named, in artifacts of every target; in right ones none is."""

import shutil
from dataclasses import replace
from importlib.util import find_spec

import numpy as np
import pytest

pytest.importorskip("torch")

from medgemma_benchmarks.bundle import open_bundle, write_bundle
from medgemma_benchmarks.layer_parity import prompt_of_layers
from medgemma_benchmarks.parity import check_parity
from medgemma_benchmarks.parity_inputs import ParityError
from medgemma_export.build import build, decide
from medgemma_export.recipe import Recipe
from medgemma_export.reference.encoders import record_reference
from medgemma_export.reference.images import sample_images, sample_labels
from medgemma_export.targets import TARGETS
from medgemma_runtime.artifact import open_artifact, sha256_file
from medgemma_runtime.errors import ArtifactError
from medgemma_runtime.manifest import write_manifest

# Of the targets' libraries, about their own insides.
pytestmark = pytest.mark.filterwarnings("ignore")

MODEL = "sample:medsiglip-tiny"
INSTALLED = {"onnx": "onnx_ir", "coreml": "coremltools", "executorch": "executorch"}
LAYERS = 3  # of the sample's text tower
BROKEN = "text_model.encoder.layers.1.mlp.fc2.weight"


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


def rewritten(artifact, directory, change):
    """A copy whose files `change` has altered, and a manifest that is true of them."""
    shutil.copytree(artifact.directory, directory)
    change(directory)
    files = tuple(
        replace(entry, sha256=sha256_file(path), size_bytes=path.stat().st_size)
        for entry in artifact.manifest.files
        if (path := directory / entry.path).is_file()
    )
    write_manifest(replace(artifact.manifest, files=files), directory)
    return open_artifact(directory)


def test_a_right_artifact_departs_nowhere(artifact, reference):
    report = check_parity(artifact, reference, per_layer=True)
    assert report.verdict == "PASS"
    assert [layer.name for layer in report.layers["text"]] == [
        "embeddings",
        *(f"residual_{layer}" for layer in range(LAYERS)),
    ]
    assert all(layer.is_seen and layer.relative_error < 1e-5 for layer in report.layers["text"])


def test_the_layer_whose_weight_is_wrong_is_named(artifact, reference, tmp_path):
    decision = decide(recipe_of("onnx", tmp_path / "unused"))
    matrix = decision.model.reader(decision.checkpoint)(BROKEN)

    def scale_one_matrix(directory):
        changed = 0
        for path in (path for path in directory.rglob("*") if path.is_file()):
            data = path.read_bytes()
            for form in (matrix, matrix.T):
                content = np.ascontiguousarray(form).tobytes()
                changed += data.count(content)
                data = data.replace(content, np.ascontiguousarray(form * np.float32(1.01)).tobytes())
            path.write_bytes(data)
        assert changed == 1

    broken = rewritten(artifact, tmp_path / "broken", scale_one_matrix)
    report = check_parity(broken, reference, per_layer=True)
    [check] = [check for check in report.checks if check.subject == "layers"]
    assert (check.verdict, check.detail) == ("FAIL", "text departs first at residual_1")
    errors = [layer.relative_error for layer in report.layers["text"]]
    assert max(errors[:2]) < 1e-5 < 1e-4 < min(errors[2:])


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


def test_layers_that_were_recorded_are_read_back(reference):
    opened = open_bundle(reference.directory)
    assert opened.record.layers == ("image", "text")
    assert opened.arrays["text.layers"].shape == (2, LAYERS + 1, 64, 64)
    assert opened.arrays["image.layers"].shape == (1, 5, 64, 64)  # of 256 patches
    assert prompt_of_layers(()) is None
