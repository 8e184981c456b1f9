"""The deployment formats: one file for each, and this table."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, get_args

from medgemma_export.models.spec import ModelSpec
from medgemma_export.targets.coreml import CoremlTarget
from medgemma_export.targets.executorch import Delegate, ExecutorchTarget
from medgemma_export.targets.onnx import OnnxTarget
from medgemma_quantization.plan import PackedWeight, QuantPlan
from medgemma_quantization.scheme import Scheme, SchemeName
from medgemma_quantization.weights import QuantizedWeights
from medgemma_runtime.errors import EdgeError
from medgemma_runtime.manifest import ComponentEntry, TargetName

if TYPE_CHECKING:
    from medgemma_export.torch_ops import IntegerLinear

__all__ = ["Target", "TARGETS", "Delegate", "choose_target"]


class Target(Protocol):
    """A deployment format."""

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


def choose_target(name: TargetName, delegate: Delegate | None = None) -> Target:
    """A format, and within ExecuTorch who computes; None is the format's own choice.

    Raises:
        EdgeError: If the format has no delegates, or not this one.
    """
    if delegate is None:
        return TARGETS[name]
    if name != "executorch":
        raise EdgeError(f"--delegate {delegate} is a choice within --target executorch; {name} has none")
    if delegate not in get_args(Delegate):
        raise EdgeError(
            f"delegate {delegate!r} is unknown; the delegates are {', '.join(get_args(Delegate))}"
        )
    return ExecutorchTarget(delegate=delegate)
