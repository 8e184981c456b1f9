import math

import numpy as np
import pytest

from medgemma_benchmarks.metrics import (
    MetricError,
    cosine,
    first_choices,
    kl,
    kl_of_log_probabilities,
    log_probabilities,
    max_abs_error,
    max_standardized_error,
    probabilities,
    relative_error,
    sqnr_db,
    top_k_agreement,
)

REFERENCE = np.array([[3.0, 4.0], [1.0, 0.0]], dtype=np.float32)


def test_cosine_of_each_row_by_hand() -> None:
    actual = np.array([[4.0, 3.0], [0.0, 2.0]], dtype=np.float32)
    np.testing.assert_allclose(cosine(actual=actual, reference=REFERENCE), [24 / 25, 0.0], atol=1e-12)


def test_cosine_does_not_see_length_and_relative_error_does() -> None:
    np.testing.assert_allclose(cosine(actual=2 * REFERENCE, reference=REFERENCE), 1.0)
    assert relative_error(actual=2 * REFERENCE, reference=REFERENCE) == pytest.approx(1.0)


def test_sums_are_taken_in_float64() -> None:
    # In float32 the ones vanish beside 1e8 and the cosine of these would be exactly 1.
    actual = np.array([[1e8] + [1.0] * 1000], dtype=np.float32)
    reference = np.array([[1e8] + [-1.0] * 1000], dtype=np.float32)
    assert max_abs_error(actual=actual, reference=reference) == 2.0
    assert cosine(actual=actual, reference=reference)[0] < 1.0


def test_sqnr_by_hand_and_infinite_without_noise() -> None:
    actual = REFERENCE + np.array([[0.1, 0.0], [0.0, 0.0]])
    assert sqnr_db(actual=actual, reference=REFERENCE) == pytest.approx(10 * math.log10(26 / 0.01), abs=1e-4)
    assert sqnr_db(actual=REFERENCE, reference=REFERENCE) == math.inf


def test_standardized_error_does_not_see_scale() -> None:
    actual = REFERENCE + np.array([[0.5, 0.0], [0.0, 0.0]])
    by_hand = 0.5 / float(np.std(REFERENCE))
    assert max_standardized_error(actual=actual, reference=REFERENCE) == pytest.approx(by_hand)
    assert max_standardized_error(actual=64 * actual, reference=64 * REFERENCE) == pytest.approx(by_hand)
    with pytest.raises(MetricError, match="all elements of the reference are equal"):
        max_standardized_error(actual=REFERENCE, reference=np.ones_like(REFERENCE))


def test_the_reference_is_the_denominator() -> None:
    one_way = relative_error(actual=2 * REFERENCE, reference=REFERENCE)
    other_way = relative_error(actual=REFERENCE, reference=2 * REFERENCE)
    assert (one_way, other_way) == pytest.approx((1.0, 0.5))


def test_top_k_counts_shared_columns() -> None:
    actual = np.array([[4.0, 3.0, 2.0, 1.0], [1.0, 2.0, 3.0, 4.0]])
    reference = np.array([[4.0, 1.0, 3.0, 2.0], [1.0, 2.0, 3.0, 4.0]])
    assert top_k_agreement(actual=actual, reference=reference, k=1) == 1.0
    assert top_k_agreement(actual=actual, reference=reference, k=2) == 0.75
    with pytest.raises(MetricError, match="top-5 agreement is undefined over 4"):
        top_k_agreement(actual=actual, reference=reference, k=5)


def test_log_probabilities_are_those_of_softmax_and_make_the_same_kl() -> None:
    reference, actual = np.array([[1.0, -2.0, 30.0]]), np.array([[0.5, 1.0, 29.0]])
    np.testing.assert_allclose(np.exp(log_probabilities(reference)), probabilities(reference), atol=1e-15)
    nats = kl_of_log_probabilities(actual=log_probabilities(actual), reference=log_probabilities(reference))
    np.testing.assert_allclose(nats, kl(actual=actual, reference=reference))


def test_kl_by_hand_and_zero_for_shifted_logits() -> None:
    reference, actual = np.log([[0.5, 0.5]]), np.log([[0.9, 0.1]])
    expected = 0.5 * math.log(0.5 / 0.9) + 0.5 * math.log(0.5 / 0.1)
    assert kl(actual=actual, reference=reference)[0] == pytest.approx(expected)
    assert kl(actual=reference + 700, reference=reference)[0] == pytest.approx(0.0, abs=1e-12)


def test_probabilities_are_a_softmax_that_does_not_overflow() -> None:
    np.testing.assert_allclose(probabilities(np.array([[1000.0, 1000.0 - math.log(3)]])), [[0.75, 0.25]])


def test_a_near_tie_is_the_references_and_not_the_candidates() -> None:
    reference = np.array([[1.00, 0.95, -5.0], [5.0, 0.0, -5.0], [1.00, 0.95, -5.0]])
    actual = np.array([[0.0, 1.0, -9.0], [0.49, 0.50, -9.0], [-9.0, -9.0, 0.0]])
    near, unsure_candidate, far_label = first_choices(actual=actual, reference=reference, tie_margin=0.1)
    assert (near.verdict, near.actual, near.reference) == ("NEAR_TIE", 1, 0)
    assert near.margin == pytest.approx(0.05)
    # The candidate's own gap is 0.01, yet the reference was sure.
    assert unsure_candidate.verdict == "DIFFERENT"
    # The reference was tied between two labels, and the candidate took a third.
    assert far_label.verdict == "DIFFERENT"


def test_the_same_label_is_the_same_however_close() -> None:
    tied = np.array([[1.0, 1.0]])
    assert first_choices(actual=tied, reference=tied, tie_margin=0.1)[0].verdict == "SAME"
    alone = first_choices(actual=tied[:, :1], reference=tied[:, :1], tie_margin=0.1)[0]
    assert (alone.verdict, alone.margin) == ("SAME", None)


@pytest.mark.parametrize("metric", [cosine, sqnr_db, max_abs_error, relative_error, kl])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_has_no_metric(metric, value: float) -> None:
    bad = REFERENCE.copy()
    bad[1, 1] = value
    with pytest.raises(MetricError, match="1 of 4 actual values are NaN or infinite"):
        metric(actual=bad, reference=REFERENCE)
    with pytest.raises(MetricError, match="1 of 4 reference values"):
        metric(actual=REFERENCE, reference=bad)


@pytest.mark.parametrize("metric", [cosine, sqnr_db, max_abs_error, relative_error, kl])
def test_shapes_are_never_broadcast(metric) -> None:
    with pytest.raises(MetricError, match=r"\[1, 2\] and reference \[2, 2\]"):
        metric(actual=REFERENCE[:1], reference=REFERENCE)


def test_undefined_cases_raise_instead_of_giving_zero() -> None:
    zero = np.zeros((2, 2))
    with pytest.raises(MetricError, match="length zero"):
        cosine(actual=np.array([[1.0, 0.0], [0.0, 0.0]]), reference=REFERENCE)
    with pytest.raises(MetricError, match="SQNR is undefined"):
        sqnr_db(actual=REFERENCE, reference=zero)
    with pytest.raises(MetricError, match="relative error is undefined"):
        relative_error(actual=REFERENCE, reference=zero)
    with pytest.raises(MetricError, match="no elements"):
        max_abs_error(actual=zero[:0], reference=zero[:0])
    with pytest.raises(MetricError, match="must have 2 axes and have 1"):
        cosine(actual=zero[0], reference=zero[0])
