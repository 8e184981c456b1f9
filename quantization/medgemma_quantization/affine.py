"""Integers and scales in plain numpy: the oracle that every target's packing is held against.

Conventions that ONNX Runtime, Core ML and XNNPACK can all represent exactly:

- a weight is `scale * integer`, zero point 0, one scale for each output row or each block of inputs in it;
- int4 lies in [-8, 7], int8 in [-127, 127];
- the magnitudes of two neighbouring int8 inputs of one output add up to at most 128. Processors without VNNI
  multiply unsigned activations by signed weights in pairs and saturate the sum at int16 (`vpmaddubsw`);
  255 * 128 is the largest that fits, so every processor computes the same number. Costs about half a bit;
- a scale has at most 8 significant bits and is a multiple of 2**-24, so that float16 and bfloat16 both hold
  it exactly.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medgemma_quantization.activations import ActivationRange
from medgemma_quantization.scheme import Storage

__all__ = [
    "QuantizedTensor",
    "INTEGER_RANGE",
    "PAIR_LIMIT",
    "quantize",
    "range_scales",
    "round_scale",
    "pack_integers",
    "unpack_integers",
    "pack_int4",
    "unpack_int4",
]

INTEGER_RANGE: dict[int, tuple[int, int]] = {4: (-8, 7), 8: (-127, 127)}
PAIR_LIMIT = 128

# float16's smallest step; the largest scale is float16's largest number with 8 significant bits.
_SCALE_STEP = 2.0**-24
_SCALE_MAX = 65280.0


@dataclass(frozen=True, kw_only=True)
class QuantizedTensor:
    """A matrix as integers and scales, or as indices into palettes.

    Shapes:
        values: [outputs, inputs] int8
        scales: [outputs, blocks] float32; blocks is 1 for per-channel storage. Of a palette its values,
            [outputs / palette, 2 ** bits]

    Attributes:
        storage: How it is stored.
        values: The integers.
        scales: What they are multiplied by.
        input: How what it multiplies is rounded; None where that is decided at run time, or not at all.
    """

    storage: Storage
    values: NDArray[np.int8]
    scales: NDArray[np.float32]
    input: ActivationRange | None = None

    def __post_init__(self) -> None:
        rows, columns = self.values.shape
        if self.storage.palette:
            if self.scales.shape != (rows // self.storage.palette, 1 << self.storage.bits):
                raise ValueError(f"{self.storage} of {self.values.shape} has no palettes {self.scales.shape}")
            return
        blocks = columns // self.storage.block if self.storage.block else 1
        if self.scales.shape != (rows, blocks):
            raise ValueError(
                f"{self.storage} of {self.values.shape} needs scales {(rows, blocks)}, "
                f"not {self.scales.shape}"
            )

        if self.storage.bits == 8 and _pair_sums(self.values.astype(np.int16)).max() > PAIR_LIMIT:
            raise ValueError(f"two neighbouring int8 values exceed {PAIR_LIMIT} together; widen the scale")

    def dequantize(self) -> NDArray[np.float32]:
        """The matrix that the integers stand for, [outputs, inputs] float32."""
        rows, columns = self.values.shape
        if self.storage.palette:
            groups = self.values.reshape(len(self.scales), -1)
            return np.take_along_axis(self.scales, groups, axis=1).reshape(rows, columns)
        blocks = self.scales.shape[1]
        grouped = self.values.reshape(rows, blocks, columns // blocks).astype(np.float32)
        return (grouped * self.scales[:, :, None]).reshape(rows, columns)


def quantize(weight: NDArray[np.float32], storage: Storage, scales: NDArray[np.float32]) -> QuantizedTensor:
    """Round a matrix to the nearest integers (ties to even) for given scales, clipped to the range.

    Args:
        weight: [outputs, inputs].
        storage: int4 or int8; its block must divide `inputs`.
        scales: [outputs, blocks], as `range_scales` or a calibration method chose them.
    """
    rows, columns = weight.shape
    blocks = scales.shape[1]
    low, high = INTEGER_RANGE[storage.bits]
    grouped = weight.reshape(rows, blocks, columns // blocks) / scales[:, :, None]
    values = np.clip(np.rint(grouped), low, high).astype(np.int8).reshape(rows, columns)
    return QuantizedTensor(storage=storage, values=values, scales=scales)


def range_scales(weight: NDArray[np.float32], storage: Storage) -> NDArray[np.float32]:
    """The smallest admissible scales with which no weight is clipped: [outputs, blocks].

    int4 has one more negative than positive step, so a block whose extreme is negative gets a finer scale.
    int8 leaves room for both weights of a pair to be rounded up.

    Raises:
        ValueError: If the block does not divide the inputs, or a weight is not finite.
    """
    rows, columns = weight.shape
    block = storage.block or columns
    if columns % block:
        raise ValueError(f"{columns} inputs are no multiple of the block {block}")
    grouped = weight.reshape(rows, columns // block, block)
    low, high = INTEGER_RANGE[storage.bits]
    scales = np.maximum(grouped.max(axis=2) / high, grouped.min(axis=2) / low)
    if storage.bits == 8:
        scales = np.maximum(scales, _pair_sums(grouped).max(axis=2) / (PAIR_LIMIT - 1))
    if not np.isfinite(scales).all():
        raise ValueError("a weight is not finite")
    return round_scale(np.abs(scales))


def round_scale(scales: NDArray[np.float32]) -> NDArray[np.float32]:
    """Round scales up to 8 significant bits and a multiple of 2**-24; zero becomes that smallest step.

    Raises:
        ValueError: If a scale exceeds the largest such float16.
    """
    mantissa, exponent = np.frexp(scales.astype(np.float64))
    rounded = np.ldexp(np.ceil(np.ldexp(mantissa, 8)), exponent - 8)
    rounded = np.maximum(np.ceil(rounded / _SCALE_STEP), 1) * _SCALE_STEP
    if (rounded > _SCALE_MAX).any():
        raise ValueError(f"a scale of {rounded.max():.4g} exceeds float16's range")
    result: NDArray[np.float32] = rounded.astype(np.float32)
    return result


def _pair_sums(values: NDArray[Any]) -> NDArray[Any]:
    """Magnitudes of inputs 0 and 1, 2 and 3, ... added up, along the last axis."""
    magnitudes = np.abs(values)
    even, odd = magnitudes[..., 0::2], magnitudes[..., 1::2]
    sums: NDArray[Any] = even.copy()
    sums[..., : odd.shape[-1]] += odd
    return sums


def pack_integers(values: NDArray[np.int8], storage: Storage) -> NDArray[Any]:
    """Integers as they are kept: int8, or several to a byte along the last axis, lowest bits first.

    Args:
        values: [..., n]: int8; int4 in [-8, 7]; or indices of 4 or 6 bits, n being a multiple of 4.
        storage: What they are.
    """
    if storage.bits == 8:
        return values
    if storage.bits == 4:
        return pack_int4(values)
    quads = values.view(np.uint8).reshape(*values.shape[:-1], -1, 4).astype(np.uint32)
    words = (quads << np.arange(0, 24, 6, dtype=np.uint32)).sum(axis=-1, dtype=np.uint32)
    octets = words[..., None] >> np.arange(0, 24, 8, dtype=np.uint32)
    return np.asarray(octets.astype(np.uint8).reshape(*values.shape[:-1], -1))


def unpack_integers(stored: NDArray[Any], storage: Storage) -> NDArray[np.int8]:
    """The inverse of `pack_integers`."""
    if storage.bits == 8:
        return stored.view(np.int8)
    if storage.bits == 4:
        unpacked = unpack_int4(stored.view(np.uint8))
        return np.asarray(unpacked & np.int8(0x0F)) if storage.palette else unpacked
    octets = stored.reshape(*stored.shape[:-1], -1, 3).astype(np.uint32)
    words = (octets << np.arange(0, 24, 8, dtype=np.uint32)).sum(axis=-1, dtype=np.uint32)
    values = (words[..., None] >> np.arange(0, 24, 6, dtype=np.uint32)) & np.uint32(0x3F)
    return np.asarray(values.astype(np.int8).reshape(*stored.shape[:-1], -1))


def pack_int4(values: NDArray[np.int8], *, offset: int = 0) -> NDArray[np.uint8]:
    """Two 4-bit integers a byte along the last axis, the first in the low half.

    Args:
        values: [..., n] with n even, in [-8, 7].
        offset: Added before packing: 0 keeps two's complement, 8 gives the unsigned form.
    """
    if values.shape[-1] % 2:
        raise ValueError(f"an odd number of integers ({values.shape[-1]}) does not fill whole bytes")
    nibbles: NDArray[np.uint8] = (values + np.int8(offset)).view(np.uint8) & np.uint8(0x0F)
    return nibbles[..., 0::2] | (nibbles[..., 1::2] << np.uint8(4))


def unpack_int4(packed: NDArray[np.uint8], *, offset: int = 0) -> NDArray[np.int8]:
    """The inverse of `pack_int4`."""
    nibbles = np.stack([packed & 0x0F, packed >> 4], axis=-1).reshape(*packed.shape[:-1], -1)
    signed: NDArray[np.int8] = nibbles.astype(np.int8)
    if offset:
        return signed - np.int8(offset)
    return np.where(signed > 7, signed - np.int8(16), signed)
