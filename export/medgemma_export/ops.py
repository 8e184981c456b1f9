"""The operations that a model is written in.

A model is a function over these; a target is one implementation of them. `TorchOps` computes, `OnnxOps` emits
ONNX nodes, `PlanOps` only notes which weights a model asks for. `T` is whatever an implementation passes
between operations: a tensor, a graph value, nothing at all.

Each operation stands at the height where deployment targets fuse (q, k and v together, the two halves of an
MLP in one, attention whole), and no lower. If an operation does not fit a target, change the operation here,
not the model.

Weights are named, never held: an implementation asks for one when it meets it and may forget it afterwards,
so every implementation streams.

Notation: B batch, S sequence, H hidden width, D head width.
"""

from dataclasses import dataclass
from typing import Literal, Protocol, TypeVar

from medgemma_quantization.row_pieces import piece_name, spans

__all__ = [
    "Ops",
    "Linear",
    "LayerNorm",
    "RmsNorm",
    "Table",
    "TablePiece",
    "PatchEmbedding",
    "Parameter",
    "Heads",
    "HeadProjection",
    "Rotary",
    "Activation",
]

Activation = Literal["gelu_tanh"]


@dataclass(frozen=True, kw_only=True)
class Linear:
    """`y = x @ weight.T + bias`: weight `NAME.weight` [outputs, inputs], bias `NAME.bias` [outputs]."""

    name: str
    inputs: int
    outputs: int
    bias: bool = True


@dataclass(frozen=True, kw_only=True)
class LayerNorm:
    """`NAME.weight` and `NAME.bias`, both [width]; statistics over the last axis in float32."""

    name: str
    width: int
    eps: float


@dataclass(frozen=True, kw_only=True)
class RmsNorm:
    """`x / rms(x) * (1 + NAME.weight) * factor` over the last axis: Gemma stores the gain less one.

    The factor is a power of two, so that it changes exponents only.
    """

    name: str
    width: int
    eps: float
    factor: float = 1.0


@dataclass(frozen=True, kw_only=True)
class TablePiece:
    """Consecutive rows of a table that are a weight of their own."""

    weight: str
    start: int
    stop: int


@dataclass(frozen=True, kw_only=True)
class Table:
    """Rows that ids look up: `NAME.weight` [rows, width], or several weights of consecutive rows.

    Attributes:
        name: What the weights' names begin with.
        rows: Of all weights together.
        width: Of a row.
        bounds: Where a piece of its own begins, the first piece apart.
    """

    name: str
    rows: int
    width: int
    bounds: tuple[int, ...] = ()

    @property
    def pieces(self) -> tuple[TablePiece, ...]:
        """The weights, in the order of their rows."""
        whole = f"{self.name}.weight"
        return tuple(
            TablePiece(
                weight=piece_name(whole, start, stop) if self.bounds else whole, start=start, stop=stop
            )
            for start, stop in spans(self.rows, self.bounds)
        )


@dataclass(frozen=True, kw_only=True)
class PatchEmbedding:
    """A convolution whose stride is its kernel.

    `NAME.weight` is [width, 3, patch, patch], `NAME.bias` [width].
    """

    name: str
    width: int
    patch: int


@dataclass(frozen=True, kw_only=True)
class Parameter:
    """A learned array `NAME` that is used as it stands: a position table, a pooling probe."""

    name: str
    shape: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Heads:
    """The heads of an attention; `kv` is smaller than `query` where heads are grouped."""

    query: int
    kv: int
    width: int


@dataclass(frozen=True, kw_only=True)
class HeadProjection:
    """What makes the heads of an attention: three linears, and norms of one head's width for q and k."""

    query: Linear
    key: Linear
    value: Linear
    query_norm: RmsNorm
    key_norm: RmsNorm


@dataclass(frozen=True, kw_only=True)
class Rotary:
    """Rotary position embedding, halves rotated, over heads of `width`.

    Position p turns pair i by `p / factor * theta ** (-2 i / width)`, computed in float32.
    """

    theta: float
    factor: float
    width: int


T = TypeVar("T")


class Ops(Protocol[T]):
    """One implementation of every operation a model may use."""

    def patch_embedding(self, pixels: T, weight: PatchEmbedding) -> T:
        """[B, 3, rows, columns] float pixels to [B, S, H], patches in row-major order."""
        ...

    def embed(self, ids: T, table: Table) -> T:
        """[B, S] ids to the table's rows, [B, S, H]."""
        ...

    def add_positions(self, x: T, positions: Parameter) -> T:
        """[B, S, H] plus a learned [S, H]."""
        ...

    def linear(self, x: T, weight: Linear) -> T:
        """[..., inputs] to [..., outputs]."""
        ...

    def project_together(self, x: T, weights: tuple[Linear, ...]) -> tuple[T, ...]:
        """Several linears of one input, such as k and v; a target may fuse them."""
        ...

    def mlp(self, x: T, up: Linear, down: Linear, activation: Activation) -> T:
        """`down(activation(up(x)))`. The hidden axis may be padded with zeros: activation(0) must be 0."""
        ...

    def layer_norm(self, x: T, weight: LayerNorm) -> T:
        """Normalize the last axis to zero mean and unit variance, then scale and shift."""
        ...

    def residual_add(self, x: T, branch: T) -> T:
        """`x + branch`: the residual stream grows here and in `residual_norm`, where range audits look."""
        ...

    def named(self, x: T, name: str) -> T:
        """`x`, which a deployed program can be asked for by this name: what its layers are compared by.

        Nothing is computed. Names are the same in every target and spelled as each of them allows: letters,
        digits and underscores.
        """
        ...

    def attention(self, q: T, k: T, v: T, heads: Heads, scale: float) -> T:
        """Full attention, `softmax(scale * q @ k.T) @ v` for each head.

        q is [B, S, query * D]; k and v are [B, S', kv * D]; the result has the shape of q.
        """
        ...

    def expand(self, parameter: Parameter, like: T) -> T:
        """A learned [1, S, H], repeated to the batch size of `like`."""
        ...

    def token(self, x: T, index: int) -> T:
        """[B, S, H] to the token at `index` (negative from the end), [B, 1, H]."""
        ...

    def scaled_embed(self, ids: T, table: Table, scale: float) -> T:
        """[B, S] ids to the table's rows times `scale`, [B, S, H]."""
        ...

    def place_images(self, embeddings: T, ids: T, features: T, image_id: int) -> T:
        """Replace the embeddings at the positions of `image_id` by image features, in order.

        [B, S, H], [B, S] and [M, H] to [B, S, H]; M is the number of such positions and may be 0.
        """
        ...

    def rms_norm(self, x: T, weight: RmsNorm) -> T:
        """Normalize the last axis to unit root mean square, then scale."""
        ...

    def residual_norm(self, x: T, branch: T, weight: RmsNorm) -> tuple[T, T]:
        """`x + branch`, and that sum normalized: the residual stream of a decoder grows only here."""
        ...

    def average_pool(self, x: T, side: int, window: int) -> T:
        """[B, side * side, H], row-major, to means over windows: [B, (side / window) ** 2, H]."""
        ...

    def join_batch(self, x: T) -> T:
        """[B, S, H] to [B * S, H]: the tokens of all images or texts, one after the other."""
        ...

    def gated_mlp(self, x: T, gate: Linear, up: Linear, down: Linear, activation: Activation) -> T:
        """`down(activation(gate(x)) * up(x))`. The hidden axis may be padded with zeros."""
        ...

    def project_heads(
        self, x: T, weights: HeadProjection, positions: T, rotary: Rotary, heads: Heads
    ) -> tuple[T, T, T]:
        """q, k and v of new tokens; q and k normalized head by head, then rotated.

        Shapes:
            x: [B, S, H]; positions: [B, S] integers
            q: [B, S, query * D]; k, v: [B, S, kv * D]
        """
        ...

    def mask(self, positions: T, blocks: T, attention_mask: T, start: T | None, window: int | None) -> T:
        """Which key each new query sees, [B, 1, S, T - start], in whatever form `cached_attention` takes.

        Key j is seen by query i (both counted from the start of the conversation) if j <= i, or if both are
        new and belong to one image; with a window only if i - j < window; and only if `attention_mask` is not
        0 there.

        Shapes:
            positions: [B, S], for their shape only
            blocks: [B, S] integers: the same number for the tokens of one image, negative for text; or one
                [1, 1] for all
            attention_mask: [B, T] integers, T being the length of the conversation with the new tokens
            start: [1] integers, the first position that the cache still holds; None for 0
        """
        ...

    def cached_attention(
        self,
        q: T,
        k: T,
        v: T,
        past_key: T,
        past_value: T,
        mask: T,
        heads: Heads,
        scale: float,
    ) -> tuple[T, T, T]:
        """Attention over past and new keys; returns the result and the key and value to keep.

        Shapes:
            q: [B, S, query * D]; k, v: [B, S, kv * D]
            past_key, past_value: [B, kv, P, D], oldest first
            mask: from `mask`, over P + S keys
            result: [B, S, query * D]; kept [B, kv, P + S, D]
        """
        ...

    def logits(self, x: T, table: Table) -> T:
        """[B, 1, H] against every row of a table, [B, 1, rows]: the head tied to the embedding."""
        ...
