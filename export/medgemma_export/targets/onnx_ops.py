"""The operations as ONNX nodes."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

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
from medgemma_export.targets.onnx_builder import DOMAIN, Attribute, OnnxBuilder
from medgemma_quantization.scheme import FLOAT32

__all__ = ["OnnxOps"]

_OPSET = 20  # the first with Gelu
_GEMMA_OPSET = 23  # the first with RotaryEmbedding and RMSNormalization


@dataclass(kw_only=True)
class OnnxOps:
    """An `Ops[ir.Value]` that emits nodes.

    Attributes:
        onnx: Where they go, and the weights.
        opset: The lowest version of the standard operators that has all that were emitted.
    """

    onnx: OnnxBuilder
    opset: int = _OPSET

    def patch_embedding(self, pixels: ir.Value, weight: PatchEmbedding) -> ir.Value:
        """See `Ops`."""
        kernel = self.onnx.vector(f"{weight.name}.weight")
        patches = self.onnx.node(
            "Conv",
            [pixels, kernel, self.onnx.vector(f"{weight.name}.bias")],
            {"kernel_shape": [weight.patch, weight.patch], "strides": [weight.patch, weight.patch]},
        )
        flat = self.onnx.node("Reshape", [patches, self.onnx.shape([0, weight.width, -1])])
        return self.onnx.node("Transpose", [flat], {"perm": [0, 2, 1]})

    def embed(self, ids: ir.Value, table: Table) -> ir.Value:
        """See `Ops`."""
        first, *others = table.pieces
        if not others:
            return self._look_up(ids, first, table.width)
        # A piece gives a row for every id, its first or last one for those outside; the last of all pieces
        # that begins at an id or before has its row. Ids beyond the table get what a whole one gives: zeros.
        found = self._look_up(
            self.onnx.node("Min", [ids, self.onnx.integers(np.array(first.stop - 1))]), first, table.width
        )
        column = self.onnx.node("Unsqueeze", [ids, self.onnx.shape([-1])])
        for piece in others:
            zero, start = self.onnx.integers(np.array(0)), self.onnx.integers(np.array(piece.start))
            within = self.onnx.node("Max", [self.onnx.node("Sub", [ids, start]), zero])
            if piece.stop < table.rows:
                last = self.onnx.integers(np.array(piece.stop - piece.start - 1))
                within = self.onnx.node("Min", [within, last])
            reached = self.onnx.node("GreaterOrEqual", [column, start])
            found = self.onnx.node("Where", [reached, self._look_up(within, piece, table.width), found])
        return found

    def _look_up(self, ids: ir.Value, piece: TablePiece, width: int) -> ir.Value:
        name = piece.weight
        storage = self.onnx.storage(name)
        if storage.is_float:
            rows = self.onnx.node(
                "Gather", [self.onnx.stored_float([name], self.onnx.weights.float(name)), ids]
            )
            return self.onnx.to_float32(rows) if storage.bits == 16 else rows
        rows = self.onnx.weight(name, self.onnx.unsigned(name), storage, (piece.stop - piece.start, width))
        attributes: dict[str, Attribute] = {
            "bits": storage.bits,
            "block_size": storage.block,
            "gather_axis": 0,
            "quantize_axis": 1,
        }
        scales = self.onnx.stored_scales([name], self.onnx.weights.scales(name))
        if storage.bits == 4:
            # Exact: 4 bits times the 8 of a scale are 11 at most. The scales need no float32 copy then.
            found = self.onnx.node("GatherBlockQuantized", [rows, ids, scales], attributes, DOMAIN)
            return self.onnx.to_float32(found)
        scales = self.onnx.to_float32(scales)
        return self.onnx.node("GatherBlockQuantized", [rows, ids, scales], attributes, DOMAIN)

    def add_positions(self, x: ir.Value, positions: Parameter) -> ir.Value:
        """See `Ops`."""
        return self.onnx.node("Add", [x, self.onnx.vector(positions.name)])

    def linear(self, x: ir.Value, weight: Linear) -> ir.Value:
        """See `Ops`."""
        storage = self.onnx.storage(f"{weight.name}.weight")
        if storage.is_float:
            return self._float_linear(x, weight)
        bias = self.onnx.vector(f"{weight.name}.bias") if weight.bias else None
        if storage.block:
            return self.onnx.block_product(x, [f"{weight.name}.weight"], bias)
        return self.onnx.channel_product(x, [f"{weight.name}.weight"], bias)

    def project_together(self, x: ir.Value, weights: tuple[Linear, ...]) -> tuple[ir.Value, ...]:
        """See `Ops`. One product each: sharing the rounding of `x` gained nothing measurable."""
        return tuple(self.linear(x, weight) for weight in weights)

    def mlp(self, x: ir.Value, up: Linear, down: Linear, activation: Activation) -> ir.Value:
        """See `Ops`."""
        hidden = self.onnx.node("Gelu", [self.linear(x, up)], {"approximate": "tanh"})
        return self.linear(hidden, down)

    def layer_norm(self, x: ir.Value, weight: LayerNorm) -> ir.Value:
        """See `Ops`."""
        gain, shift = self.onnx.vector(f"{weight.name}.weight"), self.onnx.vector(f"{weight.name}.bias")
        return self.onnx.node("LayerNormalization", [x, gain, shift], {"axis": -1, "epsilon": weight.eps})

    def residual_add(self, x: ir.Value, branch: ir.Value) -> ir.Value:
        """See `Ops`. ONNX Runtime fuses it with a LayerNorm that follows."""
        return self.onnx.node("Add", [x, branch])

    def named(self, x: ir.Value, name: str) -> ir.Value:
        """See `Ops`."""
        x.name = name
        return x

    def attention(self, q: ir.Value, k: ir.Value, v: ir.Value, heads: Heads, scale: float) -> ir.Value:
        """See `Ops`. The kernel works in tiles: no [S, S] array of scores is ever in memory."""
        if heads.query != heads.kv:
            raise NotImplementedError("MultiHeadAttention has no grouped heads")
        attributes: dict[str, Attribute] = {"num_heads": heads.query, "scale": scale}
        return self.onnx.node("MultiHeadAttention", [q, k, v], attributes, DOMAIN)

    def expand(self, parameter: Parameter, like: ir.Value) -> ir.Value:
        """See `Ops`."""
        batch = self.onnx.node("Shape", [like], {"start": 0, "end": 1})
        rest = self.onnx.shape(list(parameter.shape[1:]))
        shape = self.onnx.node("Concat", [batch, rest], {"axis": 0})
        return self.onnx.node("Expand", [self.onnx.vector(parameter.name), shape])

    def token(self, x: ir.Value, index: int) -> ir.Value:
        """See `Ops`."""
        return self.onnx.node("Gather", [x, self.onnx.shape([index])], {"axis": 1})

    def scaled_embed(self, ids: ir.Value, table: Table, scale: float) -> ir.Value:
        """See `Ops`."""
        return self.onnx.node("Mul", [self.embed(ids, table), self.onnx.floats(scale)])

    def place_images(
        self, embeddings: ir.Value, ids: ir.Value, features: ir.Value, image_id: int
    ) -> ir.Value:
        """See `Ops`. Without any features nothing is replaced: stock runtimes put them in themselves."""
        is_image = self.onnx.node("Equal", [ids, self.onnx.integers(np.array(image_id))])
        places = self.onnx.node("Transpose", [self.onnx.node("NonZero", [is_image])], {"perm": [1, 0]})
        count = self.onnx.node("Shape", [features], {"start": 0, "end": 1})
        has_none = self.onnx.node("Equal", [count, self.onnx.shape([0])])
        end = self.onnx.node("Where", [has_none, self.onnx.shape([0]), self.onnx.shape([2**62])])
        places = self.onnx.node("Slice", [places, self.onnx.shape([0]), end, self.onnx.shape([0])])
        return self.onnx.node("ScatterND", [embeddings, places, features])

    def rms_norm(self, x: ir.Value, weight: RmsNorm) -> ir.Value:
        """See `Ops`."""
        return self._rms_norm(x, self._gain(weight), weight.eps)

    def residual_norm(self, x: ir.Value, branch: ir.Value, weight: RmsNorm) -> tuple[ir.Value, ir.Value]:
        """See `Ops`."""
        attributes: dict[str, Attribute] = {"epsilon": weight.eps}
        normed, _, _, total = self.onnx.results(
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
        grid = self.onnx.node("Transpose", [x], {"perm": [0, 2, 1]})
        grid = self.onnx.node("Reshape", [grid, self.onnx.shape([0, 0, side, side])])
        sizes: dict[str, Attribute] = {"kernel_shape": [window, window], "strides": [window, window]}
        pooled = self.onnx.node("AveragePool", [grid], sizes)
        flat = self.onnx.node("Reshape", [pooled, self.onnx.shape([0, 0, -1])])
        return self.onnx.node("Transpose", [flat], {"perm": [0, 2, 1]})

    def join_batch(self, x: ir.Value) -> ir.Value:
        """See `Ops`."""
        return self.onnx.node("Flatten", [x], {"axis": 2})

    def gated_mlp(
        self, x: ir.Value, gate: Linear, up: Linear, down: Linear, activation: Activation
    ) -> ir.Value:
        """See `Ops`. Gate and up are two products: to split one costs more than to round `x` twice."""
        opened = self.onnx.node("Gelu", [self.linear(x, gate)], {"approximate": "tanh"})
        return self.linear(self.onnx.node("Mul", [opened, self.linear(x, up)]), down)

    def project_heads(
        self, x: ir.Value, weights: HeadProjection, positions: ir.Value, rotary: Rotary, heads: Heads
    ) -> tuple[ir.Value, ir.Value, ir.Value]:
        """See `Ops`. One product; q and k are normalized and rotated as the heads of one tensor.

        Angles are computed in the program, so that no table limits the context.
        """
        angles = self.onnx.once((rotary, id(positions)), lambda: self._angles(positions, rotary))
        cosine = self.onnx.once(("Cos", id(angles)), lambda: self.onnx.node("Cos", [angles]))
        sine = self.onnx.once(("Sin", id(angles)), lambda: self.onnx.node("Sin", [angles]))
        joined, [q_width, k_width, v_width] = self._joined_product(
            x, [weights.query, weights.key, weights.value]
        )
        both, v = self._split(joined, [q_width + k_width, v_width])
        gains = [
            self.onnx.node("Expand", [self._gain(norm), self.onnx.shape([count, heads.width])])
            for norm, count in ((weights.query_norm, heads.query), (weights.key_norm, heads.kv))
        ]
        gain = self.onnx.node("Concat", gains, {"axis": 0})
        both = self.onnx.node("Reshape", [both, self.onnx.shape([0, 0, heads.query + heads.kv, heads.width])])
        both = self._rms_norm(both, gain, weights.query_norm.eps)
        both = self.onnx.node("Reshape", [both, self.onnx.shape([0, 0, q_width + k_width])])
        count: dict[str, Attribute] = {"num_heads": heads.query + heads.kv}
        q, k = self._split(
            self.onnx.node("RotaryEmbedding", [both, cosine, sine, None], count), [q_width, k_width]
        )
        return q, k, v

    def _angles(self, positions: ir.Value, rotary: Rotary) -> ir.Value:
        """[B, S] to [B, S, D / 2], in the order of operations of transformers' float32."""
        pairs = np.arange(0, rotary.width, 2, dtype=np.float32) / np.float32(rotary.width)
        frequencies = 1 / np.float32(rotary.theta) ** pairs / np.float32(rotary.factor)
        column = self.onnx.node("Unsqueeze", [positions, self.onnx.shape([2])])
        column = self.onnx.node("Cast", [column], {"to": ir.DataType.FLOAT.value})
        return self.onnx.node("Mul", [column, self.onnx.floats(frequencies.astype(np.float32))])

    def mask(
        self,
        positions: ir.Value,
        blocks: ir.Value,
        attention_mask: ir.Value,
        start: ir.Value | None,
        window: int | None,
    ) -> ir.Value:
        """See `Ops`. The result is what is added to the scores: 0, or the lowest float32."""
        zero, one = self.onnx.integers(np.array(0)), self.onnx.integers(np.array(1))
        shape = self.onnx.once(("Shape", id(positions)), lambda: self.onnx.node("Shape", [positions]))
        blocks = self.onnx.once(("Expand", id(blocks)), lambda: self.onnx.node("Expand", [blocks, shape]))
        new = self.onnx.node("Gather", [shape, one])
        total = self.onnx.node("Gather", [self.onnx.node("Shape", [attention_mask]), one])
        first = zero if start is None else self.onnx.node("Squeeze", [start])
        past = self.onnx.node("Sub", [total, new])
        rows = self.onnx.node(
            "Unsqueeze", [self.onnx.node("Range", [past, total, one]), self.onnx.shape([1])]
        )
        distance = self.onnx.node("Sub", [rows, self.onnx.node("Range", [first, total, one])])
        query_blocks = self.onnx.node("Unsqueeze", [blocks, self.onnx.shape([2])])
        held = self.onnx.node("Unsqueeze", [self.onnx.node("Sub", [past, first]), self.onnx.shape([0])])
        pads = self.onnx.node("Concat", [self.onnx.shape([0]), held, self.onnx.shape([0, 0])], {"axis": 0})
        key_blocks = self.onnx.node("Pad", [blocks, pads, self.onnx.integers(np.array(-1))])
        same = self.onnx.node(
            "Equal", [query_blocks, self.onnx.node("Unsqueeze", [key_blocks, self.onnx.shape([1])])]
        )
        is_image = self.onnx.node("GreaterOrEqual", [query_blocks, zero])
        causal = self.onnx.node("GreaterOrEqual", [distance, zero])
        seen = self.onnx.node("Or", [causal, self.onnx.node("And", [same, is_image])])
        if window is not None:
            near = self.onnx.node("Less", [distance, self.onnx.integers(np.array(window))])
            seen = self.onnx.node("And", [seen, near])
        if start is not None:
            end = self.onnx.shape([2**62])
            attention_mask = self.onnx.node("Slice", [attention_mask, start, end, self.onnx.shape([1])])
        is_real = self.onnx.node("Cast", [attention_mask], {"to": ir.DataType.BOOL.value})
        seen = self.onnx.node("And", [seen, self.onnx.node("Unsqueeze", [is_real, self.onnx.shape([1])])])
        hidden = self.onnx.floats(float(np.finfo(np.float32).min))
        bias = self.onnx.node("Where", [seen, self.onnx.floats(0.0), hidden])
        return self.onnx.node("Unsqueeze", [bias, self.onnx.shape([1])])

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
        keys = self.onnx.once(("keys", id(mask)), lambda: self._key_count(mask))
        last = self.onnx.once(("last", id(mask)), lambda: self._last_key(keys, mask))
        attributes: dict[str, Attribute] = {
            "num_heads": heads.query,
            "kv_num_heads": heads.kv,
            "scale": scale,
            "causal": 0,
        }
        inputs = [q, k, v, past_key, past_value, last, keys, None, None, None, mask]
        result, key, value = self.onnx.results("GroupQueryAttention", inputs, attributes, DOMAIN, outputs=3)
        return result, key, value

    def _key_count(self, mask: ir.Value) -> ir.Value:
        """How many keys there are, past and new: an int32 scalar."""
        count = self.onnx.node("Gather", [self.onnx.node("Shape", [mask]), self.onnx.integers(np.array(3))])
        return self.onnx.node("Cast", [count], {"to": ir.DataType.INT32.value})

    def _last_key(self, keys: ir.Value, mask: ir.Value) -> ir.Value:
        """The index of the last key, for each row of the batch: [B] int32."""
        one = self.onnx.integers(np.array(1, np.int32))
        batch = self.onnx.node("Shape", [mask], {"start": 0, "end": 1})
        return self.onnx.node("Expand", [self.onnx.node("Sub", [keys, one]), batch])

    def logits(self, x: ir.Value, table: Table) -> ir.Value:
        """See `Ops`. The table's bytes are those that `embed` looks up."""
        parts = [self._piece_logits(x, piece.weight) for piece in table.pieces]
        return parts[0] if len(parts) == 1 else self.onnx.node("Concat", parts, {"axis": -1})

    def _piece_logits(self, x: ir.Value, name: str) -> ir.Value:
        storage = self.onnx.storage(name)
        if storage.is_float:
            matrix = self.onnx.stored_float([name], self.onnx.weights.float(name))
            matrix = self.onnx.to_float32(matrix) if storage.bits == 16 else matrix
            # Gemm reads the table as it lies, and has no third axis.
            flat = self.onnx.node("Squeeze", [x, self.onnx.shape([1])])
            flat = self.onnx.node("Gemm", [flat, matrix], {"transB": 1})
            return self.onnx.node("Unsqueeze", [flat, self.onnx.shape([1])])
        return self.onnx.block_product(x, [name], None)

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
        widths = [self.onnx.weights.plan.by_name[name].stored_shape[0] for name in names]
        if len({self.onnx.storage(name) for name in names}) > 1:
            parts = [self.linear(x, linear) for linear in linears]
            return self.onnx.node("Concat", parts, {"axis": -1}), widths
        storage = self.onnx.storage(names[0])
        if storage.is_float:
            return self.onnx.float_product(x, names), widths
        if storage.block:
            return self.onnx.block_product(x, names, None), widths
        return self.onnx.channel_product(x, names, None), widths

    def _split(self, x: ir.Value, widths: list[int]) -> Sequence[ir.Value]:
        return self.onnx.results("Split", [x, self.onnx.shape(widths)], {"axis": -1}, outputs=len(widths))

    def _rms_norm(self, x: ir.Value, gain: ir.Value, eps: float) -> ir.Value:
        self.opset = _GEMMA_OPSET
        return self.onnx.node("RMSNormalization", [x, gain], {"axis": -1, "epsilon": eps})

    def _gain(self, weight: RmsNorm) -> ir.Value:
        name = f"{weight.name}.weight"
        return self.onnx.weight(
            name, (self.onnx.weights.float(name) + 1) * weight.factor, FLOAT32, (weight.width,)
        )

    def _float_linear(self, x: ir.Value, weight: Linear) -> ir.Value:
        y = self.onnx.float_product(x, [f"{weight.name}.weight"])
        return self.onnx.node("Add", [y, self.onnx.vector(f"{weight.name}.bias")]) if weight.bias else y
