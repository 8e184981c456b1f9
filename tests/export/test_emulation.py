"""The emulation of ONNX Runtime's integer kernels, held against those kernels."""

from dataclasses import replace

import numpy as np
import pytest

torch = pytest.importorskip("torch")
helper = pytest.importorskip("onnx").helper

import onnxruntime  # noqa: E402
from onnx import TensorProto, numpy_helper  # noqa: E402

from medgemma_export.emulation import onnx_integer_linear  # noqa: E402
from medgemma_quantization.activations import ActivationRange  # noqa: E402
from medgemma_quantization.affine import QuantizedTensor, pack_int4, quantize, range_scales  # noqa: E402
from medgemma_quantization.scheme import INT4, INT8, INT8_BLOCKS  # noqa: E402


def run_kernel(operator, x, constants, attributes):
    node = helper.make_node(operator, ["x", *constants], ["y"], domain="com.microsoft", **attributes)
    return run_nodes([node], x, constants)


def run_nodes(nodes, x, constants):
    graph = helper.make_graph(
        nodes,
        "one",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, list(x.shape))],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(np.asarray(array), name) for name, array in constants.items()],
    )
    model = helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    )
    model.ir_version = 10
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {"x": x})[0]


def channel_kernel(x, tensor):
    constants = {"b": np.ascontiguousarray(tensor.values.T), "s": tensor.scales[:, 0].copy()}
    return run_kernel("DynamicQuantizeMatMul", x, constants, {})


def block_kernel(x, tensor):
    outputs, inputs = tensor.values.shape
    bits = tensor.storage.bits
    unsigned = (tensor.values.astype(np.int16) + 128).astype(np.uint8)
    packed = pack_int4(tensor.values, offset=8) if bits == 4 else unsigned
    blocks = packed.reshape(*tensor.scales.shape, -1)
    attributes = {"K": inputs, "N": outputs, "bits": bits, "block_size": 32, "accuracy_level": 4}
    return run_kernel("MatMulNBits", x, {"b": blocks, "s": tensor.scales}, attributes)


def matrices(seed, *, outputs, inputs, rows=33):
    rng = np.random.default_rng(seed)
    weight = rng.normal(0, 0.02, (outputs, inputs)).astype(np.float32)
    # Cubed, so that a few activations stand out as they do in real towers.
    x = (rng.normal(size=(2, rows, inputs)) ** 3).astype(np.float32)
    return weight, x


@pytest.mark.parametrize("outputs,inputs", [(64, 64), (224, 64), (64, 4320)])
@pytest.mark.parametrize(
    "storage,kernel", [(INT8, channel_kernel), (INT8_BLOCKS, block_kernel), (INT4, block_kernel)]
)
def test_emulation_equals_the_kernel(storage, kernel, outputs, inputs):
    weight, x = matrices(3, outputs=outputs, inputs=inputs)
    tensor = quantize(weight, storage, range_scales(weight, storage))
    expected = onnx_integer_linear(torch.from_numpy(x), tensor).numpy()
    alone = np.concatenate([kernel(x[:1], tensor), kernel(x[1:], tensor)])
    assert np.abs(alone - expected).max() < 1e-5 * np.abs(expected).max()


@pytest.mark.parametrize("storage", [INT8, INT8_BLOCKS, INT4])
def test_a_constant_and_an_all_zero_input(storage):
    weight, x = matrices(4, outputs=32, inputs=64)
    tensor = quantize(weight, storage, range_scales(weight, storage))
    kernel = channel_kernel if storage is INT8 else block_kernel
    for value in (0.0, 1.5, -2.0):
        constant = np.full_like(x, value)
        expected = onnx_integer_linear(torch.from_numpy(constant), tensor).numpy()
        np.testing.assert_allclose(kernel(constant, tensor), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("rows", [1, 33])
@pytest.mark.parametrize("pair", [(64, 64), (127, 1), (-64, -64), (1, -127)])
def test_no_processor_saturates_at_the_bound_on_neighbouring_integers(rows, pair):
    """Every activation at 255 and every pair at its bound: 255 * 128 just fits int16.

    On a processor without VNNI, pairs of 127 fail here (measured: 100 % of sums wrong).
    """
    x = np.full((1, rows, 64), 1.0, np.float32)
    values = np.tile(np.array(pair, np.int8), (16, 32))
    tensor = QuantizedTensor(storage=INT8, values=values, scales=np.full((16, 1), 0.5, np.float32))
    expected = np.full((1, rows, 16), 32 * sum(pair) * 0.5, np.float32)
    np.testing.assert_allclose(onnx_integer_linear(torch.from_numpy(x), tensor), expected, rtol=1e-6)
    np.testing.assert_allclose(channel_kernel(x, tensor), expected, rtol=1e-6)


def test_int8_rounds_by_the_range_of_the_whole_batch():
    """One outlier changes every other row: why the runtime gives integer programs one image at a time."""
    weight, x = matrices(5, outputs=32, inputs=64)
    tensor = quantize(weight, INT8, range_scales(weight, INT8))
    alone = channel_kernel(x[:1], tensor)
    x[1, 0, 0] = 1000.0
    together = channel_kernel(x, tensor)[:1]
    assert np.abs(alone - together).max() > 1e-2


def test_emulation_of_static_ranges_equals_the_kernel():
    weight, x = matrices(4, outputs=224, inputs=64)
    # Narrower than the activations, so that some are clipped.
    known = ActivationRange.between(float(x.min()) / 2, float(x.max()) / 3)
    tensor = replace(quantize(weight, INT8, range_scales(weight, INT8)), input=known)
    scale, zero = np.float32(known.scale), np.uint8(known.zero)
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "scale", "zero"], ["rounded"]),
        helper.make_node(
            "MatMulIntegerToFloat",
            ["rounded", "b", "scale", "s", "zero"],
            ["y"],
            domain="com.microsoft",
        ),
    ]
    constants = {
        "b": np.ascontiguousarray(tensor.values.T),
        "s": tensor.scales[:, 0].copy(),
        "scale": scale,
        "zero": zero,
    }
    actual = run_nodes(nodes, x, constants)
    expected = onnx_integer_linear(torch.from_numpy(x), tensor).numpy()
    assert np.abs(actual - expected).max() < 1e-5 * np.abs(expected).max()
    unclipped = onnx_integer_linear(torch.from_numpy(x), replace(tensor, input=None)).numpy()
    assert np.abs(actual - unclipped).max() > 0.1 * np.abs(expected).max()
