"""Reads the weights back from a finished ExecuTorch program, and holds them against their plan."""

from collections.abc import Iterable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from medgemma_export.models.spec import Component
from medgemma_export.targets.executorch_data import read_data
from medgemma_export.targets.executorch_file import constant_parts, read_program
from medgemma_export.targets.executorch_program import (
    Survey,
    late_matrix,
    late_table,
    part_rows,
    table_scales,
)
from medgemma_export.targets.executorch_stand_ins import LateWeight
from medgemma_quantization.scheme import Storage
from medgemma_quantization.weights import QuantizedWeights
from medgemma_runtime.backends.executorch import weights_path
from medgemma_runtime.errors import ArtifactError

__all__ = ["compare_program"]

_ALIGNMENT = 128


def compare_program(program: Path, component: Component, weights: QuantizedWeights) -> None:
    """Hold every matrix and table of a component, integers and scales, against the file that ships.

    Matrices are found by their names, what kernels read and scales by their content. Which scales belong to
    which integers the file says in XNNPACK's own graph, which is not read here: that a product is right shows
    only when it is computed.

    Args:
        program: A .pte file that `medgemma_export.targets.executorch` wrote. If it has a .ptd file, that lies
            beside it.
        component: What one of its methods computes.
        weights: The integers, made from checkpoint and plan.

    Raises:
        ArtifactError: Naming the first weight that is missing or differs.
    """
    description, segments = read_program(program)
    named = {entry.key: segments[entry.segment_index] for entry in description.named_data or []}
    for_kernels = list(constant_parts(description, segments).values())
    if (data := weights_path(program)).exists():
        apart, contents = read_data(data)
        named |= {entry.key: contents[entry.segment_index] for entry in apart.named_data}
        for_kernels += [contents[entry.segment_index] for entry in apart.named_data if entry.tensor_layout]
    survey = Survey(component)
    for name in dict.fromkeys([*sorted(survey.multiplied), *sorted(survey.looked_up)]):
        row, head_width = weights.plan.by_name[name], survey.halved.get(name)
        is_there = True
        if name in survey.looked_up:
            is_there = _is_among(for_kernels, late_table(name, weights))
        if name in survey.multiplied:
            is_head = name in survey.heads
            parts = [late_table(name, weights)] if is_head else late_matrix(name, weights, head_width)
            for part in parts:
                is_there &= _is_among([named[part.key]] if part.key in named else for_kernels, part)
        if not row.storage.is_float:
            scales = weights.scales(name)
            held = named.values()
            if name in survey.looked_up:
                is_there &= _holds(for_kernels, table_scales(scales, row.storage))
            if name in survey.multiplied:
                for rows in part_rows(row.stored_shape[0], head_width):
                    is_there &= _holds(held, _xnnpack_scales(scales[rows], row.storage))
        if not is_there:
            raise ArtifactError(
                f"{program.name} does not carry {name} as the plan and the checkpoint give it; "
                "the file is damaged or was made otherwise: export again"
            )


def _is_among(held: Iterable[NDArray[np.uint8]], weight: LateWeight) -> bool:
    """Whether one of the parts of a file is the weight."""
    left = [part for part in held if 0 <= len(part) - weight.size < _ALIGNMENT]
    start = 0
    for piece in weight.pieces():
        content = np.ascontiguousarray(piece).reshape(-1).view(np.uint8)
        left = [part for part in left if np.array_equal(part[start : start + len(content)], content)]
        start += len(content)
    return bool(left)


def _holds(held: Iterable[NDArray[np.uint8]], array: NDArray[np.generic]) -> bool:
    """Whether one of the parts of a file is the array; there may be padding after it."""
    content = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    return any(
        0 <= len(part) - len(content) < _ALIGNMENT and np.array_equal(part[: len(content)], content)
        for part in held
    )


def _xnnpack_scales(scales: NDArray[np.float32], storage: Storage) -> NDArray[np.generic]:
    """Those of blocks are bfloat16, which every scale fits: the upper half of a float32."""
    flat = np.ascontiguousarray(scales)
    if not storage.block:
        return flat
    return (flat.view(np.uint32) >> np.uint32(16)).astype(np.uint16)
