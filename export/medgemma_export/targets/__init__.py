"""The deployment formats: one file for each, and this table."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from medgemma_export.models.spec import ModelSpec
from medgemma_export.targets.coreml import CoremlTarget
from medgemma_export.targets.executorch import ExecutorchTarget
from medgemma_export.targets.onnx import OnnxTarget
from medgemma_quantization.plan import PackedWeight, QuantPlan
from medgemma_quantization.scheme import Scheme, SchemeName
from medgemma_quantization.weights import QuantizedWeights
from medgemma_runtime.manifest import ComponentEntry, TargetName

if TYPE_CHECKING:
    from medgemma_export.torch_ops import IntegerLinear

__all__ = ["Target", "TARGETS"]


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
