"""The operations laid out for the Neural Engine: channels first, [1, C, 1, S].

What Apple's own transformers for that engine do (apple/ml-ane-transformers): every product with a matrix is a
convolution of size 1, heads are computed one by one, and softmax runs over keys as channels. Only float16,
only fixed sizes, no blocks of scales, and no states: a decoder is given its caches, and gives new keys and
values for the host to put there.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

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
from medgemma_export.targets.coreml_ops import StepInputs

__all__ = ["ChannelOps", "HEAD_ROWS"]

HEAD_ROWS = 1 << 14
"""Outputs of one convolution of an output head, at most: what Anemll 0.3.5 cuts Gemma's into."""

# Axes of the engine have 65,536 channels at most (ane-guide.readthedocs.io, chapter 17).
_MAX_CHANNELS = 1 << 16

# 4,096 keys of 1,024 queries, 8 MB of scores: what is larger is computed for some of the queries at a time.
_MAX_SCORES = 1 << 22


@dataclass(kw_only=True)
class ChannelOps:
    """An `Ops[Var]` that adds to the function being built.

    Attributes:
        mil: Adds operators and weights.
        step: Of a decoder: rotary tables are [1, 1, D / 2, S] and masks [1, keys, 1, S], where keys are the
            rows of a cache and behind them the new tokens.
    """

    mil: MilBuilder
    step: StepInputs | None = None
    _tiled: dict[int, Var] = field(default_factory=dict)

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
        return self.mil.op("reshape", x=patches, shape=[1, weight.width, 1, -1])

    def embed(self, ids: Var, table: Table) -> Var:
        """See `Ops`. The look-up itself runs on the CPU wherever it stands."""
        rows = self.mil.matrix(f"{table.name}.weight")
        found = self.mil.op("gather", x=rows, indices=ids, axis=0, validate_indices=False)
        return self._channels_first(found)

    def add_positions(self, x: Var, positions: Parameter) -> Var:
        """See `Ops`."""
        rows = self.mil.floats(positions.name)
        whole = self.mil.op("expand_dims", x=rows, axes=[0])
        return self.mil.op("add", x=x, y=self._channels_first(whole))

    def scaled_embed(self, ids: Var, table: Table, scale: float) -> Var:
        """See `Ops`."""
        raise NotImplementedError("a decoder's embeddings are looked up outside Core ML")

    def place_images(self, embeddings: Var, ids: Var, features: Var, image_id: int) -> Var:
        """See `Ops`."""
        raise NotImplementedError("a decoder's embeddings are put together outside Core ML")

    def linear(self, x: Var, weight: Linear) -> Any:
        """See `Ops`. An output head gives its logits in pieces."""
        if weight.outputs > _MAX_CHANNELS:
            return self._pieces(x, f"{weight.name}.weight")
        kernel = self.mil.matrix(f"{weight.name}.weight", is_kernel=True)
        bias = self.mil.floats(f"{weight.name}.bias") if weight.bias else self.mil.zeros(kernel.shape[0])
        return self.mil.op("conv", x=x, weight=kernel, bias=bias, pad_type="valid")

    def logits(self, x: Var, table: Table) -> tuple[Var, ...]:
        """See `Ops`. In pieces."""
        return tuple(part for piece in table.pieces for part in self._pieces(x, piece.weight))

    def project_together(self, x: Var, weights: tuple[Linear, ...]) -> tuple[Var, ...]:
        """See `Ops`."""
        return tuple(self.linear(x, weight) for weight in weights)

    def mlp(self, x: Var, up: Linear, down: Linear, activation: Activation) -> Var:
        """See `Ops`."""
        return self.linear(self._gelu(self.linear(x, up)), down)

    def gated_mlp(self, x: Var, gate: Linear, up: Linear, down: Linear, activation: Activation) -> Var:
        """See `Ops`."""
        opened = self._gelu(self.linear(x, gate))
        return self.linear(self.mil.op("mul", x=opened, y=self.linear(x, up)), down)

    def layer_norm(self, x: Var, weight: LayerNorm) -> Var:
        """See `Ops`."""
        return self.mil.op(
            "layer_norm",
            x=x,
            axes=[1],
            gamma=self.mil.floats(f"{weight.name}.weight"),
            beta=self.mil.floats(f"{weight.name}.bias"),
            epsilon=self.mil.number(weight.eps),
        )

    def rms_norm(self, x: Var, weight: RmsNorm) -> Var:
        """See `Ops`."""
        return self.mil.rms_norm(x, weight, axis=-3)

    def residual_norm(self, x: Var, branch: Var, weight: RmsNorm) -> tuple[Var, Var]:
        """See `Ops`."""
        total = self.residual_add(x, branch)
        return total, self.rms_norm(total, weight)

    def residual_add(self, x: Var, branch: Var) -> Var:
        """See `Ops`."""
        return self.mil.op("add", x=x, y=branch)

    def named(self, x: Var, name: str) -> Var:
        """See `Ops`."""
        x.name = name
        return x

    def attention(self, q: Var, k: Var, v: Var, heads: Heads, scale: float) -> Var:
        """See `Ops`. Scores are [1, keys, 1, queries]: a head at a time, keys as channels."""
        q = self.mil.op("mul", x=q, y=self.mil.number(scale))
        queries = q.shape[3]
        step = math.ceil(queries / math.ceil(queries * k.shape[3] / _MAX_SCORES))
        parts = []
        for query, key, value in zip(*(self._heads(part, heads.query) for part in (q, k, v)), strict=True):
            some = []
            for start in range(0, queries, step):
                size = min(step, queries - start)
                piece = query
                if size < queries:
                    begin, sizes = [0, 0, 0, start], [1, 1, heads.width, size]
                    piece = self.mil.op("slice_by_size", x=query, begin=begin, size=sizes)
                scores = self.mil.op("matmul", x=key, y=piece, transpose_x=True)
                some.append(self.mil.op("matmul", x=value, y=self._softmax(scores, None)))
            parts.append(self._concat(some, axis=3))
        return self._join(parts)

    def project_heads(
        self, x: Var, weights: HeadProjection, positions: None, rotary: Rotary, heads: Heads
    ) -> tuple[Var, Var, Var]:
        """See `Ops`. The results stay apart in heads, [1, heads, D, S]: `cached_attention` takes them so."""
        cosine, sine = self._given().rotary[rotary]
        q = self._apart(self.linear(x, weights.query), heads.query)
        k = self._apart(self.linear(x, weights.key), heads.kv)
        q = self.mil.rms_norm(q, weights.query_norm, axis=-2)
        k = self.mil.rms_norm(k, weights.key_norm, axis=-2)
        q, k = (self.mil.rotate(part, cosine, sine, axis=2) for part in (q, k))
        return q, k, self._apart(self.linear(x, weights.value), heads.kv)

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
        past_key: Var,
        past_value: Var,
        mask: Var,
        heads: Heads,
        scale: float,
    ) -> tuple[Var, Var, Var]:
        """See `Ops`. Caches are [1, kv * D, 1, rows], and what comes back is that of the new tokens alone.

        Scores against cache and new keys are made apart and joined, so that no cache is copied. The queries
        that share a key head are stacked as more queries.
        """
        q = self.mil.op("mul", x=q, y=self.mil.number(scale))
        tokens, rows, group = q.shape[3], past_key.shape[3], heads.query // heads.kv
        if id(mask) not in self._tiled:
            self._tiled[id(mask)] = self._concat([mask] * group, axis=3)
        queries = self._split(q)
        parts: list[Var] = []
        for index, (held_key, held_value, key, value) in enumerate(
            zip(
                self._heads(past_key, heads.kv),
                self._heads(past_value, heads.kv),
                self._split(k),
                self._split(v),
                strict=True,
            )
        ):
            query = self._concat(queries[index * group : (index + 1) * group], axis=3)
            scores = [self.mil.op("matmul", x=each, y=query, transpose_x=True) for each in (held_key, key)]
            weights = self._softmax(self._concat(scores, axis=2), self._tiled[id(mask)])
            held, new = self.mil.op("split", x=weights, split_sizes=[rows, tokens], axis=2)
            held = self.mil.op("matmul", x=held_value, y=held)
            y = self.mil.op("add", x=held, y=self.mil.op("matmul", x=value, y=new))
            parts += self.mil.op("split", x=y, num_splits=group, axis=3) if group > 1 else [y]
        return self._join(parts), self._whole(k), self._whole(v)

    def expand(self, parameter: Parameter, like: Var) -> Var:
        """See `Ops`. There is one item, and one position."""
        return self._channels_first(self.mil.floats(parameter.name))

    def token(self, x: Var, index: int) -> Var:
        """See `Ops`."""
        if x.shape[3] == 1:
            return x
        begin = [0, 0, 0, index % x.shape[3]]
        return self.mil.op("slice_by_size", x=x, begin=begin, size=[1, x.shape[1], 1, 1])

    def join_batch(self, x: Var) -> Var:
        """See `Ops`. What follows wants its four axes; `output` drops them."""
        return x

    def average_pool(self, x: Var, side: int, window: int) -> Var:
        """See `Ops`."""
        grid = self.mil.op("reshape", x=x, shape=[1, x.shape[1], side, side])
        sizes = {"kernel_sizes": [window, window], "strides": [window, window]}
        pooled = self.mil.op("avg_pool", x=grid, pad_type="valid", **sizes)
        return self.mil.op("reshape", x=pooled, shape=[1, x.shape[1], 1, -1])

    def output(self, x: Var, name: str) -> Var:
        """A result as float32 [S, C], under the name that is declared."""
        if x.shape[3] == 1:
            return self.mil.output(self.mil.op("reshape", x=x, shape=[1, x.shape[1]]), name)
        rows = self.mil.op("reshape", x=x, shape=[x.shape[1], x.shape[3]])
        return self.mil.output(self.mil.op("transpose", x=rows, perm=[1, 0]), name)

    def _pieces(self, x: Var, name: str) -> tuple[Var, ...]:
        """The product with a matrix of many outputs, some of them at a time."""
        kernels = self.mil.kernels(name, HEAD_ROWS)
        return tuple(
            self.mil.op("conv", x=x, weight=kernel, bias=self.mil.zeros(kernel.shape[0]), pad_type="valid")
            for kernel in kernels
        )

    def _channels_first(self, x: Var) -> Var:
        """[1, S, C] to [1, C, 1, S]."""
        turned = self.mil.op("transpose", x=x, perm=[0, 2, 1])
        return self.mil.op("expand_dims", x=turned, axes=[2])

    def _softmax(self, scores: Var, mask: Var | None) -> Var:
        """[1, 1, keys, queries] to the same, over keys as channels; the mask is [1, keys, 1, queries]."""
        keys, queries = scores.shape[2:]
        scores = self.mil.op("reshape", x=scores, shape=[1, keys, 1, queries])
        if mask is not None:
            scores = self.mil.op("add", x=scores, y=mask)
        weights = self.mil.op("softmax", x=scores, axis=1)
        return self.mil.op("reshape", x=weights, shape=[1, 1, keys, queries])

    def _apart(self, x: Var, count: int) -> Var:
        """[1, heads * D, 1, S] to [1, heads, D, S]."""
        return self.mil.op("reshape", x=x, shape=[1, count, x.shape[1] // count, x.shape[3]])

    def _whole(self, x: Var) -> Var:
        """[1, heads, D, S] to [1, heads * D, 1, S]."""
        return self.mil.op("reshape", x=x, shape=[1, x.shape[1] * x.shape[2], 1, x.shape[3]])

    def _heads(self, x: Var, count: int) -> Sequence[Var]:
        """[1, heads * D, 1, S] to as many [1, 1, D, S]."""
        return self._split(self._apart(x, count))

    def _split(self, x: Var) -> Sequence[Var]:
        """[1, heads, D, S] to as many [1, 1, D, S]."""
        heads = x.shape[1]
        return self.mil.op("split", x=x, num_splits=heads, axis=1) if heads > 1 else [x]

    def _join(self, parts: Sequence[Var]) -> Var:
        """As many [1, 1, D, S] to [1, heads * D, 1, S]."""
        joined = self._concat(parts, axis=2)
        return self.mil.op("reshape", x=joined, shape=[1, joined.shape[2], 1, joined.shape[3]])

    def _concat(self, parts: Sequence[Var], axis: int) -> Var:
        return parts[0] if len(parts) == 1 else self.mil.op("concat", values=list(parts), axis=axis)

    def _gelu(self, x: Var) -> Var:
        return self.mil.op("gelu", x=x, mode="TANH_APPROXIMATION")

    def _given(self) -> StepInputs:
        if self.step is None:
            raise NotImplementedError("only a decoder's functions have caches")
        return self.step
