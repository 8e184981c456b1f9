"""ONNX for ONNX Runtime.

A float artifact has standard operators only (opset 23). Integer matrices need ONNX Runtime's own:

- int8 per channel: `DynamicQuantizeMatMul`. Weights are stored as uint8 with zero point 128, the same
  integers: with int8 weights the AVX2 kernel adds pairs of products in saturating 16-bit arithmetic and is
  silently wrong on every processor without VNNI; the uint8 kernel is exact everywhere.
- int4 in blocks: `MatMulNBits` at accuracy level 4, activations rounded to int8 in the same blocks.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir
from medgemma_quantization.plan import PackedWeight, QuantPlan
from medgemma_quantization.weights import QuantizedWeights
from medgemma_runtime.errors import EdgeError
from medgemma_runtime.manifest import ComponentEntry, TensorSpec

from medgemma_export.external_data import ExternalData
from medgemma_export.models.spec import Component, ModelSpec
from medgemma_export.targets.onnx_ops import DOMAIN, OPSET, OnnxOps

__all__ = ["OnnxTarget"]

_IR_VERSION = 11

# transformers.js finds a precision by these endings, `dtype: "int8"` and `"q4"`.
_FILE_ENDING = {32: "", 8: "_int8", 4: "_q4"}


@dataclass(frozen=True)
class OnnxTarget:
    """See `Target`."""

    def check(self, model: ModelSpec, plan: QuantPlan) -> None:
        """See `Target`."""
        for row in plan.rows:
            storage = row.storage
            if (storage.bits, bool(storage.block)) not in {(32, False), (8, False), (4, True)}:
                raise EdgeError(
                    f"{row.name}: the plan asks for {storage}, and ONNX Runtime's kernels take int8 per "
                    "channel and int4 in blocks; change the scheme"
                )
        has_integers = any(row.role == "linear" and row.storage.bits != 32 for row in plan.rows)
        if has_integers and plan.activations != "int8-dynamic":
            raise EdgeError(
                f"scheme {plan.scheme} keeps activations {plan.activations}, and ONNX Runtime's integer "
                'kernels round them to int8; say activations = "int8-dynamic"'
            )

    def lower(
        self,
        model: ModelSpec,
        weights: QuantizedWeights,
        directory: Path,
        *,
        progress: Callable[[int, int], None],
    ) -> tuple[dict[str, ComponentEntry], list[PackedWeight]]:
        """See `Target`."""
        (directory / "onnx").mkdir()
        entries: dict[str, ComponentEntry] = {}
        packed: list[PackedWeight] = []

        def note(weight: PackedWeight) -> None:
            packed.append(weight)
            progress(len(packed), len(weights.plan.rows))

        for component in model.components:
            program = f"onnx/{component.file_stem}{_ending(component, weights.plan)}.onnx"
            _lower_component(component, weights, directory / program, note)
            entries[component.name] = ComponentEntry(
                program=program, inputs=component.inputs, outputs=component.outputs
            )
        return entries, packed


def _ending(component: Component, plan: QuantPlan) -> str:
    bits = [
        plan.by_name[weight.name].storage.bits for weight in component.weights() if weight.role == "linear"
    ]
    return _FILE_ENDING[max(set(bits), key=bits.count)]


def _lower_component(
    component: Component, weights: QuantizedWeights, path: Path, note: Callable[[PackedWeight], None]
) -> None:
    inputs = {spec.name: _value(spec) for spec in component.inputs}
    with ExternalData(path.with_name(path.name + "_data")) as data:
        ops = OnnxOps(weights=weights, data=data, note=note)
        outputs = component.forward(ops, inputs)
    graph_outputs = [ops.output(outputs[spec.name], _value(spec)) for spec in component.outputs]
    graph = ir.Graph(
        list(inputs.values()),
        graph_outputs,
        nodes=ops.nodes,
        initializers=ops.initializers,
        opset_imports={"": OPSET, DOMAIN: 1},
        name=component.name,
    )
    ir.save(ir.Model(graph, ir_version=_IR_VERSION, producer_name="medgemma-edge"), path)


def _value(spec: TensorSpec) -> ir.Value:
    return ir.Value(
        name=spec.name,
        shape=ir.Shape(spec.shape),
        type=ir.TensorType(ir.DataType.from_numpy(np.dtype(spec.dtype))),
        doc_string=spec.description,
    )
