"""Reads the weights back from a finished ExecuTorch program, and holds them against their plan."""

from pathlib import Path
from typing import Any

import numpy as np
from executorch.exir._serialize._program import deserialize_pte_binary
from numpy.typing import NDArray

from medgemma_export.models.spec import Component
from medgemma_export.targets.executorch_program import Survey, half_rows, head_integers, table_arrays
from medgemma_quantization.affine import pack_int4
from medgemma_quantization.scheme import Storage
from medgemma_quantization.weights import QuantizedWeights
from medgemma_runtime.errors import ArtifactError

__all__ = ["compare_program"]

_ALIGNMENT = 128


def compare_program(program: Path, component: Component, weights: QuantizedWeights) -> None:
    """Hold every matrix and table of a component, integers and scales, against the file that ships.

    Constants are found by their content. Which scales belong to which integers the file says in XNNPACK's own
    graph, which is not read here: that a product is right shows only when it is computed.

    Args:
        program: A .pte file that `medgemma_export.targets.executorch` wrote.
        component: What one of its methods computes.
        weights: The integers, made from checkpoint and plan.

    Raises:
        ArtifactError: Naming the first weight that is missing or differs.
    """
    file = deserialize_pte_binary(program.read_bytes())
    named = file.named_data
    held = [bytes(buffer) for buffer in (named.buffers if named else [])]
    held += [bytes(buffer.storage) for buffer in file.program.constant_buffer]
    survey = Survey(component)
    for name in dict.fromkeys([*sorted(survey.multiplied), *sorted(survey.looked_up)]):
        pieces = _pieces(name, weights, survey) if name in survey.multiplied else []
        if name in survey.looked_up:
            pieces += table_arrays(name, weights)
        for piece in pieces:
            content = piece.tobytes()
            # What is read back ends where the next constant begins, so it may have padding.
            if not any(
                len(buffer) - len(content) < _ALIGNMENT and buffer.startswith(content) for buffer in held
            ):
                raise ArtifactError(
                    f"{program.name} does not carry {name} as the plan and the checkpoint give it; "
                    "the file is damaged or was made otherwise: export again"
                )


def _pieces(name: str, weights: QuantizedWeights, survey: Survey) -> list[NDArray[Any]]:
    """A matrix as XNNPACK's constants: integers and scales, those of q and k in halves."""
    row, head_width = weights.plan.by_name[name], survey.halved.get(name)
    every = [np.arange(row.stored_shape[0])]
    parts = every if head_width is None else list(half_rows(row.stored_shape[0], head_width).values())
    if row.storage.is_float:
        matrix = weights.float(name)
        return [np.ascontiguousarray(matrix[rows]) for rows in parts]
    tensor = head_integers(name, weights) if name in survey.heads else weights.quantized(name)
    return [
        piece
        for rows in parts
        for piece in (_packed(tensor.values[rows], row.storage), _scales(tensor.scales[rows], row.storage))
    ]


def _packed(values: NDArray[np.int8], storage: Storage) -> NDArray[Any]:
    return pack_int4(values, offset=8) if storage.bits == 4 else np.ascontiguousarray(values)


def _scales(scales: NDArray[np.float32], storage: Storage) -> NDArray[Any]:
    """Those of blocks are bfloat16, which every scale fits: the upper half of a float32."""
    flat = np.ascontiguousarray(scales)
    if not storage.block:
        return flat
    return (flat.view(np.uint32) >> np.uint32(16)).astype(np.uint16)
