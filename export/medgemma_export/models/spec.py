"""What a model is to the exporter: its separately exported components and where their weights lie."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from medgemma_export.checkpoint import Checkpoint
from medgemma_export.ops import Ops
from medgemma_export.plan_ops import PlanOps
from medgemma_quantization.plan import WeightSpec
from medgemma_quantization.weights import ReadWeight
from medgemma_runtime.errors import CheckpointError
from medgemma_runtime.manifest import ImageSpec, PromptSpec, Similarity, TensorSpec, TextSpec

__all__ = ["ModelSpec", "Component", "Forward", "WeightSource", "read_config", "read_json"]


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
        layers: How many layers it is made of, where it can be cut between them.
        cut: Some of the layers as a component of their own, from the residual stream to the residual stream
            (`hidden`); the empty range behind the last is what follows them.
    """

    name: str
    file_stem: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    forward: Forward
    layers: int = 0
    cut: "Callable[[range], Component] | None" = None

    def weights(self) -> list[WeightSpec]:
        """The weights that `forward` asks for."""
        ops = PlanOps()
        self.forward(ops, dict.fromkeys((spec.name for spec in self.inputs), None))
        return ops.weights


@dataclass(frozen=True, kw_only=True)
class WeightSource:
    """Where a weight lies in the checkpoint, when it is not a tensor of the same name and shape.

    Attributes:
        tensor: The tensor's name.
        tensor_rows: How many rows that has, where the weight is only some of them.
        rows: Those that are this weight.
        transposed: The tensor is [inputs, outputs]. It is turned when read, so that every plan, quantization
            method and target sees one orientation.
    """

    tensor: str
    tensor_rows: int | None = None
    rows: slice | None = None
    transposed: bool = False

    def __post_init__(self) -> None:
        if (self.tensor_rows is None) != (self.rows is None) or (self.transposed and self.rows is not None):
            raise ValueError(
                f"{self.tensor}: tensor_rows and rows belong together, and not with a transposed tensor"
            )

    def tensor_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of the tensor that a weight of this shape lies in."""
        if self.tensor_rows is not None:
            return (self.tensor_rows, *shape[1:])
        return shape[::-1] if self.transposed else shape

    def read(self, checkpoint: Checkpoint, rows: slice | None = None) -> NDArray[np.float32]:
        """The weight, or some rows of it."""
        if self.transposed:
            whole = np.ascontiguousarray(checkpoint.read(self.tensor).T)
            return whole if rows is None else whole[rows]
        if self.rows is not None and rows is not None:
            rows = slice(self.rows.start + rows.start, self.rows.start + rows.stop)
        return checkpoint.read(self.tensor, rows=rows or self.rows)


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
        prompt: How conversations become input.
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
    prompt: PromptSpec | None
    similarity: Similarity | None
    extra_files: tuple[str, ...]
    licence: str
    intended_use: str

    def weights(self) -> list[WeightSpec]:
        """The weights of all components."""
        return [
            replace(weight, part="decoder" if component.name in ("embed", "decoder") else "encoder")
            for component in self.components
            for weight in component.weights()
        ]

    def checkpoint_shapes(self) -> dict[str, tuple[int, ...]]:
        """The tensors, and their shapes, that a checkpoint of this model holds."""
        shapes: dict[str, tuple[int, ...]] = dict.fromkeys(self.scalars, (1,))
        for weight in self.weights():
            source = self.sources.get(weight.name, WeightSource(tensor=weight.name))
            shapes[source.tensor] = source.tensor_shape(weight.shape)
        return shapes

    def reader(self, checkpoint: Checkpoint) -> ReadWeight:
        """Reads a weight of the model from where it lies in the checkpoint."""

        def read(name: str, rows: slice | None = None) -> NDArray[np.float32]:
            return self.sources.get(name, WeightSource(tensor=name)).read(checkpoint, rows)

        return read


def read_json(checkpoint: Checkpoint, name: str) -> dict[str, Any]:
    """A JSON object that lies beside a checkpoint's weights.

    Raises:
        CheckpointError: If it is not there, or no JSON object.
    """
    path = checkpoint.file(name)
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{checkpoint.id}: {name} is no JSON ({error}); download it again") from None
    if not isinstance(data, dict):
        raise CheckpointError(f"{checkpoint.id}: {name} is not a JSON object; download it again")
    return data


def read_config(checkpoint: Checkpoint, kind: Any) -> Any:
    """A checkpoint's config.json as an instance of transformers' class, which knows all defaults.

    Args:
        checkpoint: Whose config.json.
        kind: The class.

    Raises:
        CheckpointError: If the class does not take it, or it has more layers than there are tensors: lists of
            that length would be made.
    """
    parts = [checkpoint.config, *(part for part in checkpoint.config.values() if isinstance(part, Mapping))]
    for layers in (part.get("num_hidden_layers") for part in parts):
        if isinstance(layers, int) and layers > len(checkpoint.tensors):
            raise CheckpointError(
                f"{checkpoint.id}: config.json says {layers} layers and there are {len(checkpoint.tensors)} "
                "tensors; download it again"
            )
    try:
        return kind.from_dict(dict(checkpoint.config))
    except Exception as error:  # each check of transformers has a class of its own
        reason = " ".join(str(error).split())
        raise CheckpointError(
            f"{checkpoint.id}: config.json is no {kind.__name__} ({reason}); download it again"
        ) from None
