"""ONNX for ONNX Runtime.

Standard operators where they are as fast, ONNX Runtime's own where they are not:

- attention: `MultiHeadAttention`, which never holds a full array of scores;
- int8 per channel: `DynamicQuantizeMatMul`, which rounds activations to uint8 over the whole input. Weights
  are signed, the fast form on VNNI and AMX, and exact on every processor because neighbouring integers are
  bounded (see `medgemma_quantization.affine`). With static ranges `QuantizeLinear`, once for all matrices
  that share an input, and `MatMulIntegerToFloat`;
- int4 and int8 in blocks: `MatMulNBits` at accuracy level 4, which rounds activations to int8 in the same
  blocks; tables are the same bytes, looked up by `GatherBlockQuantized`;
- fp16: weights only. They are cast when the program is loaded, because the CPU has no faster kernels for
  float16; what is gained is the size of the download.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import onnx_ir as ir

from medgemma_export.external_data import ExternalData
from medgemma_export.models.spec import Component, ModelSpec
from medgemma_export.targets.onnx_builder import DOMAIN, OnnxBuilder
from medgemma_export.targets.onnx_genai import write_genai_files
from medgemma_export.targets.onnx_js import write_js_files
from medgemma_export.targets.onnx_ops import OnnxOps
from medgemma_quantization.plan import PackedWeight, QuantPlan, refuse_palettes
from medgemma_quantization.scheme import INT8_BLOCKS, SCHEMES, Scheme, SchemeName
from medgemma_quantization.weights import QuantizedWeights
from medgemma_runtime.errors import EdgeError
from medgemma_runtime.manifest import ComponentEntry, TensorSpec

if TYPE_CHECKING:
    from medgemma_export.torch_ops import IntegerLinear

__all__ = ["OnnxTarget"]

_IR_VERSION = 11

# transformers.js finds a precision by these endings, `dtype: "int8"` and `"q4"`.
_FILE_ENDING = {32: "", 16: "_fp16", 8: "_int8", 4: "_q4"}


@dataclass(frozen=True)
class OnnxTarget:
    """See `Target`."""

    cuts_tables: ClassVar[bool] = True

    def scheme(self, name: SchemeName) -> Scheme:
        """See `Target`.

        ONNX Runtime multiplies int8 channels by activations that it rounds over their whole input. A decoder
        whose int8 has blocks, and so rounds activations block by block, loses a quarter of that or less.
        """
        scheme = SCHEMES[name]
        return replace(scheme, decoder=INT8_BLOCKS) if name == "int8" else scheme

    def check(self, model: ModelSpec, plan: QuantPlan) -> None:
        """See `Target`."""
        if plan.activations == "float16":
            raise EdgeError(
                f"scheme {plan.scheme} computes in float16, which ONNX Runtime does not on a CPU; "
                'say activations = "float"'
            )
        if plan.residual_scale != 1:
            raise EdgeError(
                f"scheme {plan.scheme} scales the residual stream by {plan.residual_scale:g}; ONNX Runtime "
                "computes in float32, whose range needs no help: leave residual_scale out"
            )
        refuse_palettes(plan, "ONNX Runtime")
        for row in plan.rows:
            if not row.storage.is_float and row.role == "table" and not row.storage.block:
                raise EdgeError(
                    f"{row.name}: the plan asks for {row.storage}, and ONNX Runtime looks up rows in blocks; "
                    "give the table a block of 32"
                )
            if row.storage.bits == 4 and not row.storage.block:
                raise EdgeError(
                    f"{row.name}: the plan asks for {row.storage}, and ONNX Runtime's int4 kernel takes "
                    "blocks; give it a block of 32"
                )
        has_integers = any(row.role == "linear" and not row.storage.is_float for row in plan.rows)
        if plan.activations == "int8-static":
            _check_static(model, plan)
        elif has_integers and plan.activations != "int8-dynamic":
            raise EdgeError(
                f"scheme {plan.scheme} keeps activations {plan.activations}, and ONNX Runtime's integer "
                'kernels round them to int8; say activations = "int8-dynamic", or "int8-static"'
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
        shared: dict[str, ir.ExternalTensor] = {}
        packed: list[PackedWeight] = []

        def note(weight: PackedWeight) -> None:
            packed.append(weight)
            progress(len(packed), len(weights.plan.rows))

        for component in model.components:
            program = f"onnx/{component.file_stem}{_ending(component, weights.plan)}.onnx"
            _lower_component(component, weights, directory / program, shared, note)
            entries[component.name] = ComponentEntry(
                program=program, inputs=component.inputs, outputs=component.outputs
            )
        write_genai_files(model, entries, directory)
        write_js_files(model, entries, directory)
        return entries, packed

    def integer_linear(self) -> "IntegerLinear":
        """See `Target`."""
        from medgemma_export.emulation import onnx_integer_linear

        return onnx_integer_linear


def _check_static(model: ModelSpec, plan: QuantPlan) -> None:
    """Static ranges need the kernel that takes one for each input: int8 per channel."""
    for row in plan.rows:
        if row.role == "linear" and not row.storage.is_float and row.storage.block:
            raise EdgeError(
                f"{row.name}: the plan asks for {row.storage}, whose kernel in ONNX Runtime rounds "
                'activations at run time; with activations = "int8-static" give matrices 8 bits and no block'
            )
        if row.role == "table" and not row.storage.is_float and model.prompt is not None:
            raise EdgeError(
                f"{row.name}: the table is the output head, too, and the kernel for {row.storage} rounds "
                'activations at run time; with activations = "int8-static" give the table 32 or 16 bits'
            )


def _ending(component: Component, plan: QuantPlan) -> str:
    """By the storage that most matrices and tables of the component have."""
    weights = [weight for weight in component.weights() if weight.role in ("linear", "table")]
    bits = [plan.by_name[weight.name].storage.bits for weight in weights]
    return _FILE_ENDING[max(set(bits), key=bits.count)]


def _lower_component(
    component: Component,
    weights: QuantizedWeights,
    path: Path,
    shared: dict[str, ir.ExternalTensor],
    note: Callable[[PackedWeight], None],
) -> None:
    inputs = {spec.name: _input(spec) for spec in component.inputs}
    with ExternalData(path.with_name(path.name + "_data"), shared) as data:
        builder = OnnxBuilder(weights=weights, data=data, note=note)
        ops = OnnxOps(onnx=builder)
        outputs = component.forward(ops, inputs)
    graph_outputs = [ops.output(outputs[spec.name], _value(spec)) for spec in component.outputs]
    graph = ir.Graph(
        list(inputs.values()),
        graph_outputs,
        nodes=builder.nodes,
        # An input that is an initializer too may be left out: stock runtimes do not know it.
        initializers=[*builder.initializers, *(value for value in inputs.values() if value.const_value)],
        opset_imports={"": ops.opset, DOMAIN: 1},
        name=component.name,
    )
    ir.save(ir.Model(graph, ir_version=_IR_VERSION, producer_name="medgemma-edge"), path)


def _input(spec: TensorSpec) -> ir.Value:
    value = _value(spec)
    if spec.default is not None:
        free = 0 if spec.may_be_empty else 1
        shape = [free if isinstance(dim, str) else dim for dim in spec.shape]
        default = np.full(shape, spec.default, spec.dtype)
        value.const_value = ir.tensor(default, name=spec.name)
    return value


def _value(spec: TensorSpec) -> ir.Value:
    return ir.Value(
        name=spec.name,
        # transformers.js knows by this name how long the first axis of an empty cache is.
        shape=ir.Shape("batch_size" if dim == "batch" else dim for dim in spec.shape),
        type=ir.TensorType(ir.DataType.from_numpy(np.dtype(spec.dtype))),
        doc_string=spec.description,
    )
