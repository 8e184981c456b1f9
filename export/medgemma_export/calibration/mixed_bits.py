"""Mixed precision under a budget: decisions on matrices, and on pieces of a table's rows."""

from collections.abc import Callable
from dataclasses import dataclass

from medgemma_export.models import ModelSpec
from medgemma_quantization.budget import Budget, Sensitivity, choose_bits, predicted_kl
from medgemma_quantization.plan import QuantPlan
from medgemma_quantization.row_pieces import cut_rows, join_rows, table_to_cut

__all__ = ["MixedPlan", "mix_bits"]


@dataclass(frozen=True, kw_only=True)
class MixedPlan:
    """What a budget came to.

    Attributes:
        model: The model, its table in as many weights as the plan has for it.
        plan: How each is stored.
        predicted_kl: What that is expected to cost predictions, nats, on the calibration set.
    """

    model: ModelSpec
    plan: QuantPlan
    predicted_kl: float


def mix_bits(
    plan: QuantPlan,
    high: QuantPlan,
    budget: Budget,
    *,
    describe: Callable[[tuple[int, ...]], ModelSpec],
    measure: Callable[[ModelSpec, QuantPlan, QuantPlan], Sensitivity],
    cuts_tables: bool,
) -> MixedPlan:
    """Give 8 bits to what gains most by them.

    Args:
        plan: Weights at 4 bits, those that are to be decided on.
        high: How each is stored that gets 8 bits.
        budget: How far to go.
        describe: The model with its table cut where it is told.
        measure: What 4 bits cost a model, by the low and the high plan of its weights.
        cuts_tables: Whether a table may be stored in two ways; it is one decision else.

    Raises:
        EdgeError: If the budget leaves nothing to choose, or the model predicts nothing.
    """
    model = describe(())
    # A model without prompts predicts nothing, which `measure` refuses.
    found = table_to_cut(plan) if cuts_tables and model.prompt is not None else None
    if found is None:
        sensitivity = measure(model, plan, high)
        mixed = choose_bits(plan, high, sensitivity, budget)
        return MixedPlan(model=model, plan=mixed, predicted_kl=_predict(mixed, sensitivity))
    table, bounds = found
    low, high = cut_rows(plan, table, bounds), cut_rows(high, table, bounds)
    sensitivity = measure(describe(bounds), low, high)
    mixed = choose_bits(low, high, sensitivity, budget)
    joined, kept = join_rows(mixed, table, bounds)
    return MixedPlan(model=describe(kept), plan=joined, predicted_kl=_predict(mixed, sensitivity))


def _predict(plan: QuantPlan, sensitivity: Sensitivity) -> float:
    return predicted_kl(sensitivity, (row.name for row in plan.rows if row.storage.bits == 8))
