"""Finds the static ranges of what integer matrices multiply: the float model runs once over the samples."""

from collections.abc import Callable, Sequence

from medgemma_export.calibration.calibrate import ModelInput
from medgemma_export.calibration.lockstep_ops import Samples
from medgemma_export.calibration.observation import observe
from medgemma_export.calibration.reach import check_ranges
from medgemma_export.models import ModelSpec
from medgemma_quantization.activations import ActivationRange, choose_range
from medgemma_quantization.observers import Range
from medgemma_quantization.plan import QuantPlan
from medgemma_quantization.scheme import RangeMethod
from medgemma_quantization.weights import ReadWeight
from medgemma_runtime.errors import EdgeError

__all__ = ["find_ranges"]


def find_ranges(
    model: ModelSpec,
    plan: QuantPlan,
    read: ReadWeight,
    samples: Sequence[ModelInput],
    *,
    method: RangeMethod,
    memory_bytes: int,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, ActivationRange]:
    """The range of the input of every matrix that the plan stores as integers, by the matrix's name.

    Matrices that share an input share its range.

    Args:
        model: All its components, since later ones need the outputs of earlier ones.
        plan: Which matrices are integers.
        read: Reads a float weight by name, inputs scaled where a method does that.
        samples: The calibration set, as the model takes it.
        method: How a range is chosen.
        memory_bytes: Activations beyond this go to temporary files.
        progress: Called with the matrices done and their number.

    Raises:
        EdgeError: If an input is not finite, or no sample reaches a matrix.
    """
    wanted = [row.name for row in plan.rows if row.role == "linear" and not row.storage.is_float]
    ranges: dict[str, ActivationRange] = {}

    def meet(names: tuple[str, ...], inputs: Samples | None) -> None:
        integers = [name for name in names if name in wanted]
        if inputs is None or not integers:
            return
        if progress is not None:
            progress(len(ranges), len(wanted))
        seen = Range()
        try:
            for (x,) in inputs.rows():
                seen.add(x)
            found = choose_range(seen, method)
        except ValueError as error:
            raise EdgeError(
                f"{names[0]} cannot be calibrated: {error}; mend the calibration set, or say "
                'activations = "int8-dynamic"'
            ) from None
        ranges.update(dict.fromkeys(integers, found))

    observe(
        model,
        read,
        samples,
        memory_bytes=memory_bytes,
        meet=meet,
        predict=meet,
    )
    check_ranges(plan, [name for name in wanted if name not in ranges])
    return ranges
