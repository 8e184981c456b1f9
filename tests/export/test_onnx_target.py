"""The three questions, asked of what the ONNX target writes: lowering, packing, and the plan."""

import json
import shutil
from collections import Counter
from dataclasses import replace

import numpy as np
import onnxruntime
import pytest

from medgemma_export.build import build, decide
from medgemma_export.emulation import onnx_integer_linear
from medgemma_export.recipe import Recipe
from medgemma_export.reference.exact_program import write_exact_program
from medgemma_export.targets import TARGETS
from medgemma_export.torch_ops import compute
from medgemma_quantization.affine import unpack_int4
from medgemma_quantization.plan import make_plan, read_plan
from medgemma_quantization.scheme import INT4, INT8, INT8_BLOCKS, SCHEMES, Storage
from medgemma_quantization.weights import quantize_weights
from medgemma_runtime.artifact import open_artifact
from medgemma_runtime.errors import EdgeError
from tests.export.conftest import SAMPLE

onnx = pytest.importorskip("onnx")
torch = pytest.importorskip("torch")


def silent(what, done, total):
    pass


def export(out, scheme, components=()):
    recipe = Recipe(model=SAMPLE, revision=None, target="onnx", scheme=scheme, components=components, out=out)
    return build(recipe, progress=silent), decide(recipe)


@pytest.fixture(scope="module", params=["fp32", "fp16", "int8", "int4"])
def exported(request, tmp_path_factory):
    return export(tmp_path_factory.mktemp("onnx") / request.param, SCHEMES[request.param])


def run(artifact, component, inputs):
    path = artifact.path(artifact.manifest.components[component].program)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return session.run(None, inputs)[0]


def load(artifact, component):
    return onnx.load(artifact.path(artifact.manifest.components[component].program))


def test_lowering_equals_transformers(exported, reference):
    artifact, _ = exported
    if artifact.manifest.precision != "fp32":
        pytest.skip("asked of float artifacts")
    for name, inputs in reference.inputs.items():
        assert np.abs(run(artifact, name, inputs) - reference.pooled[name]).max() < 1e-4


def exact_session(artifact, component, directory, *, data=None):
    program = artifact.path(artifact.manifest.components[component].program)
    write_exact_program(program, directory / "exact.onnx")
    options = onnxruntime.SessionOptions()
    # Optimized, ONNX Runtime would turn the float product into a rounding one again.
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.add_session_config_entry(
        "session.model_external_initializers_file_folder_path", str(data or program.parent)
    )
    return onnxruntime.InferenceSession((directory / "exact.onnx").read_bytes(), options)


def test_packing_equals_the_module_that_carries_the_same_integers(exported, reference, tmp_path):
    artifact, decision = exported
    weights = quantize_weights(decision.plan, decision.model.reader(decision.checkpoint), tmp_path / "w")
    for component in decision.model.components:
        inputs = reference.inputs[component.name]
        expected = compute(component, weights, inputs)["pooler_output"]
        actual = exact_session(artifact, component.name, tmp_path).run(None, inputs)[0]
        assert np.abs(actual - expected).max() < 1e-5


def test_packing_sees_one_wrong_byte(exported, reference, tmp_path):
    artifact, decision = exported
    program = artifact.path(artifact.manifest.components["image"].program)
    shutil.copytree(program.parent, tmp_path / "onnx")
    name = "vision_model.head.mlp.fc2.weight"
    [tensor] = [found for found in load(artifact, "image").graph.initializer if found.name == name]
    path = tmp_path / "onnx" / f"{program.name}_data"
    damaged = bytearray(path.read_bytes())
    # The data of the tensor lies in the file as it is: find it there, and flip a high bit.
    position = damaged.index(tensor.raw_data)
    damaged[position + 3] ^= 0x40
    path.write_bytes(damaged)
    weights = quantize_weights(decision.plan, decision.model.reader(decision.checkpoint), tmp_path / "w")
    inputs = reference.inputs["image"]
    expected = compute(decision.model.components[0], weights, inputs)["pooler_output"]
    actual = exact_session(artifact, "image", tmp_path, data=tmp_path / "onnx").run(None, inputs)[0]
    assert np.abs(actual - expected).max() > 1e-5


def test_every_integer_product_equals_its_emulation_on_the_input_it_really_gets(
    exported, reference, tmp_path
):
    """The shipped program, operator by operator: no rounding of one layer can hide in the next."""
    artifact, decision = exported
    if artifact.manifest.precision in ("fp32", "fp16"):
        pytest.skip("has no integers")
    weights = quantize_weights(decision.plan, decision.model.reader(decision.checkpoint), tmp_path)
    checked = 0
    for component in decision.model.components:
        program = load(artifact, component.name)
        products = [
            node for node in program.graph.node if node.op_type in ("DynamicQuantizeMatMul", "MatMulNBits")
        ]
        names = sorted({name for node in products for name in (node.input[0], node.output[0])})
        program.graph.output.extend(
            onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in names
        )
        session = onnxruntime.InferenceSession(program.SerializeToString())
        seen = dict(zip(names, session.run(names, reference.inputs[component.name]), strict=True))
        for node in products:
            name = node.input[1]
            bias = weights.float(name.removesuffix("weight") + "bias")
            x = torch.from_numpy(seen[node.input[0]])
            expected = onnx_integer_linear(x, weights.quantized(name)).numpy() + bias
            error = np.abs(seen[node.output[0]] - expected) / np.abs(expected).max()
            assert np.quantile(error, 0.95) < 1e-5, name
            # An activation halfway between two integers may go either way, in every row that repeats it.
            assert error.max() < 5e-3, name
            checked += 1
    assert checked == sum(row.role == "linear" and not row.storage.is_float for row in decision.plan.rows)


def test_the_integers_in_the_file_are_those_of_the_plan(exported, tmp_path):
    artifact, decision = exported
    weights = quantize_weights(decision.plan, decision.model.reader(decision.checkpoint), tmp_path)
    found = {}
    for name in artifact.manifest.components:
        program = load(artifact, name)
        found |= {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in program.graph.initializer}
    compared = Counter()
    for row in decision.plan.rows:
        stored = found[row.name]
        if row.storage.is_float:
            true = weights.float(row.name)
            assert stored.dtype.itemsize == row.storage.bits // 8
            assert (stored == (true.T if row.role == "linear" else true)).all()
        else:
            tensor = weights.quantized(row.name)
            scales = found[f"{row.name}.scales"]
            if row.storage == INT4:
                values = unpack_int4(stored, offset=8).reshape(tensor.values.shape)
            elif row.storage == INT8_BLOCKS:
                values = (stored.astype(np.int16) - 128).reshape(tensor.values.shape)
            else:
                values = stored.T
            assert (values == tensor.values).all()
            assert (scales.reshape(tensor.scales.shape) == tensor.scales).all()
        compared[row.role] += 1
    assert set(compared) == {"linear", "table", "patch", "norm", "bias", "position", "probe"}


def test_operators_are_those_that_are_meant(exported):
    artifact, _ = exported
    kinds = Counter()
    for name in artifact.manifest.components:
        program = load(artifact, name)
        onnx.checker.check_model(program)
        kinds += Counter(f"{node.domain}:{node.op_type}" for node in program.graph.node)
    integer_kernel = {
        "fp32": ":MatMul",
        "fp16": ":MatMul",
        "int8": "com.microsoft:DynamicQuantizeMatMul",
        "int4": "com.microsoft:MatMulNBits",
    }[artifact.manifest.precision]
    config = json.loads((artifact.directory / "config.json").read_text())
    layers = sum(config[part]["num_hidden_layers"] for part in ("vision_config", "text_config"))
    # Six linears a layer, six in the pooling head, one text head: none left behind in another form.
    assert kinds[integer_kernel] == 6 * layers + 6 + 1
    assert kinds["com.microsoft:MultiHeadAttention"] == layers + 1
    assert (kinds[":MatMul"] == 0) == (artifact.manifest.precision in ("int8", "int4"))


def test_batch_is_dynamic(exported, reference):
    artifact, _ = exported
    pixels = reference.inputs["image"]["pixel_values"]
    one = run(artifact, "image", {"pixel_values": pixels})
    three = run(artifact, "image", {"pixel_values": np.repeat(pixels, 3, axis=0)})
    assert three.shape == (3, one.shape[1])
    np.testing.assert_allclose(three, np.repeat(one, 3, axis=0), atol=1e-4)


def test_the_artifact_says_what_it_is(exported):
    artifact, decision = exported
    manifest = open_artifact(artifact.directory).manifest
    plan = read_plan(artifact.directory / "plan.json")
    assert plan == decision.plan
    assert manifest.quantization.plan_sha256 == plan.sha256
    entry = next(file for file in manifest.files if file.path == "plan.json")
    assert entry.sha256 == plan.sha256
    assert manifest.model.weights_sha256 == decision.checkpoint.weights_sha256()
    assert "patient" in manifest.model.intended_use
    assert manifest.build.peak_rss_bytes > 1e6


def test_one_component_can_be_exported_alone(out):
    artifact, _ = export(out, SCHEMES["int8"], components=("text",))
    assert set(artifact.manifest.components) == {"text"}
    assert artifact.manifest.image is None
    assert not list(artifact.directory.glob("onnx/vision*"))


def test_what_the_kernels_cannot_take_is_refused_before_any_weight_is_read(model):
    whole_rows = replace(SCHEMES["int4"], linear=Storage(bits=4))
    with pytest.raises(EdgeError, match="asks for int4 per channel, and ONNX Runtime's int4 kernel takes"):
        TARGETS["onnx"].check(model, make_plan(whole_rows, model.weights()))
    with pytest.raises(EdgeError, match="looks up rows in blocks"):
        TARGETS["onnx"].check(model, make_plan(replace(SCHEMES["int8"], table=INT8), model.weights()))
    weight_only = replace(SCHEMES["int8"], activations="float")
    with pytest.raises(EdgeError, match="round them to int8"):
        TARGETS["onnx"].check(model, make_plan(weight_only, model.weights()))


def test_an_override_reaches_the_file(out):
    mixed = replace(SCHEMES["int4"], name="mixed", overrides=((r"text_model\.head\.weight", INT8),))
    artifact, _ = export(out, mixed)
    kinds = Counter(node.op_type for node in load(artifact, "text").graph.node)
    assert kinds["DynamicQuantizeMatMul"] == 1
    assert kinds["MatMulNBits"] > 1
