"""The models that the exporter knows: one file for each, and this table."""

from collections.abc import Callable

from medgemma_export.checkpoint import Checkpoint
from medgemma_export.models import medgemma, medsiglip
from medgemma_export.models.spec import Component, ModelSpec
from medgemma_runtime.errors import CheckpointError

__all__ = ["ModelSpec", "Component", "MODELS", "load_model"]

MODELS: dict[str, Callable[[Checkpoint], ModelSpec]] = {
    "Gemma3ForConditionalGeneration": medgemma.load,
    "Gemma3ForCausalLM": medgemma.load_text_only,
    "SiglipModel": medsiglip.load,
}


def load_model(checkpoint: Checkpoint) -> ModelSpec:
    """Describe the model in a checkpoint, by the architecture that its config.json names.

    Raises:
        CheckpointError: If the architecture is none of `MODELS`.
    """
    named = checkpoint.config.get("architectures")
    architecture = named[0] if isinstance(named, list) and named else None
    if architecture not in MODELS:
        raise CheckpointError(
            f"{checkpoint.id} is of architecture {architecture!r}; this version exports {', '.join(MODELS)}"
        )
    return MODELS[architecture](checkpoint)
