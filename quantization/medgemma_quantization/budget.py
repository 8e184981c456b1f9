"""Mixed precision: which weights deserve 8 bits, by what 4 bits on each of them cost the model's predictions.

The measured costs of single weights say how the cost of all of them is shared out; the cost of all at 4 bits
and of all at 8 bits, measured too, are the ends between which a plan's cost is predicted. Costs do not quite
add, and they are those on the calibration set: a prediction is no measurement, and says so wherever it is
shown.
"""

import json
import math
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from pydantic import ConfigDict, TypeAdapter, ValidationError

from medgemma_quantization.plan import PlanRow, QuantPlan
from medgemma_runtime.errors import EdgeError
from medgemma_runtime.files import replacing

__all__ = [
    "Budget",
    "Sensitivity",
    "Share",
    "check_floor",
    "choose_bits",
    "parse_size",
    "predicted_kl",
    "read_sensitivity",
    "write_sensitivity",
]

_UNITS = {"MB": 10**6, "GB": 10**9, "MIB": 1 << 20, "GIB": 1 << 30}


@dataclass(frozen=True, kw_only=True)
class Budget:
    """What a plan may take or cost: one of the two.

    Attributes:
        size_bytes: Of all weights as they are stored; tokenizer and programs come on top.
        max_kl: Mean divergence of the predictions, nats, as predicted.
    """

    size_bytes: int | None = None
    max_kl: float | None = None

    def __post_init__(self) -> None:
        if (self.size_bytes is None) == (self.max_kl is None):
            raise ValueError("a budget is either a size or a divergence")
        if self.max_kl is not None and not 0 < self.max_kl < math.inf:
            raise ValueError(f"a divergence of {self.max_kl} nats is no budget; it must be above zero")

    def __str__(self) -> str:
        if self.size_bytes is not None:
            unit, name = (1e9, "GB") if self.size_bytes >= 1e9 else (1e6, "MB")
            return f"budget {self.size_bytes / unit:g} {name}"
        return f"budget {self.max_kl:g} nats"


@dataclass(frozen=True, kw_only=True)
class Share:
    """What 4 bits on one decision cost, everything else float.

    Attributes:
        names: The weights that are decided on together: one matrix, a table, or a whole image tower.
        kl: Mean divergence of the predictions on calibration samples, nats.
    """

    __pydantic_config__ = ConfigDict(extra="forbid", allow_inf_nan=False)

    names: tuple[str, ...]
    kl: float


@dataclass(frozen=True, kw_only=True)
class Sensitivity:
    """What 4 bits cost a model, decision by decision.

    Attributes:
        key: Of what was measured: checkpoint, plan, method, calibration set.
        tokens: Predictions that were compared.
        shares: By decision, in the order of the plan.
        low_kl: The divergence with all of them at 4 bits.
        high_kl: The divergence with all of them at 8 bits.
    """

    __pydantic_config__ = ConfigDict(extra="forbid", allow_inf_nan=False)

    key: str
    tokens: int
    shares: tuple[Share, ...]
    low_kl: float
    high_kl: float


def parse_size(text: str) -> int:
    """`2.6GB` or `800 MiB` as bytes.

    Raises:
        EdgeError: If it is something else.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([MG]i?B)\s*", text, re.IGNORECASE)
    if match is None or float(match[1]) == 0:
        raise EdgeError(f"size {text!r} is not understood; write it as 2.6GB or 800MB")
    return int(float(match[1]) * _UNITS[match[2].upper()])


def check_floor(plan: QuantPlan, high: QuantPlan, budget: Budget) -> None:
    """Refuse, from the plan alone, sizes that leave nothing to choose.

    Raises:
        EdgeError: If the budget is below the smallest plan, or the largest fits.
    """
    if budget.size_bytes is None:
        return
    names = {row.name for row in plan.rows if row.storage.bits == 4}
    smallest, largest = _bits(plan) // 8, _bits(_raised(plan, high, names)) // 8
    if budget.size_bytes < smallest:
        raise EdgeError(
            f"{budget} was asked for and the smallest plan, {plan.scheme} throughout, takes "
            f"{_size(smallest)}; name at least that"
        )
    if budget.size_bytes >= largest:
        raise EdgeError(
            f"{budget} was asked for and int8 throughout takes only {_size(largest)}; leave the budget out "
            "and choose int8"
        )


def choose_bits(plan: QuantPlan, high: QuantPlan, sensitivity: Sensitivity, budget: Budget) -> QuantPlan:
    """The plan with 8 bits for the weights that gain most for each added bit.

    It is near the best there is, not always the best: to know that, all choices would have to be tried.

    Args:
        plan: Weights at 4 bits, those that are to be decided on.
        high: How each is stored that gets 8 bits: the target's own int8.
        sensitivity: Measured on these plans.
        budget: How far to go.

    Raises:
        EdgeError: If the budget is below the smallest plan, or leaves nothing to choose.
    """
    check_floor(plan, high, budget)
    if budget.max_kl is not None:
        if budget.max_kl <= sensitivity.high_kl:
            raise EdgeError(
                f"{budget} was asked for and int8 throughout is measured at {sensitivity.high_kl:.2g} "
                "already; name more than that, or choose fp16"
            )
        if budget.max_kl >= sensitivity.low_kl:
            raise EdgeError(
                f"{budget} was asked for and {plan.scheme} throughout is measured at "
                f"{sensitivity.low_kl:.2g}; leave the budget out"
            )
    ranked = sorted(sensitivity.shares, key=lambda share: -share.kl / _added_bits(plan, high, share))
    # Beside the plain order, each decision is tried ahead of all others: a table is so large that what goes
    # before it may leave no room, and is then worth less than the table alone.
    tried = [
        _fill(plan, high, sensitivity, budget, (*first, *ranked)) for first in [(), *((s,) for s in ranked)]
    ]
    if budget.size_bytes is not None:
        chosen = min(tried, key=lambda names: predicted_kl(sensitivity, names))
    else:
        chosen = min(tried, key=lambda names: _bits(_raised(plan, high, names)))
    mixed = _raised(plan, high, chosen)
    place = {name: (rank, share) for rank, share in enumerate(ranked, start=1) for name in share.names}
    rows = tuple(
        replace(row, reason=_reason(row, budget, *place[row.name], of=len(ranked)))
        if row.name in place
        else row
        for row in mixed.rows
    )
    return replace(mixed, scheme=f"{plan.scheme}-int8", rows=rows)


def _fill(
    plan: QuantPlan, high: QuantPlan, sensitivity: Sensitivity, budget: Budget, order: Iterable[Share]
) -> set[str]:
    """The names of what is raised when decisions are taken in turn, those that do not fit left out."""
    chosen: set[str] = set()
    bits = _bits(plan)
    for share in order:
        if budget.max_kl is not None and predicted_kl(sensitivity, chosen) <= budget.max_kl:
            break
        added = _added_bits(plan, high, share)
        if chosen.issuperset(share.names) or (
            budget.size_bytes is not None and bits + added > budget.size_bytes * 8
        ):
            continue
        chosen.update(share.names)
        bits += added
    return chosen


def predicted_kl(sensitivity: Sensitivity, raised: Iterable[str]) -> float:
    """What a plan is expected to cost in which these weights have 8 bits and all others 4: nats."""
    names = set(raised)
    total = sum(share.kl for share in sensitivity.shares)
    left = sum(share.kl for share in sensitivity.shares if not names.issuperset(share.names))
    part = left / total if total > 0 else 0.0
    return sensitivity.high_kl + (sensitivity.low_kl - sensitivity.high_kl) * part


def write_sensitivity(sensitivity: Sensitivity, path: Path) -> None:
    """Write as JSON."""
    with replacing(path) as stream:
        stream.write((json.dumps(asdict(sensitivity), indent=1) + "\n").encode())


def read_sensitivity(path: Path, *, key: str) -> Sensitivity:
    """Read what `write_sensitivity` wrote.

    Raises:
        EdgeError: If the file is something else, or was measured on something else.
    """
    try:
        found = TypeAdapter(Sensitivity).validate_json(path.read_text(encoding="utf-8"), strict=True)
    except (OSError, UnicodeDecodeError, ValidationError) as error:
        raise EdgeError(
            f"{path} holds no sensitivities ({str(error).splitlines()[0]}); remove it to measure them again"
        ) from None
    if found.key != key:
        raise EdgeError(
            f"{path} was measured on another checkpoint, method or calibration set; name another file, or "
            "remove it to measure again"
        )
    return found


def _bits(plan: QuantPlan) -> int:
    return sum(row.stored_bits for row in plan.rows)


def _added_bits(plan: QuantPlan, high: QuantPlan, share: Share) -> int:
    return _bits(_raised(plan, high, share.names)) - _bits(plan)


def _raised(plan: QuantPlan, high: QuantPlan, names: Iterable[str]) -> QuantPlan:
    wanted = set(names)
    rows = tuple(
        replace(row, storage=high.by_name[row.name].storage) if row.name in wanted else row
        for row in plan.rows
    )
    return replace(plan, rows=rows)


def _reason(row: PlanRow, budget: Budget, rank: int, share: Share, *, of: int) -> str:
    together = f" of {len(share.names)} weights" if len(share.names) > 1 else ""
    padded = row.reason.partition("; ")[2]
    return (
        f"{budget}: 4 bits{together} alone cost {share.kl:.2g} nats, rank {rank} of {of} by cost for each bit"
        + (f"; {padded}" if padded else "")
    )


def _size(size_bytes: int) -> str:
    """Rounded up, so that what is said to be enough is."""
    unit, name = (10**9, "GB") if size_bytes >= 10**9 else (10**6, "MB")
    digits = 3 - math.floor(math.log10(max(size_bytes, 1) / unit))
    return f"{math.ceil(size_bytes / unit * 10**digits) / 10**digits:.{max(digits, 0)}f} {name}"
