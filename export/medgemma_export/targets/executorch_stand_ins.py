"""Weights that are not there yet: what the exporter holds in place of them while it lowers a program.

A stand-in has a weight's shape and dtype, and memory that nobody touches but for a mark at its beginning.
XNNPACK calls constants by name, so it is told the weight's name and given the mark alone. When everything
else is decided, `executorch_file.write_program` puts the weights where the marks are, one at a time.
"""

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from executorch.backends.xnnpack.operators.node_visitor import NodeVisitor
from executorch.backends.xnnpack.serialization.xnnpack_graph_schema import ConstantDataOffset, XNNGraph
from executorch.backends.xnnpack.utils.utils import get_param_tensor, is_param_node
from executorch.backends.xnnpack.utils.xnnpack_constants import UINT64_MAX
from executorch.exir._serialize._named_data_store import NamedDataStore
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.fx import Node

__all__ = ["MARK_BYTES", "LateWeight", "StandIns", "late_array"]

MARK_BYTES = 16

# XNNPACK's kernels read weights in vectors.
_ALIGNMENT = 16


@dataclass(frozen=True, kw_only=True)
class LateWeight:
    """A weight as a program's file holds it.

    Attributes:
        name: Its own, or that of a part. What has the same bytes has the same name.
        size: Bytes.
        pieces: Makes them, in order, as contiguous arrays.
    """

    name: str
    size: int
    pieces: Callable[[], Iterator[NDArray[Any]]]

    @property
    def key(self) -> str:
        """What files call it. XNNPACK holds no sizes against each other, so the name says it."""
        return f"{self.name}:{self.size}"

    @property
    def mark(self) -> bytes:
        """What its stand-ins begin with."""
        return hashlib.blake2b(self.name.encode(), digest_size=MARK_BYTES).digest()


def late_array(name: str, array: NDArray[Any]) -> LateWeight:
    """A weight that is there already."""
    return LateWeight(name=name, size=array.nbytes, pieces=lambda: iter([array]))


class StandIns:
    """The stand-ins of a program, and the weights that they stand for.

    Args:
        are_filled: Whether weights are put in at once and nothing stands for them, for delegates that keep
            weights in a form of their own.
    """

    def __init__(self, *, are_filled: bool = False) -> None:
        self._are_filled = are_filled
        self._by_mark: dict[bytes, LateWeight] = {}

    @property
    def weights(self) -> tuple[LateWeight, ...]:
        """All that must reach the file."""
        return tuple(self._by_mark.values())

    def parameter(self, weight: LateWeight, shape: tuple[int, ...], dtype: torch.dtype) -> nn.Parameter:
        """A stand-in, or the same memory once more: copies of a program share it."""
        if self._are_filled:
            content = np.concatenate([piece.reshape(-1) for piece in weight.pieces()])
            return nn.Parameter(torch.from_numpy(content).view(dtype).view(shape), requires_grad=False)
        self._by_mark.setdefault(weight.mark, weight)
        # The system gives pages of what is empty when they are written to.
        memory = torch.empty(torch.Size(shape).numel() * dtype.itemsize, dtype=torch.uint8)
        memory[:MARK_BYTES] = torch.frombuffer(bytearray(weight.mark), dtype=torch.uint8)
        parameter = nn.Parameter(memory.view(dtype).view(shape), requires_grad=False)
        parameter.__deepcopy__ = lambda memo: parameter  # type: ignore[method-assign]
        return parameter

    def find(self, content: bytes) -> LateWeight | None:
        """The weight that these bytes stand for, if they begin with a mark."""
        return self._by_mark.get(content[:MARK_BYTES])

    @contextmanager
    def in_xnnpack(self) -> Iterator[None]:
        """Have XNNPACK's lowering call weights by their names, where it would hash and pack their bytes."""
        serialize = NodeVisitor.get_serialized_buffer_index

        def name_or_serialize(
            visitor: Any, tensor: Node, graph: XNNGraph, *arguments: Any, **keywords: Any
        ) -> int:
            weight = self._of_node(visitor, tensor, *arguments, **keywords)
            if weight is None:
                index: int = serialize(visitor, tensor, graph, *arguments, **keywords)
                return index
            graph.constant_data.append(
                ConstantDataOffset(offset=UINT64_MAX, size=weight.size, named_key=weight.key)
            )
            store: NamedDataStore = visitor._named_data_store
            store.add_named_data(weight.key, weight.mark, alignment=_ALIGNMENT)
            return len(graph.constant_data) - 1

        NodeVisitor.get_serialized_buffer_index = name_or_serialize
        try:
            yield
        finally:
            NodeVisitor.get_serialized_buffer_index = serialize

    def _of_node(
        self,
        visitor: Any,
        tensor: Node,
        ids: dict[Node, int],
        convert_to_nhwc: bool,
        swap_in_out_for_weights: bool,
        quant_params: Any,
        *others: Any,
    ) -> LateWeight | None:
        """By the parameters of `NodeVisitor.get_serialized_buffer_index`."""
        node = tensor if quant_params is None else quant_params.q_input
        if not is_param_node(visitor.exported_program, node):
            return None
        held: Tensor = get_param_tensor(visitor.exported_program, node)
        if held.nbytes < MARK_BYTES or not held.is_contiguous():
            return None
        weight = self.find(held.view(-1).view(torch.uint8)[:MARK_BYTES].numpy().tobytes())
        assert weight is None or not (convert_to_nhwc or swap_in_out_for_weights), (
            "weights of convolutions are there"
        )
        return weight
