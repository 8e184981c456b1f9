"""From outputs to measured values, and from values to verdicts."""

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medgemma_benchmarks.gates import Gates, Question, Verdict
from medgemma_benchmarks.metrics import (
    MetricError,
    cosine,
    first_choices,
    kl,
    max_abs_error,
    probabilities,
    relative_error,
    sqnr_db,
)
from medgemma_benchmarks.parity_report import (
    Check,
    ComponentParity,
    LayerParity,
    PredictionParity,
    ZeroShotParity,
)
from medgemma_runtime.manifest import Precision

__all__ = ["Judge", "compare_component", "compare_zero_shot"]


class Judge:
    """Holds measured values against the gates and keeps every verdict.

    Args:
        question: Which of lowering, packing and scheme is asked of the outputs.
        precision: Of the artifact.
        gates: The thresholds.

    Attributes:
        checks: One for every gate that was met, in order.
    """

    def __init__(self, question: Question, precision: Precision, gates: Gates):
        self.question, self.precision, self.gates = question, precision, gates
        self.checks: list[Check] = []

    def values(
        self,
        question: Question,
        subject: str,
        values: dict[str, float | None],
        *,
        near_ties: int = 0,
        detail: str = "",
    ) -> None:
        """Judge named values of one subject by all gates of a question."""
        for gate in self.gates.find(question, subject, self.precision):
            value = values[gate.metric]
            # Agreement is None where every image is a near tie: then nothing was decided, which the
            # gate on their share judges.
            undecided = gate.metric == "agreement" and near_ties > 0
            verdict: Verdict = gate.judge(value)
            if undecided and (value is None or verdict == "PASS"):
                verdict = "NEAR_TIE"
            self.checks.append(
                Check(
                    question=question,
                    subject=subject,
                    metric=gate.metric,
                    value=value,
                    limit=gate.limit,
                    verdict=verdict,
                    detail=detail,
                    reason=gate.reason,
                )
            )

    def component(self, name: str, parity: ComponentParity, rounded: ComponentParity | None) -> None:
        """Judge one component's outputs; for packing, `rounded` are those of the shipped program."""
        values = {
            "max_abs_error": parity.max_abs_error,
            "relative_error": parity.relative_error,
            "cosine_min": parity.cosine_min,
            "rounded_cosine_min": None if rounded is None else rounded.cosine_min,
        }
        undefined = parity.undefined or (rounded.undefined if rounded is not None else None)
        self.values(self.question, name, values, detail=undefined or "")

    def zero_shot(self, where: str, result: ZeroShotParity, names: Sequence[str]) -> None:
        """Judge labels; `names` are the images'."""
        detail = result.undefined or ""
        if result.choices is not None:
            odd = {
                verdict: [name for name, c in zip(names, result.choices, strict=True) if c.verdict == verdict]
                for verdict in ("DIFFERENT", "NEAR_TIE")
            }
            parts = [f"{len(names) - result.near_ties} of {len(names)} decided"] if result.near_ties else []
            parts += [
                f"{len(found)} {verdict.lower().replace('_', ' ')}: {', '.join(found)}"
                for verdict, found in odd.items()
                if found
            ]
            detail = "; ".join(parts)
        values = {
            "logit_error": result.logit_error,
            "agreement": result.agreement,
            "near_tie_share": result.near_tie_share,
        }
        self.values(self.question, where, values, near_ties=result.near_ties, detail=detail)

    def layers(self, component: str, layers: Sequence[LayerParity]) -> None:
        """Judge the first layer of a component that departs, or else the one that comes closest to it."""
        [gate] = self.gates.find(self.question, "layers", self.precision)
        seen = [layer for layer in layers if layer.is_seen]
        first = next((layer for layer in seen if gate.judge(layer.relative_error) == "FAIL"), None)
        shown = first or max(seen, key=lambda layer: layer.relative_error or 0.0)
        unseen = [layer.name for layer in layers if not layer.is_seen]
        parts = [f"{component} departs nowhere, most at {shown.name}"]
        if first is not None:
            place = layers.index(first)
            hidden = itertools.takewhile(lambda layer: not layer.is_seen, reversed(layers[:place]))
            suspects = [*(layer.name for layer in reversed(list(hidden))), first.name]
            if first.is_result:
                suspects[-1] = "the head"
            parts = [f"{component} departs first at {first.name}"]
            if first.is_result or len(suspects) > 1:
                parts[0] += f": {' or '.join(suspects)} is wrong"
        if shown.undefined:
            parts.append(shown.undefined)
        if unseen:
            parts.append(f"inside a delegate's call and not seen: {', '.join(unseen)}")
        self.values(
            self.question, "layers", {"relative_error": shown.relative_error}, detail="; ".join(parts)
        )

    def predictions(self, name: str, parity: PredictionParity) -> None:
        """Judge predictions of tokens.

        Among thousands some are near ties: left out of agreement, they are no verdict on the whole.
        """
        values = {
            "max_standardized_error": parity.max_standardized_error,
            "kl_mean": parity.kl_mean,
            "agreement": parity.agreement,
            "near_tie_share": parity.near_tie_share,
            "perplexity_ratio": parity.perplexity_ratio,
        }
        decided = f"{parity.tokens - parity.near_ties} of {parity.tokens} predictions decided"
        self.values(self.question, name, values, detail=parity.undefined or decided)


def compare_component(*, actual: NDArray[Any], reference: NDArray[Any]) -> ComponentParity:
    """All metrics of one component's outputs [N, D]; where one is undefined, none is given, and why.

    Args:
        actual: Of the artifact.
        reference: Of the reference.
    """
    try:
        cosines = cosine(actual=actual, reference=reference)
        noise = sqnr_db(actual=actual, reference=reference)
        return ComponentParity(
            rows=len(reference),
            cosines=tuple(cosines.tolist()),
            cosine_min=float(cosines.min()),
            cosine_mean=float(cosines.mean()),
            max_abs_error=max_abs_error(actual=actual, reference=reference),
            relative_error=relative_error(actual=actual, reference=reference),
            sqnr_db=noise if np.isfinite(noise) else None,
            undefined=None,
        )
    except MetricError as error:
        return ComponentParity(rows=len(reference), undefined=str(error))


def compare_zero_shot(*, actual: NDArray[Any], reference: NDArray[Any], tie_margin: float) -> ZeroShotParity:
    """All metrics of logits [N, M]; where one is undefined, none is given, and why.

    Args:
        actual: Of the artifact.
        reference: Of the reference; it alone decides what a near tie is.
        tie_margin: In logits.
    """
    expected = probabilities(reference)
    try:
        choices = first_choices(actual=actual, reference=reference, tie_margin=tie_margin)
        divergence = kl(actual=actual, reference=reference)
        error = max_abs_error(actual=actual, reference=reference)
    except MetricError as undefined:
        return ZeroShotParity(reference_probabilities=_rows(expected), near_ties=0, undefined=str(undefined))
    near = sum(choice.verdict == "NEAR_TIE" for choice in choices)
    same = sum(choice.verdict == "SAME" for choice in choices)
    decided = len(choices) - near
    return ZeroShotParity(
        reference_probabilities=_rows(expected),
        probabilities=_rows(probabilities(actual)),
        choices=choices,
        agreement=same / decided if decided else None,
        near_ties=near,
        near_tie_share=near / len(choices),
        logit_error=error,
        kl_mean=float(divergence.mean()),
        undefined=None,
    )


def _rows(matrix: NDArray[np.float64]) -> tuple[tuple[float, ...], ...]:
    return tuple(tuple(row) for row in matrix.tolist())
