"""Gemma 3's text decoder (Gemma Team 2025, arXiv 2503.19786), as transformers 5.23 computes it.

MedGemma's language model is this decoder; every local layer looks back over a window, every sixth layer over
everything, and the tokens of one image see each other.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from medgemma_export.ops import HeadProjection, Heads, Linear, Ops, RmsNorm, Rotary, Table
from medgemma_runtime.layers import residual_name

__all__ = ["Decoder", "embed_tokens", "decode", "decode_layers", "decode_head", "norm_before"]

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Decoder:
    """The sizes and constants of one decoder.

    Attributes:
        prefix: What every weight name but the head's begins with.
        width: Hidden width H.
        mlp_width: Hidden width of the MLP.
        vocabulary: Rows of the table, the spare ones past the tokenizer's last piece included.
        heads: Attention heads; their widths need not add up to `width`.
        windows: For each layer how many tokens it sees, itself included; None is a global layer.
        local_rotary: Rotary embedding of the layers with a window.
        global_rotary: Rotary embedding of the others.
        attention_scale: Factor of the attention scores; not always `heads.width ** -0.5`.
        embedding_scale: Factor of the embedded tokens, but not of image features.
        eps: Of every norm.
        residual_scale: Factor of the whole residual stream, a power of two. Norms undo it, so logits stay the
            same; float16 engines need it, because the stream exceeds their range.
        head: Name of the output head's linear, or None where the head is the embedding's table.
        table_bounds: Where rows of the table begin that are a weight of their own.
    """

    prefix: str
    width: int
    mlp_width: int
    vocabulary: int
    heads: Heads
    windows: tuple[int | None, ...]
    local_rotary: Rotary
    global_rotary: Rotary
    attention_scale: float
    embedding_scale: float
    eps: float
    head: str | None
    residual_scale: float = 1.0
    table_bounds: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.heads.query % self.heads.kv:
            raise ValueError(
                f"{self.prefix}: {self.heads.kv} key heads do not divide {self.heads.query} query heads"
            )

    @property
    def table(self) -> Table:
        """The embedding, and the output head where that is tied."""
        return Table(
            name=f"{self.prefix}.embed_tokens",
            rows=self.vocabulary,
            width=self.width,
            bounds=self.table_bounds,
        )

    def linear(self, name: str, inputs: int, outputs: int) -> Linear:
        """A linear of this decoder; Gemma's have no bias."""
        return Linear(name=f"{self.prefix}.{name}", inputs=inputs, outputs=outputs, bias=False)

    def norm(self, name: str, width: int | None = None) -> RmsNorm:
        """A norm over the hidden width, or over a head's."""
        return RmsNorm(name=f"{self.prefix}.{name}", width=width or self.width, eps=self.eps)

    def stream_norm(self, name: str) -> RmsNorm:
        """A norm of the residual stream, which is scaled, and so is what is added to its mean square."""
        return replace(self.norm(name), eps=self.eps * self.residual_scale**2)

    def branch_norm(self, name: str) -> RmsNorm:
        """A norm of what is added to the residual stream."""
        return replace(self.norm(name), factor=self.residual_scale)


def embed_tokens(ops: Ops[T], ids: T, decoder: Decoder) -> T:
    """[B, S] ids to scaled embeddings [B, S, H]."""
    return ops.scaled_embed(ids, decoder.table, decoder.embedding_scale * decoder.residual_scale)


def decode(
    ops: Ops[T],
    x: T,
    positions: T,
    blocks: T,
    attention_mask: T,
    local_start: T,
    past: Sequence[tuple[T, T]],
    decoder: Decoder,
) -> tuple[T, list[tuple[T, T]]]:
    """One step over new tokens: the logits after the last of them, and the caches to keep.

    Shapes:
        x: [B, S, H] embeddings; positions: [B, S]
        blocks, attention_mask: as `Ops.mask` says
        local_start: [1], the first position that the caches of local layers still hold
        past: a key and a value [B, kv, P, D] for each layer, P the same in all local and in all global layers
        logits: [B, 1, vocabulary]
    """
    normed = ops.rms_norm(x, norm_before(decoder, 0))
    layers = range(len(decoder.windows))
    x, branch, present = decode_layers(
        ops, x, normed, positions, blocks, attention_mask, local_start, past, decoder, layers
    )
    x, normed = ops.residual_norm(x, branch, norm_before(decoder, layers.stop))
    ops.named(x, residual_name(layers[-1]))
    return decode_head(ops, ops.token(normed, -1), decoder), present


def decode_layers(
    ops: Ops[T],
    x: T,
    normed: T,
    positions: T,
    blocks: T,
    attention_mask: T,
    local_start: T,
    past: Sequence[tuple[T, T]],
    decoder: Decoder,
    layers: range,
) -> tuple[T, T, list[tuple[T, T]]]:
    """Some of the layers: the residual stream, what is still to be added to it, and the caches to keep.

    The sum is left to the caller, because targets fuse it with the norm that follows.

    Shapes:
        x, normed: [B, S, H], the residual stream and its norm by `norm_before(decoder, layers.start)`
        past: one pair for each of these layers, else as in `decode`
    """
    masks = {
        window: ops.mask(positions, blocks, attention_mask, None if window is None else local_start, window)
        for window in dict.fromkeys(decoder.windows[layer] for layer in layers)
    }
    present: list[tuple[T, T]] = []
    branch = normed  # of a layer there always is
    for layer, held in zip(layers, past, strict=True):
        name = f"layers.{layer}"
        if layer > layers.start:
            x, normed = ops.residual_norm(x, branch, norm_before(decoder, layer))
            x = ops.named(x, residual_name(layer - 1))
        mask = masks[decoder.windows[layer]]
        branch, key, value = _attend(ops, normed, positions, mask, held, decoder, layer)
        present.append((key, value))
        branch = ops.rms_norm(branch, decoder.branch_norm(f"{name}.post_attention_layernorm"))
        x, normed = ops.residual_norm(x, branch, decoder.stream_norm(f"{name}.pre_feedforward_layernorm"))
        branch = _feed_forward(ops, normed, decoder, f"{name}.mlp")
        branch = ops.rms_norm(branch, decoder.branch_norm(f"{name}.post_feedforward_layernorm"))
    return x, branch, present


def norm_before(decoder: Decoder, layer: int) -> RmsNorm:
    """The norm of the residual stream before a layer, or before the head."""
    is_head = layer == len(decoder.windows)
    return decoder.stream_norm("norm" if is_head else f"layers.{layer}.input_layernorm")


def _attend(
    ops: Ops[T], x: T, positions: T, mask: T, past: tuple[T, T], decoder: Decoder, layer: int
) -> tuple[T, T, T]:
    name, heads = f"layers.{layer}.self_attn", decoder.heads
    projection = HeadProjection(
        query=decoder.linear(f"{name}.q_proj", decoder.width, heads.query * heads.width),
        key=decoder.linear(f"{name}.k_proj", decoder.width, heads.kv * heads.width),
        value=decoder.linear(f"{name}.v_proj", decoder.width, heads.kv * heads.width),
        query_norm=decoder.norm(f"{name}.q_norm", heads.width),
        key_norm=decoder.norm(f"{name}.k_norm", heads.width),
    )
    rotary = decoder.global_rotary if decoder.windows[layer] is None else decoder.local_rotary
    q, k, v = ops.project_heads(x, projection, positions, rotary, heads)
    y, key, value = ops.cached_attention(q, k, v, *past, mask, heads, decoder.attention_scale)
    out = decoder.linear(f"{name}.o_proj", heads.query * heads.width, decoder.width)
    return ops.linear(y, out), key, value


def _feed_forward(ops: Ops[T], x: T, decoder: Decoder, name: str) -> T:
    gate, up = (
        decoder.linear(f"{name}.{part}", decoder.width, decoder.mlp_width)
        for part in ("gate_proj", "up_proj")
    )
    down = decoder.linear(f"{name}.down_proj", decoder.mlp_width, decoder.width)
    return ops.gated_mlp(x, gate, up, down, "gelu_tanh")


def decode_head(ops: Ops[T], x: T, decoder: Decoder) -> T:
    """The normed residual stream of one token, [B, 1, H], to logits [B, 1, vocabulary]."""
    if decoder.head is None:
        return ops.logits(x, decoder.table)
    head = Linear(name=decoder.head, inputs=decoder.width, outputs=decoder.vocabulary, bias=False)
    return ops.linear(x, head)
