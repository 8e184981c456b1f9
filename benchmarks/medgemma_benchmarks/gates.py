"""Thresholds, and the verdict on a value. The numbers and their reasons stand in `gates.toml`."""

import tomllib
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Literal

from pydantic import ConfigDict, TypeAdapter, ValidationError

from medgemma_runtime.errors import EdgeError
from medgemma_runtime.manifest import Precision

__all__ = ["Gate", "Gates", "Question", "Subject", "Metric", "Verdict", "load_gates", "worst"]

Question = Literal["pixels", "tokens", "lowering", "packing", "scheme"]
Subject = Literal["image", "text", "zero-shot", "end-to-end", "vision", "decoder", "prefill", "layers"]
Metric = Literal[
    "differing_uint8",
    "differing_ids",
    "max_abs_error",
    "max_standardized_error",
    "relative_error",
    "cosine_min",
    "rounded_cosine_min",
    "logit_error",
    "agreement",
    "near_tie_share",
    "kl_mean",
    "perplexity_ratio",
]
Verdict = Literal["PASS", "NEAR_TIE", "FAIL"]

_OF_INPUTS: dict[Question, frozenset[Metric]] = {
    "pixels": frozenset(("differing_uint8", "max_abs_error")),
    "tokens": frozenset(("differing_ids",)),
}
_OF_OUTPUTS: frozenset[Metric] = frozenset(("max_abs_error", "relative_error", "cosine_min"))
_OF_LAYERS: frozenset[Metric] = frozenset(("relative_error",))
_OF_LABELS: frozenset[Metric] = frozenset(("logit_error", "agreement", "near_tie_share"))
_OF_TOKENS: frozenset[Metric] = frozenset(
    ("max_standardized_error", "kl_mean", "agreement", "near_tie_share", "perplexity_ratio")
)


@dataclass(frozen=True, kw_only=True)
class Gate:
    """One threshold.

    Attributes:
        question: What is asked: are the inputs, the lowering, the packing, the scheme right?
        components: What it holds for: a component; `zero-shot` (both towers on the recorded inputs) or
            `end-to-end` (both from image and caption); `decoder` (every token by itself, through the caches)
            or `prefill` (a prompt read at once, and what follows it); `layers` (the residual stream after
            each layer of any component).
        precisions: The precisions it holds for.
        metric: The name of the value that is judged.
        at_most: Upper limit, itself allowed; or None.
        at_least: Lower limit, itself allowed; or None. Exactly one of the two is given.
        reason: Why the limit is where it is.
    """

    __pydantic_config__ = ConfigDict(extra="forbid", allow_inf_nan=False)

    question: Question
    components: tuple[Subject, ...]
    precisions: tuple[Precision, ...]
    metric: Metric
    at_most: float | None = None
    at_least: float | None = None
    reason: str

    def __post_init__(self) -> None:
        if (self.at_most is None) == (self.at_least is None):
            raise ValueError(f"gate {self.question}/{self.metric} needs one of at_most and at_least")
        for component in self.components:
            if self.metric not in (known := _measured(self.question, component)):
                raise ValueError(
                    f"{self.metric} is not measured for {self.question} of {component}; "
                    f"measured are {', '.join(sorted(known))}"
                )

    @property
    def limit(self) -> str:
        """The limit as a reader writes it, such as `≤ 0.0001`."""
        return f"≤ {self.at_most:g}" if self.at_most is not None else f"≥ {self.at_least:g}"

    def judge(self, value: float | None) -> Literal["PASS", "FAIL"]:
        """PASS if the value keeps the limit. None (not computable) and NaN fail."""
        if value is None:
            return "FAIL"
        if self.at_most is not None:
            return "PASS" if value <= self.at_most else "FAIL"
        return "PASS" if value >= self.at_least else "FAIL"  # type: ignore[operator]


@dataclass(frozen=True, kw_only=True)
class Gates:
    """All thresholds."""

    __pydantic_config__ = ConfigDict(extra="forbid", allow_inf_nan=False)

    tie_margin_logits: float
    gate: tuple[Gate, ...]

    def __post_init__(self) -> None:
        if self.tie_margin_logits < 0:
            raise ValueError(f"tie_margin_logits cannot be negative and is {self.tie_margin_logits}")

    def find(self, question: Question, component: str, precision: Precision) -> tuple[Gate, ...]:
        """The gates of one question on one component.

        Raises:
            EdgeError: If there is none, because what nothing can fail has not been checked.
        """
        found = tuple(
            gate
            for gate in self.gate
            if gate.question == question and component in gate.components and precision in gate.precisions
        )
        if not found:
            raise EdgeError(
                f"gates.toml has no gate for {question} of {component} at {precision}; "
                "state a threshold and its reason there"
            )
        return found


def _measured(question: Question, component: Subject) -> frozenset[Metric]:
    """The metrics that answer a question about a component."""
    if question in _OF_INPUTS:
        return _OF_INPUTS[question]
    if component == "layers":
        return _OF_LAYERS
    if component in ("zero-shot", "end-to-end"):
        return _OF_LABELS
    if component in ("decoder", "prefill"):
        return _OF_TOKENS
    return _OF_OUTPUTS | {"rounded_cosine_min"} if question == "packing" else _OF_OUTPUTS


_ADAPTER: TypeAdapter[Gates] = TypeAdapter(Gates)


def load_gates(path: Path | None = None) -> Gates:
    """Read the thresholds.

    Args:
        path: A TOML file of the same form; None reads the one this package ships.

    Raises:
        EdgeError: If the file is absent, no TOML, or not to the form.
    """
    source = path if path is not None else files("medgemma_benchmarks") / "gates.toml"
    try:
        return _ADAPTER.validate_python(tomllib.loads(source.read_text(encoding="utf-8")))
    except OSError as error:
        raise EdgeError(f"gates {source.name} cannot be read: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise EdgeError(f"gates {source.name} is no TOML file: {error}") from None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise EdgeError(f"gates {source.name} is not to the form: {where}: {first['msg']}") from None


def worst(verdicts: tuple[Verdict, ...]) -> Verdict:
    """FAIL if any failed, else NEAR_TIE if any is one, else PASS.

    Raises:
        ValueError: If there is no verdict: nothing checked is not a pass.
    """
    if not verdicts:
        raise ValueError("no verdict to sum up")
    if "FAIL" in verdicts:
        return "FAIL"
    return "NEAR_TIE" if "NEAR_TIE" in verdicts else "PASS"
