"""What other toolchains make of the same weights, computed by their own code: peers in a quantization table.

Only their numerics are taken, for every weight that a plan stores as integers, so that all rows of a table
round the same weights. Their files differ in that: llama-quantize keeps an output head in Q6_K, and a tied
table with it; ONNX Runtime GenAI's builder leaves embeddings float unless they are shared.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Literal

import numpy as np
from numpy.typing import NDArray

from medgemma_quantization.plan import QuantPlan
from medgemma_quantization.weights import ReadWeight

__all__ = ["Peer", "PEERS", "PeerName", "peer_reader"]

PeerName = Literal["llama.cpp-q4_0", "onnxruntime-int4", "onnxruntime-uint4"]

_BLOCK: Final = 32


@dataclass(frozen=True, kw_only=True)
class Peer:
    """A rounding of another toolchain, in blocks of 32 inputs.

    Attributes:
        label: For people.
        storage: What it stores.
        bits: Of a weight, with its share of a 16-bit scale and, where there is one, a 4-bit zero point.
        round_rows: Rounds [rows, inputs] and gives back what the integers stand for.
    """

    label: str
    storage: str
    bits: float
    round_rows: Callable[[NDArray[np.float32]], NDArray[np.float32]]


def _q4_0(weight: NDArray[np.float32]) -> NDArray[np.float32]:
    """llama.cpp's Q4_0: 16 levels from the value of largest magnitude, whose sign decides the scale's."""
    from gguf import GGMLQuantizationType, quants

    packed = quants.quantize(weight, GGMLQuantizationType.Q4_0)
    rounded: NDArray[np.float32] = quants.dequantize(packed, GGMLQuantizationType.Q4_0)
    return rounded


def _blockwise(weight: NDArray[np.float32], *, symmetric: bool) -> NDArray[np.float32]:
    """What ONNX Runtime's quantizer for `MatMulNBits` writes; GenAI's builder calls it as `rtn`."""
    from onnxruntime.capi._pybind_state import quantize_matmul_4bits

    outputs, inputs = weight.shape
    blocks = inputs // _BLOCK
    packed = np.zeros((outputs, blocks, _BLOCK // 2), np.uint8)
    scales = np.zeros((outputs, blocks), np.float32)
    zeros = np.zeros((outputs, -(-blocks // 2)), np.uint8)
    transposed = np.ascontiguousarray(weight.T)
    quantize_matmul_4bits(packed, transposed, scales, zeros, _BLOCK, outputs, inputs, symmetric)
    # The scale that a float16 artifact stores.
    scales = scales.astype(np.float16).astype(np.float32)
    values = _nibbles(packed).astype(np.float32)
    zero = np.full((outputs, blocks), 8, np.float32)
    if not symmetric:
        zero = _nibbles(zeros)[:, :blocks].astype(np.float32)
    rounded: NDArray[np.float32] = (values - zero[..., None]) * scales[..., None]
    return rounded.reshape(weight.shape)


def _nibbles(packed: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Both halves of each byte, the low one first, along the last axis."""
    return np.stack((packed & 0x0F, packed >> 4), axis=-1).reshape(*packed.shape[:-1], -1)


PEERS: dict[PeerName, Peer] = {
    "llama.cpp-q4_0": Peer(label="llama.cpp Q4_0", storage="Q4_0, int4 block 32", bits=4.5, round_rows=_q4_0),
    "onnxruntime-int4": Peer(
        label="ONNX Runtime RTN, symmetric",
        storage="int4 block 32",
        bits=4.5,
        round_rows=lambda weight: _blockwise(weight, symmetric=True),
    ),
    "onnxruntime-uint4": Peer(
        label="ONNX Runtime RTN, asymmetric",
        storage="uint4 block 32, zero points",
        bits=4.625,
        round_rows=lambda weight: _blockwise(weight, symmetric=False),
    ),
}


def peer_reader(peer: Peer, plan: QuantPlan, read: ReadWeight) -> ReadWeight:
    """Reads weights as the peer rounds them, those that the plan keeps float as they are.

    Args:
        peer: Who rounds.
        plan: One with blocks of 32 for every matrix and table.
        read: Reads a float weight by name.
    """

    def rounded(name: str, rows: slice | None = None) -> NDArray[np.float32]:
        weight, row = read(name, rows), plan.by_name[name]
        if row.storage.is_float:
            return weight
        # A plan with blocks of 32 has made every matrix a multiple of them.
        grow = row.stored_shape[1] - weight.shape[1]
        return peer.round_rows(np.pad(weight, ((0, 0), (0, grow))))

    return rounded
