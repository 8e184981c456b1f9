"""The operations as ONNX nodes."""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from medgemma_export.external_data import ExternalData
from medgemma_export.ops import (
    Activation,
    Heads,
    LayerNorm,
    Linear,
    Parameter,
    PatchEmbedding,
    RmsNorm,
    Rotary,
    Table,
)
from medgemma_quantization.plan import PackedWeight
from medgemma_quantization.scheme import FLOAT32, Storage
from medgemma_quantization.weights import QuantizedWeights

__all__ = ["OnnxOps", "DOMAIN"]

DOMAIN = "com.microsoft"

_OPSET = 20  # the first with Gelu
_GEMMA_OPSET = 23  # the first with Attention, RotaryEmbedding and RMSNormalization

_Attribute = int | float | str | Sequence[int] | ir.TensorProtocol


@dataclass(kw_only=True)
class OnnxOps:
    """An `Ops[ir.Value]` that emits nodes and writes weights as it meets them.

    Attributes:
        weights: Where weights come from.
        data: Where they go.
        note: Told what was written for each weight.
        nodes: In topological order.
        initializers: The weights and constants that the nodes refer to.
        opset: The lowest version of the standard operators that has all that were emitted.
    """

    weights: QuantizedWeights
    data: ExternalData
    note: Callable[[PackedWeight], None]
    nodes: list[ir.Node] = field(default_factory=list)
    initializers: list[ir.Value] = field(default_factory=list)
    opset: int = _OPSET
    _values: dict[tuple[Hashable, ...], ir.Value] = field(default_factory=dict)

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
        rows = self._weight(name, self._unsigned(name), storage, (table.rows, table.width))
        attributes: dict[str, _Attribute] = {
            "bits": storage.bits,
            "block_size": storage.block,
            "gather_axis": 0,
            "quantize_axis": 1,
        }
        scales = self._scales(name, self.weights.scales(name))
        return self._node("GatherBlockQuantized", [rows, ids, scales], attributes, DOMAIN)

    def add_positions(self, x: ir.Value, positions: Parameter) -> ir.Value:
        """See `Ops`."""
        return self._node("Add", [x, self._float(positions.name)])

    def linear(self, x: ir.Value, weight: Linear) -> ir.Value:
        """See `Ops`."""
        storage = self._storage(f"{weight.name}.weight")
        if storage.bits == 32:
            return self._float_linear(x, weight)
        bias = self._float(f"{weight.name}.bias") if weight.bias else None
        if storage.block:
            return self._block_product(x, f"{weight.name}.weight", bias)
        return self._channel_product(x, f"{weight.name}.weight", bias)

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

    def scaled_embed(self, ids: ir.Value, table: Table, scale: float) -> ir.Value:
        """See `Ops`."""
        return self._node("Mul", [self.embed(ids, table), self._floats(scale)])

    def place_images(
        self, embeddings: ir.Value, ids: ir.Value, features: ir.Value, image_id: int
    ) -> ir.Value:
        """See `Ops`."""
        is_image = self._node("Equal", [ids, self._integers(np.array(image_id))])
        where = self._node("Transpose", [self._node("NonZero", [is_image])], {"perm": [1, 0]})
        return self._node("ScatterND", [embeddings, where, features])

    def rms_norm(self, x: ir.Value, weight: RmsNorm) -> ir.Value:
        """See `Ops`."""
        self.opset = _GEMMA_OPSET
        name = f"{weight.name}.weight"
        gain = self._weight(name, self.weights.float(name) + 1, FLOAT32, (weight.width,))
        pieces = self._node("Reshape", [x, self._shape([-1, weight.width])])
        attributes: dict[str, _Attribute] = {"axis": -1, "epsilon": weight.eps}
        normed = self._node("RMSNormalization", [pieces, gain], attributes)
        return self._node("Reshape", [normed, self._node("Shape", [x])])

    def average_pool(self, x: ir.Value, side: int, window: int) -> ir.Value:
        """See `Ops`."""
        grid = self._node("Transpose", [x], {"perm": [0, 2, 1]})
        grid = self._node("Reshape", [grid, self._shape([0, 0, side, side])])
        sizes: dict[str, _Attribute] = {"kernel_shape": [window, window], "strides": [window, window]}
        pooled = self._node("AveragePool", [grid], sizes)
        flat = self._node("Reshape", [pooled, self._shape([0, 0, -1])])
        return self._node("Transpose", [flat], {"perm": [0, 2, 1]})

    def join_batch(self, x: ir.Value) -> ir.Value:
        """See `Ops`."""
        return self._node("Flatten", [x], {"axis": 2})

    def gated_mlp(
        self, x: ir.Value, gate: Linear, up: Linear, down: Linear, activation: Activation
    ) -> ir.Value:
        """See `Ops`."""
        opened = self._node("Gelu", [self.linear(x, gate)], {"approximate": "tanh"})
        return self.linear(self._node("Mul", [opened, self.linear(x, up)]), down)

    def rotate(self, x: ir.Value, positions: ir.Value, rotary: Rotary) -> ir.Value:
        """See `Ops`. Angles are computed in the program, so that no table limits the context."""
        self.opset = _GEMMA_OPSET
        angles = self._once((rotary, id(positions)), lambda: self._angles(positions, rotary))
        cosine = self._once(("Cos", id(angles)), lambda: self._node("Cos", [angles]))
        sine = self._once(("Sin", id(angles)), lambda: self._node("Sin", [angles]))
        shape = self._node("Shape", [x])
        heads = self._node("Reshape", [x, self._shape([0, 0, -1, rotary.width])])
        heads = self._node("Transpose", [heads], {"perm": [0, 2, 1, 3]})
        turned = self._node("RotaryEmbedding", [heads, cosine, sine])
        turned = self._node("Transpose", [turned], {"perm": [0, 2, 1, 3]})
        return self._node("Reshape", [turned, shape])

    def _angles(self, positions: ir.Value, rotary: Rotary) -> ir.Value:
        """[B, S] to [B, S, D / 2], in the order of operations of transformers' float32."""
        pairs = np.arange(0, rotary.width, 2, dtype=np.float32) / np.float32(rotary.width)
        frequencies = 1 / np.float32(rotary.theta) ** pairs / np.float32(rotary.factor)
        column = self._node("Unsqueeze", [positions, self._shape([2])])
        column = self._node("Cast", [column], {"to": ir.DataType.FLOAT.value})
        return self._node("Mul", [column, self._floats(frequencies.astype(np.float32))])

    def mask(self, blocks: ir.Value, past_key: ir.Value, window: int | None) -> ir.Value:
        """See `Ops`."""
        past = self._node("Gather", [self._node("Shape", [past_key]), self._integers(np.array(2))])
        new = self._node("Gather", [self._node("Shape", [blocks]), self._integers(np.array(1))])
        total = self._node("Add", [past, new])
        one = self._integers(np.array(1))
        rows = self._node("Unsqueeze", [self._node("Range", [past, total, one]), self._shape([1])])
        columns = self._node("Range", [self._integers(np.array(0)), total, one])
        distance = self._node("Sub", [rows, columns])
        causal = self._node("GreaterOrEqual", [distance, self._integers(np.array(0))])
        batch = self._node("Shape", [blocks], {"start": 0, "end": 1})
        text = ir.tensor(np.array([-1]), name="text")
        past_shape = self._node(
            "Concat", [batch, self._node("Unsqueeze", [past, self._shape([0])])], {"axis": 0}
        )
        past_blocks = self._node("ConstantOfShape", [past_shape], {"value": text})
        key_blocks = self._node("Concat", [past_blocks, blocks], {"axis": 1})
        query_column = self._node("Unsqueeze", [blocks, self._shape([2])])
        same = self._node("Equal", [query_column, self._node("Unsqueeze", [key_blocks, self._shape([1])])])
        in_image = self._node("GreaterOrEqual", [query_column, self._integers(np.array(0))])
        seen = self._node("Or", [causal, self._node("And", [same, in_image])])
        if window is not None:
            near = self._node("Less", [distance, self._integers(np.array(window))])
            seen = self._node("And", [seen, near])
        return self._node("Unsqueeze", [seen, self._shape([1])])

    def cached_attention(
        self,
        q: ir.Value,
        k: ir.Value,
        v: ir.Value,
        past_key: ir.Value,
        past_value: ir.Value,
        mask: ir.Value,
        heads: Heads,
        scale: float,
        window: int | None,
    ) -> tuple[ir.Value, ir.Value, ir.Value]:
        """See `Ops`."""
        self.opset = _GEMMA_OPSET
        attributes: dict[str, _Attribute] = {
            "q_num_heads": heads.query,
            "kv_num_heads": heads.kv,
            "scale": scale,
        }
        result, key, value = self._nodes(
            "Attention", [q, k, v, mask, past_key, past_value], attributes, outputs=3
        )
        if window is not None:
            start, end, axis = self._shape([-window]), self._shape([2**62]), self._shape([2])
            key = self._node("Slice", [key, start, end, axis])
            value = self._node("Slice", [value, start, end, axis])
        return result, key, value

    def logits(self, x: ir.Value, table: Table) -> ir.Value:
        """See `Ops`. The table's bytes are those that `embed` looks up."""
        name = f"{table.name}.weight"
        if self._storage(name).bits == 32:
            return self._node("Gemm", [x, self._float(name)], {"transB": 1})
        return self._block_product(x, name, None)

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

    def _channel_product(self, x: ir.Value, name: str, bias: ir.Value | None) -> ir.Value:
        tensor = self.weights.quantized(name)
        matrix = self._weight(name, tensor.values.T, tensor.storage, tensor.values.shape)
        scales = self._scales(name, tensor.scales[:, 0])
        return self._node("DynamicQuantizeMatMul", [x, matrix, scales, None, bias], domain=DOMAIN)

    def _block_product(self, x: ir.Value, name: str, bias: ir.Value | None) -> ir.Value:
        row, scales = self.weights.plan.by_name[name], self.weights.scales(name)
        outputs, inputs = row.stored_shape
        blocks = self._unsigned(name).reshape(*scales.shape, -1)
        matrix = self._weight(name, blocks, row.storage, (outputs, inputs))
        attributes: dict[str, _Attribute] = {
            "K": inputs,
            "N": outputs,
            "bits": row.storage.bits,
            "block_size": row.storage.block,
            "accuracy_level": 4,
        }
        stored = self._scales(name, scales)
        return self._node("MatMulNBits", [x, matrix, stored, None, None, bias], attributes, DOMAIN)

    def _unsigned(self, name: str) -> NDArray[np.uint8]:
        """Integers as the block kernels store them, around 8 or 128: each one's sign bit turned."""
        is_packed = self._storage(name).bits == 4
        return self.weights.stored_values(name).view(np.uint8) ^ np.uint8(0x88 if is_packed else 0x80)

    def _scales(self, name: str, scales: NDArray[np.float32]) -> ir.Value:
        """Half the bytes on disk: float16 holds every scale exactly, and the cast is folded at load."""
        stored = self._constant(f"{name}.scales", scales.astype(np.float16))
        return self._node("Cast", [stored], {"to": ir.DataType.FLOAT.value})

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

    def _once(self, key: tuple[Hashable, ...], emit: Callable[[], ir.Value]) -> ir.Value:
        """A value that several layers use, emitted by the first."""
        if key not in self._values:
            self._values[key] = emit()
        return self._values[key]

    def _shape(self, sizes: list[int]) -> ir.Value:
        return self._integers(np.array(sizes))

    def _integers(self, array: NDArray[np.int64]) -> ir.Value:
        return self._constant(f"constant.{len(self.initializers)}", array)

    def _floats(self, values: float | NDArray[np.float32]) -> ir.Value:
        return self._constant(f"constant.{len(self.initializers)}", np.asarray(values, np.float32))

    def _node(
        self,
        operator: str,
        inputs: Sequence[ir.Value | None],
        attributes: dict[str, _Attribute] | None = None,
        domain: str = "",
    ) -> ir.Value:
        return self._nodes(operator, inputs, attributes, domain)[0]

    def _nodes(
        self,
        operator: str,
        inputs: Sequence[ir.Value | None],
        attributes: dict[str, _Attribute] | None = None,
        domain: str = "",
        outputs: int = 1,
    ) -> Sequence[ir.Value]:
        name = f"{operator}.{len(self.nodes)}"
        node = ir.node(operator, inputs, attributes or {}, domain=domain, num_outputs=outputs, name=name)
        for index, output in enumerate(node.outputs):
            output.name = f"{name}.output.{index}"
        self.nodes.append(node)
        return node.outputs
