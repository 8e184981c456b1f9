"""Methods against their definitions: brute force for scale search, a plain GPTQ for the blocked one."""

import numpy as np
import pytest

from medgemma_quantization.affine import quantize, range_scales, round_scale
from medgemma_quantization.methods import gptq as gptq_module
from medgemma_quantization.methods.gptq import DAMPING, gptq
from medgemma_quantization.methods.rounding import nearest
from medgemma_quantization.methods.search import CANDIDATES, search_scales, searched
from medgemma_quantization.observers import Moments
from medgemma_quantization.scheme import INT4, INT8, INT8_BLOCKS, Storage

METHODS = {"nearest": nearest, "searched": searched, "gptq": gptq}


def make_inputs(width: int, rows: int = 400, seed: int = 0) -> np.ndarray:
    """Correlated inputs of very different magnitudes, as hidden states are."""
    rng = np.random.default_rng(seed)
    mixing = rng.normal(size=(width, width)) * np.exp(rng.normal(size=width))
    return (rng.normal(size=(rows, width)) @ mixing / width**0.5).astype(np.float32)


def make_weight(rows: int, width: int, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(rows, width)).astype(np.float32)


def observed(x: np.ndarray, original: np.ndarray | None = None) -> Moments:
    moments = Moments.zeros(x.shape[1])
    moments.add(x, original)
    return moments


def output_error(tensor, weight: np.ndarray, x: np.ndarray) -> float:
    return float(np.square(x @ (tensor.dequantize() - weight).T).mean())


@pytest.mark.parametrize("storage", [INT4, Storage(bits=4, block=64), INT8, INT8_BLOCKS], ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_every_method_gives_admissible_tensors(method, storage):
    weight, moments = make_weight(24, 128), observed(make_inputs(128))
    tensor = METHODS[method](storage, moments)(weight)
    assert tensor.storage == storage
    assert tensor.values.shape == weight.shape
    np.testing.assert_array_equal(round_scale(tensor.scales), tensor.scales)
    assert (tensor.scales > 0).all()


@pytest.mark.parametrize("method", METHODS)
def test_rows_are_independent(method):
    weight, moments = make_weight(24, 64), observed(make_inputs(64))
    rounder = METHODS[method](INT4, moments)
    whole = rounder(weight)
    for part in (slice(0, 5), slice(5, 24)):
        piece = rounder(weight[part])
        # A matrix product of fewer rows may sum in another order, so a tie may fall otherwise.
        assert (piece.values == whole.values[part]).mean() > 0.99
        assert (piece.scales == whole.scales[part]).mean() > 0.95


@pytest.mark.parametrize("weighted", [False, True])
def test_search_finds_the_best_candidate(weighted):
    weight = make_weight(6, 64)
    importance = np.exp(np.random.default_rng(2).normal(size=64)).astype(np.float32) if weighted else None
    weights = np.ones(64, np.float32) if importance is None else importance
    found = search_scales(weight, INT4, importance)
    ranges = range_scales(weight, INT4)

    def error(scales: np.ndarray) -> np.ndarray:
        squares = np.square(quantize(weight, INT4, scales).dequantize() - weight) * weights
        return squares.reshape(6, 2, 32).sum(axis=2)

    tried = [error(round_scale(ranges * share)) for share in CANDIDATES]
    np.testing.assert_allclose(error(found), np.min(tried, axis=0), rtol=1e-5)
    assert (error(found) < error(ranges)).any()


def test_each_method_is_better_than_the_one_before():
    x, weight = make_inputs(128), make_weight(64, 128)
    moments = observed(x)
    errors = [output_error(METHODS[name](INT4, moments)(weight), weight, x) for name in METHODS]
    # 1, 0.65 and 0.29 are seen.
    assert errors[2] < 0.5 * errors[1] < 0.5 * errors[0]


def plain_gptq(weight: np.ndarray, hessian: np.ndarray, scales: np.ndarray, order: np.ndarray) -> np.ndarray:
    """Optimal brain quantization in a given order, the inverse updated by elimination: float64, no tricks."""
    left, values = weight.astype(np.float64), np.zeros(weight.shape)
    inverse = np.linalg.inv(hessian)
    for place in order:
        scale = scales[:, place // 32]
        values[:, place] = np.clip(np.rint(left[:, place] / scale), -8, 7)
        error = (left[:, place] - values[:, place] * scale) / inverse[place, place]
        left -= error[:, None] * inverse[place]
        inverse -= np.outer(inverse[:, place], inverse[place]) / inverse[place, place]
        inverse[place] = inverse[:, place] = 0
        inverse[place, place] = 1
    return values


def test_gptq_rounds_as_plain_elimination_does():
    x, weight = make_inputs(96), make_weight(40, 96)
    moments = observed(x)
    tensor = gptq(INT4, moments)(weight)
    hessian = moments.hessian()
    order = gptq_module._order(np.diagonal(hessian), 32)
    assert sorted(order) == list(range(96))
    damped = hessian + np.eye(96) * DAMPING * np.diagonal(hessian).mean()
    reference = plain_gptq(weight, damped, tensor.scales, order)
    assert (tensor.values == reference).mean() > 0.995


def test_large_inputs_are_rounded_first_and_blocks_stay_together():
    diagonal = np.array([1.0, 2, 9, 1, 5, 6, 0, 0])
    assert gptq_module._order(diagonal, 4).tolist() == [2, 1, 0, 3, 5, 4, 6, 7]


def test_gptq_makes_up_for_what_layers_before_it_changed():
    original, weight = make_inputs(64, rows=600), make_weight(32, 64)
    # The layer before has lost a part of its output, which other inputs know something about.
    x = original + (original @ make_weight(64, 64, seed=5) * 0.02).astype(np.float32)

    def error(moments: Moments) -> float:
        tensor = gptq(INT8, moments)(weight)
        return float(np.square(x @ tensor.dequantize().T - original @ weight.T).mean())

    assert error(observed(x, original)) < 0.3 * error(observed(x))


def test_inputs_that_did_not_change_move_nothing():
    x, weight = make_inputs(64), make_weight(8, 64)
    plain, same = gptq(INT4, observed(x))(weight), gptq(INT4, observed(x, x))(weight)
    np.testing.assert_array_equal(plain.values, same.values)


@pytest.mark.parametrize("rows", [1, 10])
def test_fewer_samples_than_inputs_are_damped(rows):
    x, weight = make_inputs(64, rows=rows), make_weight(16, 64)
    tensor = gptq(INT4, observed(x))(weight)
    assert output_error(tensor, weight, x) < output_error(nearest(INT4, None)(weight), weight, x)
    step = np.repeat(tensor.scales, 32, axis=1)
    assert np.isfinite(step).all()


def test_an_input_that_is_always_zero_is_rounded_like_any_other():
    x = make_inputs(64)
    x[:, 40] = 0
    weight = make_weight(16, 64)
    tensor = gptq(INT4, observed(x))(weight)
    assert np.abs(tensor.dequantize()[:, 40] - weight[:, 40]).max() < 1.0


def test_gptq_without_inputs_is_refused():
    with pytest.raises(ValueError, match="no sample reached it"):
        gptq(INT4, None)
    with pytest.raises(ValueError, match="no sample reached it"):
        gptq(INT4, Moments.zeros(32))
    with pytest.raises(ValueError, match="zero in every sample"):
        gptq(INT4, observed(np.zeros((4, 32), np.float32)))


@pytest.mark.parametrize("rows", [20, 90])
def test_weights_move_by_what_their_inputs_lack(rows):
    """Fewer rows than inputs, and more: `W + W @ drift @ inverse(H + damping)`, by LAPACK."""
    rng = np.random.default_rng(4)
    x = rng.normal(size=(300, 48)).astype(np.float32)
    original = x + 0.1 * rng.normal(size=x.shape).astype(np.float32)
    moments = Moments.zeros(48)
    moments.add(x, original)
    weight = rng.normal(size=(rows, 48)).astype(np.float32)
    inverse = np.linalg.inv(moments.hessian() + 0.05 * np.eye(48))
    expected = weight + weight @ moments.mean_drift() @ inverse
    moved = gptq_module._mover(moments, 0.05)(weight)
    np.testing.assert_allclose(moved, expected, atol=1e-5)
    assert np.abs(moved - weight).max() > 0.01
    # Nearer to what the float model gave than the weights as they were.
    given, true = moved @ x.T, weight @ original.T
    assert np.square(given - true).mean() < np.square(weight @ x.T - true).mean()
