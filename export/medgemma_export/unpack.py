"""Reads the weights back from a finished ONNX program, to compare them with what a plan says they are."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx_ir as ir

from medgemma_export.models.spec import Component
from medgemma_quantization.affine import unpack_int4
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
    stored = {value.name: value.const_value for value in ir.load(program).graph.initializers.values()}
    for name in dict.fromkeys(weight.name for weight in component.weights()):
        if not all(_same(name, stored, weights)):
            raise ArtifactError(
                f"{program.name} does not carry {name} as the plan and the checkpoint give it; "
                "its weight file is damaged or was made otherwise: export again"
            )


def _same(
    name: str, stored: dict[str | None, ir.TensorProtocol | None], weights: QuantizedWeights
) -> Iterator[bool]:
    tensor, scales = stored.get(name), stored.get(f"{name}.scales")
    row = weights.plan.by_name[name]
    storage = row.storage
    if tensor is None:
        yield False
    elif storage.bits == 32:
        true, found = weights.float(name), tensor.numpy()
        # A matrix lies transposed, and a gain of Gemma's has its 1 added.
        forms = {"linear": [true.T], "norm": [true, true + 1]}.get(row.role, [true])
        yield any(found.shape == form.shape and bool((found == form).all()) for form in forms)
    elif scales is None:
        yield False
    else:
        values, found = weights.quantized(name).values, tensor.numpy()
        if storage.block:
            around = unpack_int4(found, offset=8) if storage.bits == 4 else (found ^ 0x80).view(np.int8)
            yield bool((around.reshape(values.shape) == values).all())
        else:
            yield found.shape == values.T.shape and bool((found == values.T).all())
        yield bool((scales.numpy().reshape(-1) == weights.scales(name).reshape(-1)).all())
