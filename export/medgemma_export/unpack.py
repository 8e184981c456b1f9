"""Reads the weights back from a finished ONNX program, to compare them with what a plan says they are."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from medgemma_export.models.spec import Component
from medgemma_export.targets.onnx_ops import JOINT
from medgemma_quantization.affine import unpack_int4
from medgemma_quantization.plan import QuantPlan
from medgemma_quantization.weights import QuantizedWeights
from medgemma_runtime.errors import ArtifactError

__all__ = ["compare_integers"]


def compare_integers(program: Path, component: Component, weights: QuantizedWeights) -> None:
    """Hold every weight of a component, integer by integer and scale by scale, against the file that ships.

    Args:
        program: An .onnx file that `medgemma_export.targets.onnx` wrote.
        component: What it computes.
        weights: The integers, made from checkpoint and plan.

    Raises:
        ArtifactError: Naming the first weight that is missing or differs.
    """
    stored = _take_apart(program, weights.plan)
    for name in dict.fromkeys(weight.name for weight in component.weights()):
        if not all(_same(name, stored, weights)):
            raise ArtifactError(
                f"{program.name} does not carry {name} as the plan and the checkpoint give it; "
                "its weight file is damaged or was made otherwise: export again"
            )


def _take_apart(program: Path, plan: QuantPlan) -> dict[str, NDArray[Any]]:
    """All tensors of a program by name; of those that lie joined, each by its own name."""
    whole: dict[str, NDArray[Any]] = {}
    for value in ir.load(program).graph.initializers.values():
        if value.name is not None and value.const_value is not None:
            # The pieces of a tensor come in order.
            name, array = value.name.partition("[")[0], value.const_value.numpy()
            whole[name] = np.concatenate([whole[name], array]) if name in whole else array
    arrays: dict[str, NDArray[Any]] = {}
    for joined, array in whole.items():
        names = joined.removesuffix(".scales").split(JOINT)
        suffix = ".scales" if joined.endswith(".scales") else ""
        if len(names) == 1:
            arrays[joined] = array
            continue
        rows = [plan.by_name[name].stored_shape[0] for name in names]
        # Outputs lie along the last axis where the matrix lies transposed.
        in_blocks = plan.by_name[names[0]].storage.block > 0
        if suffix and in_blocks:
            array = array.reshape(sum(rows), -1)
        pieces = np.split(array, np.cumsum(rows)[:-1], axis=0 if in_blocks else -1)
        arrays |= {f"{name}{suffix}": piece for name, piece in zip(names, pieces, strict=True)}
    return arrays


def _same(name: str, stored: dict[str, NDArray[Any]], weights: QuantizedWeights) -> Iterator[bool]:
    found, scales = stored.get(name), stored.get(f"{name}.scales")
    row = weights.plan.by_name[name]
    storage = row.storage
    if found is None:
        yield False
    elif storage.is_float:
        true = weights.float(name)
        # A matrix lies transposed, and a gain of Gemma's has its 1 added.
        forms = {"linear": [true.T], "norm": [true, true + 1]}.get(row.role, [true])
        yield any(found.shape == form.shape and bool((found == form).all()) for form in forms)
    elif scales is None:
        yield False
    else:
        values = weights.quantized(name).values
        if storage.block:
            around = unpack_int4(found, offset=8) if storage.bits == 4 else (found ^ 0x80).view(np.int8)
            yield bool((around.reshape(values.shape) == values).all())
        else:
            yield found.shape == values.T.shape and bool((found == values.T).all())
        yield bool((scales.reshape(-1) == weights.scales(name).reshape(-1)).all())
