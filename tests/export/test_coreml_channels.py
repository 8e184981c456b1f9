"""Encoders laid out for the Neural Engine: the same numbers from other operators."""

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("medgemma_export.targets.coreml_mil")

from medgemma_export.build import build, decide
from medgemma_export.recipe import Recipe
from medgemma_export.targets import choose_target
from medgemma_export.targets import coreml as coreml_target
from medgemma_export.targets.coreml_unpack import compare_package
from medgemma_export.torch_ops import compute
from medgemma_quantization.plan import make_plan
from medgemma_quantization.weights import quantize_weights
from medgemma_runtime.backends.mil import MilProgram, contents
from medgemma_runtime.backends.mil_session import MilSession
from medgemma_runtime.errors import EdgeError
from tests.export.conftest import SAMPLE
from tests.export.coreml_spec import narrow_or_not_finite

TARGET = choose_target("coreml", units="ane")


@pytest.fixture(scope="module", params=["fp16", "int8", "lut6"])
def exported(request, tmp_path_factory):
    directory = tmp_path_factory.mktemp(request.param)
    recipe = Recipe(
        model=SAMPLE,
        revision=None,
        target="coreml",
        scheme=TARGET.scheme(request.param),
        components=(),
        out=directory / "artifact",
        units="ane",
    )
    artifact, decision = build(recipe, progress=lambda *step: None), decide(recipe)
    read = decision.model.reader(decision.checkpoint)
    weights = quantize_weights(decision.plan, read, directory / "weights")
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
        assert actual.shape == expected.shape
        assert np.abs(actual - expected).max() < 1e-5, name
        compare_package(package_of(artifact, name), components[name], weights)


def test_float16_is_finite_and_close(exported, inputs):
    artifact, components, weights = exported
    for name, given in inputs.items():
        expected = compute(components[name], weights, given)["pooler_output"]
        for mode in ("fp16", "fp16_accumulate"):
            actual = MilSession(artifact, name, mode=mode).run(given)["pooler_output"]
            assert sqnr(actual, expected) > 48, (name, mode)


def test_operators_and_shapes_are_those_of_the_engine(exported, inputs):
    artifact, components, weights = exported
    ranks, tensors = {}, {}
    for name, given in inputs.items():
        found = contents(MilProgram.open(package_of(artifact, name)).functions["main"])
        linears = sum(weights.plan.by_name[w.name].role == "linear" for w in components[name].weights())
        assert found.operators["conv"] == linears + (name == "image")
        assert "linear" not in found.operators and "scaled_dot_product_attention" not in found.operators
        assert not [w.name for w in found.weights if len(w.shape) == 2 and w.storage.startswith("lut")]

        def observe(tensor, kind, x, name=name):
            ranks[name] = max(ranks.get(name, 0), x.ndim)
            tensors[name, kind] = x.shape

        MilSession(artifact, name, observe=observe).run(given)
    assert max(ranks.values()) == 4
    assert tensors["text", "softmax"] == (1, 64, 1, 64)
    assert tensors["image", "gelu"][2] == 1


def test_coremltools_infers_the_types_again_and_nothing_is_narrow(exported):
    import coremltools
    from coremltools.converters.mil.frontend.milproto.load import load

    artifact, _, _ = exported
    for name in artifact.manifest.components:
        model = coremltools.models.MLModel(str(package_of(artifact, name)), skip_model_load=True)
        spec = model.get_spec()
        load(spec, specification_version=spec.specificationVersion, file_weights_dir=model.weights_dir)
        assert model.user_defined_metadata["units"] == "ane"
        assert narrow_or_not_finite(spec) == []


def test_what_the_engine_does_not_take_is_refused_by_name(model, monkeypatch):
    for precision, message in (
        ("int4", r"asks for int4 block 32, and blocks .* Neural Engine; use --precision int8, lut6 or lut4"),
        ("fp32", r"scheme fp32 computes in float, and the Neural Engine in float16 only; use --units gpu"),
    ):
        with pytest.raises(EdgeError, match=message):
            TARGET.check(model, make_plan(TARGET.scheme(precision), model.weights()))
    plan = make_plan(TARGET.scheme("int8"), model.weights())
    TARGET.check(model, plan)
    monkeypatch.setattr(coreml_target, "MAX_PROGRAM_BYTES", 1000)
    with pytest.raises(EdgeError, match=r"component image takes \d+ MB, and the Neural Engine keeps"):
        TARGET.check(model, plan)


def test_units_are_a_choice_within_core_ml():
    with pytest.raises(EdgeError, match="--units ane is a choice within --target coreml; onnx has none"):
        choose_target("onnx", units="ane")
    with pytest.raises(EdgeError, match="'npu' is unknown; choose one of gpu, ane"):
        choose_target("coreml", units="npu")
    assert choose_target("coreml", units="gpu") == choose_target("coreml")
