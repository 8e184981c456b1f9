"""The operations as ONNX nodes."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from medgemma_export.external_data import ExternalData
from medgemma_export.ops import Activation, Heads, LayerNorm, Linear, Parameter, PatchEmbedding, Table
from medgemma_quantization.affine import pack_int4
from medgemma_quantization.plan import PackedWeight
from medgemma_quantization.scheme import FLOAT32, Storage
from medgemma_quantization.weights import QuantizedWeights

__all__ = ["OnnxOps", "OPSET", "DOMAIN"]

OPSET = 20  # the first with Gelu
DOMAIN = "com.microsoft"

_Attribute = int | float | str | Sequence[int]


@dataclass(kw_only=True)
class OnnxOps:
    """An `Ops[ir.Value]` that emits nodes and writes weights as it meets them.

    Attributes:
        weights: Where weights come from.
        data: Where they go.
        note: Told what was written for each weight.
        nodes: In topological order.
        initializers: The weights and constants that the nodes refer to.
    """

    weights: QuantizedWeights
    data: ExternalData
    note: Callable[[PackedWeight], None]
    nodes: list[ir.Node] = field(default_factory=list)
    initializers: list[ir.Value] = field(default_factory=list)

    def patch_embedding(self, pixels: ir.Value, weight: PatchEmbedding) -> ir.Value:
        """See `Ops`."""
        kernel = self._float(f"{weight.name}.weight")
        patches = self._node(
            "Conv",
            [pixels, kernel, self._float(f"{weight.name}.bias")],
            {"kernel_shape": [weight.patch, weight.patch], "strides": [weight.patch, weight.patch]},
        )
        flat = self._node("Reshape", [patches, self._shape([0, weight.width, -1])])
        return self._node("Transpose", [flat], {"perm": [0, 2, 1]})

    def embed(self, ids: ir.Value, table: Table) -> ir.Value:
        """See `Ops`."""
        name = f"{table.name}.weight"
        storage = self._storage(name)
        if storage.bits == 32:
            return self._node("Gather", [self._float(name), ids])
        tensor = self.weights.quantized(name)
        if storage.bits == 4:
            # Unsigned, because the kernel's zero point for packed bytes is 8.
            rows = self._weight(name, pack_int4(tensor.values, offset=8), storage, tensor.values.shape)
            scales = self._constant(f"{name}.scales", tensor.scales)
            attributes: dict[str, _Attribute] = {
                "bits": 4,
                "block_size": storage.block,
                "gather_axis": 0,
                "quantize_axis": 1,
            }
            return self._node("GatherBlockQuantized", [rows, ids, scales], attributes, DOMAIN)
        rows = self._weight(name, tensor.values, storage, tensor.values.shape)
        picked = self._node("Cast", [self._node("Gather", [rows, ids])], {"to": ir.DataType.FLOAT.value})
        scales = self._constant(f"{name}.scales", tensor.scales)
        return self._node("Mul", [picked, self._node("Gather", [scales, ids])])

    def add_positions(self, x: ir.Value, positions: Parameter) -> ir.Value:
        """See `Ops`."""
        return self._node("Add", [x, self._float(positions.name)])

    def linear(self, x: ir.Value, weight: Linear) -> ir.Value:
        """See `Ops`."""
        storage = self._storage(f"{weight.name}.weight")
        if storage.bits == 32:
            return self._float_linear(x, weight)
        if storage.bits == 8:
            return self._int8_linear(x, weight, storage)
        return self._int4_linear(x, weight, storage)

    def project_together(self, x: ir.Value, weights: tuple[Linear, ...]) -> tuple[ir.Value, ...]:
        """See `Ops`. One product each: sharing the rounding of `x` gained nothing measurable."""
        return tuple(self.linear(x, weight) for weight in weights)

    def mlp(self, x: ir.Value, up: Linear, down: Linear, activation: Activation) -> ir.Value:
        """See `Ops`."""
        hidden = self._node("Gelu", [self.linear(x, up)], {"approximate": "tanh"})
        return self.linear(hidden, down)

    def layer_norm(self, x: ir.Value, weight: LayerNorm) -> ir.Value:
        """See `Ops`."""
        gain, shift = self._float(f"{weight.name}.weight"), self._float(f"{weight.name}.bias")
        return self._node("LayerNormalization", [x, gain, shift], {"axis": -1, "epsilon": weight.eps})

    def residual_add(self, x: ir.Value, branch: ir.Value) -> ir.Value:
        """See `Ops`. ONNX Runtime fuses it with a LayerNorm that follows."""
        return self._node("Add", [x, branch])

    def attention(self, q: ir.Value, k: ir.Value, v: ir.Value, heads: Heads, scale: float) -> ir.Value:
        """See `Ops`. The kernel works in tiles: no [S, S] array of scores is ever in memory."""
        if heads.query != heads.kv:
            raise NotImplementedError("MultiHeadAttention has no grouped heads")
        attributes: dict[str, _Attribute] = {"num_heads": heads.query, "scale": scale}
        return self._node("MultiHeadAttention", [q, k, v], attributes, DOMAIN)

    def expand(self, parameter: Parameter, like: ir.Value) -> ir.Value:
        """See `Ops`."""
        batch = self._node("Shape", [like], {"start": 0, "end": 1})
        rest = self._shape(list(parameter.shape[1:]))
        shape = self._node("Concat", [batch, rest], {"axis": 0})
        return self._node("Expand", [self._float(parameter.name), shape])

    def token(self, x: ir.Value, index: int) -> ir.Value:
        """See `Ops`."""
        return self._node("Gather", [x, self._integers(np.array(index))], {"axis": 1})

    def output(self, value: ir.Value, declared: ir.Value) -> ir.Value:
        """Give a result the name, shape and type of a declared output."""
        value.name, value.shape, value.type = declared.name, declared.shape, declared.type
        value.doc_string = declared.doc_string
        return value

    def _float_linear(self, x: ir.Value, weight: Linear) -> ir.Value:
        name = f"{weight.name}.weight"
        array = self.weights.float(name)
        matrix = self._weight(name, array.T, FLOAT32, array.shape)
        y = self._node("MatMul", [x, matrix])
        return self._node("Add", [y, self._float(f"{weight.name}.bias")]) if weight.bias else y

    def _int8_linear(self, x: ir.Value, weight: Linear, storage: Storage) -> ir.Value:
        name = f"{weight.name}.weight"
        tensor = self.weights.quantized(name)
        matrix = self._weight(name, tensor.values.T, storage, tensor.values.shape)
        scales = self._constant(f"{name}.scales", tensor.scales[:, 0])
        bias = self._float(f"{weight.name}.bias") if weight.bias else None
        return self._node("DynamicQuantizeMatMul", [x, matrix, scales, None, bias], domain=DOMAIN)

    def _int4_linear(self, x: ir.Value, weight: Linear, storage: Storage) -> ir.Value:
        name = f"{weight.name}.weight"
        tensor = self.weights.quantized(name)
        outputs, inputs = tensor.values.shape
        blocks = pack_int4(tensor.values, offset=8).reshape(outputs, -1, storage.block // 2)
        matrix = self._weight(name, blocks, storage, tensor.values.shape)
        scales = self._constant(f"{name}.scales", tensor.scales)
        bias = self._float(f"{weight.name}.bias") if weight.bias else None
        attributes: dict[str, _Attribute] = {
            "K": inputs,
            "N": outputs,
            "bits": 4,
            "block_size": storage.block,
            "accuracy_level": 4,
        }
        return self._node("MatMulNBits", [x, matrix, scales, None, None, bias], attributes, DOMAIN)

    def _storage(self, name: str) -> Storage:
        return self.weights.plan.by_name[name].storage

    def _float(self, name: str) -> ir.Value:
        array = self.weights.float(name)
        return self._weight(name, array, FLOAT32, array.shape)

    def _weight(self, name: str, array: NDArray[Any], storage: Storage, shape: tuple[int, ...]) -> ir.Value:
        self.note(PackedWeight(name=name, storage=storage, shape=shape))
        return self._constant(name, array)

    def _constant(self, name: str, array: NDArray[Any]) -> ir.Value:
        tensor = self.data.add(name, array)
        value = ir.Value(
            name=name, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype), const_value=tensor
        )
        self.initializers.append(value)
        return value

    def _shape(self, sizes: list[int]) -> ir.Value:
        return self._integers(np.array(sizes))

    def _integers(self, array: NDArray[np.int64]) -> ir.Value:
        return self._constant(f"constant.{len(self.initializers)}", array)

    def _node(
        self,
        operator: str,
        inputs: Sequence[ir.Value | None],
        attributes: dict[str, _Attribute] | None = None,
        domain: str = "",
    ) -> ir.Value:
        node = ir.node(
            operator, inputs, attributes or {}, domain=domain, name=f"{operator}.{len(self.nodes)}"
        )
        output = node.outputs[0]
        output.name = f"{node.name}.output"
        self.nodes.append(node)
        return output
