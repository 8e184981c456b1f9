"""What the values between a program's layers are called, the same in every target, and which are compared."""

import numpy as np
from numpy.typing import NDArray

__all__ = ["EMBEDDINGS", "MAX_TOKENS", "residual_name", "layer_names", "kept_tokens"]

EMBEDDINGS = "embeddings"
"""The residual stream before the first layer, [B, S, H]."""

MAX_TOKENS = 64
"""Tokens of each input whose residual stream a reference keeps."""


def residual_name(layer: int) -> str:
    """The residual stream after a layer, counted from 0, [B, S, H]."""
    return f"residual_{layer}"


def layer_names(layers: int) -> tuple[str, ...]:
    """The names of all states of a component with so many layers, in order."""
    return (EMBEDDINGS, *(residual_name(layer) for layer in range(layers)))


def kept_tokens(tokens: int) -> NDArray[np.int64]:
    """The places of `MAX_TOKENS` tokens spread evenly over an input, first and last among them, or all."""
    return np.rint(np.linspace(0, tokens - 1, min(tokens, MAX_TOKENS))).astype(np.int64)
