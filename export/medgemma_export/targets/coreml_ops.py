"""The operations as Core ML's MIL, for one item at a time and fixed sizes.

Safe in float16 by construction: a norm divides by the largest magnitude before it squares, a mask is finite,
queries are scaled before they meet keys, and indices stay int32.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

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
)
from medgemma_export.targets.coreml_builder import MilBuilder
from medgemma_export.targets.coreml_mil import Var

__all__ = ["MilOps", "Cache", "CacheSlot", "StepInputs"]

# 16 heads of 1,024 patches: what is larger is computed for some of the queries at a time.
_MAX_SCORES = 1 << 24


@dataclass(kw_only=True)
class Cache:
    """A state: keys and values of several layers, [2 * layers, kv, rows, D] float16, K before V.

    Attributes:
        state: The function's input.
        slot: [1] int32, the first of the rows that the new tokens take.
        current: What the state holds after the layers so far.
        begin: `slot` as an index into the state.
    """

    state: Var
    slot: Var
    current: Var | None = None
    begin: Var | None = None


@dataclass(frozen=True, kw_only=True)
class CacheSlot:
    """Where one layer's keys and values lie: what stands for `past_key` and `past_value`."""

    cache: Cache
    layer: int


@dataclass(frozen=True, kw_only=True)
class StepInputs:
    """What a decoder's function is given beside embeddings.

    Attributes:
        rotary: For each rotary embedding cosines and sines, [1, 1, S, D / 2].
        masks: What is added to scores, [1, 1, S, rows]: of layers with a window (True) and without.
        last: [1] int32, the index of the last token; None where there is one token only.
    """

    rotary: Mapping[Rotary, tuple[Var, Var]]
    masks: Mapping[bool, Var]
    last: Var | None


@dataclass(kw_only=True)
class MilOps:
    """An `Ops[Var]` that adds to the function being built.

    Attributes:
        mil: Adds operators and weights.
        step: Of a decoder.
    """

    mil: MilBuilder
    step: StepInputs | None = None
    _tiled: dict[int, Var] = field(default_factory=dict)

    def output(self, x: Var, name: str) -> Var:
        """A result as float32, under the name that is declared."""
        return self.mil.output(x, name)

    def patch_embedding(self, pixels: Var, weight: PatchEmbedding) -> Var:
        """See `Ops`."""
        patches = self.mil.op(
            "conv",
            x=pixels,
            weight=self.mil.floats(f"{weight.name}.weight"),
            bias=self.mil.floats(f"{weight.name}.bias"),
            strides=[weight.patch, weight.patch],
            pad_type="valid",
        )
        flat = self.mil.op("reshape", x=patches, shape=[1, weight.width, -1])
        return self.mil.op("transpose", x=flat, perm=[0, 2, 1])

    def embed(self, ids: Var, table: Table) -> Var:
        """See `Ops`."""
        rows = self.mil.matrix(f"{table.name}.weight")
        return self.mil.op("gather", x=rows, indices=ids, axis=0, validate_indices=False)

    def add_positions(self, x: Var, positions: Parameter) -> Var:
        """See `Ops`."""
        return self.mil.op("add", x=x, y=self.mil.floats(positions.name))

    def linear(self, x: Var, weight: Linear) -> Var:
        """See `Ops`."""
        matrix = self.mil.matrix(f"{weight.name}.weight")
        bias = self.mil.floats(f"{weight.name}.bias") if weight.bias else self.mil.zeros(matrix.shape[0])
        return self.mil.op("linear", x=x, weight=matrix, bias=bias)

    def project_together(self, x: Var, weights: tuple[Linear, ...]) -> tuple[Var, ...]:
        """See `Ops`. One product each."""
        return tuple(self.linear(x, weight) for weight in weights)

    def mlp(self, x: Var, up: Linear, down: Linear, activation: Activation) -> Var:
        """See `Ops`."""
        return self.linear(self._gelu(self.linear(x, up)), down)

    def layer_norm(self, x: Var, weight: LayerNorm) -> Var:
        """See `Ops`."""
        return self.mil.op(
            "layer_norm",
            x=x,
            axes=[-1],
            gamma=self.mil.floats(f"{weight.name}.weight"),
            beta=self.mil.floats(f"{weight.name}.bias"),
            epsilon=self.mil.number(weight.eps),
        )

    def residual_add(self, x: Var, branch: Var) -> Var:
        """See `Ops`."""
        return self.mil.op("add", x=x, y=branch)

    def named(self, x: Var, name: str) -> Var:
        """See `Ops`."""
        x.name = name
        return x

    def attention(self, q: Var, k: Var, v: Var, heads: Heads, scale: float) -> Var:
        """See `Ops`. A few queries at a time, so that no full array of scores is ever in memory."""
        if heads.query != heads.kv:
            raise NotImplementedError("attention without a cache has no grouped heads")
        q = self._split(self.mil.op("mul", x=q, y=self.mil.number(scale)), heads)
        k, v = self._split(k, heads), self._split(v, heads)
        queries, keys = q.shape[2], k.shape[2]
        step = math.ceil(queries / math.ceil(heads.query * queries * keys / _MAX_SCORES))
        parts = []
        for start in range(0, queries, step):
            size = min(step, queries - start)
            some = q
            if size < queries:
                begin, sizes = [0, 0, start, 0], [1, heads.query, size, heads.width]
                some = self.mil.op("slice_by_size", x=q, begin=begin, size=sizes)
            scores = self.mil.op("matmul", x=some, y=k, transpose_y=True)
            parts.append(self.mil.op("matmul", x=self.mil.op("softmax", x=scores, axis=-1), y=v))
        whole = parts[0] if len(parts) == 1 else self.mil.op("concat", values=parts, axis=2)
        return self._join(whole)

    def expand(self, parameter: Parameter, like: Var) -> Var:
        """See `Ops`. There is one item."""
        return self.mil.floats(parameter.name)

    def token(self, x: Var, index: int) -> Var:
        """See `Ops`. The last token of a chunk is the last that is not padding."""
        if x.shape[1] == 1:
            return x
        if index == -1 and self.step is not None:
            return self.mil.op("gather", x=x, indices=self.step.last, axis=1, validate_indices=False)
        begin = [0, index % x.shape[1], 0]
        return self.mil.op("slice_by_size", x=x, begin=begin, size=[1, 1, x.shape[2]])

    def scaled_embed(self, ids: Var, table: Table, scale: float) -> Var:
        """See `Ops`."""
        raise NotImplementedError("a decoder's embeddings are looked up outside Core ML")

    def place_images(self, embeddings: Var, ids: Var, features: Var, image_id: int) -> Var:
        """See `Ops`."""
        raise NotImplementedError("a decoder's embeddings are put together outside Core ML")

    def rms_norm(self, x: Var, weight: RmsNorm) -> Var:
        """See `Ops`."""
        return self.mil.rms_norm(x, weight, axis=-1)

    def residual_norm(self, x: Var, branch: Var, weight: RmsNorm) -> tuple[Var, Var]:
        """See `Ops`."""
        total = self.mil.op("add", x=x, y=branch)
        return total, self.rms_norm(total, weight)

    def average_pool(self, x: Var, side: int, window: int) -> Var:
        """See `Ops`."""
        width = x.shape[2]
        grid = self.mil.op("transpose", x=x, perm=[0, 2, 1])
        grid = self.mil.op("reshape", x=grid, shape=[1, width, side, side])
        sizes = {"kernel_sizes": [window, window], "strides": [window, window]}
        pooled = self.mil.op("avg_pool", x=grid, pad_type="valid", **sizes)
        flat = self.mil.op("reshape", x=pooled, shape=[1, width, (side // window) ** 2])
        return self.mil.op("transpose", x=flat, perm=[0, 2, 1])

    def join_batch(self, x: Var) -> Var:
        """See `Ops`."""
        return self.mil.op("reshape", x=x, shape=list(x.shape[1:]))

    def gated_mlp(self, x: Var, gate: Linear, up: Linear, down: Linear, activation: Activation) -> Var:
        """See `Ops`."""
        opened = self._gelu(self.linear(x, gate))
        return self.linear(self.mil.op("mul", x=opened, y=self.linear(x, up)), down)

    def project_heads(
        self, x: Var, weights: HeadProjection, positions: None, rotary: Rotary, heads: Heads
    ) -> tuple[Var, Var, Var]:
        """See `Ops`. The results stay apart in heads, [1, heads, S, D]: `cached_attention` takes them so."""
        q = self._pieces(self.linear(x, weights.query), heads.query, heads.width)
        k = self._pieces(self.linear(x, weights.key), heads.kv, heads.width)
        v = self._pieces(self.linear(x, weights.value), heads.kv, heads.width)
        q, k = self.rms_norm(q, weights.query_norm), self.rms_norm(k, weights.key_norm)
        q, k, v = (self.mil.op("transpose", x=part, perm=[0, 2, 1, 3]) for part in (q, k, v))
        return self._rotate(q, rotary), self._rotate(k, rotary), v

    def mask(
        self, positions: None, blocks: None, attention_mask: None, start: None, window: int | None
    ) -> Var:
        """See `Ops`. It is an input: the host knows which row of a cache holds which position."""
        return self._given().masks[window is not None]

    def cached_attention(
        self,
        q: Var,
        k: Var,
        v: Var,
        past_key: CacheSlot,
        past_value: CacheSlot,
        mask: Var,
        heads: Heads,
        scale: float,
    ) -> tuple[Var, CacheSlot, CacheSlot]:
        """See `Ops`. New keys and values take their rows in the state, and all rows are looked at.

        The fused kernel knows no groups: the queries that share a key head are stacked as more queries.
        """
        keys, values = self._update(past_key, k, v)
        tokens, group = q.shape[2], heads.query // heads.kv
        # The kernel's own factor is width ** -0.5.
        if not math.isclose(factor := scale * math.sqrt(heads.width), 1, rel_tol=1e-6):
            q = self.mil.op("mul", x=q, y=self.mil.number(factor))
        q = self.mil.op("reshape", x=q, shape=[1, heads.kv, group * tokens, heads.width])
        if group > 1:
            if id(mask) not in self._tiled:
                self._tiled[id(mask)] = self.mil.op("concat", values=[mask] * group, axis=2)
            mask = self._tiled[id(mask)]
        y = self.mil.op("scaled_dot_product_attention", query=q, key=keys, value=values, attn_mask=mask)
        y = self.mil.op("reshape", x=y, shape=[1, heads.query, tokens, heads.width])
        return self._join(y), past_key, past_value

    def logits(self, x: Var, table: Table) -> Var:
        """See `Ops`."""
        parts = [
            self.mil.op(
                "linear",
                x=x,
                weight=self.mil.matrix(piece.weight),
                bias=self.mil.zeros(piece.stop - piece.start),
            )
            for piece in table.pieces
        ]
        return parts[0] if len(parts) == 1 else self.mil.op("concat", values=parts, axis=-1)

    def _update(self, slot: CacheSlot, k: Var, v: Var) -> tuple[Var, Var]:
        """Write a layer's new rows into its state; all keys and values of the layer, [1, kv, rows, D]."""
        cache, first = slot.cache, 2 * slot.layer
        if cache.current is None or cache.begin is None:
            cache.current = self.mil.op("read_state", input=cache.state)
            zero = np.zeros(1, np.int32)
            cache.begin = self.mil.op("concat", values=[zero, zero, cache.slot, zero], axis=0)
        both = self.mil.op("concat", values=[k, v], axis=0)
        if not self.mil.half:
            both = self.mil.op("cast", x=both, dtype="fp16")  # a state holds nothing else
        begin = self.mil.op("add", x=cache.begin, y=np.array([first, 0, 0, 0], np.int32))
        end = self.mil.op("add", x=begin, y=np.array(both.shape, np.int32))
        updated = self.mil.op("slice_update", x=cache.current, update=both, begin=begin, end=end)
        cache.current = self.mil.op("coreml_update_state", state=cache.state, value=updated)
        shape = cache.current.shape
        layer = [
            self.mil.op("slice_by_size", x=cache.current, begin=[first + part, 0, 0, 0], size=[1, *shape[1:]])
            for part in (0, 1)
        ]
        if not self.mil.half:
            layer = [self.mil.op("cast", x=part, dtype="fp32") for part in layer]
        return layer[0], layer[1]

    def _rotate(self, x: Var, rotary: Rotary) -> Var:
        cosine, sine = self._given().rotary[rotary]
        return self.mil.rotate(x, cosine, sine, axis=-1)

    def _given(self) -> StepInputs:
        if self.step is None:
            raise NotImplementedError("only a decoder's functions have caches")
        return self.step

    def _gelu(self, x: Var) -> Var:
        return self.mil.op("gelu", x=x, mode="TANH_APPROXIMATION")

    def _split(self, x: Var, heads: Heads) -> Var:
        """[1, S, heads * D] to [1, heads, S, D]."""
        return self.mil.op("transpose", x=self._pieces(x, heads.query, heads.width), perm=[0, 2, 1, 3])

    def _pieces(self, x: Var, count: int, width: int) -> Var:
        return self.mil.op("reshape", x=x, shape=[1, x.shape[1], count, width])

    def _join(self, x: Var) -> Var:
        """[1, heads, S, D] to [1, S, heads * D]."""
        x = self.mil.op("transpose", x=x, perm=[0, 2, 1, 3])
        return self.mil.op("reshape", x=x, shape=[1, x.shape[1], x.shape[2] * x.shape[3]])
