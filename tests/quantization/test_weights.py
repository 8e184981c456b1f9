import numpy as np
import pytest

from medgemma_quantization.plan import WeightSpec, make_plan
from medgemma_quantization.scheme import SCHEMES
from medgemma_quantization.weights import quantize_weights
from medgemma_runtime.errors import CheckpointError

SPECS = [
    WeightSpec(name="fc1.weight", shape=(40, 64), role="linear", padded_axes=(0,)),
    WeightSpec(name="fc1.bias", shape=(40,), role="bias", padded_axes=(0,)),
    WeightSpec(name="fc2.weight", shape=(64, 40), role="linear", padded_axes=(1,)),
]


@pytest.fixture
def checkpoint():
    rng = np.random.default_rng(1)
    return {spec.name: rng.normal(size=spec.shape).astype(np.float32) for spec in SPECS}


def reader(checkpoint):
    return lambda name, rows=None: checkpoint[name][rows or slice(None)]


@pytest.mark.parametrize("scheme", ["fp32", "fp16", "int8", "int4"])
def test_what_is_read_back_is_the_weight_within_half_a_step(tmp_path, checkpoint, scheme):
    plan = make_plan(SCHEMES[scheme], SPECS)
    weights = quantize_weights(plan, reader(checkpoint), tmp_path)
    for row in plan.rows:
        true = checkpoint[row.name]
        grow = [(0, stored - size) for stored, size in zip(row.stored_shape, true.shape, strict=True)]
        padded = np.pad(true, grow)
        if row.storage.bits == 32:
            np.testing.assert_array_equal(weights.float(row.name), padded)
        elif row.storage.bits == 16:
            np.testing.assert_array_equal(weights.float(row.name), padded.astype(np.float16))
        else:
            tensor = weights.quantized(row.name)
            assert tensor.values.shape == row.stored_shape
            step = np.repeat(tensor.scales, row.stored_shape[1] // tensor.scales.shape[1], axis=1)
            assert (np.abs(tensor.dequantize() - padded) <= 0.501 * step).all()


def test_what_float16_cannot_hold_is_refused(tmp_path, checkpoint):
    weights = quantize_weights(make_plan(SCHEMES["fp16"], SPECS), reader(checkpoint), tmp_path)
    checkpoint["fc2.weight"][3, 3] = 65_504
    weights.float("fc2.weight")
    checkpoint["fc2.weight"][3, 3] = 70_000
    with pytest.raises(CheckpointError, match=r"fc2\.weight has values that float16 cannot hold"):
        weights.float("fc2.weight")


def test_an_interrupted_run_goes_on_where_it_stopped(tmp_path, checkpoint):
    plan = make_plan(SCHEMES["int8"], SPECS)
    reads: list[str] = []

    def stops_at_the_second(name, rows=None):
        reads.append(name)
        if name == "fc2.weight":
            raise KeyboardInterrupt
        return checkpoint[name][rows or slice(None)]

    with pytest.raises(KeyboardInterrupt):
        quantize_weights(plan, stops_at_the_second, tmp_path)
    reads.clear()

    def counts(name, rows=None):
        reads.append(name)
        return checkpoint[name][rows or slice(None)]

    steps: list[tuple[int, int]] = []
    quantize_weights(plan, counts, tmp_path, progress=lambda done, total: steps.append((done, total)))
    assert reads == ["fc2.weight"]
    assert steps == [(0, 2), (1, 2), (2, 2)]
    assert not list(tmp_path.glob("*.partial"))


@pytest.mark.parametrize("damage", ["torn", "missing", "one bit"])
def test_integers_that_are_not_whole_are_made_again(tmp_path, checkpoint, damage):
    plan = make_plan(SCHEMES["int8"], SPECS)
    before = quantize_weights(plan, reader(checkpoint), tmp_path).quantized("fc1.weight")
    path = tmp_path / "fc1.weight.values.npy"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(b"torn" if damage == "torn" else content)
    after = quantize_weights(plan, reader(checkpoint), tmp_path).quantized("fc1.weight")
    np.testing.assert_array_equal(before.values, after.values)


@pytest.mark.parametrize("scheme", ["int8", "int4"])
def test_rounding_piece_by_piece_is_rounding_at_once(tmp_path, checkpoint, monkeypatch, scheme):
    plan = make_plan(SCHEMES[scheme], SPECS)
    whole = quantize_weights(plan, reader(checkpoint), tmp_path / "whole")
    monkeypatch.setattr("medgemma_quantization.weights._PIECE_VALUES", 200)
    pieces = quantize_weights(plan, reader(checkpoint), tmp_path / "pieces")
    for name in ("fc1.weight", "fc2.weight"):
        np.testing.assert_array_equal(whole.quantized(name).values, pieces.quantized(name).values)
        np.testing.assert_array_equal(whole.scales(name), pieces.scales(name))


def test_a_weight_that_is_not_finite_is_named(tmp_path, checkpoint):
    checkpoint["fc2.weight"][3, 3] = np.inf
    with pytest.raises(CheckpointError, match=r"fc2.weight cannot be quantized: a weight is not finite"):
        quantize_weights(make_plan(SCHEMES["int4"], SPECS), reader(checkpoint), tmp_path)
