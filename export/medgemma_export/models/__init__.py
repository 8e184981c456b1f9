"""The models that the exporter knows: one file for each, and this table."""

from collections.abc import Callable
from typing import Any

from medgemma_export.checkpoint import Checkpoint
from medgemma_export.models import medgemma, medsiglip
from medgemma_export.models.spec import Component, ModelSpec
from medgemma_runtime.errors import CheckpointError, EdgeError

__all__ = ["ModelSpec", "Component", "MODELS", "load_model"]

MODELS: dict[str, Callable[..., ModelSpec]] = {
    "Gemma3ForConditionalGeneration": medgemma.load,
    "Gemma3ForCausalLM": medgemma.load_text_only,
    "SiglipModel": medsiglip.load,
}


def load_model(
    checkpoint: Checkpoint, *, residual_scale: float = 1.0, table_bounds: tuple[int, ...] = ()
) -> ModelSpec:
    """Describe the model in a checkpoint, by the architecture that its config.json names.

    Args:
        checkpoint: Where the weights lie.
        residual_scale: Factor of a decoder's residual stream, for engines that compute in float16.
        table_bounds: Where rows of a decoder's table begin that are a weight of their own.

    Raises:
        CheckpointError: If the architecture is none of `MODELS`, or no such model can be of the sizes that
            the checkpoint states.
    """
    named = checkpoint.config.get("architectures")
    architecture = named[0] if isinstance(named, list) and named else None
    if not isinstance(architecture, str) or architecture not in MODELS:
        raise CheckpointError(
            f"{checkpoint.id} is of architecture {architecture!r}; this version exports {', '.join(MODELS)}"
        )
    options: dict[str, Any] = {}
    if residual_scale != 1 or table_bounds:
        options = {"residual_scale": residual_scale, "table_bounds": table_bounds}
        if MODELS[architecture] is medsiglip.load:
            raise EdgeError(
                f"{architecture} has no decoder whose residual stream could be scaled; leave it at 1"
            )
    try:
        return MODELS[architecture](checkpoint, **options)
    # What describes a model refuses widths, heads and ids that cannot be, or fails to divide by them.
    except (ValueError, TypeError, ArithmeticError) as error:
        raise CheckpointError(
            f"{checkpoint.id}: no {architecture} is as config.json says ({error}); download it again"
        ) from error
