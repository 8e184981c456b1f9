"""SigLIP's image and text towers (Zhai et al. 2023, arXiv 2303.15343), as transformers 5.23 computes them.

MedSigLIP is this model; MedGemma's vision encoder is its image tower without the pooling head.
"""

from dataclasses import dataclass
from typing import TypeVar

from medgemma_export.ops import Heads, LayerNorm, Linear, Ops, Parameter, PatchEmbedding, Table
from medgemma_runtime.layers import EMBEDDINGS, residual_name

__all__ = ["Encoder", "encode_patches", "pool_by_attention", "encode_text"]

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Encoder:
    """The sizes of one tower.

    Attributes:
        prefix: What every weight name of the tower begins with, such as `vision_model`.
        width: Hidden width H.
        mlp_width: Hidden width of the MLP; 4304 in so400m, no multiple of 32.
        layers: Number of layers.
        heads: Attention heads; the head width is `width / heads`.
        eps: Of every LayerNorm.
    """

    prefix: str
    width: int
    mlp_width: int
    layers: int
    heads: int
    eps: float

    def __post_init__(self) -> None:
        if self.width % self.heads:
            raise ValueError(f"{self.prefix}: {self.heads} heads do not divide the width {self.width}")

    def linear(self, name: str, inputs: int, outputs: int) -> Linear:
        """A linear of this tower; SigLIP's all have a bias."""
        return Linear(name=f"{self.prefix}.{name}", inputs=inputs, outputs=outputs)

    def layer_norm(self, name: str) -> LayerNorm:
        """A LayerNorm of this tower."""
        return LayerNorm(name=f"{self.prefix}.{name}", width=self.width, eps=self.eps)


def encode_patches(ops: Ops[T], pixels: T, tower: Encoder, *, image_size: int, patch: int) -> T:
    """[B, 3, image_size, image_size] in [-1, 1] to patch features [B, S, H] after the last LayerNorm."""
    patches = (image_size // patch) ** 2
    embeddings = f"{tower.prefix}.embeddings"
    x = ops.patch_embedding(
        pixels, PatchEmbedding(name=f"{embeddings}.patch_embedding", width=tower.width, patch=patch)
    )
    positions = Parameter(name=f"{embeddings}.position_embedding.weight", shape=(patches, tower.width))
    x = _encode(ops, ops.add_positions(x, positions), tower)
    return ops.layer_norm(x, tower.layer_norm("post_layernorm"))


def pool_by_attention(ops: Ops[T], features: T, tower: Encoder) -> T:
    """The MAP head: a learned probe attends to all patches, [B, S, H] to [B, H]."""
    probe = ops.expand(Parameter(name=f"{tower.prefix}.head.probe", shape=(1, 1, tower.width)), features)
    pooled = _attend(ops, probe, features, tower, "head.attention")
    normed = ops.layer_norm(pooled, tower.layer_norm("head.layernorm"))
    pooled = ops.residual_add(pooled, _feed_forward(ops, normed, tower, "head.mlp"))
    return ops.join_batch(ops.token(pooled, 0))


def encode_text(ops: Ops[T], ids: T, tower: Encoder, *, vocabulary: int, length: int) -> T:
    """[B, length] ids to [B, H]: no mask, and the last position is the text's embedding.

    Padding to exactly `length` is part of the model: the last position is usually padding, and the model was
    trained so.
    """
    embeddings = f"{tower.prefix}.embeddings"
    table = Table(name=f"{embeddings}.token_embedding", rows=vocabulary, width=tower.width)
    positions = Parameter(name=f"{embeddings}.position_embedding.weight", shape=(length, tower.width))
    x = _encode(ops, ops.add_positions(ops.embed(ids, table), positions), tower)
    x = ops.token(ops.layer_norm(x, tower.layer_norm("final_layer_norm")), -1)
    x = ops.join_batch(x)
    return ops.linear(x, tower.linear("head", tower.width, tower.width))


def _encode(ops: Ops[T], x: T, tower: Encoder) -> T:
    x = ops.named(x, EMBEDDINGS)
    for layer in range(tower.layers):
        name = f"encoder.layers.{layer}"
        normed = ops.layer_norm(x, tower.layer_norm(f"{name}.layer_norm1"))
        x = ops.residual_add(x, _attend(ops, normed, normed, tower, f"{name}.self_attn"))
        normed = ops.layer_norm(x, tower.layer_norm(f"{name}.layer_norm2"))
        x = ops.named(
            ops.residual_add(x, _feed_forward(ops, normed, tower, f"{name}.mlp")), residual_name(layer)
        )
    return x


def _attend(ops: Ops[T], queries: T, memory: T, tower: Encoder, name: str) -> T:
    width = tower.width
    query, key, value, out = (
        tower.linear(f"{name}.{part}", width, width) for part in ("q_proj", "k_proj", "v_proj", "out_proj")
    )
    if queries is memory:
        q, k, v = ops.project_together(memory, (query, key, value))
    else:
        q = ops.linear(queries, query)
        k, v = ops.project_together(memory, (key, value))
    heads = Heads(query=tower.heads, kv=tower.heads, width=width // tower.heads)
    return ops.linear(ops.attention(q, k, v, heads, scale=heads.width**-0.5), out)


def _feed_forward(ops: Ops[T], x: T, tower: Encoder, name: str) -> T:
    up = tower.linear(f"{name}.fc1", tower.width, tower.mlp_width)
    down = tower.linear(f"{name}.fc2", tower.mlp_width, tower.width)
    return ops.mlp(x, up, down, "gelu_tanh")
