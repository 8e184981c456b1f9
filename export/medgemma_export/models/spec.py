"""What a model is to the exporter: its separately exported components and where their weights lie."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from medgemma_export.checkpoint import Checkpoint
from medgemma_export.ops import Ops
from medgemma_export.plan_ops import PlanOps
from medgemma_quantization.plan import WeightSpec
from medgemma_quantization.weights import ReadWeight
from medgemma_runtime.manifest import ImageSpec, Similarity, TensorSpec, TextSpec

__all__ = ["ModelSpec", "Component", "Forward", "WeightSource"]


class Forward(Protocol):
    """A component's computation, for any implementation of the operations."""

    def __call__(self, ops: Ops[Any], inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Named inputs to named outputs."""
        ...


@dataclass(frozen=True, kw_only=True)
class Component:
    """A separately exported part of a model.

    Attributes:
        name: Its name in the artifact's manifest.
        file_stem: Its program's file name without suffix, as stock runtimes expect it.
        inputs: What it takes.
        outputs: What it gives.
        forward: What it computes.
    """

    name: str
    file_stem: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    forward: Forward

    def weights(self) -> list[WeightSpec]:
        """The weights that `forward` asks for."""
        ops = PlanOps()
        self.forward(ops, dict.fromkeys((spec.name for spec in self.inputs), None))
        return ops.weights


@dataclass(frozen=True, kw_only=True)
class WeightSource:
    """Where a weight lies in the checkpoint, when it is some rows of a larger tensor.

    Attributes:
        tensor: The larger tensor's name.
        tensor_rows: How many rows that has.
        rows: Those that are this weight.
    """

    tensor: str
    tensor_rows: int
    rows: slice


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """A model that the exporter knows.

    Attributes:
        architecture: Hugging Face's name for it.
        components: Its parts.
        sources: Where weights lie that are not in the checkpoint under their own name.
        scalars: Checkpoint tensors that went into this description and into no component.
        image: How pixels become input.
        text: How texts become input.
        similarity: How two embeddings become a logit.
        extra_files: Files of the checkpoint that stock runtimes want beside the programs.
        licence: Of the weights.
        intended_use: What the manifest says about use.
    """

    architecture: str
    components: tuple[Component, ...]
    sources: Mapping[str, WeightSource]
    scalars: tuple[str, ...]
    image: ImageSpec | None
    text: TextSpec | None
    similarity: Similarity | None
    extra_files: tuple[str, ...]
    licence: str
    intended_use: str

    def weights(self) -> list[WeightSpec]:
        """The weights of all components."""
        return [weight for component in self.components for weight in component.weights()]

    def checkpoint_shapes(self) -> dict[str, tuple[int, ...]]:
        """The tensors, and their shapes, that a checkpoint of this model holds."""
        shapes: dict[str, tuple[int, ...]] = dict.fromkeys(self.scalars, (1,))
        for weight in self.weights():
            source = self.sources.get(weight.name)
            if source is None:
                shapes[weight.name] = weight.shape
            else:
                shapes[source.tensor] = (source.tensor_rows, *weight.shape[1:])
        return shapes

    def reader(self, checkpoint: Checkpoint) -> ReadWeight:
        """Reads a weight of the model from where it lies in the checkpoint."""

        def read(name: str) -> NDArray[np.float32]:
            source = self.sources.get(name)
            if source is None:
                return checkpoint.read(name)
            return checkpoint.read(source.tensor, rows=source.rows)

        return read
