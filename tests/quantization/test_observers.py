"""Statistics merge bit for bit, however samples are dealt out, and are what they are said to be."""

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medgemma_quantization.observers import HISTOGRAM_EDGES, ExactSum, Moments, Range
from medgemma_runtime.errors import EdgeError

INPUTS = 5


def make_samples(seed: int, count: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Samples of unequal lengths whose inputs differ in magnitude by nine decades."""
    rng = np.random.default_rng(seed)
    scale = 10.0 ** rng.uniform(-6, 3, INPUTS)
    samples = []
    for _ in range(count):
        x = (rng.normal(size=(rng.integers(1, 9), INPUTS)) * scale).astype(np.float32)
        samples.append((x, x + rng.normal(size=x.shape).astype(np.float32) * np.float32(0.01)))
    return samples


def observe(samples) -> Moments:
    moments = Moments.zeros(INPUTS)
    for x, original in samples:
        moments.add(x, original)
    return moments


def parts(moments: Moments) -> list[np.ndarray]:
    sums = (moments.magnitude, *moments.second, moments.drift)
    for part in sums:
        part.carry()
    return [np.array(moments.rows), *(array for part in sums for array in (part.high, part.low))]


@settings(max_examples=60)
@given(
    seed=st.integers(0, 999), owners=st.lists(st.integers(0, 3), min_size=1, max_size=12), order=st.randoms()
)
def test_however_samples_are_dealt_out_the_bits_are_the_same(seed, owners, order):
    samples = make_samples(seed, len(owners))
    together = parts(observe(samples))
    shares = [[sample for sample, owner in zip(samples, owners, strict=True) if owner == n] for n in range(4)]
    for share in shares:
        order.shuffle(share)
    order.shuffle(shares)
    merged = Moments.zeros(INPUTS)
    for share in shares:
        merged.merge(observe(share))
    for actual, reference in zip(parts(merged), together, strict=True):
        np.testing.assert_array_equal(actual, reference)


def test_plain_sums_would_depend_on_the_order():
    """That the check above can fail: float64 sums of the same terms do."""
    samples = make_samples(3, 12)
    terms = [x.T.astype(np.float64) @ x for x, _ in samples]
    assert (sum(terms) != sum(reversed(terms))).any()


@given(st.lists(st.floats(-(2.0**37), 2.0**37), min_size=1, max_size=20))
def test_a_sum_is_the_sum_of_its_cut_terms(terms):
    total = ExactSum.zeros((1,))
    for term in terms:
        total.add(np.array([term]))
    true = sum(Fraction(term) for term in terms)
    cut = len(terms) * Fraction(2) ** -64
    total.carry()
    kept = total.high[0].item() * Fraction(2) ** -22 + total.low[0].item() * Fraction(2) ** -64
    assert abs(kept - true) <= cut
    assert math.isclose(total.value()[0], float(true), rel_tol=1e-15, abs_tol=1e-15)


def test_carries_are_brought_in_before_the_low_part_overflows(monkeypatch):
    monkeypatch.setattr("medgemma_quantization.observers._TERMS_PER_CARRY", 3)
    total = ExactSum.zeros((1,))
    for _ in range(10):
        total.add(np.array([1 - 2.0**-40]))
        assert total.low[0] < 4 * 2**42
    assert total.value()[0] == 10 - 10 * 2.0**-40


def test_moments_are_those_of_numpy():
    samples = make_samples(1, 6)
    moments = observe(samples)
    x = np.concatenate([x for x, _ in samples]).astype(np.float64)
    original = np.concatenate([y for _, y in samples]).astype(np.float64)
    np.testing.assert_allclose(moments.hessian(), x.T @ x / len(x), rtol=1e-5, atol=1e-9)
    np.testing.assert_array_equal(moments.hessian(), moments.hessian().T)
    np.testing.assert_allclose(moments.mean_drift(), (original - x).T @ x / len(x), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(moments.mean_magnitude(), np.abs(x).mean(axis=0), rtol=1e-6)


def test_wide_layers_are_added_in_strips(monkeypatch):
    x = np.random.default_rng(0).normal(size=(7, 50)).astype(np.float32)
    whole = Moments.zeros(50)
    whole.add(x, x + 1)
    hessian, drift = whole.hessian(), whole.mean_drift()
    monkeypatch.setattr("medgemma_quantization.observers._STRIP", 16)
    strips = Moments.zeros(50)
    strips.add(x, x + 1)
    np.testing.assert_allclose(strips.hessian(), hessian, rtol=1e-5)
    np.testing.assert_array_equal(strips.hessian(), strips.hessian().T)
    np.testing.assert_allclose(strips.mean_drift(), drift, rtol=1e-5)
    np.testing.assert_array_equal(strips.mean_drift(slice(20, 30)), strips.mean_drift()[20:30])
    np.testing.assert_array_equal(strips.mean_square(), np.diagonal(strips.hessian()))
    order = np.random.default_rng(1).permutation(50)
    np.testing.assert_array_equal(strips.hessian(order), strips.hessian()[np.ix_(order, order)])


@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e8])
def test_what_cannot_be_summed_is_refused(bad):
    x = np.ones((3, INPUTS), np.float32)
    x[1, 2] = bad
    with pytest.raises(ValueError, match="are not finite, or too large"):
        Moments.zeros(INPUTS).add(x)
    with pytest.raises(ValueError, match="are not finite, or too large"):
        Moments.zeros(INPUTS).add(np.ones_like(x), x)


def test_one_large_activation_among_many_rows_is_summed():
    x = np.ones((200_000, INPUTS), np.float32)
    x[0, 2] = 1e4
    moments = Moments.zeros(INPUTS)
    moments.add(x, x + np.float32(0.5))
    # float32 holds the sums of products of a sample to six digits.
    assert moments.mean_square()[2] == pytest.approx((1e8 + 199_999) / 200_000, rel=1e-5)


def test_sums_are_refused_before_they_leave_their_range(tmp_path):
    x = np.full((9, INPUTS), 2.0**18, np.float32)  # squares of 2**36: sixteen rows are too many
    moments = Moments.zeros(INPUTS)
    moments.add(x)
    moments.save(tmp_path / "moments.npz")
    for found in (moments, Moments.load(tmp_path / "moments.npz")):
        with pytest.raises(ValueError, match="too large together"):
            found.merge(moments)
        with pytest.raises(ValueError, match="too large for their squares' sum"):
            found.add(x)
        assert found.mean_square()[0] == 2.0**36
        found.add(x[:6])


def test_other_widths_do_not_merge():
    with pytest.raises(ValueError, match="6 inputs cannot join those of 5"):
        Moments.zeros(5).merge(Moments.zeros(6))


def test_what_is_saved_is_read_back(tmp_path):
    moments = observe(make_samples(2, 5))
    moments.save(tmp_path / "a.npz")
    loaded = Moments.load(tmp_path / "a.npz")
    for actual, reference in zip(parts(loaded), parts(moments), strict=True):
        np.testing.assert_array_equal(actual, reference)
    loaded.merge(observe(make_samples(4, 1)))


@pytest.mark.parametrize("content", [b"", b"no statistics", None])
def test_a_file_of_something_else_is_refused(tmp_path, content):
    path = tmp_path / "a.npz"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(EdgeError, match=r"a\.npz holds no calibration statistics"):
        Moments.load(path)


def test_an_archive_with_pickles_is_refused(tmp_path):
    path = tmp_path / "a.npz"
    np.savez(path, rows=np.array([{}], dtype=object), magnitude=1, second=1, drift=1)
    with pytest.raises(EdgeError, match="holds no calibration statistics"):
        Moments.load(path)


def test_ranges_count_every_value_once_and_merge():
    rng = np.random.default_rng(0)
    values = [rng.normal(size=30).astype(np.float32) * 10.0 ** rng.integers(-8, 8) for _ in range(9)]
    values.append(np.zeros(4, np.float32))
    whole = Range()
    for value in values:
        whole.add(value)
    first, second = Range(), Range()
    for value in values[::2]:
        second.add(value)
    for value in values[1::2]:
        first.add(value)
    first.merge(second)
    flat = np.concatenate(values)
    assert (first.low, first.high) == (whole.low, whole.high) == (flat.min(), flat.max())
    np.testing.assert_array_equal(first.histogram, whole.histogram)
    reference, _ = np.histogram(np.clip(flat, HISTOGRAM_EDGES[0], HISTOGRAM_EDGES[-1]), HISTOGRAM_EDGES)
    np.testing.assert_array_equal(whole.histogram, reference)


def test_a_range_refuses_what_is_not_finite_and_takes_nothing():
    seen = Range()
    seen.add(np.empty(0, np.float32))
    assert seen.histogram.sum() == 0
    with pytest.raises(ValueError, match="not finite"):
        seen.add(np.array([1, np.nan], np.float32))
