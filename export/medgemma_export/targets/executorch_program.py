"""The constants of a component in the forms that its ExecuTorch program takes.

Scales and vectors go through `torch.export` as they are. Of matrices and tables it sees stand-ins; what they
stand for is packed here, some rows at a time. Tables are looked up by ExecuTorch's own kernels.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
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
from medgemma_export.targets.executorch_stand_ins import LateWeight, StandIns
from medgemma_quantization.affine import INTEGER_RANGE, QuantizedTensor, pack_int4
from medgemma_quantization.plan import PackedWeight
from medgemma_quantization.scheme import FLOAT32, Storage
from medgemma_quantization.weights import QuantizedWeights

__all__ = [
    "Constants",
    "Survey",
    "late_matrix",
    "late_table",
    "look_up",
    "pack_table",
    "part_rows",
    "table_scales",
]

# Rows of a table are packed so many values at a time.
_PIECE_VALUES = 1 << 24

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
        stand_ins: Where matrices and tables are entered.
        step: Tokens of one call at most; of decoders only.
        context: Tokens of a conversation at most; of decoders only.
    """

    def __init__(
        self,
        component: Component,
        weights: QuantizedWeights,
        note: Callable[[PackedWeight], None],
        stand_ins: StandIns,
        *,
        step: int = 1,
        context: int = 1,
    ) -> None:
        super().__init__()
        self._step, self._context, self._note, self._weights = step, context, note, weights
        self._stand_ins = stand_ins
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
        rows, width = row.stored_shape
        scales = ""
        if row.storage.is_float:
            dtype = torch.float32
        else:
            width, dtype = width * row.storage.bits // 8, torch.uint8 if row.storage.bits == 4 else torch.int8
            factors = table_scales(self._weights.scales(name), row.storage)
            scales = self._hold(f"{name}.scales", torch.from_numpy(factors))
        values = self._stand_in(f"{name}.rows", late_table(name, self._weights), (rows, width), dtype)
        self._tables[name] = _HeldTable(values=values, scales=scales, storage=row.storage)
        self._note(PackedWeight(name=name, storage=row.storage, shape=row.stored_shape))

    def _hold_matrix(self, name: str, head_width: int | None, *, is_head: bool) -> None:
        row = self._weights.plan.by_name[name]
        late = [late_table(name, self._weights)] if is_head else late_matrix(name, self._weights, head_width)
        outputs, inputs = row.stored_shape
        shape = (outputs // len(late), inputs)
        if row.storage.is_float:
            for part in late:
                self._matrices[part.name] = self._stand_in(part.name, part, shape, torch.float32)
            self._note(PackedWeight(name=name, storage=FLOAT32, shape=row.stored_shape))
            return
        for part, rows in zip(late, part_rows(outputs, head_width), strict=True):
            factors = self._weights.scales(name)[rows]
            factors = np.ascontiguousarray(factors if row.storage.block else factors[:, 0])
            zeros = torch.zeros(factors.shape, dtype=torch.int8)
            self._matrices[part.name] = _HeldMatrix(
                values=self._stand_in(part.name, part, shape, torch.int8),
                scales=self._hold(f"{part.name}.scales", torch.from_numpy(factors)),
                zeros=self._hold(f"{part.name}.zeros", zeros),
                storage=row.storage,
            )
        self._note(PackedWeight(name=name, storage=row.storage, shape=row.stored_shape))

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
        return self._register(name, nn.Parameter(tensor, requires_grad=False))

    def _stand_in(self, name: str, late: LateWeight, shape: tuple[int, ...], dtype: torch.dtype) -> str:
        return self._register(name, self._stand_ins.parameter(late, shape, dtype))

    def _register(self, name: str, parameter: nn.Parameter) -> str:
        held = name.replace(".", "__")  # a module's attribute has no dots
        self.register_parameter(held, parameter)
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
    return values, table_scales(tensor.scales, tensor.storage)


def table_scales(scales: NDArray[np.float32], storage: Storage) -> NDArray[np.float16]:
    """The scales of a table that is looked up; each of them fits float16."""
    return (scales if storage.block else scales[:, 0]).astype(np.float16)


def _swap_pairs(values: NDArray[np.int8]) -> NDArray[np.int8]:
    return np.ascontiguousarray(values.reshape(-1, 2)[:, ::-1]).reshape(values.shape)


def late_table(name: str, weights: QuantizedWeights) -> LateWeight:
    """The rows of a table, for the kernel that looks up and for the one that multiplies alike.

    XNNPACK has the first of two int4 in the low half of a byte, and the kernel that looks up in the high one:
    the order of columns is that of `ExecutorchOps.matrices`.
    """
    row = weights.plan.by_name[name]
    rows, width = row.stored_shape
    step = max(1, _PIECE_VALUES // width)

    def pieces() -> Iterator[NDArray[Any]]:
        if row.storage.is_float:
            yield weights.float(name)
            return
        for start in range(0, rows, step):
            values, _ = pack_table(weights.quantized(name, slice(start, min(start + step, rows))))
            yield values

    return LateWeight(name=name, size=_bytes(rows, width, row.storage), pieces=pieces)


def late_matrix(name: str, weights: QuantizedWeights, head_width: int | None) -> list[LateWeight]:
    """A matrix as XNNPACK multiplies by it; one that is needed in halves in two parts."""
    row = weights.plan.by_name[name]
    outputs, inputs = row.stored_shape

    def part(rows: NDArray[np.int64] | slice) -> Iterator[NDArray[Any]]:
        if row.storage.is_float:
            yield np.ascontiguousarray(weights.float(name)[rows])
            return
        values = weights.quantized(name).values[rows]
        yield pack_int4(values, offset=8) if row.storage.bits == 4 else np.ascontiguousarray(values)

    parts = part_rows(outputs, head_width)
    names = [name] if head_width is None else [f"{name}.{half}" for half in HALVES]
    size = _bytes(outputs // len(parts), inputs, row.storage)
    return [
        LateWeight(name=part_name, size=size, pieces=partial(part, rows))
        for part_name, rows in zip(names, parts, strict=True)
    ]


def part_rows(rows: int, head_width: int | None) -> list[NDArray[np.int64] | slice]:
    """All rows; or those that make the first half of every head, and those that make the second."""
    if head_width is None:
        return [slice(None)]
    halves = np.arange(rows).reshape(-1, 2, head_width // 2)
    return [halves[:, index].reshape(-1) for index in range(2)]


def _bytes(rows: int, width: int, storage: Storage) -> int:
    return rows * width * (32 if storage.is_float else storage.bits) // 8
