import math

import numpy as np
import pytest

from medgemma_benchmarks.metrics import MetricError
from medgemma_benchmarks.teacher_forced import (
    compare_predictions,
    predict,
    reference_logits,
    summarize,
)

VOCABULARY = 11


class CountingDecoder:
    """Stands for `Decoder`: its logits say how long the conversation is, and which token came last."""

    def __init__(self) -> None:
        self.reads: list[list[int]] = []
        self.given: dict[str, np.ndarray | None] = {}

    def new_cache(self, capacity: int) -> list[int]:
        self.capacity = capacity
        return []

    def read(self, cache, ids, *, image_blocks=None, image_features=None) -> np.ndarray:
        if not cache:
            self.given = {"image_blocks": image_blocks, "image_features": image_features}
        cache += ids.tolist()
        self.reads.append(ids.tolist())
        return np.array([len(cache), cache[-1]], np.float32)


def rows(shape=(6, VOCABULARY), seed=5) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def test_every_token_is_predicted_once_from_all_before_it() -> None:
    decoder, ids = CountingDecoder(), np.array([2, 30, 31, 32, 33], np.int64)
    blocks, features = np.array([-1, 0, 0, -1, -1]), np.ones((2, 3), np.float32)
    logits = list(predict(decoder, ids, given=3, image_blocks=blocks, image_features=features))  # type: ignore[arg-type]
    assert [row.tolist() for row in logits] == [[3, 31], [4, 32]]
    assert decoder.reads == [[2, 30, 31], [32]]
    assert decoder.capacity == 5
    np.testing.assert_array_equal(decoder.given["image_blocks"], blocks[:3])
    assert decoder.given["image_features"] is features


def test_reference_logits_are_the_head_times_hidden_states() -> None:
    hidden, head = rows((70, 4)), rows((VOCABULARY, 4), seed=1)
    made = np.stack(list(reference_logits(hidden, head)))
    np.testing.assert_allclose(made, hidden @ head.T, rtol=1e-5, atol=1e-6)
    assert made.shape == (70, VOCABULARY)


def test_two_tokens_by_hand() -> None:
    # The reference gives 3/4 and 1/4, the artifact one half each; what came is the second token.
    reference = np.log(np.array([[0.75, 0.25]], np.float32)) + 7
    [found] = compare_predictions(
        actual=np.zeros((1, 2), np.float32), reference=reference, ids=np.array([1]), tie_margin=0.1
    )
    assert found.kl == pytest.approx(0.75 * math.log(1.5) + 0.25 * math.log(0.5), abs=1e-6)
    assert found.actual_nats == pytest.approx(math.log(0.5))
    assert found.reference_nats == pytest.approx(math.log(0.25), abs=1e-6)
    assert found.max_abs_error == pytest.approx(7 + math.log(0.75), abs=1e-6)
    deviation = math.log(3) / 2
    assert found.max_standardized_error == pytest.approx((7 + math.log(0.75)) / deviation, abs=1e-5)
    assert (found.choice.actual, found.choice.reference, found.choice.verdict) == (0, 0, "SAME")
    assert found.choice.margin == pytest.approx(math.log(3), abs=1e-5)


def test_a_near_tie_of_the_reference_is_left_out_of_agreement() -> None:
    reference = np.array([[1.0, 0.95, 0.0], [3.0, 0.0, 0.0], [3.0, 0.0, 0.0], [2.0, 0.0, 0.0]])
    actual = np.array([[0.95, 1.0, 0.0], [3.0, 0.0, 0.0], [0.0, 3.0, 0.0], [2.0, 0.0, 0.0]])
    parity = summarize(
        compare_predictions(actual=actual, reference=reference, ids=np.zeros(4, np.int64), tie_margin=0.1)
    )
    assert (parity.tokens, parity.near_ties, parity.near_tie_share) == (4, 1, 0.25)
    assert parity.agreement == pytest.approx(2 / 3)
    tied = summarize(
        compare_predictions(
            actual=actual[:1], reference=reference[:1], ids=np.zeros(1, np.int64), tie_margin=0.1
        )
    )
    assert tied.agreement is None


def test_perplexity_of_a_uniform_model_is_its_vocabulary() -> None:
    # And one more token that is never chosen: logits that are all equal are no model's.
    uniform, ids = np.pad(np.zeros((5, VOCABULARY)), ((0, 0), (0, 1)), constant_values=-1e3), np.arange(5)
    parity = summarize(compare_predictions(actual=uniform, reference=uniform, ids=ids, tie_margin=0.1))
    assert parity.perplexity == pytest.approx(VOCABULARY)
    assert parity.reference_perplexity == pytest.approx(VOCABULARY)
    assert (parity.kl_mean, parity.kl_p99, parity.perplexity_ratio) == (0.0, 0.0, pytest.approx(1.0))


def test_p99_is_near_the_worst_and_the_mean_is_not() -> None:
    reference = np.tile(rows((1, VOCABULARY)), (100, 1))
    actual = reference.copy()
    actual[:3] = rows((3, VOCABULARY), seed=9) * 3
    parity = summarize(
        compare_predictions(actual=actual, reference=reference, ids=np.zeros(100, np.int64), tie_margin=0.1)
    )
    assert parity.kl_p99 is not None and parity.kl_mean is not None
    assert parity.kl_p99 > 10 * parity.kl_mean > 0


def test_predictions_of_the_position_beside_are_seen() -> None:
    reference, ids = rows((40, VOCABULARY)) * 3, np.zeros(39, np.int64)
    right = compare_predictions(actual=reference[:-1], reference=reference[:-1], ids=ids, tie_margin=0.1)
    shifted = compare_predictions(actual=reference[1:], reference=reference[:-1], ids=ids, tie_margin=0.1)
    assert summarize(right).kl_mean == 0
    assert (summarize(shifted).kl_mean or 0) > 1


def test_a_model_that_is_sure_of_the_wrong_token_has_a_finite_perplexity() -> None:
    actual, reference = np.array([[1e4, 0.0]]), np.array([[0.5, 0.0]])
    parity = summarize(
        compare_predictions(actual=actual, reference=reference, ids=np.array([1]), tie_margin=0.1)
    )
    assert parity.perplexity is not None and math.isfinite(parity.perplexity)
    assert parity.perplexity > 1e300


def test_rows_that_do_not_go_together_are_refused() -> None:
    with pytest.raises(MetricError, match="only arrays of one shape"):
        compare_predictions(
            actual=rows((1, 3)), reference=rows((1, 4)), ids=np.zeros(1, np.int64), tie_margin=0.1
        )
    with pytest.raises(ValueError, match="zip"):
        compare_predictions(
            actual=rows((2, 3)), reference=rows((1, 3)), ids=np.zeros(1, np.int64), tie_margin=0.1
        )
    with pytest.raises(MetricError, match="1 of 3 actual values are NaN"):
        compare_predictions(
            actual=np.array([[np.nan, 0, 0]]), reference=rows((1, 3)), ids=np.array([0]), tie_margin=0.1
        )
