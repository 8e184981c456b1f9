"""The operations of an encoder laid out for the Neural Engine: channels first, [1, C, 1, S].

What Apple's own transformers for that engine do (apple/ml-ane-transformers): every product with a matrix is a
convolution of size 1, heads are computed one by one, and softmax runs over keys as channels. Only float16,
only fixed sizes, no blocks of scales.
"""

from dataclasses import dataclass

from medgemma_export.ops import Activation, Heads, LayerNorm, Linear, Parameter, PatchEmbedding, Table
from medgemma_export.targets.coreml_builder import MilBuilder
from medgemma_export.targets.coreml_mil import Var

__all__ = ["ChannelOps"]


@dataclass(kw_only=True)
class ChannelOps:
    """The part of `Ops[Var]` that encoders use.

    Attributes:
        mil: Adds operators and weights.
    """

    mil: MilBuilder

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

    def linear(self, x: Var, weight: Linear) -> Var:
        """See `Ops`."""
        kernel = self.mil.matrix(f"{weight.name}.weight", is_kernel=True)
        bias = self.mil.floats(f"{weight.name}.bias") if weight.bias else self.mil.zeros(kernel.shape[0])
        return self.mil.op("conv", x=x, weight=kernel, bias=bias, pad_type="valid")

    def project_together(self, x: Var, weights: tuple[Linear, ...]) -> tuple[Var, ...]:
        """See `Ops`."""
        return tuple(self.linear(x, weight) for weight in weights)

    def mlp(self, x: Var, up: Linear, down: Linear, activation: Activation) -> Var:
        """See `Ops`."""
        return self.linear(self.mil.op("gelu", x=self.linear(x, up), mode="TANH_APPROXIMATION"), down)

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
        parts = []
        for query, key, value in zip(*(self._heads(part, heads) for part in (q, k, v)), strict=True):
            keys, queries = key.shape[3], query.shape[3]
            scores = self.mil.op("matmul", x=key, y=query, transpose_x=True)
            scores = self.mil.op("reshape", x=scores, shape=[1, keys, 1, queries])
            weights = self.mil.op("softmax", x=scores, axis=1)
            weights = self.mil.op("reshape", x=weights, shape=[1, 1, keys, queries])
            parts.append(self.mil.op("matmul", x=value, y=weights))
        joined = self.mil.op("concat", values=parts, axis=2)
        return self.mil.op("reshape", x=joined, shape=[1, heads.query * heads.width, 1, -1])

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

    def output(self, x: Var, name: str) -> Var:
        """A result as float32 [1, C], under the name that is declared."""
        return self.mil.output(self.mil.op("reshape", x=x, shape=[1, x.shape[1]]), name)

    def _channels_first(self, x: Var) -> Var:
        """[1, S, C] to [1, C, 1, S]."""
        turned = self.mil.op("transpose", x=x, perm=[0, 2, 1])
        return self.mil.op("expand_dims", x=turned, axes=[2])

    def _heads(self, x: Var, heads: Heads) -> tuple[Var, ...]:
        """[1, heads * D, 1, S] to as many [1, 1, D, S]."""
        length = x.shape[3]
        apart = self.mil.op("reshape", x=x, shape=[1, heads.query, heads.width, length])
        return tuple(self.mil.op("split", x=apart, num_splits=heads.query, axis=1))
