"""coremltools' own reader over finished packages, and over packages that were tampered with."""

import json
import shutil
from dataclasses import replace

import pytest

pytest.importorskip("torch")
pytest.importorskip("medgemma_export.targets.coreml_mil")

from medgemma_export.build import build
from medgemma_export.recipe import Recipe
from medgemma_export.reference.cli import reference_main
from medgemma_export.targets import choose_target
from medgemma_export.targets.coreml_mil import proto
from medgemma_export.targets.coreml_package import MODEL_PATH
from medgemma_export.targets.coreml_validation import read_back
from medgemma_runtime.errors import ArtifactError, EdgeError


@pytest.fixture(scope="module", params=["gpu", "ane"])
def artifact(request, tmp_path_factory):
    recipe = Recipe(
        model="sample:medgemma-tiny",
        revision=None,
        target="coreml",
        scheme=choose_target("coreml", units=request.param).scheme("int8"),
        components=("embed", "decoder"),
        out=tmp_path_factory.mktemp(request.param) / "artifact",
        context=112,
        units=request.param,
    )
    return build(recipe, progress=lambda *step: None)


def program_of(artifact):
    name = "decoder_0_7" if "decoder_0_7" in artifact.manifest.components else "decoder"
    return artifact.directory / artifact.manifest.components[name].program


def test_every_function_is_read_and_every_float_has_its_reason(artifact, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["medgemma-reference", "coreml", str(artifact.directory), "--json"])
    assert reference_main() == 0
    found = json.loads(capsys.readouterr().out)
    assert {item["function"] for item in found} >= {"prefill", "decode"}
    for item in found:
        product = "conv" if "main" in {f["function"] for f in found} else "linear"
        assert item["operators"][product] >= 1
        assert "const" not in item["operators"]
        for weight in item["floats"]:
            assert weight["storage"] == "float16" and weight["reason"]
            assert "norm" in weight["name"]
    monkeypatch.setattr("sys.argv", ["medgemma-reference", "coreml", str(artifact.directory)])
    assert reference_main() == 0
    printed = capsys.readouterr().out
    assert "int8 per channel" in printed and "and" in printed


def tampered(artifact, tmp_path, change):
    """A copy with another program; hashes are the business of `open_artifact`."""
    directory = tmp_path / "artifact"
    shutil.copytree(artifact.directory, directory)
    copy = replace(artifact, directory=directory)
    path = program_of(copy) / MODEL_PATH
    model = proto.Model_pb2.Model.FromString(path.read_bytes())
    change(model)
    path.write_bytes(model.SerializeToString())
    return copy


def operations(model):
    for function in model.mlProgram.functions.values():
        for block in function.block_specializations.values():
            yield from block.operations


def narrow_a_result(model):
    [operation, *_] = [found for found in operations(model) if found.type == "gelu"]
    dimension = operation.outputs[0].type.tensorType.dimensions[1].constant
    dimension.size += 1


def rename_a_weight(model):
    old, new = "layers_0_mlp_down_proj_weight", "layers_0_mlp_down_proj_other"
    for operation in operations(model):
        for named in (*operation.outputs, *(a for i in operation.inputs.values() for a in i.arguments)):
            if old in named.name:  # to write a name would drop a value in its place
                named.name = named.name.replace(old, new)


def other_plan(model):
    model.description.metadata.userDefined["plan_sha256"] = "0"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (narrow_a_result, r"coremltools cannot read function '\w+' of decoder\w*.mlpackage back: \w+"),
        (rename_a_weight, r"stores \w*mlp_down_proj_other as int8 per channel and the plan says in no plan"),
        (other_plan, r"decoder\w*.mlpackage was made of another plan than lies beside it"),
    ],
)
def test_a_package_that_was_tampered_with_is_refused(artifact, tmp_path, change, message):
    with pytest.raises(ArtifactError, match=message):
        list(read_back(tampered(artifact, tmp_path, change)))


def test_a_matrix_that_is_left_in_floats_is_refused(artifact, tmp_path, monkeypatch):
    """As a target would leave it that skips what it cannot compress: here the plan says otherwise."""
    from medgemma_export.targets import coreml_validation

    plan = coreml_validation.read_plan(artifact.directory / "plan.json")
    [norm, *_] = [row for row in plan.rows if row.role == "norm" and "layers.0" in row.name]
    [linear, *_] = [row for row in plan.rows if row.role == "linear"]
    rows = tuple(replace(norm, storage=linear.storage) if row is norm else row for row in plan.rows)
    other = replace(plan, rows=rows)
    monkeypatch.setattr(coreml_validation, "read_plan", lambda path: other)
    monkeypatch.setattr(type(plan), "sha256", plan.sha256)
    with pytest.raises(
        ArtifactError, match=r"layernorm_weight as float16 and the plan says int8 per channel"
    ):
        list(read_back(artifact))


def test_other_targets_are_refused(artifact):
    other = replace(artifact, manifest=replace(artifact.manifest, target="onnx"))
    with pytest.raises(EdgeError, match=r"is an artifact of target onnx, .* give one of target coreml"):
        list(read_back(other))
