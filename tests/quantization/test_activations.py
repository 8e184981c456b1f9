"""Static ranges are those of onnxruntime's calibrators, as far as bins that merge can tell."""

import contextlib
import io

import numpy as np
import pytest

from medgemma_quantization.activations import (
    MARGIN,
    RANGE_METHODS,
    RANGES_NAME,
    ActivationRange,
    choose_range,
    read_ranges,
    save_ranges,
)
from medgemma_quantization.observers import Range
from medgemma_runtime.errors import EdgeError

COUNT = 40_000


def gelu(x: np.ndarray) -> np.ndarray:
    return x / 2 * (1 + np.tanh((2 / np.pi) ** 0.5 * (x + 0.044715 * x**3)))


def values(kind: str) -> np.ndarray:
    rng = np.random.default_rng(0)
    drawn = {
        "normal": rng.normal(size=COUNT),
        "cubed": rng.normal(size=COUNT) ** 3,
        "laplace": 3 * rng.laplace(size=COUNT),
        "gelu": gelu(2 * rng.normal(size=COUNT)),
        "outliers": np.append(rng.normal(size=COUNT - 2), [60, -40]),
    }
    return drawn[kind].astype(np.float32)


def seen(x: np.ndarray, parts: int = 8) -> Range:
    whole = Range()
    for part in np.array_split(x, parts):
        one = Range()
        one.add(part)
        whole.merge(one)
    return whole


def ort_range(x: np.ndarray, method: str) -> tuple[float, float]:
    pytest.importorskip("onnx")
    from onnxruntime.quantization.calibrate import HistogramCollector

    collector = HistogramCollector(
        method=method,
        symmetric=False,
        num_bins=1024,
        num_quantized_bins=255,
        percentile=99.99,
        scenario="same",
    )
    with contextlib.redirect_stdout(io.StringIO()):
        collector.collect({"x": [x]})
        low, high = collector.compute_collection_result()["x"][:2]
    return float(np.ravel(low)[0]), float(np.ravel(high)[0])


def squared_error(x: np.ndarray, ends: tuple[float, float]) -> float:
    known = ActivationRange.between(*ends)
    rounded = np.clip(np.rint(x / known.scale) + known.zero, 0, 255) - known.zero
    return float(np.square(rounded * known.scale - x).mean())


@pytest.mark.parametrize("kind", ["normal", "cubed", "laplace", "gelu", "outliers"])
def test_percentiles_are_those_of_onnxruntime(kind):
    """To the width of a bin: 2 ** (1 / 16)."""
    x = values(kind)
    np.testing.assert_allclose(RANGE_METHODS["percentile"](seen(x)), ort_range(x, "percentile"), rtol=0.05)


def test_entropy_is_that_of_onnxruntime():
    """The divergence is flat and its bins are noisy: thresholds of other seeds differ by half, too."""
    x = values("cubed")
    actual, reference = RANGE_METHODS["entropy"](seen(x)), ort_range(x, "entropy")
    ratios = np.array(actual) / np.array(reference)
    assert (ratios > 0.6).all() and (ratios < 1.65).all()
    # And not the whole range, where that has a long tail.
    assert actual[1] < 0.9 * x.max()


def test_minmax_is_what_was_seen_and_a_margin():
    x = values("gelu")
    low, high = RANGE_METHODS["minmax"](seen(x))
    assert (low, high) == (MARGIN * float(x.min()), MARGIN * float(x.max()))


@pytest.mark.parametrize("kind", ["normal", "cubed", "laplace", "gelu", "outliers"])
def test_least_error_is_least_of_all_methods(kind):
    x = values(kind)
    errors = {method: squared_error(x, find(seen(x))) for method, find in RANGE_METHODS.items()}
    # One per cent for what bins do not tell.
    assert errors["mse"] <= 1.01 * min(errors.values())
    assert errors["mse"] < 0.999 * errors["minmax"]


@pytest.mark.parametrize("method", RANGE_METHODS)
def test_ranges_do_not_depend_on_how_samples_were_dealt_out(method):
    x = values("laplace")
    assert choose_range(seen(x, 3), method) == choose_range(seen(x[::-1], 50), method)


@pytest.mark.parametrize("method", RANGE_METHODS)
@pytest.mark.parametrize("constant", [0.0, 3.0, -3.0])
def test_an_input_that_is_always_the_same_has_a_range(method, constant):
    known = choose_range(seen(np.full(50, constant, np.float32), 1), method)
    rounded = (np.clip(np.rint(constant / known.scale) + known.zero, 0, 255) - known.zero) * known.scale
    assert rounded == pytest.approx(constant, rel=0.01)


def test_zero_is_exact_and_both_ends_are_in():
    for low, high in ((-1.0, 3.0), (0.5, 3.0), (-3.0, -0.5), (0.0, 0.0)):
        known = ActivationRange.between(low, high)
        steps = np.rint(np.array([low, 0.0, high]) / known.scale) + known.zero
        assert steps[1] == known.zero
        assert (steps >= 0).all() and (steps <= 255).all()


@pytest.mark.parametrize("method", RANGE_METHODS)
def test_what_was_never_seen_has_no_range(method):
    with pytest.raises(ValueError, match="no sample reached it"):
        choose_range(Range(), method)


def test_ranges_are_read_back(tmp_path):
    ranges = {"a.weight": ActivationRange.between(-0.1, 7.3), "b.weight": ActivationRange.between(0, 1)}
    save_ranges(ranges, tmp_path)
    assert read_ranges(tmp_path) == ranges
    assert [path.name for path in tmp_path.iterdir()] == [RANGES_NAME]


@pytest.mark.parametrize(
    "content", [None, "", "[]", '{"a": 3}', '{"a": [0, 3]}', '{"a": [NaN, 3]}', '{"a": [1, 256]}']
)
def test_a_file_of_something_else_is_refused(tmp_path, content):
    if content is not None:
        (tmp_path / RANGES_NAME).write_text(content)
    with pytest.raises(EdgeError, match=r"activation_ranges\.json holds no activation ranges"):
        read_ranges(tmp_path)
