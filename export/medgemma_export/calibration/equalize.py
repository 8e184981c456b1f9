"""Finds the factors of a model's folds, with calibration samples: the float model runs once over them."""

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from medgemma_export.calibration.calibrate import ModelInput
from medgemma_export.calibration.fold_ops import planned_folds
from medgemma_export.calibration.lockstep_ops import Samples
from medgemma_export.calibration.observation import observe
from medgemma_export.models import ModelSpec
from medgemma_quantization.equalization import Equalization
from medgemma_quantization.methods.method import FindFactors
from medgemma_quantization.observers import Moments
from medgemma_quantization.plan import QuantPlan
from medgemma_quantization.weights import ReadWeight
from medgemma_runtime.errors import EdgeError

__all__ = ["equalize"]


def equalize(
    model: ModelSpec,
    plan: QuantPlan,
    read: ReadWeight,
    samples: Sequence[ModelInput],
    *,
    find: FindFactors,
    memory_bytes: int,
    progress: Callable[[int, int], None] | None = None,
) -> Equalization:
    """Find the factors of every fold that a sample reaches.

    Each is found for the activations of the float model, which no other fold changes.

    Args:
        model: All its components, since later ones need the outputs of earlier ones.
        plan: How the readers are stored.
        read: Reads a float weight by name.
        samples: The calibration set, as the model takes it.
        find: How to find them.
        memory_bytes: Activations beyond this go to temporary files.
        progress: Called with the folds done and their number.

    Raises:
        EdgeError: If the activations of a fold are of no use.
    """
    folds = planned_folds(model, plan)
    by_reader = {fold.readers[0]: fold for fold in folds}
    factors: dict[str, NDArray[np.float32]] = {}

    def meet(names: tuple[str, ...], inputs: Samples | None) -> None:
        fold = by_reader.get(names[0])
        if fold is None or inputs is None:
            return
        if progress is not None:
            progress(len(factors), len(folds))
        readers = [
            (plan.by_name[name].storage, read(name))
            for name in fold.readers
            if not plan.by_name[name].storage.is_float
        ]
        try:
            factors[fold.source] = find(fold, *_observe(inputs, readers[0][1].shape[1]), readers)
        except ValueError as error:
            raise EdgeError(
                f"{names[0]} cannot be calibrated: {error}; mend the calibration set, or quantize "
                "without one by --method search"
            ) from None

    observe(
        model,
        read,
        samples,
        memory_bytes=memory_bytes,
        meet=meet,
        predict=meet,
    )
    return Equalization(folds=folds, factors=factors)


def _observe(inputs: Samples, width: int) -> tuple[Moments, NDArray[np.float32]]:
    moments, peaks = Moments.zeros(width), np.zeros(width, np.float32)
    for (x,) in inputs.rows():
        moments.add(x)
        np.maximum(peaks, np.abs(x).max(axis=0, initial=0), out=peaks)
    return moments, peaks
