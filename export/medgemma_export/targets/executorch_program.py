"""The constants of a component in the forms that its ExecuTorch program takes.

Integers and scales go through `torch.export` as they are; XNNPACK packs them. Tables are looked up by
ExecuTorch's own kernels.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import executorch.kernels.quantized  # noqa: F401  registers the kernels that look tables up
import numpy as np
import torch
from executorch.exir.passes import _quant_patterns_and_replacements  # noqa: F401  and their operators
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from medgemma_export.models.spec import Component
from medgemma_export.ops import HeadProjection, Heads, RmsNorm, Rotary, Table
from medgemma_export.plan_ops import PlanOps
from medgemma_export.targets.executorch_ops import HALVES, ExecutorchOps, IntegerMatrix
from medgemma_quantization.affine import INTEGER_RANGE, QuantizedTensor, pack_int4
from medgemma_quantization.plan import PackedWeight
from medgemma_quantization.scheme import FLOAT32, Storage
from medgemma_quantization.weights import QuantizedWeights

__all__ = [
    "Constants",
    "Survey",
    "half_rows",
    "head_integers",
    "integer_matrix",
    "look_up",
    "pack_table",
    "table_arrays",
]

_LOOK_UP = {
    4: torch.ops.quantized_decomposed.embedding_4bit.dtype,
    8: torch.ops.quantized_decomposed.embedding_byte.dtype,
}


class Survey(PlanOps):
    """Notes in which forms a component needs its weights.

    Args:
        component: The component.

    Attributes:
        multiplied: Names of the matrices and tables that inputs are multiplied by.
        heads: Names of the tables among them.
        looked_up: Names of the tables that ids look up.
        halved: Width of a head, by the name of a weight that is needed in halves.
        gains: Factors of the gains that are stored less one, by name.
        rotaries: The rotary embeddings.
        averages: Sizes and widths of the rows that averages are taken with.
    """

    def __init__(self, component: Component) -> None:
        super().__init__()
        self.multiplied: set[str] = set()
        self.heads: set[str] = set()
        self.looked_up: set[str] = set()
        self.halved: dict[str, int] = {}
        self.gains: dict[str, float] = {}
        self.rotaries: dict[Rotary, None] = {}
        self.averages: dict[tuple[int, int], None] = {}
        component.forward(self, dict.fromkeys((spec.name for spec in component.inputs), None))
        self.multiplied |= {weight.name for weight in self.weights if weight.role == "linear"}

    def embed(self, ids: None, table: Table) -> None:
        """See `Ops`."""
        self.looked_up.add(f"{table.name}.weight")
        super().embed(ids, table)

    def scaled_embed(self, ids: None, table: Table, scale: float) -> None:
        """See `Ops`."""
        self.embed(ids, table)

    def logits(self, x: None, table: Table) -> None:
        """See `Ops`."""
        self.heads.add(f"{table.name}.weight")
        self.multiplied.add(f"{table.name}.weight")
        super().logits(x, table)

    def rms_norm(self, x: None, weight: RmsNorm) -> None:
        """See `Ops`."""
        self.gains[f"{weight.name}.weight"] = weight.factor
        if f"{weight.name}.weight" not in self.halved:
            self.averages[weight.width, weight.width] = None
        super().rms_norm(x, weight)

    def project_heads(
        self, x: None, weights: HeadProjection, positions: None, rotary: Rotary, heads: Heads
    ) -> tuple[None, None, None]:
        """See `Ops`."""
        for part in (weights.query, weights.key, weights.query_norm, weights.key_norm):
            self.halved[f"{part.name}.weight"] = heads.width
        self.rotaries[rotary] = None
        self.averages[heads.width // 2, heads.width] = None
        return super().project_heads(x, weights, positions, rotary, heads)


@dataclass(frozen=True, kw_only=True)
class _HeldTable:
    """A table to look up: the names of its parts, and how it is stored."""

    values: str
    scales: str
    storage: Storage


@dataclass(frozen=True, kw_only=True)
class _HeldMatrix:
    """A matrix of integers: the names of its parts, and how it is stored."""

    values: str
    scales: str
    zeros: str
    storage: Storage


class Constants(nn.Module):
    """All that a component's program holds, under names that say what it is.

    Args:
        component: Whose they are.
        weights: Where the weights come from.
        note: Told the form that each weight was given.
        step: Tokens of one call at most; of decoders only.
        context: Tokens of a conversation at most; of decoders only.
    """

    def __init__(
        self,
        component: Component,
        weights: QuantizedWeights,
        note: Callable[[PackedWeight], None],
        *,
        step: int = 1,
        context: int = 1,
    ) -> None:
        super().__init__()
        self._step, self._context, self._note, self._weights = step, context, note, weights
        self._floats: dict[str, str] = {}
        self._matrices: dict[str, str | _HeldMatrix] = {}
        self._tables: dict[str, _HeldTable] = {}
        self._frequencies: dict[Rotary, str] = {}
        self._averages: dict[tuple[int, int], str] = {}
        survey = Survey(component)
        for weight in {weight.name: weight for weight in survey.weights}.values():
            name, head_width = weight.name, survey.halved.get(weight.name)
            if name in survey.looked_up:
                self._hold_table(name)
            if name in survey.multiplied:
                self._hold_matrix(name, head_width, is_head=name in survey.heads)
            elif name not in survey.looked_up:
                self._hold_float(name, head_width, survey.gains.get(name))
        for rotary in survey.rotaries:
            # In transformers' order of operations.
            pairs = torch.arange(0, rotary.width, 2) / rotary.width
            turns = 1 / rotary.theta**pairs / rotary.factor
            self._frequencies[rotary] = self._hold(f"frequencies.{len(self._frequencies)}", turns)
        for size, width in survey.averages:
            row = torch.full((1, size), 1 / width)
            self._averages[size, width] = self._hold(f"average.{size}.{width}", row)

    def ops(self) -> ExecutorchOps:
        """The operations over these constants; `torch.export` needs them asked for anew in each run."""
        return ExecutorchOps(
            floats={name: getattr(self, held) for name, held in self._floats.items()},
            matrices={name: self._matrix(held) for name, held in self._matrices.items()},
            look_up=self._look_up,
            frequencies={rotary: getattr(self, held) for rotary, held in self._frequencies.items()},
            averages={key: getattr(self, held) for key, held in self._averages.items()},
            step=self._step,
            context=self._context,
        )

    def _matrix(self, held: str | _HeldMatrix) -> Tensor | IntegerMatrix:
        if isinstance(held, str):
            matrix: Tensor = getattr(self, held)
            return matrix
        return IntegerMatrix(
            values=getattr(self, held.values),
            scales=getattr(self, held.scales),
            zeros=getattr(self, held.zeros),
            storage=held.storage,
        )

    def _look_up(self, name: str, ids: Tensor) -> Tensor:
        table = self._tables[name]
        values = getattr(self, table.values)
        if table.storage.is_float:
            return functional.embedding(ids, values)
        return look_up(values, getattr(self, table.scales), ids, table.storage)

    def _hold_table(self, name: str) -> None:
        row = self._weights.plan.by_name[name]
        values, *scales = (torch.from_numpy(part) for part in table_arrays(name, self._weights))
        self._tables[name] = _HeldTable(
            values=self._hold(f"{name}.rows", values),
            scales=self._hold(f"{name}.scales", scales[0]) if scales else "",
            storage=row.storage,
        )
        self._note(PackedWeight(name=name, storage=row.storage, shape=row.stored_shape))

    def _hold_matrix(self, name: str, head_width: int | None, *, is_head: bool) -> None:
        row = self._weights.plan.by_name[name]
        parts: dict[str, Any] = {name: slice(None)}
        if head_width is not None:
            parts = {
                f"{name}.{half}": rows for half, rows in half_rows(row.stored_shape[0], head_width).items()
            }
        if row.storage.is_float:
            matrix = self._weights.float(name)
            for part, rows in parts.items():
                self._matrices[part] = self._hold(part, torch.from_numpy(np.ascontiguousarray(matrix[rows])))
            self._note(PackedWeight(name=name, storage=FLOAT32, shape=matrix.shape))
            return
        whole = head_integers(name, self._weights) if is_head else self._weights.quantized(name)
        for part, rows in parts.items():
            tensor = integer_matrix(whole.values[rows], whole.scales[rows], whole.storage)
            self._matrices[part] = _HeldMatrix(
                values=self._hold(part, tensor.values),
                scales=self._hold(f"{part}.scales", tensor.scales),
                zeros=self._hold(f"{part}.zeros", tensor.zeros),
                storage=tensor.storage,
            )
        self._note(PackedWeight(name=name, storage=whole.storage, shape=whole.values.shape))

    def _hold_float(self, name: str, head_width: int | None, factor: float | None) -> None:
        array = self._weights.float(name)
        tensor = torch.from_numpy(array if factor is None else (array + 1) * np.float32(factor))
        if head_width is None:
            self._floats[name] = self._hold(name, tensor)
        else:
            for half, part in zip(HALVES, tensor.chunk(2), strict=True):
                self._floats[f"{name}.{half}"] = self._hold(f"{name}.{half}", part.contiguous())
        self._note(PackedWeight(name=name, storage=FLOAT32, shape=tuple(tensor.shape)))

    def _hold(self, name: str, tensor: Tensor) -> str:
        held = name.replace(".", "__")  # a module's attribute has no dots
        self.register_parameter(held, nn.Parameter(tensor, requires_grad=False))
        return held


def look_up(values: Tensor, scales: Tensor, ids: Tensor, storage: Storage) -> Tensor:
    """Rows of a table that `pack_table` packed, [..., width] float32."""
    low, high = INTEGER_RANGE[storage.bits] if storage.bits == 4 else (-128, 127)
    rows: Tensor = _LOOK_UP[storage.bits](values, scales, None, low, high, ids, dtype=torch.float32)
    return rows


def pack_table(tensor: QuantizedTensor) -> tuple[NDArray[Any], NDArray[np.float16]]:
    """A table as ExecuTorch's kernels look it up: rows, and scales as float16, which each of them fits."""
    values: NDArray[Any] = tensor.values
    if tensor.storage.bits == 4:
        # ExecuTorch's kernel has the first of two integers in the high half of a byte.
        values = pack_int4(_swap_pairs(values), offset=8)
    scales = tensor.scales if tensor.storage.block else tensor.scales[:, 0]
    return values, scales.astype(np.float16)


def head_integers(name: str, weights: QuantizedWeights) -> QuantizedTensor:
    """The integers of a table that inputs are multiplied by, in the order of `ExecutorchOps.matrices`.

    XNNPACK has the first of two int4 in the low half of a byte, and the kernel that looks up in the high one.
    """
    table = weights.quantized(name)
    return replace(table, values=_swap_pairs(table.values)) if table.storage.bits == 4 else table


def _swap_pairs(values: NDArray[np.int8]) -> NDArray[np.int8]:
    return np.ascontiguousarray(values.reshape(-1, 2)[:, ::-1]).reshape(values.shape)


def table_arrays(name: str, weights: QuantizedWeights) -> list[NDArray[Any]]:
    """What a program holds of a table that is looked up: its rows, and their scales if it has any."""
    if weights.plan.by_name[name].storage.is_float:
        return [weights.float(name)]
    return list(pack_table(weights.quantized(name)))


def half_rows(rows: int, head_width: int) -> dict[str, NDArray[np.int64]]:
    """The rows of a projection that make the first half of every head, and those that make the second."""
    halves = np.arange(rows).reshape(-1, 2, head_width // 2)
    return {half: halves[:, index].reshape(-1) for index, half in enumerate(HALVES)}


def integer_matrix(values: NDArray[np.int8], scales: NDArray[np.float32], storage: Storage) -> IntegerMatrix:
    """A matrix of integers for `IntegerMatrix.dequantized`."""
    factors = np.ascontiguousarray(scales if storage.block else scales[:, 0])
    return IntegerMatrix(
        values=torch.from_numpy(np.ascontiguousarray(values)),
        scales=torch.from_numpy(factors),
        zeros=torch.zeros(factors.shape, dtype=torch.int8),
        storage=storage,
    )
