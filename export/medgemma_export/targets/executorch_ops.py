"""The operations as ExecuTorch runs them: PyTorch, written so that XNNPACK takes all between two attentions.

What XNNPACK cannot take splits a program, and every split costs a thread start. Hence the forms below:

- a mean over the last axis is a product with a row of ones, because XNNPACK has no such mean;
- GELU's tanh form is spelled out, because XNNPACK would compute the exact form in its place;
- q and k are made in two halves, as rotary embedding pairs them, because XNNPACK cannot cut an axis of a
  tensor of free length;
- attention is ExecuTorch's fused kernel, over keys that lie in buffers of the program. It looks at the first
  rows of a buffer without a copy, but then with no mask. A single token needs none if buffers hold what it
  sees and nothing else; several tokens have a copy made and a mask. Both are computed, each of almost nothing
  where the other counts, because a branch would cut the program;
- what several matrices multiply is rounded to int8 once;
- every operator is one of ExecuTorch's core operators, also where PyTorch has a shorter word: what has to be
  decomposed has the whole program traced once more;
- there is no batch axis: the strides of [S, H] do not depend on S, which spares the exporter much arithmetic.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from executorch.extension.llm.custom_ops import custom_ops as _register_attention  # noqa: F401
from torch import Tensor
from torch.ao.quantization.fx import _decomposed as _register_rounding  # noqa: F401
from torch.nn import functional

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
from medgemma_export.targets.executorch_layers import name_value
from medgemma_quantization.affine import INTEGER_RANGE
from medgemma_quantization.scheme import Storage

__all__ = ["ExecutorchOps", "IntegerMatrix", "Mask", "HALVES"]

HALVES = ("first", "second")
"""The parts of a head that rotary embedding pairs: of each head's rows the first half, and the second."""

_QUANTIZED = torch.ops.quantized_decomposed

# Not infinite: a block of keys that are all unseen would give 0 / 0 in the kernel's running softmax.
_UNSEEN = -1e30

# Hendrycks and Gimpel 2016, arXiv 1606.08415, section 2.
_GELU_SLOPE, _GELU_CUBIC = (2 / math.pi) ** 0.5, 0.044715


@dataclass(frozen=True, kw_only=True)
class Mask:
    """Which key each new query sees, and where in the buffers keys lie.

    Attributes:
        values: [S, L] float32, 0 where a key is seen and very negative elsewhere; of several tokens.
        slots: [1, S] int64, the new keys' rows of the buffers.
        before: Rows of a ring that are copied before the new keys are written, and stand before them in L;
            None without a window, where the first L rows are copied afterwards.
        length: L.
        start: All rows up to and with this one are what a single token sees.
        is_single: [1] float32, 1 for a single token and 0 for several.
        is_several: [1] float32, 0 for a single token and 1 for several.
    """

    values: Tensor
    slots: Tensor
    before: int | None
    length: int
    start: int
    is_single: Tensor
    is_several: Tensor


@dataclass(frozen=True, kw_only=True)
class IntegerMatrix:
    """A matrix of integers, as XNNPACK's exporter knows it.

    Attributes:
        values: [outputs, inputs] int8, whatever their bits.
        scales: [outputs, blocks] float32, or [outputs].
        zeros: Zeros of the same shape.
        storage: Their bits and block.
    """

    values: Tensor
    scales: Tensor
    zeros: Tensor
    storage: Storage

    def dequantized(self) -> Tensor:
        """What XNNPACK folds into its product: [outputs, inputs] float32."""
        held = (self.values, self.scales, self.zeros)
        low, high = INTEGER_RANGE[self.storage.bits]
        if self.storage.block:
            result: Tensor = _QUANTIZED.dequantize_per_channel_group(
                *held, low, high, torch.int8, self.storage.block, torch.float32
            )
        else:
            result = _QUANTIZED.dequantize_per_channel(*held, 0, low, high, torch.int8)
        return result


@dataclass(kw_only=True)
class ExecutorchOps:
    """An `Ops[Tensor]` for `torch.export`, one sequence at a time and so without a batch axis.

    Where `Ops` says [B, S, H] it takes and gives [S, H].

    Attributes:
        floats: Float weights by name; gains of `RmsNorm` have their 1 added, and those of heads' norms are
            found by name and half.
        matrices: Matrices and tables by name; those of q and k by name and half. Of an int4 table every two
            columns are swapped: so packed, its bytes are those that look it up.
        look_up: Rows of a table by name and ids.
        frequencies: [D / 2], turns of each pair at position 1.
        averages: [1, n] filled with 1 / width, by n and width.
        step: Tokens of one call at most.
        context: Rows of the buffers of layers without a window.
    """

    floats: Mapping[str, Tensor]
    matrices: Mapping[str, Tensor | IntegerMatrix]
    look_up: Callable[[str, Tensor], Tensor]
    frequencies: Mapping[Rotary, Tensor]
    averages: Mapping[tuple[int, int], Tensor]
    step: int
    context: int
    _angles: dict[Rotary, tuple[Tensor, Tensor]] = field(default_factory=dict)
    _rounded: tuple[Tensor, Tensor] | None = None  # the last that was multiplied by integers, and its int8

    def patch_embedding(self, pixels: Tensor, weight: PatchEmbedding) -> Tensor:
        """See `Ops`."""
        kernel, bias = self.floats[f"{weight.name}.weight"], self.floats[f"{weight.name}.bias"]
        stride, none = (weight.patch, weight.patch), (0, 0)
        patches = torch.convolution(pixels, kernel, bias, stride, none, (1, 1), False, none, 1)
        return patches.view(weight.width, -1).permute(1, 0)

    def embed(self, ids: Tensor, table: Table) -> Tensor:
        """See `Ops`."""
        return self.look_up(f"{table.name}.weight", ids)

    def add_positions(self, x: Tensor, positions: Parameter) -> Tensor:
        """See `Ops`."""
        return x + self.floats[positions.name]

    def linear(self, x: Tensor, weight: Linear) -> Tensor:
        """See `Ops`."""
        bias = self.floats[f"{weight.name}.bias"] if weight.bias else None
        return self._multiply(x, f"{weight.name}.weight", bias)

    def project_together(self, x: Tensor, weights: tuple[Linear, ...]) -> tuple[Tensor, ...]:
        """See `Ops`."""
        return tuple(self.linear(x, weight) for weight in weights)

    def mlp(self, x: Tensor, up: Linear, down: Linear, activation: Activation) -> Tensor:
        """See `Ops`."""
        return self.linear(_gelu(self.linear(x, up)), down)

    def layer_norm(self, x: Tensor, weight: LayerNorm) -> Tensor:
        """See `Ops`."""
        gain, shift = self.floats[f"{weight.name}.weight"], self.floats[f"{weight.name}.bias"]
        normed: Tensor = torch.native_layer_norm(x, (weight.width,), gain, shift, weight.eps)[0]
        return normed

    def residual_add(self, x: Tensor, branch: Tensor) -> Tensor:
        """See `Ops`."""
        return x + branch

    def named(self, x: Tensor, name: str) -> Tensor:
        """See `Ops`. `executorch_layers.mark_names` takes it out again."""
        named: Tensor = name_value(x, name)
        return named

    def attention(self, q: Tensor, k: Tensor, v: Tensor, heads: Heads, scale: float) -> Tensor:
        """See `Ops`."""
        q, k, v = _pieces(q, heads.query), _pieces(k, heads.kv), _pieces(v, heads.kv)
        # The kernel looks at `start + queries` keys.
        start = k.shape[1] - q.shape[1]
        return _join(torch.ops.llama.custom_sdpa(q, k, v, start, None, 0.0, False, scale))

    def expand(self, parameter: Parameter, like: Tensor) -> Tensor:
        """See `Ops`."""
        return self.floats[parameter.name].view(parameter.shape[1:])

    def token(self, x: Tensor, index: int) -> Tensor:
        """See `Ops`."""
        return x[-1:] if index == -1 else x[index : index + 1]

    def scaled_embed(self, ids: Tensor, table: Table, scale: float) -> Tensor:
        """See `Ops`."""
        return self.embed(ids, table) * scale

    def place_images(self, embeddings: Tensor, ids: Tensor, features: Tensor, image_id: int) -> Tensor:
        """See `Ops`. Left to who runs the program: ExecuTorch's runners give images and texts by turns."""
        return embeddings

    def rms_norm(self, x: Tensor, weight: RmsNorm) -> Tensor:
        """See `Ops`."""
        unit = torch.rsqrt(self._mean_square(x, weight.width) + weight.eps)
        return x * unit * self.floats[f"{weight.name}.weight"]

    def residual_norm(self, x: Tensor, branch: Tensor, weight: RmsNorm) -> tuple[Tensor, Tensor]:
        """See `Ops`."""
        total = x + branch
        return total, self.rms_norm(total, weight)

    def average_pool(self, x: Tensor, side: int, window: int) -> Tensor:
        """See `Ops`."""
        grid = x.permute(1, 0).reshape(1, -1, side, side)
        return functional.avg_pool2d(grid, window).view(x.shape[1], -1).permute(1, 0)

    def join_batch(self, x: Tensor) -> Tensor:
        """See `Ops`."""
        return x

    def gated_mlp(self, x: Tensor, gate: Linear, up: Linear, down: Linear, activation: Activation) -> Tensor:
        """See `Ops`."""
        return self.linear(_gelu(self.linear(x, gate)) * self.linear(x, up), down)

    def project_heads(
        self, x: Tensor, weights: HeadProjection, positions: Tensor, rotary: Rotary, heads: Heads
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See `Ops`."""
        if rotary not in self._angles:  # the layers share them
            turned = positions[:, None, None] * self.frequencies[rotary]
            self._angles[rotary] = turned.cos(), turned.sin()
        angles = self._angles[rotary]
        q = self._rotated(x, weights.query, weights.query_norm, angles, heads.query)
        k = self._rotated(x, weights.key, weights.key_norm, angles, heads.kv)
        return q, k, self.linear(x, weights.value)

    def mask(
        self, positions: Tensor, blocks: Tensor, attention_mask: None, start: None, window: int | None
    ) -> Mask:
        """See `Ops`. `blocks` are how many tokens of the same image follow, [S] float32."""
        new: int = positions.shape[0]
        # An integer that is known only when the program runs.
        first: Any = torch.ops.aten._local_scalar_dense(positions[0])
        torch._check(first >= 0)  # type: ignore[no-untyped-call]
        torch._check(first + new <= self.context)  # type: ignore[no-untyped-call]
        are_several = torch.sym_min(new - 1, 1)  # type: ignore[no-untyped-call]
        before: int | None = None
        if window is None:
            length = 1 + are_several * (first + new - 1)
            torch._check(length <= self.context)  # type: ignore[no-untyped-call]
            start, slots = first, positions
            key = torch.arange(0, length, 1)
        else:
            rows = min(self.context, window)
            # At least one, seen or not: strides of what may be empty have no order.
            copied = are_several * torch.sym_min(first, rows)  # type: ignore[no-untyped-call]
            before = torch.sym_max(copied, 1)  # type: ignore[no-untyped-call]
            length = before + new
            start = torch.sym_min(first, rows - 1)  # type: ignore[no-untyped-call]
            slots = torch.remainder(positions, rows)
            last = positions[:1] - 1
            # The sum is not negative: ExecuTorch's kernel has the remainder of C.
            held = last - torch.remainder(last + rows - torch.arange(0, before, 1), rows)
            key = torch.cat((held, positions))
        seen = key[None] <= (positions + blocks.to(torch.int64))[:, None]
        if window is not None:
            seen = torch.bitwise_and(seen, positions[:, None] - key[None] < window)
        return Mask(
            values=torch.where(seen, torch.scalar_tensor(0.0), torch.scalar_tensor(_UNSEEN)),
            slots=slots[None],
            before=before,
            length=length,
            start=(1 - are_several) * start,
            is_single=(positions[-1:] == positions[:1]).to(torch.float32),
            is_several=(positions[-1:] != positions[:1]).to(torch.float32),
        )

    def cached_attention(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        past_key: Tensor,
        past_value: Tensor,
        mask: Mask,
        heads: Heads,
        scale: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See `Ops`. The caches are buffers [1, rows, kv, D] of the program, written in place."""
        copies = []
        for new, cache in ((_pieces(k, heads.kv), past_key), (_pieces(v, heads.kv), past_value)):
            if mask.before is not None:
                # What the first token overwrites is not seen any more. Row 0 of a new ring is copied, and
                # if it were left as it was found, what is not a number would stay so behind a mask.
                torch.ops.llama.update_cache_with_indices(new[:, :1], cache, 0, mask.slots[:, :1])
                # A long step overwrites what its first tokens see.
                copies.append(torch.cat((cache[:, : mask.before], new), 1))
            torch.ops.llama.update_cache_with_indices(new, cache, 0, mask.slots)
            if mask.before is None:
                copies.append(cache[:, : mask.length])
        q = _pieces(q, heads.query)
        # With a mask the kernel looks at all keys it is given, and without at `start + queries`.
        several = torch.ops.llama.custom_sdpa(q, *copies, 0, mask.values, 0.0, False, scale)
        single = torch.ops.llama.custom_sdpa(
            q[:, -1:], past_key, past_value, mask.start, None, 0.0, False, scale
        )
        y = _join(several) * mask.is_several + _join(single) * mask.is_single
        return y, past_key, past_value

    def logits(self, x: Tensor, table: Table) -> Tensor:
        """See `Ops`."""
        matrix = self.matrices[f"{table.name}.weight"]
        is_swapped = isinstance(matrix, IntegerMatrix) and matrix.storage.bits == 4
        return self._multiply(_swap_pairs(x) if is_swapped else x, f"{table.name}.weight")

    def _multiply(self, x: Tensor, name: str, bias: Tensor | None = None) -> Tensor:
        matrix = self.matrices[name]
        if isinstance(matrix, Tensor):
            return functional.linear(x, matrix, bias)
        if self._rounded is None or self._rounded[0] is not x:
            self._rounded = x, _round(x)
        return functional.linear(self._rounded[1], matrix.dequantized(), bias)

    def _rotated(
        self, x: Tensor, weight: Linear, norm: RmsNorm, angles: tuple[Tensor, Tensor], heads: int
    ) -> Tensor:
        first, second = (
            self._multiply(x, f"{weight.name}.weight.{half}").view(-1, heads, norm.width // 2)
            for half in HALVES
        )
        mean = self._mean_square(first, norm.width) + self._mean_square(second, norm.width)
        unit = torch.rsqrt(mean + norm.eps)
        gains = [self.floats[f"{norm.name}.weight.{half}"] for half in HALVES]
        first, second = first * unit * gains[0], second * unit * gains[1]
        cos, sin = angles
        turned = torch.cat((first * cos - second * sin, second * cos + first * sin), -1)
        return turned.view(-1, heads * norm.width)

    def _mean_square(self, x: Tensor, width: int) -> Tensor:
        """`sum(x ** 2) / width` over the last axis, which may be only a part of the width."""
        return functional.linear(x * x, self.averages[x.shape[-1], width])


def _round(x: Tensor) -> Tensor:
    """Each row rounded to int8 over its own range, as XNNPACK does it."""
    ranges = _QUANTIZED.choose_qparams_per_token_asymmetric(x, torch.int8)
    integers = _QUANTIZED.quantize_per_token(x, *ranges, -128, 127, torch.int8)
    result: Tensor = _QUANTIZED.dequantize_per_token(integers, *ranges, -128, 127, torch.int8, torch.float32)
    return result


def _swap_pairs(x: Tensor) -> Tensor:
    """[S, H] with every two columns swapped."""
    pairs = x.view(-1, x.shape[1] // 2, 2)
    return torch.cat((pairs[..., 1:], pairs[..., :1]), -1).view(-1, x.shape[1])


def _gelu(x: Tensor) -> Tensor:
    """The tanh form: `x * sigmoid(2 u)` where the usual notation has `x * (1 + tanh(u)) / 2`."""
    return x * torch.sigmoid((x * x * (2 * _GELU_SLOPE * _GELU_CUBIC) + 2 * _GELU_SLOPE) * x)


def _pieces(x: Tensor, count: int) -> Tensor:
    """[S, count * D] to [1, S, count, D], as the kernels want it."""
    return x.view(1, -1, count, x.shape[-1] // count)


def _join(x: Tensor) -> Tensor:
    """[1, S, count, D] to [S, count * D]."""
    return x.view(-1, x.shape[2] * x.shape[3])
