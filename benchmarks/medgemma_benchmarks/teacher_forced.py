"""Teacher forcing: how a model predicts each token of a given text, all tokens before it being given too.

Nothing is drawn, so one near tie cannot lead two models apart: every position is a comparison of its own.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medgemma_benchmarks.metrics import (
    Choice,
    first_choices,
    kl_of_log_probabilities,
    log_probabilities,
    max_abs_error,
    max_standardized_error,
)
from medgemma_benchmarks.parity_report import PredictionParity
from medgemma_runtime.decoder import Decoder

__all__ = ["Prediction", "predict", "reference_logits", "compare_predictions", "summarize"]

# Rows of the reference's logits that are made at once: 34 MB each 32 with Gemma's vocabulary.
_ROWS_AT_ONCE = 32


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """One prediction against the reference's.

    Attributes:
        kl: KL(reference || actual), nats.
        max_abs_error: Largest difference of one logit.
        max_standardized_error: The same in standard deviations of the reference's logits here.
        choice: The first token of either, and the verdict on it.
        actual_nats: Log probability that the artifact gave to the token that came.
        reference_nats: Log probability that the reference gave to it.
    """

    kl: float
    max_abs_error: float
    max_standardized_error: float
    choice: Choice
    actual_nats: float
    reference_nats: float


def predict(
    decoder: Decoder,
    ids: NDArray[np.int64],
    *,
    given: int,
    image_blocks: NDArray[np.int64] | None = None,
    image_features: NDArray[np.float32] | None = None,
) -> Iterator[NDArray[np.float32]]:
    """The logits from which each of `ids[given:]` would be drawn, one token read at a time.

    Args:
        decoder: Of the artifact.
        ids: [S] of the whole text.
        given: How many of them are read at once, before the first prediction; among them all of images.
        image_blocks: [S], as `Decoder.read` takes it.
        image_features: [F, H], likewise.

    Yields:
        [vocabulary], spare rows included; S - given of them.

    Raises:
        NotFiniteError: If a logit is not finite.
    """
    cache = decoder.new_cache(len(ids))
    blocks = None if image_blocks is None else image_blocks[:given]
    yield decoder.read(cache, ids[:given], image_blocks=blocks, image_features=image_features)
    for position in range(given, len(ids) - 1):
        yield decoder.read(cache, ids[position : position + 1])


def reference_logits(
    hidden_states: NDArray[np.float32], head: NDArray[np.float32]
) -> Iterator[NDArray[np.float32]]:
    """The reference's logits, row by row, from [T, D] hidden states and a head of [V, D]."""
    for start in range(0, len(hidden_states), _ROWS_AT_ONCE):
        yield from hidden_states[start : start + _ROWS_AT_ONCE] @ head.T


def compare_predictions(
    *,
    actual: Iterable[NDArray[Any]],
    reference: Iterable[NDArray[Any]],
    ids: NDArray[np.int64],
    tie_margin: float,
) -> list[Prediction]:
    """Compare predictions one by one.

    Args:
        actual: [vocabulary] logits of the artifact, T of them.
        reference: Those of the reference.
        ids: [T] tokens that came.
        tie_margin: In logits; within it, the reference's own preference is a near tie.

    Raises:
        MetricError: If vocabularies differ, or a logit is not finite.
    """
    found = []
    for row, wanted, token in zip(actual, reference, ids, strict=True):
        logits = {"actual": row[None].astype(np.float64), "reference": wanted[None].astype(np.float64)}
        error, standardized = max_abs_error(**logits), max_standardized_error(**logits)
        nats = {side: log_probabilities(values) for side, values in logits.items()}
        found.append(
            Prediction(
                kl=float(kl_of_log_probabilities(**nats)[0]),
                max_abs_error=error,
                max_standardized_error=standardized,
                choice=first_choices(**logits, tie_margin=tie_margin)[0],
                actual_nats=float(nats["actual"][0, token]),
                reference_nats=float(nats["reference"][0, token]),
            )
        )
    return found


def summarize(predictions: Sequence[Prediction]) -> PredictionParity:
    """What a report states of at least one prediction."""
    divergence = np.array([prediction.kl for prediction in predictions])
    verdicts = [prediction.choice.verdict for prediction in predictions]
    near = verdicts.count("NEAR_TIE")
    decided = len(verdicts) - near
    nats = float(np.mean([prediction.actual_nats for prediction in predictions]))
    reference_nats = float(np.mean([prediction.reference_nats for prediction in predictions]))
    return PredictionParity(
        tokens=len(predictions),
        kl_mean=float(divergence.mean()),
        kl_p99=float(np.percentile(divergence, 99)),
        max_abs_error=max(prediction.max_abs_error for prediction in predictions),
        max_standardized_error=max(prediction.max_standardized_error for prediction in predictions),
        agreement=verdicts.count("SAME") / decided if decided else None,
        near_ties=near,
        near_tie_share=near / len(verdicts),
        perplexity=_exp(-nats),
        reference_perplexity=_exp(-reference_nats),
        perplexity_ratio=_exp(reference_nats - nats),
        undefined=None,
    )


def _exp(nats: float) -> float:
    """A finite number, which JSON can hold, even where a broken model's perplexity would be none."""
    return float(np.exp(min(nats, 700.0)))
