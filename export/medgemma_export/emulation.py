"""What the targets' kernels do to activations, computed exactly in PyTorch.

A packing reference must round activations as the target does, or the rounding would hide a packing error.
"""

import torch
from torch import Tensor
from torch.nn import functional

from medgemma_export.ops import Heads, LayerNorm, Linear, Parameter, PatchEmbedding, RmsNorm, Table
from medgemma_export.torch_ops import TorchOps
from medgemma_quantization.activations import ActivationRange
from medgemma_quantization.affine import QuantizedTensor

__all__ = ["onnx_integer_linear", "executorch_integer_linear", "Float16Ops"]


def onnx_integer_linear(x: Tensor, weight: QuantizedTensor) -> Tensor:
    """`DynamicQuantizeMatMul` for int8 per channel, `MatMulNBits` at accuracy level 4 for int4 in blocks.

    `QuantizeLinear` and `MatMulIntegerToFloat` where the range is static.

    Every row of the batch is rounded as a run of its own: the runtime gives integer programs one image at a
    time, because `DynamicQuantizeMatMul` looks at its whole input.

    Shapes:
        x: [B, ..., inputs] float32
        result: [B, ..., outputs] float32
    """
    if weight.input is not None:
        return _static_linear(x, weight, weight.input)
    return _block_linear(x, weight) if weight.storage.block else _tensor_linear(x, weight)


def _static_linear(x: Tensor, weight: QuantizedTensor, known: ActivationRange) -> Tensor:
    rounded = (x / known.scale).round().add(known.zero).clamp(0, 255) - known.zero
    sums = rounded.double() @ torch.from_numpy(weight.values).double().T
    return sums.float() * (known.scale * torch.from_numpy(weight.scales[:, 0]))


def _tensor_linear(x: Tensor, weight: QuantizedTensor) -> Tensor:
    """One uint8 range for each row of the batch, zero included (ONNX operator DynamicQuantizeLinear)."""
    axes = tuple(range(1, x.ndim))
    low = x.amin(axes, keepdim=True).clamp(max=0)
    high = x.amax(axes, keepdim=True).clamp(min=0)
    scale = torch.where(high > low, (high - low) / 255, 1)
    zero = (-low / scale).clamp(0, 255).round()
    rounded = (x / scale).round().add(zero).clamp(0, 255) - zero
    # float64 holds every sum of integer products exactly.
    sums = rounded.double() @ torch.from_numpy(weight.values).double().T
    return sums.float() * (scale * torch.from_numpy(weight.scales[:, 0]))


def _block_linear(x: Tensor, weight: QuantizedTensor) -> Tensor:
    """One symmetric int8 range for every block of every row of `x`, as MLAS rounds at accuracy level 4."""
    blocks = x.reshape(*x.shape[:-1], -1, weight.storage.block)
    peak = blocks.abs().amax(-1, keepdim=True)
    inverse = torch.where(peak > 0, 127 / peak, 0)
    rounded = (blocks * inverse).round().double() * (peak / 127).double()
    matrix = torch.from_numpy(weight.dequantize()).double()
    return functional.linear(rounded.flatten(-2), matrix).float()


def executorch_integer_linear(x: Tensor, weight: QuantizedTensor) -> Tensor:
    """XNNPACK's `qd8` kernels: one int8 range for each token, zero included.

    The zero point is chosen as XNNPACK chooses it (`xnn_f32_qd8_asymmetric_quantization_params`): from the
    end of the range where rounding it errs least.

    Shapes:
        x: [..., inputs] float32
        result: [..., outputs] float32
    """
    low = x.amin(-1, keepdim=True).clamp(max=0)
    high = x.amax(-1, keepdim=True).clamp(min=0)
    steps = torch.where(high > low, 255 / (high - low), 1)  # for each unit of x
    from_low, from_high = -128 - low * steps, 127 - high * steps
    is_low = (-128 + low * steps) + (127 + high * steps) > 0
    zero = torch.where(is_low, from_low, from_high).clamp(-128, 127).round()
    rounded = ((x * steps).round() + zero).clamp(-128, 127) - zero
    matrix = torch.from_numpy(weight.dequantize()).double()
    return functional.linear(rounded.double() / steps.double(), matrix).float()


class Float16Ops(TorchOps):
    """An engine that keeps activations in float16: what passes between operations is rounded to it.

    Within an operation sums are float32, as engines have them; what is beyond 65,504 becomes infinite.
    """

    def patch_embedding(self, pixels: Tensor, weight: PatchEmbedding) -> Tensor:
        """See `Ops`."""
        return _half(super().patch_embedding(pixels, weight))

    def embed(self, ids: Tensor, table: Table) -> Tensor:
        """See `Ops`."""
        return _half(super().embed(ids, table))

    def scaled_embed(self, ids: Tensor, table: Table, scale: float) -> Tensor:
        """See `Ops`."""
        return _half(super().scaled_embed(ids, table, scale))

    def add_positions(self, x: Tensor, positions: Parameter) -> Tensor:
        """See `Ops`."""
        return _half(super().add_positions(x, positions))

    def linear(self, x: Tensor, weight: Linear) -> Tensor:
        """See `Ops`. All other linears are computed by this one."""
        return _half(super().linear(_half(x), weight))

    def layer_norm(self, x: Tensor, weight: LayerNorm) -> Tensor:
        """See `Ops`."""
        return _half(super().layer_norm(x, weight))

    def rms_norm(self, x: Tensor, weight: RmsNorm) -> Tensor:
        """See `Ops`."""
        return _half(super().rms_norm(x, weight))

    def residual_add(self, x: Tensor, branch: Tensor) -> Tensor:
        """See `Ops`."""
        return _half(super().residual_add(x, branch))

    def residual_norm(self, x: Tensor, branch: Tensor, weight: RmsNorm) -> tuple[Tensor, Tensor]:
        """See `Ops`."""
        total = _half(x + branch)
        return total, self.rms_norm(total, weight)

    def attention(self, q: Tensor, k: Tensor, v: Tensor, heads: Heads, scale: float) -> Tensor:
        """See `Ops`."""
        return _half(super().attention(q, k, v, heads, scale))

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
        result, key, value = super().cached_attention(q, k, v, past_key, past_value, mask, heads, scale)
        return _half(result), key, value

    def average_pool(self, x: Tensor, side: int, window: int) -> Tensor:
        """See `Ops`."""
        return _half(super().average_pool(x, side, window))

    def logits(self, x: Tensor, table: Table) -> Tensor:
        """See `Ops`."""
        return _half(super().logits(x, table))


def _half(x: Tensor) -> Tensor:
    return x.half().float()
