"""The operations computed in PyTorch, float32 on the CPU.

With a float plan this is the model itself and is held against `transformers`. With an integer plan it is the
packing reference: the same integers, and the target's own rounding of activations, computed without the
target.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from medgemma_export.models.spec import Component
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
from medgemma_quantization.affine import QuantizedTensor
from medgemma_quantization.weights import QuantizedWeights

__all__ = ["TorchOps", "IntegerLinear", "compute", "rotate", "weight_only"]

IntegerLinear = Callable[[Tensor, QuantizedTensor], Tensor]
"""`x @ dequantized.T` with whatever the target does to `x`: [..., inputs] to [..., outputs]."""


def weight_only(x: Tensor, weight: QuantizedTensor) -> Tensor:
    """The `IntegerLinear` of a target that leaves activations alone."""
    return x @ torch.from_numpy(weight.dequantize()).T


@dataclass(frozen=True, kw_only=True)
class TorchOps:
    """An `Ops[Tensor]`.

    Attributes:
        weights: Where weights come from.
        integer_linear: What the target does where a weight is integers.
        show: Told every value that has a name; None for nobody.
    """

    weights: QuantizedWeights
    integer_linear: IntegerLinear = weight_only
    show: Callable[[str, Tensor], None] | None = None

    def patch_embedding(self, pixels: Tensor, weight: PatchEmbedding) -> Tensor:
        """See `Ops`."""
        kernel = self._float(f"{weight.name}.weight")
        patches = functional.conv2d(pixels, kernel, self._float(f"{weight.name}.bias"), stride=weight.patch)
        return patches.flatten(2).transpose(1, 2)

    def embed(self, ids: Tensor, table: Table) -> Tensor:
        """See `Ops`."""
        return torch.cat([self._rows(piece.weight) for piece in table.pieces])[ids]

    def add_positions(self, x: Tensor, positions: Parameter) -> Tensor:
        """See `Ops`."""
        return x + self._float(positions.name)

    def linear(self, x: Tensor, weight: Linear) -> Tensor:
        """See `Ops`."""
        y = self._multiply(x, f"{weight.name}.weight")
        return y + self._float(f"{weight.name}.bias") if weight.bias else y

    def project_together(self, x: Tensor, weights: tuple[Linear, ...]) -> tuple[Tensor, ...]:
        """See `Ops`."""
        return tuple(self.linear(x, weight) for weight in weights)

    def mlp(self, x: Tensor, up: Linear, down: Linear, activation: Activation) -> Tensor:
        """See `Ops`."""
        return self.linear(functional.gelu(self.linear(x, up), approximate="tanh"), down)

    def layer_norm(self, x: Tensor, weight: LayerNorm) -> Tensor:
        """See `Ops`."""
        gain, shift = self._float(f"{weight.name}.weight"), self._float(f"{weight.name}.bias")
        return functional.layer_norm(x, (weight.width,), gain, shift, weight.eps)

    def residual_add(self, x: Tensor, branch: Tensor) -> Tensor:
        """See `Ops`."""
        return x + branch

    def named(self, x: Tensor, name: str) -> Tensor:
        """See `Ops`."""
        if self.show is not None:
            self.show(name, x)
        return x

    def attention(self, q: Tensor, k: Tensor, v: Tensor, heads: Heads, scale: float) -> Tensor:
        """See `Ops`."""
        return _attend(*(_split(part, heads.width) for part in (q, k, v)), mask=None, scale=scale)

    def expand(self, parameter: Parameter, like: Tensor) -> Tensor:
        """See `Ops`."""
        return self._float(parameter.name).expand(like.shape[0], -1, -1)

    def token(self, x: Tensor, index: int) -> Tensor:
        """See `Ops`."""
        return x[:, [index]]

    def scaled_embed(self, ids: Tensor, table: Table, scale: float) -> Tensor:
        """See `Ops`."""
        return self.embed(ids, table) * scale

    def place_images(self, embeddings: Tensor, ids: Tensor, features: Tensor, image_id: int) -> Tensor:
        """See `Ops`."""
        places = ids == image_id
        if int(places.sum()) != features.shape[0]:
            # masked_scatter would leave out what is too much.
            raise ValueError(f"{int(places.sum())} image positions for {features.shape[0]} image features")
        return embeddings.masked_scatter(places[..., None], features)

    def rms_norm(self, x: Tensor, weight: RmsNorm) -> Tensor:
        """See `Ops`."""
        unit: Tensor = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + weight.eps)
        gain = (1 + self._float(f"{weight.name}.weight")) * weight.factor
        if self.weights.plan.by_name[f"{weight.name}.weight"].storage.bits == 16:
            gain = gain.half().float()  # what is multiplied by is what is stored
        return unit * gain

    def residual_norm(self, x: Tensor, branch: Tensor, weight: RmsNorm) -> tuple[Tensor, Tensor]:
        """See `Ops`."""
        total = x + branch
        return total, self.rms_norm(total, weight)

    def average_pool(self, x: Tensor, side: int, window: int) -> Tensor:
        """See `Ops`."""
        grid = x.transpose(1, 2).reshape(x.shape[0], x.shape[2], side, side)
        return functional.avg_pool2d(grid, window).flatten(2).transpose(1, 2)

    def join_batch(self, x: Tensor) -> Tensor:
        """See `Ops`."""
        return x.flatten(0, 1)

    def gated_mlp(self, x: Tensor, gate: Linear, up: Linear, down: Linear, activation: Activation) -> Tensor:
        """See `Ops`."""
        hidden = functional.gelu(self.linear(x, gate), approximate="tanh") * self.linear(x, up)
        return self.linear(hidden, down)

    def project_heads(
        self, x: Tensor, weights: HeadProjection, positions: Tensor, rotary: Rotary, heads: Heads
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See `Ops`."""
        q, k, v = self.project_together(x, (weights.query, weights.key, weights.value))
        q = self.rms_norm(_pieces(q, heads.width), weights.query_norm)
        k = self.rms_norm(_pieces(k, heads.width), weights.key_norm)
        return rotate(q, positions, rotary).flatten(-2), rotate(k, positions, rotary).flatten(-2), v

    def mask(
        self,
        positions: Tensor,
        blocks: Tensor,
        attention_mask: Tensor,
        start: Tensor | None,
        window: int | None,
    ) -> Tensor:
        """See `Ops`. The result is boolean."""
        blocks = blocks.expand(positions.shape)
        new, total = blocks.shape[1], attention_mask.shape[1]
        first = 0 if start is None else int(start)
        query, key = torch.arange(total - new, total)[:, None], torch.arange(first, total)
        one_image = (blocks[:, :, None] == blocks[:, None]) & (blocks[:, None] >= 0)
        seen = (key <= query) | functional.pad(one_image, (total - new - first, 0))
        if window is not None:
            seen = seen & (query - key < window)
        return (seen & (attention_mask[:, None, first:] != 0))[:, None]

    def cached_attention(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        past_key: Tensor,
        past_value: Tensor,
        mask: Tensor,
        heads: Heads,
        scale: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See `Ops`."""
        key = torch.cat((past_key, _split(k, heads.width)), 2)
        value = torch.cat((past_value, _split(v, heads.width)), 2)
        return _attend(_split(q, heads.width), key, value, mask=mask, scale=scale), key, value

    def logits(self, x: Tensor, table: Table) -> Tensor:
        """See `Ops`."""
        return torch.cat([self._multiply(x, piece.weight) for piece in table.pieces], -1)

    def _rows(self, name: str) -> Tensor:
        if self._is_float(name):
            return self._float(name)
        return torch.from_numpy(self.weights.quantized(name).dequantize())

    def _multiply(self, x: Tensor, name: str) -> Tensor:
        if self._is_float(name):
            return x @ self._float(name).T
        return self.integer_linear(x, self.weights.quantized(name))

    def _is_float(self, name: str) -> bool:
        return self.weights.plan.by_name[name].storage.is_float

    def _float(self, name: str) -> Tensor:
        return torch.from_numpy(self.weights.float(name))


def rotate(x: Tensor, positions: Tensor, rotary: Rotary) -> Tensor:
    """Rotary embedding of [B, S, heads, D] at integer positions [B, S]."""
    # In transformers' order: at position 100,000 the last bit of a frequency is a hundredth of a radian.
    pairs = torch.arange(0, rotary.width, 2) / rotary.width
    angles = positions[..., None, None] * (1 / rotary.theta**pairs / rotary.factor)
    first, second = x.chunk(2, -1)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1)


def _split(x: Tensor, width: int) -> Tensor:
    """[B, S, heads * width] to [B, heads, S, width]."""
    return _pieces(x, width).transpose(1, 2)


def _pieces(x: Tensor, width: int) -> Tensor:
    """The last axis, cut into pieces: [..., count * width] to [..., count, width]."""
    return x.reshape(*x.shape[:-1], -1, width)


def _attend(q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None, scale: float) -> Tensor:
    """[B, query, S, D] against [B, kv, S', D], the result as [B, S, query * D]."""
    grouped = q.shape[1] != k.shape[1]
    y = functional.scaled_dot_product_attention(q, k, v, mask, scale=scale, enable_gqa=grouped)
    return y.transpose(1, 2).flatten(2)


def compute(
    component: Component,
    weights: QuantizedWeights,
    inputs: Mapping[str, NDArray[Any]],
    *,
    integer_linear: IntegerLinear = weight_only,
    show: Callable[[str, Tensor], None] | None = None,
) -> dict[str, NDArray[np.float32]]:
    """Run a component once in PyTorch: named arrays in, named arrays out, and `show` as `TorchOps` has it."""
    ops = TorchOps(weights=weights, integer_linear=integer_linear, show=show)
    with torch.inference_mode():
        outputs = component.forward(ops, {name: torch.from_numpy(array) for name, array in inputs.items()})
    return {name: tensor.numpy() for name, tensor in outputs.items()}
