"""How far numbers are from their reference. Every function names its two sides; none has a default.

All sums are taken in float64. A metric that is undefined on its inputs raises `MetricError`; none returns a
placeholder. Logits are of labels, where a row is an image, or of the next token, where a row is a position.
Softmax stands for zero-shot probability because MedSigLIP's model card uses it, although the training loss is
a sigmoid.
"""

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from medgemma_runtime.errors import EdgeError

__all__ = [
    "MetricError",
    "Choice",
    "cosine",
    "sqnr_db",
    "max_abs_error",
    "max_standardized_error",
    "relative_error",
    "top_k_agreement",
    "first_choices",
    "probabilities",
    "log_probabilities",
    "kl",
    "kl_of_log_probabilities",
]


class MetricError(EdgeError):
    """Two arrays between which a metric is not defined."""


@dataclass(frozen=True, kw_only=True)
class Choice:
    """Which column of a row comes first, a label or a token, and how sure the reference was of its own.

    Attributes:
        actual: Index of the column with the highest actual logit.
        reference: Index of the column with the highest reference logit.
        margin: Reference logit of its first column less that of its second; None with one column only.
        verdict: `SAME`; `NEAR_TIE` when the reference itself rates the actual column within the tie margin
            of its first; `DIFFERENT` otherwise.
    """

    actual: int
    reference: int
    margin: float | None
    verdict: Literal["SAME", "NEAR_TIE", "DIFFERENT"]


def cosine(*, actual: NDArray[Any], reference: NDArray[Any]) -> NDArray[np.float64]:
    """Cosine similarity of each row.

    Shapes:
        actual, reference: [N, D]
        result: [N], in [-1, 1]

    Raises:
        MetricError: If shapes differ, a value is not finite, or a row has no length.
    """
    a, r = _pair(actual, reference, ndim=2)
    lengths = np.linalg.norm(a, axis=1) * np.linalg.norm(r, axis=1)
    if not lengths.all():
        raise MetricError(f"cosine is undefined: row {int(np.argmin(lengths))} of one side has length zero")
    cosines: NDArray[np.float64] = np.clip(np.sum(a * r, axis=1) / lengths, -1.0, 1.0)
    return cosines


def sqnr_db(*, actual: NDArray[Any], reference: NDArray[Any]) -> float:
    """Signal to quantization noise over all elements, in dB: infinite when nothing differs.

    Raises:
        MetricError: If shapes differ, a value is not finite, or the reference is all zero.
    """
    a, r = _pair(actual, reference)
    signal, noise = float(np.sum(r * r)), float(np.sum((a - r) ** 2))
    if signal == 0.0:
        raise MetricError("SQNR is undefined: the reference is all zero")
    return float("inf") if noise == 0.0 else float(10.0 * np.log10(signal / noise))


def max_abs_error(*, actual: NDArray[Any], reference: NDArray[Any]) -> float:
    """The largest absolute difference of two elements, in the unit of the arrays.

    Raises:
        MetricError: If shapes differ, there is no element, or a value is not finite.
    """
    a, r = _pair(actual, reference)
    return float(np.max(np.abs(a - r)))


def max_standardized_error(*, actual: NDArray[Any], reference: NDArray[Any]) -> float:
    """The largest absolute difference of two elements, in standard deviations of the reference's elements.

    Raises:
        MetricError: If shapes differ, a value is not finite, or the reference is constant.
    """
    a, r = _pair(actual, reference)
    deviation = float(np.std(r))
    if deviation == 0.0:
        raise MetricError("standardized error is undefined: all elements of the reference are equal")
    return float(np.max(np.abs(a - r))) / deviation


def relative_error(*, actual: NDArray[Any], reference: NDArray[Any]) -> float:
    """Length of the difference over the length of the reference, all elements together.

    Raises:
        MetricError: If shapes differ, a value is not finite, or the reference is all zero.
    """
    a, r = _pair(actual, reference)
    length = float(np.linalg.norm(r))
    if length == 0.0:
        raise MetricError("relative error is undefined: the reference is all zero")
    return float(np.linalg.norm(a - r)) / length


def top_k_agreement(*, actual: NDArray[Any], reference: NDArray[Any], k: int) -> float:
    """Share of the reference's k highest columns that are among the actual k highest, mean over rows.

    Shapes:
        actual, reference: [N, M] scores; equal scores rank by column

    Raises:
        MetricError: If shapes differ, a value is not finite, or k is not in 1..M.
    """
    a, r = _pair(actual, reference, ndim=2)
    if not 1 <= k <= a.shape[1]:
        raise MetricError(f"top-{k} agreement is undefined over {a.shape[1]} columns")
    first_a = np.argsort(-a, axis=1, kind="stable")[:, :k]
    first_r = np.argsort(-r, axis=1, kind="stable")[:, :k]
    shared = [np.intersect1d(x, y).size for x, y in zip(first_a, first_r, strict=True)]
    return float(np.mean(shared)) / k


def first_choices(*, actual: NDArray[Any], reference: NDArray[Any], tie_margin: float) -> tuple[Choice, ...]:
    """The first label of each image, or the first token of each position, against the reference's.

    Only the reference's logits decide what a near tie is: a candidate that is unsure of everything earns no
    excuse, and neither does one that picks a column the reference never considered.

    Shapes:
        actual, reference: [N, M] logits

    Args:
        actual: Logits to judge.
        reference: Logits to judge by.
        tie_margin: Logits within which the reference's own preference counts as a tie.

    Raises:
        MetricError: If shapes differ or a value is not finite.
    """
    a, r = _pair(actual, reference, ndim=2)
    choices = []
    for row_a, row_r in zip(a, r, strict=True):
        chosen, wanted = int(np.argmax(row_a)), int(np.argmax(row_r))
        others = np.delete(row_r, wanted)
        if chosen == wanted:
            verdict: Literal["SAME", "NEAR_TIE", "DIFFERENT"] = "SAME"
        elif row_r[wanted] - row_r[chosen] < tie_margin:
            verdict = "NEAR_TIE"
        else:
            verdict = "DIFFERENT"
        choices.append(
            Choice(
                actual=chosen,
                reference=wanted,
                margin=float(row_r[wanted] - others.max()) if others.size else None,
                verdict=verdict,
            )
        )
    return tuple(choices)


def probabilities(logits: NDArray[Any]) -> NDArray[np.float64]:
    """Softmax over the last axis: with labels in columns, zero-shot probability of each label."""
    x = np.asarray(logits, dtype=np.float64)
    weights: NDArray[np.float64] = np.exp(x - x.max(axis=-1, keepdims=True))
    weights /= weights.sum(axis=-1, keepdims=True)
    return weights


def kl(*, actual: NDArray[Any], reference: NDArray[Any]) -> NDArray[np.float64]:
    """KL(softmax(reference) || softmax(actual)) of each row of logits, in nats.

    Shapes:
        actual, reference: [N, M] logits
        result: [N], not negative

    Raises:
        MetricError: If shapes differ or a value is not finite.
    """
    a, r = _pair(actual, reference, ndim=2)
    return kl_of_log_probabilities(actual=log_probabilities(a), reference=log_probabilities(r))


def kl_of_log_probabilities(
    *, actual: NDArray[np.float64], reference: NDArray[np.float64]
) -> NDArray[np.float64]:
    """`kl` of rows that `log_probabilities` made: over Gemma's 262,144 tokens that is most of the work."""
    a, r = _pair(actual, reference, ndim=2)
    # Rounding can leave an exact zero just below zero.
    nats: NDArray[np.float64] = np.maximum(np.sum(np.exp(r) * (r - a), axis=1), 0.0)
    return nats


def log_probabilities(logits: NDArray[Any]) -> NDArray[np.float64]:
    """Log softmax over the last axis, in nats. Perplexity is `exp` of minus the mean over what came."""
    x = np.asarray(logits, dtype=np.float64)
    shifted: NDArray[np.float64] = x - x.max(axis=-1, keepdims=True)
    shifted -= np.log(np.sum(np.exp(shifted), axis=-1, keepdims=True))
    return shifted


def _pair(
    actual: NDArray[Any], reference: NDArray[Any], *, ndim: int | None = None
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    if actual.shape != reference.shape:
        raise MetricError(
            f"actual has shape {list(actual.shape)} and reference {list(reference.shape)}; "
            "only arrays of one shape are compared"
        )
    if ndim is not None and actual.ndim != ndim:
        raise MetricError(f"the arrays must have {ndim} axes and have {actual.ndim}")
    if actual.size == 0:
        raise MetricError("the arrays have no elements, so nothing can be compared")
    pair = np.asarray(actual, dtype=np.float64), np.asarray(reference, dtype=np.float64)
    for side, array in zip(("actual", "reference"), pair, strict=True):
        bad = int(np.count_nonzero(~np.isfinite(array)))
        if bad:
            raise MetricError(f"{bad} of {array.size} {side} values are NaN or infinite")
    return pair
