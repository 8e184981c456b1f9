"""Makes the integers of a plan by a method of `METHODS`: what scales inputs first, then what rounds."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from medgemma_export.models import ModelSpec
from medgemma_quantization.equalization import Equalization, read_factors
from medgemma_quantization.methods import METHODS, MethodName
from medgemma_quantization.plan import QuantPlan
from medgemma_quantization.weights import QuantizedWeights, ReadWeight, quantize_weights
from medgemma_runtime.command import Progress
from medgemma_runtime.errors import EdgeError

if TYPE_CHECKING:
    from medgemma_export.calibrate import ModelInput

__all__ = ["make_integers"]


def make_integers(
    model: ModelSpec,
    plan: QuantPlan,
    read: ReadWeight,
    samples: Sequence["ModelInput"] | None,
    directory: Path,
    *,
    method: MethodName,
    memory_bytes: int,
    progress: Progress,
) -> QuantizedWeights:
    """Round every integer weight of a plan, with samples or without.

    Args:
        model: All its components, since later ones need the outputs of earlier ones.
        plan: What to do.
        read: Reads a float weight by name.
        samples: The calibration set, as the model takes it; None for none.
        directory: Where integers and factors go; those that are there already, and whole, are kept.
        method: How to find them.
        memory_bytes: Activations beyond this go to the disk.
        progress: Called with what is being done, steps done, and steps in all.

    Returns:
        The weights; those that stay float are read as the method's factors have changed them.

    Raises:
        EdgeError: If the method cannot use what it sees of a layer.
    """
    found = METHODS[method]
    directory.mkdir(parents=True, exist_ok=True)
    if found.factors is not None and samples is not None:
        read = _equalization(model, plan, read, samples, directory, method, memory_bytes, progress).reader(
            read
        )
    if samples is None or not found.sees_inputs:
        return quantize_weights(
            plan,
            read,
            directory,
            find=found.find,
            progress=lambda done, total: progress("quantize", done, total),
        )
    from medgemma_export.calibrate import calibrate  # PyTorch

    return calibrate(
        model,
        plan,
        read,
        samples,
        directory,
        find=found.find,
        memory_bytes=memory_bytes,
        progress=lambda done, total: progress("calibrate", done, total),
    )


def _equalization(
    model: ModelSpec,
    plan: QuantPlan,
    read: ReadWeight,
    samples: Sequence["ModelInput"],
    directory: Path,
    method: MethodName,
    memory_bytes: int,
    progress: Progress,
) -> Equalization:
    """The factors that an interrupted run has left, or new ones."""
    from medgemma_export.equalize import equalize  # PyTorch
    from medgemma_export.fold_ops import planned_folds

    find = METHODS[method].factors
    if find is None:
        raise ValueError(f"method {method} has no factors")
    try:
        return read_factors(directory, planned_folds(model, plan))
    except EdgeError:
        made = equalize(
            model,
            plan,
            read,
            samples,
            find=find,
            memory_bytes=memory_bytes,
            progress=lambda done, total: progress("scale inputs", done, total),
        )
        made.save(directory)
        return made
