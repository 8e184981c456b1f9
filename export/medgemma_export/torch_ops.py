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
from medgemma_export.ops import Activation, Heads, LayerNorm, Linear, Parameter, PatchEmbedding, Table
from medgemma_quantization.affine import QuantizedTensor
from medgemma_quantization.weights import QuantizedWeights

__all__ = ["TorchOps", "IntegerLinear", "compute", "weight_only"]

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
    """

    weights: QuantizedWeights
    integer_linear: IntegerLinear = weight_only

    def patch_embedding(self, pixels: Tensor, weight: PatchEmbedding) -> Tensor:
        """See `Ops`."""
        kernel = self._float(f"{weight.name}.weight")
        patches = functional.conv2d(pixels, kernel, self._float(f"{weight.name}.bias"), stride=weight.patch)
        return patches.flatten(2).transpose(1, 2)

    def embed(self, ids: Tensor, table: Table) -> Tensor:
        """See `Ops`."""
        name = f"{table.name}.weight"
        if self._is_float(name):
            return self._float(name)[ids]
        return torch.from_numpy(self.weights.quantized(name).dequantize())[ids]

    def add_positions(self, x: Tensor, positions: Parameter) -> Tensor:
        """See `Ops`."""
        return x + self._float(positions.name)

    def linear(self, x: Tensor, weight: Linear) -> Tensor:
        """See `Ops`."""
        name = f"{weight.name}.weight"
        if self._is_float(name):
            y = x @ self._float(name).T
        else:
            y = self.integer_linear(x, self.weights.quantized(name))
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

    def attention(self, q: Tensor, k: Tensor, v: Tensor, heads: Heads, scale: float) -> Tensor:
        """See `Ops`."""
        q, k, v = (
            part.reshape(*part.shape[:2], count, heads.width).transpose(1, 2)
            for part, count in ((q, heads.query), (k, heads.kv), (v, heads.kv))
        )
        grouped = heads.query != heads.kv
        y = functional.scaled_dot_product_attention(q, k, v, scale=scale, enable_gqa=grouped)
        return y.transpose(1, 2).flatten(2)

    def expand(self, parameter: Parameter, like: Tensor) -> Tensor:
        """See `Ops`."""
        return self._float(parameter.name).expand(like.shape[0], -1, -1)

    def token(self, x: Tensor, index: int) -> Tensor:
        """See `Ops`."""
        return x[:, index]

    def _is_float(self, name: str) -> bool:
        return self.weights.plan.by_name[name].storage.bits == 32

    def _float(self, name: str) -> Tensor:
        return torch.from_numpy(self.weights.float(name))


def compute(
    component: Component,
    weights: QuantizedWeights,
    inputs: Mapping[str, NDArray[Any]],
    *,
    integer_linear: IntegerLinear = weight_only,
) -> dict[str, NDArray[np.float32]]:
    """Run a component once in PyTorch: named arrays in, named arrays out."""
    ops = TorchOps(weights=weights, integer_linear=integer_linear)
    with torch.inference_mode():
        outputs = component.forward(ops, {name: torch.from_numpy(array) for name, array in inputs.items()})
    return {name: tensor.numpy() for name, tensor in outputs.items()}
