"""Reads the weights back from a finished ONNX program, to compare them with what a plan says they are."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from medgemma_export.models.spec import Component
from medgemma_export.targets.onnx_builder import JOINT
from medgemma_quantization.affine import unpack_int4
from medgemma_quantization.plan import PlanRow, QuantPlan
from medgemma_quantization.weights import QuantizedWeights, keep_integers
from medgemma_runtime.errors import ArtifactError

__all__ = ["compare_integers", "read_integers"]


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
        if not _same(name, stored, weights):
            raise ArtifactError(
                f"{program.name} does not carry {name} as the plan and the checkpoint give it; "
                "its weight file is damaged or was made otherwise: export again"
            )


def read_integers(program: Path, component: Component, plan: QuantPlan, directory: Path) -> None:
    """Keep the integers and scales of a component as they are made, in `directory`, from the file that ships.

    Args:
        program: An .onnx file that `medgemma_export.targets.onnx` wrote.
        component: What it computes.
        plan: How its weights are stored.
        directory: As `quantize_weights` fills it.

    Raises:
        ArtifactError: Naming the first weight that is missing.
    """
    stored = _take_apart(program, plan)
    for name in dict.fromkeys(weight.name for weight in component.weights()):
        row = plan.by_name[name]
        if row.storage.is_float:
            continue
        integers = _integers(row, stored)
        if integers is None:
            raise ArtifactError(f"{program.name} does not carry {name}; export the model again")
        keep_integers(row, directory, *integers)


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


def _integers(
    row: PlanRow, stored: dict[str, NDArray[Any]]
) -> tuple[NDArray[np.int8], NDArray[np.float32]] | None:
    """Integers, [outputs, inputs], and scales, [outputs, blocks], of a weight; None if they are not there."""
    found, scales = stored.get(row.name), stored.get(f"{row.name}.scales")
    if found is None or scales is None:
        return None
    if row.storage.block:
        around = unpack_int4(found, offset=8) if row.storage.bits == 4 else (found ^ 0x80).view(np.int8)
        values = around.reshape(row.stored_shape)
    else:
        values = found.T
    if values.shape != row.stored_shape or scales.size != row.scale_count:
        return None
    return values, scales.astype(np.float32).reshape(row.stored_shape[0], -1)


def _same(name: str, stored: dict[str, NDArray[Any]], weights: QuantizedWeights) -> bool:
    row = weights.plan.by_name[name]
    if row.storage.is_float:
        found, true = stored.get(name), weights.float(name)
        # A matrix lies transposed, and a gain of Gemma's has its 1 added.
        forms = {"linear": [true.T], "norm": [true, true + 1]}.get(row.role, [true])
        return found is not None and any(np.array_equal(found, form) for form in forms)
    integers = _integers(row, stored)
    if integers is None:
        return False
    tensor = weights.quantized(name)
    return np.array_equal(integers[0], tensor.values) and np.array_equal(integers[1], tensor.scales)
