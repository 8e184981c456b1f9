"""Makes the integers of a plan by a method of `METHODS`: what scales inputs, static ranges, what rounds."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from medgemma_export.models import ModelSpec
from medgemma_quantization.activations import ActivationRange, read_ranges, save_ranges
from medgemma_quantization.equalization import Equalization, read_factors
from medgemma_quantization.methods import METHODS, MethodName
from medgemma_quantization.plan import QuantPlan
from medgemma_quantization.scheme import RangeMethod
from medgemma_quantization.weights import QuantizedWeights, ReadWeight, quantize_weights
from medgemma_runtime.command import Progress
from medgemma_runtime.errors import EdgeError

if TYPE_CHECKING:
    from medgemma_export.calibration.calibrate import ModelInput

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
    inputs: dict[str, ActivationRange] = {}
    if plan.ranges is not None and samples is not None:
        inputs = _static_ranges(model, plan, plan.ranges, read, samples, directory, memory_bytes, progress)
    if samples is None or not found.sees_inputs:
        weights = quantize_weights(
            plan,
            read,
            directory,
            find=found.find,
            progress=lambda done, total: progress("quantize", done, total),
        )
        return replace(weights, inputs=inputs)
    from medgemma_export.calibration.calibrate import calibrate  # PyTorch

    weights = calibrate(
        model,
        plan,
        read,
        samples,
        directory,
        find=found.find,
        memory_bytes=memory_bytes,
        progress=lambda done, total: progress("calibrate", done, total),
    )
    return replace(weights, inputs=inputs)


def _static_ranges(
    model: ModelSpec,
    plan: QuantPlan,
    ranges: RangeMethod,
    read: ReadWeight,
    samples: Sequence["ModelInput"],
    directory: Path,
    memory_bytes: int,
    progress: Progress,
) -> dict[str, ActivationRange]:
    """The ranges that an interrupted run has left, or new ones."""
    from medgemma_export.calibration.static_ranges import find_ranges  # PyTorch

    try:
        return read_ranges(directory)
    except EdgeError:
        made = find_ranges(
            model,
            plan,
            read,
            samples,
            method=ranges,
            memory_bytes=memory_bytes,
            progress=lambda done, total: progress("find activation ranges", done, total),
        )
        save_ranges(made, directory)
        return made


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
    from medgemma_export.calibration.equalize import equalize  # PyTorch
    from medgemma_export.calibration.fold_ops import planned_folds

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
