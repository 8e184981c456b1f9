"""Encoders lowered to Core ML, evaluated without a Mac: lowering, packing, and what the package says."""

import json
import shutil
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("medgemma_export.targets.coreml_mil")

from medgemma_export.build import build, decide
from medgemma_export.models import load_model
from medgemma_export.recipe import Recipe
from medgemma_export.targets import TARGETS
from medgemma_export.targets.coreml_package import WEIGHTS_PATH
from medgemma_export.targets.coreml_unpack import compare_package, compare_storage
from medgemma_export.torch_ops import compute
from medgemma_quantization.plan import make_plan
from medgemma_quantization.scheme import FLOAT32, INT8, SCHEMES, Storage
from medgemma_quantization.weights import quantize_weights
from medgemma_runtime.backends.mil import MilProgram
from medgemma_runtime.backends.mil_session import MilSession
from medgemma_runtime.errors import ArtifactError, EdgeError
from tests.export.conftest import SAMPLE
from tests.export.coreml_spec import narrow_or_not_finite

TARGET = TARGETS["coreml"]


def export(out, scheme, components=()):
    recipe = Recipe(
        model=SAMPLE, revision=None, target="coreml", scheme=scheme, components=components, out=out
    )
    return build(recipe, progress=lambda *step: None), decide(recipe)


@pytest.fixture(scope="module", params=["fp32", "fp16", "int8", "lut6", "int4"])
def exported(request, tmp_path_factory):
    directory = tmp_path_factory.mktemp(request.param)
    artifact, decision = export(directory / "artifact", TARGET.scheme(request.param))
    weights = quantize_weights(
        decision.plan, decision.model.reader(decision.checkpoint), directory / "weights"
    )
    return artifact, {component.name: component for component in decision.model.components}, weights


@pytest.fixture(scope="module")
def inputs():
    """Whole levels, as an image has, and a text."""
    rng = np.random.default_rng(7)
    levels = np.kron(rng.integers(0, 256, (7, 7, 3)), np.ones((32, 32, 1))).astype(np.float32)
    ids = rng.integers(3, 200, (1, 64))
    ids[0, 12:] = 1
    pixels = (levels * np.float32(1 / 255) - np.float32(0.5)) / np.float32(0.5)
    return {
        "image": {"pixel_values": np.ascontiguousarray(pixels.transpose(2, 0, 1)[None])},
        "text": {"input_ids": ids},
    }


def package_of(artifact, name):
    return artifact.directory / artifact.manifest.components[name].program


def sqnr(actual, expected):
    return 10 * np.log10((expected**2).sum() / ((actual - expected) ** 2).sum())


def test_lowering_and_packing_equal_the_module_with_the_same_numbers(exported, inputs):
    artifact, components, weights = exported
    for name, given in inputs.items():
        expected = compute(components[name], weights, given)["pooler_output"]
        actual = MilSession(artifact, name).run(given)["pooler_output"]
        assert np.abs(actual - expected).max() < 1e-5, name


def test_float16_is_finite_and_close(exported, inputs):
    artifact, components, weights = exported
    for name, given in inputs.items():
        expected = compute(components[name], weights, given)["pooler_output"]
        for mode in ("fp16", "fp16_accumulate"):
            actual = MilSession(artifact, name, mode=mode).run(given)["pooler_output"]
            # Measured: 63 to 66 dB, 53 where sums are float16 too; a program in float32 has nothing to round.
            assert sqnr(actual, expected) > 48, (name, mode)


def test_the_package_carries_the_integers_of_the_plan(exported):
    artifact, components, weights = exported
    for name, component in components.items():
        compare_package(package_of(artifact, name), component, weights)


def test_nothing_stays_uncompressed_that_the_plan_compresses(exported):
    artifact, _, weights = exported
    kinds, dtypes = Counter(), Counter()
    size = 0
    for name in artifact.manifest.components:
        program = MilProgram.open(package_of(artifact, name))
        [function] = program.functions.values()
        kinds += Counter(step.operation.type for step in function.steps)
        for constant in function.constants:
            stored = program.stored("main", constant)
            if sum(array.size for array in stored.values()) > 1000:
                dtypes["floats" if "val" in stored else "integers"] += 1
        size += (package_of(artifact, name) / WEIGHTS_PATH).stat().st_size
    rows = weights.plan.rows
    assert dtypes["integers"] == sum(not row.storage.is_float for row in rows)
    config = json.loads((artifact.directory / "config.json").read_text())
    layers = sum(config[part]["num_hidden_layers"] for part in ("vision_config", "text_config"))
    assert kinds["linear"] == 6 * layers + 6 + 1
    assert kinds["softmax"] == layers + 1
    assert kinds["layer_norm"] == 2 * layers + 3
    assert kinds["gather"] == kinds["conv"] == 1
    # Records and alignment take up to 128 bytes a tensor.
    planned = sum(row.stored_bits for row in rows) / 8
    assert planned < size < planned + 3 * 128 * len(rows)


def test_a_weight_that_is_stored_otherwise_than_planned_is_seen_in_the_file(exported):
    artifact, components, weights = exported
    package, plan = package_of(artifact, "text"), weights.plan
    compare_storage(package, components["text"], plan)
    name = "text_model.head.weight"
    other = FLOAT32 if not plan.by_name[name].storage.is_float else INT8
    rows = tuple(replace(row, storage=other) if row.name == name else row for row in plan.rows)
    with pytest.raises(RuntimeError, match=rf"function main, holds .* for {name} and the plan says {other}"):
        compare_storage(package, components["text"], replace(plan, rows=rows))
    with pytest.raises(RuntimeError, match="holds nothing for vision_model"):
        compare_storage(package, components["image"], plan)


def test_a_matrix_that_no_plan_knows_is_seen_in_the_file(exported):
    artifact, components, weights = exported

    def part(ops, inputs):
        return {}

    nothing = replace(components["text"], forward=part)
    with pytest.raises(RuntimeError, match=r"holds text_model_\w+, which no plan knows"):
        compare_storage(package_of(artifact, "text"), nothing, weights.plan)


@pytest.mark.parametrize("part", ["data", "scale"])
def test_a_flipped_bit_is_seen(exported, tmp_path, part):
    artifact, components, weights = exported
    name = "vision_model.head.mlp.fc2.weight"
    if weights.plan.by_name[name].storage.is_float:
        pytest.skip("has no integers")
    package = tmp_path / "image.mlpackage"
    shutil.copytree(package_of(artifact, "image"), package)
    content = bytearray((package / WEIGHTS_PATH).read_bytes())
    stored = weights.stored_values(name) if part == "data" else weights.scales(name).astype(np.float16)
    content[content.index(stored.tobytes()) + 3] ^= 0x10
    (package / WEIGHTS_PATH).write_bytes(content)
    with pytest.raises(ArtifactError, match=r"does not carry vision_model\.head\.mlp\.fc2\.weight"):
        compare_package(package, components["image"], weights)


def test_a_float_that_differs_is_seen(exported, tmp_path):
    artifact, components, weights = exported
    package = tmp_path / "text.mlpackage"
    shutil.copytree(package_of(artifact, "text"), package)
    content = bytearray((package / WEIGHTS_PATH).read_bytes())
    half = weights.plan.activations == "float16"
    gain = weights.float("text_model.final_layer_norm.weight").astype(np.float16 if half else np.float32)
    content[content.index(gain.tobytes())] ^= 0x01
    (package / WEIGHTS_PATH).write_bytes(content)
    with pytest.raises(ArtifactError, match=r"does not carry text_model\.final_layer_norm\.weight"):
        compare_package(package, components["text"], weights)


def test_coremltools_infers_the_types_of_the_whole_program_again(exported):
    import coremltools
    from coremltools.converters.mil.frontend.milproto.load import load

    artifact, _, weights = exported
    for name in artifact.manifest.components:
        model = coremltools.models.MLModel(str(package_of(artifact, name)), skip_model_load=True)
        spec = model.get_spec()
        load(spec, specification_version=spec.specificationVersion, file_weights_dir=model.weights_dir)
        assert model.license == artifact.manifest.model.licence
        assert model.user_defined_metadata["plan_sha256"] == weights.plan.sha256
        assert model.user_defined_metadata["component"] == name
        for feature in (*spec.description.input, *spec.description.output):
            assert feature.shortDescription
        if name == "image":
            [image] = [feature.type.imageType for feature in spec.description.input]
            assert (image.width, image.height) == (224, 224)
            assert image.colorSpace == coremltools.proto.FeatureTypes_pb2.ImageFeatureType.RGB


def test_no_index_is_narrow_and_no_number_infinite(exported):
    import coremltools

    artifact, _, _ = exported
    for name in artifact.manifest.components:
        spec = coremltools.utils.load_spec(str(package_of(artifact, name)))
        assert narrow_or_not_finite(spec) == []


def test_queries_are_taken_a_few_at_a_time_where_scores_would_be_many(tmp_path, inputs, monkeypatch):
    from medgemma_export.targets import coreml_ops

    whole, _ = export(tmp_path / "whole", TARGET.scheme("fp32"), components=("image",))
    monkeypatch.setattr(coreml_ops, "_MAX_SCORES", 1 << 12)
    cut, _ = export(tmp_path / "cut", TARGET.scheme("fp32"), components=("image",))
    sizes = []
    session = MilSession(
        cut, "image", observe=lambda name, kind, x: sizes.append(x.size * (kind == "softmax"))
    )
    result = session.run(inputs["image"])["pooler_output"]
    assert 0 < max(sizes) <= 1 << 12
    expected = MilSession(whole, "image").run(inputs["image"])["pooler_output"]
    np.testing.assert_allclose(result, expected, atol=1e-5)


def test_what_core_ml_cannot_take_is_refused_before_any_weight_is_read(model, checkpoint):
    with pytest.raises(EdgeError, match=r"scheme int4 rounds activations to int8.*say activations"):
        TARGET.check(model, make_plan(SCHEMES["int4"], model.weights()))
    mixed = replace(TARGET.scheme("int4"), overrides=((r"text_model\.head\.weight", FLOAT32),))
    with pytest.raises(
        EdgeError, match=r"text_model\.head\.weight: the plan asks for float32.*float16 through"
    ):
        TARGET.check(model, make_plan(mixed, model.weights()))
    with pytest.raises(EdgeError, match="has no decoder whose residual stream"):
        load_model(checkpoint, residual_scale=0.5)


def test_palettes_are_for_core_ml_and_for_matrices(model):
    plan = make_plan(TARGET.scheme("lut4"), model.weights())
    TARGET.check(model, plan)
    for other, engine in (("onnx", "ONNX Runtime"), ("executorch", "XNNPACK")):
        with pytest.raises(
            EdgeError, match=rf"asks for lut4 group 8, and {engine} has no palettes; use --target"
        ):
            TARGETS[other].check(model, make_plan(TARGETS[other].scheme("lut4"), model.weights()))
    table = replace(TARGET.scheme("lut4"), table=Storage(bits=4, palette=11))
    with pytest.raises(EdgeError, match=r"token_embedding.* a host looks rows up by their scales"):
        TARGET.check(model, make_plan(table, model.weights()))


@pytest.mark.parametrize("activations", ["float16", "float"])
def test_four_bit_palettes_are_what_the_plan_says(tmp_path, inputs, activations):
    scheme = replace(TARGET.scheme("lut4"), activations=activations)
    artifact, decision = export(tmp_path / "artifact", scheme, components=("text",))
    [text] = decision.model.components
    weights = quantize_weights(
        decision.plan, decision.model.reader(decision.checkpoint), tmp_path / "weights"
    )
    compare_package(package_of(artifact, "text"), text, weights)
    stored = MilProgram.open(package_of(artifact, "text")).stored("main", "text_model_head_weight")
    assert stored["indices"].max() == 15
    assert stored["lut"].shape == (stored["indices"].shape[0] // 8, 1, 16, 1)
    assert stored["lut"].dtype == ("float16" if activations == "float16" else "float32")
    expected = compute(text, weights, inputs["text"])["pooler_output"]
    actual = MilSession(artifact, "text").run(inputs["text"])["pooler_output"]
    assert np.abs(actual - expected).max() < 1e-5


def test_another_coremltools_is_refused(model, monkeypatch):
    from importlib.metadata import PackageNotFoundError

    from medgemma_export.targets import coreml

    plan = make_plan(TARGET.scheme("int4"), model.weights())
    monkeypatch.setattr(coreml, "version", lambda name: "8.3")
    with pytest.raises(EdgeError, match=r"coremltools 9\.0 and 8\.3 is installed; pip install"):
        TARGET.check(model, plan)

    def absent(name):
        raise PackageNotFoundError(name)

    monkeypatch.setattr(coreml, "version", absent)
    with pytest.raises(EdgeError, match=r"coremltools 9\.0 and none is installed"):
        TARGET.check(model, plan)


def test_an_override_and_rows_without_blocks_reach_the_file(tmp_path):
    scheme = replace(
        TARGET.scheme("int4"),
        name="mixed",
        table=Storage(bits=4),
        overrides=((r"text_model\.head\.weight", INT8),),
    )
    artifact, _ = export(tmp_path / "artifact", scheme, components=("text",))
    program = MilProgram.open(package_of(artifact, "text"))
    head = program.stored("main", "text_model_head_weight")
    table = program.stored("main", "text_model_embeddings_token_embedding_weight")
    assert head["scale"].shape == (head["data"].shape[0], 1)
    assert table["scale"].shape == (table["data"].shape[0], 1)
    assert np.abs(table["data"]).max() == 8 or table["data"].max() == 7
