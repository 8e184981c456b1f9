"""Operators that multiply and add up: linear, matmul, convolution, pooling, norms, attention."""

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medgemma_runtime.backends.mil.arguments import Arguments
from medgemma_runtime.backends.mil.arithmetic import Arithmetic
from medgemma_runtime.errors import EdgeError

__all__ = ["linear", "matmul", "conv", "avg_pool", "softmax", "layer_norm", "attention"]

# Attention over 4,096 patches has 16.8 million scores for each head; they are made for as many queries at
# once as keep them under this many.
_MAX_SCORES = 1 << 24


def linear(arguments: Arguments, arithmetic: Arithmetic) -> NDArray[Any]:
    """[..., I] by weight [O, I], plus bias [O]."""
    y = arithmetic.matmul(arguments.array("x"), arguments.array("weight").T)
    bias = arguments.optional("bias")
    return y if bias is None else np.asarray(y + bias)


def matmul(arguments: Arguments, arithmetic: Arithmetic) -> NDArray[Any]:
    """[..., M, K] by [..., K, N], the leading axes broadcast."""
    x, y = arguments.array("x"), arguments.array("y")
    if min(x.ndim, y.ndim) < 2:
        # coremltools 9.0 states [1, 5] for [8] by [2, 8, 5], its own definition and numpy [2, 5].
        raise EdgeError("the product of a vector is not evaluated; give it a second axis")
    x = x.swapaxes(-1, -2) if arguments.flag("transpose_x") else x
    y = y.swapaxes(-1, -2) if arguments.flag("transpose_y") else y
    return arithmetic.matmul(x, y)


def conv(arguments: Arguments, arithmetic: Arithmetic) -> NDArray[Any]:
    """[N, C, *D] by weight [O, C / groups, *K] to [N, O, *D'], in one to three dimensions."""
    x, weight = arguments.array("x"), arguments.array("weight")
    sizes = weight.shape[2:]
    strides = arguments.integers("strides", (1,) * len(sizes))
    dilations = arguments.integers("dilations", (1,) * len(sizes))
    groups = arguments.integer("groups", 1)
    windows = _windows(_padded(arguments, x, len(sizes)), sizes, strides, dilations)
    # [N, C, *D', *K] to [N, *D', groups, C / groups * K]
    kernel_axes = range(2 + len(sizes), 2 + 2 * len(sizes))
    patches = windows.transpose(0, *range(2, 2 + len(sizes)), 1, *kernel_axes)
    patches = patches.reshape(*patches.shape[: 1 + len(sizes)], groups, -1)
    kernels = weight.reshape(groups, weight.shape[0] // groups, -1).swapaxes(-1, -2)
    products = [arithmetic.matmul(patches[..., group, :], kernels[group]) for group in range(groups)]
    y = np.concatenate(products, -1)
    bias = arguments.optional("bias")
    return np.moveaxis(y if bias is None else y + bias, -1, 1)


def avg_pool(arguments: Arguments, arithmetic: Arithmetic) -> NDArray[Any]:
    """Means over windows of [N, C, *D]."""
    x, sizes = arguments.array("x"), arguments.integers("kernel_sizes")
    strides = arguments.integers("strides", (1,) * len(sizes))
    if arguments.flag("ceil_mode"):
        raise EdgeError("ceil_mode is not evaluated")
    window_axes = tuple(range(x.ndim, x.ndim + len(sizes)))
    ones = (1,) * len(sizes)
    total = arithmetic.sum(_windows(_padded(arguments, x, len(sizes)), sizes, strides, ones), window_axes)
    count: NDArray[Any] | np.float32 = np.float32(math.prod(sizes))
    if arguments.flag("exclude_padding_from_average"):
        inside = _padded(arguments, np.ones_like(x), len(sizes))
        count = _windows(inside, sizes, strides, ones).sum(window_axes)
    return np.asarray(np.squeeze(total, window_axes) / count)


def softmax(arguments: Arguments, arithmetic: Arithmetic) -> NDArray[Any]:
    """Over one axis, the last where left out."""
    return _softmax(arguments.array("x"), arguments.integer("axis", -1), arithmetic)


def layer_norm(arguments: Arguments, _: Arithmetic) -> NDArray[Any]:
    """Zero mean and unit variance over `axes`, then scale and shift.

    The statistics are float32 in every mode: residuals of tens of thousands pass through the devices'
    kernels, whose squares fp16 could not hold.
    """
    x = arguments.array("x")
    axes = tuple(axis % x.ndim for axis in arguments.integers("axes", range(x.ndim)))
    shape = [size if axis in axes else 1 for axis, size in enumerate(x.shape)]
    centred = x - x.mean(axes, keepdims=True)
    variance = np.square(centred).mean(axes, keepdims=True)
    y = centred / np.sqrt(variance + arguments.number("epsilon", 1e-5))
    gamma, beta = arguments.optional("gamma"), arguments.optional("beta")
    if gamma is not None:
        y = y * gamma.reshape(shape)
    return np.asarray(y if beta is None else y + beta.reshape(shape))


def attention(arguments: Arguments, arithmetic: Arithmetic) -> NDArray[Any]:
    """`softmax(query @ key.T / sqrt(E) + mask) @ value`; a boolean mask is true where a key is seen."""
    query, key, value = (arguments.array(name) for name in ("query", "key", "value"))
    mask = arguments.optional("attn_mask")
    if query.shape[:-2] != key.shape[:-2] or query.shape[:-2] != value.shape[:-2]:
        raise EdgeError(
            f"leading axes of query {list(query.shape)}, key {list(key.shape)} and value "
            f"{list(value.shape)} differ; the operator does not repeat grouped heads"
        )
    queries, keys = query.shape[-2], key.shape[-2]
    rows = max(1, _MAX_SCORES // (math.prod(query.shape[:-2]) * keys))
    scale = np.float32(1 / math.sqrt(query.shape[-1]))
    parts = []
    for start in range(0, queries, rows):
        part = slice(start, start + rows)
        scores = arithmetic.inner(arithmetic.matmul(query[..., part, :], key.swapaxes(-1, -2)) * scale)
        if mask is not None:
            seen = mask[..., part, :] if mask.ndim > 1 and mask.shape[-2] > 1 else mask
            scores = np.where(seen, scores, -np.inf) if seen.dtype == np.bool_ else scores + seen
        parts.append(arithmetic.matmul(_softmax(scores, -1, arithmetic), value))
    return np.concatenate(parts, -2)


def _softmax(x: NDArray[Any], axis: int, arithmetic: Arithmetic) -> NDArray[Any]:
    axis %= x.ndim
    powers = arithmetic.inner(np.exp(x - x.max(axis, keepdims=True)))
    return arithmetic.inner(powers / arithmetic.sum(powers, (axis,)))


def _padded(arguments: Arguments, x: NDArray[Any], dimensions: int) -> NDArray[Any]:
    """The input with zeros around its last axes as `pad_type` and `pad` say."""
    kind, pad = arguments.text("pad_type", "valid"), arguments.integers("pad", (0,) * 2 * dimensions)
    if kind == "valid":
        return x
    if kind != "custom":
        raise EdgeError(f"pad_type {kind!r} is not evaluated")
    sides = [(0, 0)] * (x.ndim - dimensions) + [(pad[2 * i], pad[2 * i + 1]) for i in range(dimensions)]
    return np.pad(x, sides)


def _windows(
    x: NDArray[Any], sizes: tuple[int, ...], strides: tuple[int, ...], dilations: tuple[int, ...]
) -> NDArray[Any]:
    """Every window of the last axes: [N, C, *D] to [N, C, *D', *sizes], a view."""
    axes = tuple(range(x.ndim - len(sizes), x.ndim))
    spans = tuple((size - 1) * step + 1 for size, step in zip(sizes, dilations, strict=True))
    windows = np.lib.stride_tricks.sliding_window_view(x, spans, axes)
    every = [slice(None)] * (x.ndim - len(sizes))
    return windows[
        (*every, *(slice(None, None, step) for step in strides), *(slice(None, None, d) for d in dilations))
    ]
