"""The operations as ONNX nodes."""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from medgemma_export.external_data import ExternalData
from medgemma_export.ops import (
    Activation,
    HeadProjection,
    Heads,
    LayerNorm,
    Linear,
    Parameter,
    PatchEmbedding,
    RmsNorm,
    Rotary,
    Table,
    TablePiece,
)
from medgemma_quantization.activations import ActivationRange
from medgemma_quantization.plan import PackedWeight
from medgemma_quantization.scheme import FLOAT32, Storage
from medgemma_quantization.weights import QuantizedWeights

__all__ = ["OnnxOps", "DOMAIN", "JOINT"]

DOMAIN = "com.microsoft"

JOINT = "+"
"""Between the names of weights that one tensor holds."""

_OPSET = 20  # the first with Gelu
_GEMMA_OPSET = 23  # the first with RotaryEmbedding and RMSNormalization

# A weight of more bytes is multiplied in pieces, whose rows keep the file's alignment.
_PIECE_BYTES = 96 << 20
_PIECE_ROWS = 1 << 14

_Emitted = TypeVar("_Emitted")
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
    _values: dict[tuple[Hashable, ...], Any] = field(default_factory=dict)

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
        first, *others = table.pieces
        if not others:
            return self._look_up(ids, first, table.width)
        # A piece gives a row for every id, its first or last one for those outside; the last of all pieces
        # that begins at an id or before has its row. Ids beyond the table get what a whole one gives: zeros.
        found = self._look_up(
            self._node("Min", [ids, self._integers(np.array(first.stop - 1))]), first, table.width
        )
        column = self._node("Unsqueeze", [ids, self._shape([-1])])
        for piece in others:
            zero, start = self._integers(np.array(0)), self._integers(np.array(piece.start))
            within = self._node("Max", [self._node("Sub", [ids, start]), zero])
            if piece.stop < table.rows:
                last = self._integers(np.array(piece.stop - piece.start - 1))
                within = self._node("Min", [within, last])
            reached = self._node("GreaterOrEqual", [column, start])
            found = self._node("Where", [reached, self._look_up(within, piece, table.width), found])
        return found

    def _look_up(self, ids: ir.Value, piece: TablePiece, width: int) -> ir.Value:
        name = piece.weight
        storage = self._storage(name)
        if storage.is_float:
            rows = self._node("Gather", [self._stored_float([name], self.weights.float(name)), ids])
            return self._to_float32(rows) if storage.bits == 16 else rows
        rows = self._weight(name, self._unsigned(name), storage, (piece.stop - piece.start, width))
        attributes: dict[str, _Attribute] = {
            "bits": storage.bits,
            "block_size": storage.block,
            "gather_axis": 0,
            "quantize_axis": 1,
        }
        scales = self._stored_scales([name], self.weights.scales(name))
        if storage.bits == 4:
            # Exact: 4 bits times the 8 of a scale are 11 at most. The scales need no float32 copy then.
            found = self._node("GatherBlockQuantized", [rows, ids, scales], attributes, DOMAIN)
            return self._to_float32(found)
        scales = self._to_float32(scales)
        return self._node("GatherBlockQuantized", [rows, ids, scales], attributes, DOMAIN)

    def add_positions(self, x: ir.Value, positions: Parameter) -> ir.Value:
        """See `Ops`."""
        return self._node("Add", [x, self._float(positions.name)])

    def linear(self, x: ir.Value, weight: Linear) -> ir.Value:
        """See `Ops`."""
        storage = self._storage(f"{weight.name}.weight")
        if storage.is_float:
            return self._float_linear(x, weight)
        bias = self._float(f"{weight.name}.bias") if weight.bias else None
        if storage.block:
            return self._block_product(x, [f"{weight.name}.weight"], bias)
        return self._channel_product(x, [f"{weight.name}.weight"], bias)

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

    def named(self, x: ir.Value, name: str) -> ir.Value:
        """See `Ops`."""
        x.name = name
        return x

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
        return self._node("Gather", [x, self._shape([index])], {"axis": 1})

    def scaled_embed(self, ids: ir.Value, table: Table, scale: float) -> ir.Value:
        """See `Ops`."""
        return self._node("Mul", [self.embed(ids, table), self._floats(scale)])

    def place_images(
        self, embeddings: ir.Value, ids: ir.Value, features: ir.Value, image_id: int
    ) -> ir.Value:
        """See `Ops`. Without any features nothing is replaced: stock runtimes put them in themselves."""
        is_image = self._node("Equal", [ids, self._integers(np.array(image_id))])
        places = self._node("Transpose", [self._node("NonZero", [is_image])], {"perm": [1, 0]})
        count = self._node("Shape", [features], {"start": 0, "end": 1})
        has_none = self._node("Equal", [count, self._shape([0])])
        end = self._node("Where", [has_none, self._shape([0]), self._shape([2**62])])
        places = self._node("Slice", [places, self._shape([0]), end, self._shape([0])])
        return self._node("ScatterND", [embeddings, places, features])

    def rms_norm(self, x: ir.Value, weight: RmsNorm) -> ir.Value:
        """See `Ops`."""
        return self._rms_norm(x, self._gain(weight), weight.eps)

    def residual_norm(self, x: ir.Value, branch: ir.Value, weight: RmsNorm) -> tuple[ir.Value, ir.Value]:
        """See `Ops`."""
        attributes: dict[str, _Attribute] = {"epsilon": weight.eps}
        normed, _, _, total = self._nodes(
            "SkipSimplifiedLayerNormalization",
            [x, branch, self._gain(weight)],
            attributes,
            DOMAIN,
            outputs=4,
            unused=(1, 2),
        )
        return total, normed

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
        """See `Ops`. Gate and up are two products: to split one costs more than to round `x` twice."""
        opened = self._node("Gelu", [self.linear(x, gate)], {"approximate": "tanh"})
        return self.linear(self._node("Mul", [opened, self.linear(x, up)]), down)

    def project_heads(
        self, x: ir.Value, weights: HeadProjection, positions: ir.Value, rotary: Rotary, heads: Heads
    ) -> tuple[ir.Value, ir.Value, ir.Value]:
        """See `Ops`. One product; q and k are normalized and rotated as the heads of one tensor.

        Angles are computed in the program, so that no table limits the context.
        """
        angles = self._once((rotary, id(positions)), lambda: self._angles(positions, rotary))
        cosine = self._once(("Cos", id(angles)), lambda: self._node("Cos", [angles]))
        sine = self._once(("Sin", id(angles)), lambda: self._node("Sin", [angles]))
        joined, [q_width, k_width, v_width] = self._joined_product(
            x, [weights.query, weights.key, weights.value]
        )
        both, v = self._split(joined, [q_width + k_width, v_width])
        gains = [
            self._node("Expand", [self._gain(norm), self._shape([count, heads.width])])
            for norm, count in ((weights.query_norm, heads.query), (weights.key_norm, heads.kv))
        ]
        gain = self._node("Concat", gains, {"axis": 0})
        both = self._node("Reshape", [both, self._shape([0, 0, heads.query + heads.kv, heads.width])])
        both = self._rms_norm(both, gain, weights.query_norm.eps)
        both = self._node("Reshape", [both, self._shape([0, 0, q_width + k_width])])
        count: dict[str, _Attribute] = {"num_heads": heads.query + heads.kv}
        q, k = self._split(
            self._node("RotaryEmbedding", [both, cosine, sine, None], count), [q_width, k_width]
        )
        return q, k, v

    def _angles(self, positions: ir.Value, rotary: Rotary) -> ir.Value:
        """[B, S] to [B, S, D / 2], in the order of operations of transformers' float32."""
        pairs = np.arange(0, rotary.width, 2, dtype=np.float32) / np.float32(rotary.width)
        frequencies = 1 / np.float32(rotary.theta) ** pairs / np.float32(rotary.factor)
        column = self._node("Unsqueeze", [positions, self._shape([2])])
        column = self._node("Cast", [column], {"to": ir.DataType.FLOAT.value})
        return self._node("Mul", [column, self._floats(frequencies.astype(np.float32))])

    def mask(
        self,
        positions: ir.Value,
        blocks: ir.Value,
        attention_mask: ir.Value,
        start: ir.Value | None,
        window: int | None,
    ) -> ir.Value:
        """See `Ops`. The result is what is added to the scores: 0, or the lowest float32."""
        zero, one = self._integers(np.array(0)), self._integers(np.array(1))
        shape = self._once(("Shape", id(positions)), lambda: self._node("Shape", [positions]))
        blocks = self._once(("Expand", id(blocks)), lambda: self._node("Expand", [blocks, shape]))
        new = self._node("Gather", [shape, one])
        total = self._node("Gather", [self._node("Shape", [attention_mask]), one])
        first = zero if start is None else self._node("Squeeze", [start])
        past = self._node("Sub", [total, new])
        rows = self._node("Unsqueeze", [self._node("Range", [past, total, one]), self._shape([1])])
        distance = self._node("Sub", [rows, self._node("Range", [first, total, one])])
        query_blocks = self._node("Unsqueeze", [blocks, self._shape([2])])
        held = self._node("Unsqueeze", [self._node("Sub", [past, first]), self._shape([0])])
        pads = self._node("Concat", [self._shape([0]), held, self._shape([0, 0])], {"axis": 0})
        key_blocks = self._node("Pad", [blocks, pads, self._integers(np.array(-1))])
        same = self._node("Equal", [query_blocks, self._node("Unsqueeze", [key_blocks, self._shape([1])])])
        is_image = self._node("GreaterOrEqual", [query_blocks, zero])
        causal = self._node("GreaterOrEqual", [distance, zero])
        seen = self._node("Or", [causal, self._node("And", [same, is_image])])
        if window is not None:
            near = self._node("Less", [distance, self._integers(np.array(window))])
            seen = self._node("And", [seen, near])
        if start is not None:
            end = self._shape([2**62])
            attention_mask = self._node("Slice", [attention_mask, start, end, self._shape([1])])
        is_real = self._node("Cast", [attention_mask], {"to": ir.DataType.BOOL.value})
        seen = self._node("And", [seen, self._node("Unsqueeze", [is_real, self._shape([1])])])
        hidden = self._floats(float(np.finfo(np.float32).min))
        bias = self._node("Where", [seen, self._floats(0.0), hidden])
        return self._node("Unsqueeze", [bias, self._shape([1])])

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
    ) -> tuple[ir.Value, ir.Value, ir.Value]:
        """See `Ops`.

        The kernel appends to the past in place where a runtime binds one buffer to both, and hands out a
        longer copy where not. It is told to be bidirectional, because its own causal mask cannot be lifted
        for images: the mask says everything.
        """
        keys = self._once(("keys", id(mask)), lambda: self._key_count(mask))
        last = self._once(("last", id(mask)), lambda: self._last_key(keys, mask))
        attributes: dict[str, _Attribute] = {
            "num_heads": heads.query,
            "kv_num_heads": heads.kv,
            "scale": scale,
            "causal": 0,
        }
        inputs = [q, k, v, past_key, past_value, last, keys, None, None, None, mask]
        result, key, value = self._nodes("GroupQueryAttention", inputs, attributes, DOMAIN, outputs=3)
        return result, key, value

    def _key_count(self, mask: ir.Value) -> ir.Value:
        """How many keys there are, past and new: an int32 scalar."""
        count = self._node("Gather", [self._node("Shape", [mask]), self._integers(np.array(3))])
        return self._node("Cast", [count], {"to": ir.DataType.INT32.value})

    def _last_key(self, keys: ir.Value, mask: ir.Value) -> ir.Value:
        """The index of the last key, for each row of the batch: [B] int32."""
        one = self._constant(f"constant.{len(self.initializers)}", np.array(1, np.int32))
        batch = self._node("Shape", [mask], {"start": 0, "end": 1})
        return self._node("Expand", [self._node("Sub", [keys, one]), batch])

    def logits(self, x: ir.Value, table: Table) -> ir.Value:
        """See `Ops`. The table's bytes are those that `embed` looks up."""
        parts = [self._piece_logits(x, piece.weight) for piece in table.pieces]
        return parts[0] if len(parts) == 1 else self._node("Concat", parts, {"axis": -1})

    def _piece_logits(self, x: ir.Value, name: str) -> ir.Value:
        storage = self._storage(name)
        if storage.is_float:
            matrix = self._stored_float([name], self.weights.float(name))
            matrix = self._to_float32(matrix) if storage.bits == 16 else matrix
            # Gemm reads the table as it lies, and has no third axis.
            flat = self._node("Squeeze", [x, self._shape([1])])
            flat = self._node("Gemm", [flat, matrix], {"transB": 1})
            return self._node("Unsqueeze", [flat, self._shape([1])])
        return self._block_product(x, [name], None)

    def output(self, value: ir.Value, declared: ir.Value) -> ir.Value:
        """Give a result the name, shape and type of a declared output."""
        value.name, value.shape, value.type = declared.name, declared.shape, declared.type
        value.doc_string = declared.doc_string
        return value

    def _joined_product(self, x: ir.Value, linears: Sequence[Linear]) -> tuple[ir.Value, list[int]]:
        """Several linears without bias as one product, and how wide the result of each is.

        Their rows lie one after the other under a name that joins theirs. Where the plan stores them in
        different ways, each is a product of its own.
        """
        names = [f"{linear.name}.weight" for linear in linears]
        widths = [self.weights.plan.by_name[name].stored_shape[0] for name in names]
        if len({self._storage(name) for name in names}) > 1:
            parts = [self.linear(x, linear) for linear in linears]
            return self._node("Concat", parts, {"axis": -1}), widths
        storage = self._storage(names[0])
        if storage.is_float:
            return self._float_product(x, names), widths
        if storage.block:
            return self._block_product(x, names, None), widths
        return self._channel_product(x, names, None), widths

    def _split(self, x: ir.Value, widths: list[int]) -> Sequence[ir.Value]:
        return self._nodes("Split", [x, self._shape(widths)], {"axis": -1}, outputs=len(widths))

    def _float_product(self, x: ir.Value, names: Sequence[str]) -> ir.Value:
        array = np.concatenate([self.weights.float(name) for name in names]).T
        matrix = self._stored_float(names, array)
        if self._storage(names[0]).bits == 16:
            matrix = self._to_float32(matrix)
        return self._node("MatMul", [x, matrix])

    def _stored_float(self, names: Sequence[str], array: NDArray[np.float32]) -> ir.Value:
        is_half = self._storage(names[0]).bits == 16
        return self._joined(names, array.astype(np.float16) if is_half else array)

    def _to_float32(self, x: ir.Value) -> ir.Value:
        return self._node("Cast", [x], {"to": ir.DataType.FLOAT.value})

    def _channel_product(self, x: ir.Value, names: Sequence[str], bias: ir.Value | None) -> ir.Value:
        tensors = [self.weights.quantized(name) for name in names]
        matrix = self._joined(names, np.concatenate([tensor.values for tensor in tensors]).T)
        scales = self._scales(names, np.concatenate([tensor.scales[:, 0] for tensor in tensors]))
        known = self.weights.inputs.get(names[0])
        if known is None:
            return self._node("DynamicQuantizeMatMul", [x, matrix, scales, None, bias], domain=DOMAIN)
        rounded, scale, zero = self._once(("rounded", id(x), known), lambda: self._rounded(x, known))
        return self._node(
            "MatMulIntegerToFloat", [rounded, matrix, scale, scales, zero, None, bias], domain=DOMAIN
        )

    def _rounded(self, x: ir.Value, known: ActivationRange) -> tuple[ir.Value, ir.Value, ir.Value]:
        """An activation as uint8, for all matrices that share it, with scale and zero point."""
        scale = self._floats(known.scale)
        zero = self._constant(f"constant.{len(self.initializers)}", np.array(known.zero, np.uint8))
        return self._node("QuantizeLinear", [x, scale, zero]), scale, zero

    def _block_product(self, x: ir.Value, names: Sequence[str], bias: ir.Value | None) -> ir.Value:
        rows = [self.weights.plan.by_name[name] for name in names]
        storage, inputs = rows[0].storage, rows[0].stored_shape[1]
        scales = np.concatenate([self.weights.scales(name) for name in names])
        values = np.concatenate([self._unsigned(name) for name in names]).reshape(*scales.shape, -1)
        attributes: dict[str, _Attribute] = {
            "K": inputs,
            "N": len(values),
            "bits": storage.bits,
            "block_size": storage.block,
            "accuracy_level": 4,
        }
        if values.nbytes > _PIECE_BYTES and bias is None:
            return self._product_in_pieces(x, names, values, scales, attributes)
        matrix, stored = self._joined(names, values), self._scales(names, scales)
        return self._node("MatMulNBits", [x, matrix, stored, None, None, bias], attributes, DOMAIN)

    def _product_in_pieces(
        self,
        x: ir.Value,
        names: Sequence[str],
        values: NDArray[np.uint8],
        scales: NDArray[np.float32],
        attributes: dict[str, _Attribute],
    ) -> ir.Value:
        """One product for every so many rows: ONNX Runtime copies each weight as it loads it."""
        rows = -(-len(values) * _PIECE_BYTES // values.nbytes // _PIECE_ROWS) * _PIECE_ROWS
        self._note_joined(names)
        name = JOINT.join(names)
        matrices = self.data.add_in_pieces(name, values, rows)
        halves = self.data.add_in_pieces(f"{name}.scales", scales.astype(np.float16), rows)
        parts = []
        for matrix, half in zip(matrices, halves, strict=True):
            sizes = attributes | {"N": matrix.shape.numpy()[0]}
            stored = self._to_float32(self._initializer(half))
            parts.append(self._node("MatMulNBits", [x, self._initializer(matrix), stored], sizes, DOMAIN))
        return self._node("Concat", parts, {"axis": -1})

    def _rms_norm(self, x: ir.Value, gain: ir.Value, eps: float) -> ir.Value:
        self.opset = _GEMMA_OPSET
        return self._node("RMSNormalization", [x, gain], {"axis": -1, "epsilon": eps})

    def _gain(self, weight: RmsNorm) -> ir.Value:
        name = f"{weight.name}.weight"
        return self._weight(name, (self.weights.float(name) + 1) * weight.factor, FLOAT32, (weight.width,))

    def _float_linear(self, x: ir.Value, weight: Linear) -> ir.Value:
        y = self._float_product(x, [f"{weight.name}.weight"])
        return self._node("Add", [y, self._float(f"{weight.name}.bias")]) if weight.bias else y

    def _unsigned(self, name: str) -> NDArray[np.uint8]:
        """Integers as the block kernels store them, around 8 or 128: each one's sign bit turned."""
        is_packed = self._storage(name).bits == 4
        return self.weights.stored_values(name).view(np.uint8) ^ np.uint8(0x88 if is_packed else 0x80)

    def _scales(self, names: Sequence[str], scales: NDArray[np.float32]) -> ir.Value:
        """As the kernels take them; the cast is folded when the program is loaded."""
        return self._to_float32(self._stored_scales(names, scales))

    def _stored_scales(self, names: Sequence[str], scales: NDArray[np.float32]) -> ir.Value:
        """Half the bytes on disk: float16 holds every scale exactly."""
        return self._constant(f"{JOINT.join(names)}.scales", scales.astype(np.float16))

    def _storage(self, name: str) -> Storage:
        return self.weights.plan.by_name[name].storage

    def _float(self, name: str) -> ir.Value:
        array = self.weights.float(name)
        return self._weight(name, array, FLOAT32, array.shape)

    def _joined(self, names: Sequence[str], array: NDArray[Any]) -> ir.Value:
        """Weights of one storage that lie as one: the rows of the first, then those of the next."""
        self._note_joined(names)
        return self._constant(JOINT.join(names), array)

    def _note_joined(self, names: Sequence[str]) -> None:
        for name in names:
            row = self.weights.plan.by_name[name]
            self.note(PackedWeight(name=name, storage=row.storage, shape=row.stored_shape))

    def _weight(self, name: str, array: NDArray[Any], storage: Storage, shape: tuple[int, ...]) -> ir.Value:
        self.note(PackedWeight(name=name, storage=storage, shape=shape))
        return self._constant(name, array)

    def _constant(self, name: str, array: NDArray[Any]) -> ir.Value:
        return self._initializer(self.data.add(name, array))

    def _initializer(self, tensor: ir.TensorProtocol) -> ir.Value:
        value = ir.Value(
            name=tensor.name,
            shape=ir.Shape(tensor.shape.numpy()),
            type=ir.TensorType(tensor.dtype),
            const_value=tensor,
        )
        self.initializers.append(value)
        return value

    def _once(self, key: tuple[Hashable, ...], emit: Callable[[], _Emitted]) -> _Emitted:
        """A value that several layers use, emitted by the first, or several such."""
        if key not in self._values:
            self._values[key] = emit()
        found: _Emitted = self._values[key]
        return found

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
        unused: Sequence[int] = (),
    ) -> Sequence[ir.Value]:
        name = f"{operator}.{len(self.nodes)}"
        node = ir.node(operator, inputs, attributes or {}, domain=domain, num_outputs=outputs, name=name)
        for index, output in enumerate(node.outputs):
            output.name = "" if index in unused else f"{name}.output.{index}"
        self.nodes.append(node)
        return node.outputs
