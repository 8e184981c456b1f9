"""The deployment formats: one file for each, and this table."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Protocol, get_args

from medgemma_export.models.spec import ModelSpec
from medgemma_export.targets.coreml import CoremlTarget, Units
from medgemma_export.targets.executorch import Delegate, ExecutorchTarget
from medgemma_export.targets.onnx import OnnxTarget
from medgemma_quantization.plan import PackedWeight, QuantPlan
from medgemma_quantization.scheme import Scheme, SchemeName
from medgemma_quantization.weights import QuantizedWeights
from medgemma_runtime.errors import EdgeError
from medgemma_runtime.manifest import ComponentEntry, TargetName

if TYPE_CHECKING:
    from medgemma_export.torch_ops import IntegerLinear

__all__ = ["Target", "TARGETS", "Units", "Delegate", "choose_target"]


class Target(Protocol):
    """A deployment format.

    Attributes:
        cuts_tables: Whether a budget may store some rows of a table in 8 bits and others in 4; where not, a
            table is one decision.
    """

    cuts_tables: ClassVar[bool]

    def scheme(self, name: SchemeName) -> Scheme:
        """A built-in scheme as this format has it: engines differ in what they do to activations."""
        ...

    def check(self, model: ModelSpec, plan: QuantPlan) -> None:
        """Refuse what the format cannot take, before any weight is read.

        Raises:
            EdgeError: Naming what was asked, what the format takes, and the remedy.
        """
        ...

    def lower(
        self,
        model: ModelSpec,
        weights: QuantizedWeights,
        directory: Path,
        *,
        progress: Callable[[int, int], None],
    ) -> tuple[dict[str, ComponentEntry], list[PackedWeight]]:
        """Write every component into `directory`, where the model's extra files lie already.

        Returns:
            The components for the manifest, and what was packed, to be held against the plan.
        """
        ...

    def integer_linear(self) -> "IntegerLinear":
        """What the format's kernels compute where a weight is integers, for packing references."""
        ...


TARGETS: dict[TargetName, Target] = {
    "onnx": OnnxTarget(),
    "coreml": CoremlTarget(),
    "executorch": ExecutorchTarget(),
}


def choose_target(
    name: TargetName,
    *,
    units: Units | None = None,
    delegate: Delegate | None = None,
    separate_weights: bool = False,
) -> Target:
    """A format, with what is chosen within it: whose layout, who computes, where weights go.

    Args:
        name: From `TARGETS`.
        units: Whose layout within Core ML; None is the format's own choice.
        delegate: Who computes within ExecuTorch; None is the format's own choice.
        separate_weights: Whether weights get a file of their own within ExecuTorch.

    Raises:
        EdgeError: If the format has no such choice, or not this one.
    """
    for option, choice, known, owner in (
        ("--units", units, get_args(Units), "coreml"),
        ("--delegate", delegate, get_args(Delegate), "executorch"),
    ):
        if choice is not None and name != owner:
            raise EdgeError(f"{option} {choice} is a choice within --target {owner}; {name} has none")
        if choice is not None and choice not in known:
            raise EdgeError(f"{option} {choice!r} is unknown; choose one of {', '.join(known)}")
    if separate_weights and name != "executorch":
        raise EdgeError(f"--separate-weights is a choice within --target executorch; {name} has none")
    if units is not None:
        return CoremlTarget(units=units)
    if delegate is None and not separate_weights:
        return TARGETS[name]
    return ExecutorchTarget(delegate=delegate or "xnnpack", separate_weights=separate_weights)
