"""Emulated peers are what the peers' own kernels compute with what their own quantizers wrote."""

import numpy as np
import onnxruntime
import pytest
from onnx import TensorProto, helper

from medgemma_export.calibration.peer_rounding import PEERS, peer_reader
from medgemma_quantization.plan import WeightSpec, make_plan
from medgemma_quantization.scheme import SCHEMES

OUTPUTS, INPUTS = 48, 96


@pytest.fixture
def weight() -> np.ndarray:
    weight = np.random.default_rng(5).standard_normal((OUTPUTS, INPUTS)).astype(np.float32)
    weight[3, 32:64] = 0
    weight[4] += 2  # one-sided, where a zero point pays
    return weight


def kernel_weight(weight: np.ndarray, *, is_symmetric: bool) -> np.ndarray:
    """What MatMulNBits multiplies the identity with, scales in float16 as an artifact has them."""
    from onnxruntime.quantization.matmul_nbits_quantizer import (
        DefaultWeightOnlyQuantConfig,
        DefaultWeightOnlyQuantizer,
    )

    config = DefaultWeightOnlyQuantConfig(block_size=32, is_symmetric=is_symmetric, bits=4)
    packed, scales, zeros = DefaultWeightOnlyQuantizer(config).qbits_block_quant(
        np.ascontiguousarray(weight.T)
    )
    arrays = {"b": packed, "s": scales.astype(np.float16).astype(np.float32).reshape(-1)}
    if not is_symmetric:
        arrays["z"] = zeros.reshape(-1)
    node = helper.make_node(
        "MatMulNBits",
        ["x", *arrays],
        ["y"],
        domain="com.microsoft",
        K=INPUTS,
        N=OUTPUTS,
        bits=4,
        block_size=32,
        accuracy_level=1,
    )
    kinds = {"b": TensorProto.UINT8, "s": TensorProto.FLOAT, "z": TensorProto.UINT8}
    graph = helper.make_graph(
        [node],
        "one",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [INPUTS, INPUTS])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [INPUTS, OUTPUTS])],
        [helper.make_tensor(name, kinds[name], a.shape, a.tobytes(), raw=True) for name, a in arrays.items()],
    )
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=8)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {"x": np.eye(INPUTS, dtype=np.float32)})[0].T


@pytest.mark.parametrize(("name", "is_symmetric"), [("onnxruntime-int4", True), ("onnxruntime-uint4", False)])
def test_what_onnx_runtime_computes(weight, name, is_symmetric):
    rounded = PEERS[name].round_rows(weight)
    np.testing.assert_allclose(
        rounded, kernel_weight(weight, is_symmetric=is_symmetric), rtol=1e-6, atol=1e-7
    )
    other = kernel_weight(weight, is_symmetric=not is_symmetric)
    assert np.abs(rounded - other).max() > 0.01


def test_q4_0_by_hand(weight):
    """ggml's quantize_row_q4_0_ref: d = max / -8, of the value of largest magnitude; x / d + 8.5 cut."""
    rounded = PEERS["llama.cpp-q4_0"].round_rows(weight)
    for row in (0, 3, 47):
        for start in range(0, INPUTS, 32):
            block = weight[row, start : start + 32]
            scale = block[np.abs(block).argmax()] / np.float32(-8)
            inverse = np.float32(1) / scale if scale else np.float32(0)
            levels = np.clip(np.trunc(block * inverse + np.float32(8.5)), 0, 15) - 8
            expected = levels * np.float32(np.float16(scale))
            np.testing.assert_array_equal(rounded[row, start : start + 32], expected)


def test_a_zero_point_pays_where_values_are_one_sided(weight):
    errors = {name: np.abs(peer.round_rows(weight) - weight)[4].mean() for name, peer in PEERS.items()}
    assert errors["onnxruntime-uint4"] < 0.8 * min(errors["onnxruntime-int4"], errors["llama.cpp-q4_0"])


def test_readers_round_what_a_plan_rounds_and_pad_as_it_pads():
    specs = [
        WeightSpec(name="up", shape=(36, 64), role="linear", padded_axes=(0,)),
        WeightSpec(name="down", shape=(64, 36), role="linear", padded_axes=(1,)),
        WeightSpec(name="norm", shape=(64,), role="norm"),
    ]
    plan = make_plan(SCHEMES["int4"], specs)
    values = {
        spec.name: np.random.default_rng(1).normal(size=spec.shape).astype(np.float32) for spec in specs
    }

    def read(name: str, rows: slice | None = None) -> np.ndarray:
        return values[name] if rows is None else values[name][rows]

    peer = PEERS["llama.cpp-q4_0"]
    reader = peer_reader(peer, plan, read)
    np.testing.assert_array_equal(reader("norm"), values["norm"])
    np.testing.assert_array_equal(reader("up", slice(3, 9)), peer.round_rows(values["up"])[3:9])
    padded = np.pad(values["down"], ((0, 0), (0, 28)))
    np.testing.assert_array_equal(reader("down"), peer.round_rows(padded))
