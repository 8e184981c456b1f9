"""Adds operators to a Core ML function, and writes each weight to its file when an operator asks for it."""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medgemma_export.ops import RmsNorm
from medgemma_export.targets.coreml_mil import PACKED_DTYPES, Var, mb
from medgemma_export.targets.coreml_package import WeightFile
from medgemma_quantization.plan import PackedWeight, PlanRow
from medgemma_quantization.scheme import FLOAT16, FLOAT32
from medgemma_quantization.weights import QuantizedWeights

__all__ = ["MilBuilder", "identifier", "gain_array", "SCALES", "PIECE"]

SCALES = ".scales"
"""After the name of a weight: its scales, or its palettes, in the weight file."""

PIECE = "piece"
"""After the name of a weight, with a number: some of its rows."""


def identifier(name: str) -> str:
    """A weight's name as MIL can spell it."""
    return re.sub(r"\W", "_", name)


def row_kind(row: PlanRow) -> str:
    """The type that a weight file gives the integers of a weight."""
    return f"{'uint' if row.storage.palette else 'int'}{row.storage.bits}"


def gain_array(stored: NDArray[np.float32], weight: RmsNorm, *, half: bool) -> NDArray[Any]:
    """What an RMS norm multiplies by: Gemma stores it less one."""
    gain = (stored + np.float32(1)) * np.float32(weight.factor)
    return gain.astype(np.float16 if half else np.float32)


@dataclass(kw_only=True)
class MilBuilder:
    """What implementations of the operations build with.

    Attributes:
        weights: Where weights come from.
        file: Where they go.
        note: Told what was written for each weight.
        half: Whether the program computes in float16, or in float32.
    """

    weights: QuantizedWeights
    file: WeightFile
    note: Callable[[PackedWeight], None]
    half: bool
    _constants: dict[str, Var] = field(default_factory=dict)
    _count: int = 0

    def normalize_pixels(self, pixels: Var, scale: NDArray[np.float32], bias: NDArray[np.float32]) -> Var:
        """[1, 3, rows, columns] float32 of an image from 0 to 255 to a model's input; scale and bias are [3].

        In float32, which has no part in what follows: it costs nothing, and a level stays what it is.
        """
        scaled = self.op("mul", x=pixels, y=scale.reshape(1, 3, 1, 1))
        normalized = self.op("add", x=scaled, y=bias.reshape(1, 3, 1, 1))
        return self.op("cast", x=normalized, dtype="fp16") if self.half else normalized

    def output(self, x: Var, name: str) -> Var:
        """A result as float32, under the name that is declared."""
        return mb.cast(x=x, dtype="fp32", name=name) if self.half else self.result(x, name)

    def result(self, x: Var, name: str) -> Var:
        """A result as it is, under the name that is declared."""
        return mb.identity(x=x, name=name)

    def op(self, operator: str, **arguments: Any) -> Any:
        """Add an operator, and give its result, or its results."""
        self._count += 1
        return getattr(mb, operator)(name=f"{operator}_{self._count}", **arguments)

    def number(self, value: float) -> Any:
        """A constant of one element, in what the program computes in."""
        return np.float16(value) if self.half else np.float32(value)

    def matrix(self, name: str, *, is_kernel: bool = False) -> Var:
        """A matrix or table: as it is, or as integers and what makes them values, which engines put together.

        Args:
            name: Of the weight.
            is_kernel: Whether it is given two more axes of size 1, as the kernel of a convolution.
        """
        if name not in self._constants:
            row = self.weights.plan.by_name[name]
            self.note(PackedWeight(name=name, storage=row.storage, shape=row.stored_shape))
            more = (1, 1) if is_kernel else ()
            if row.storage.is_float:
                floats = self._cast(self.weights.float(name))
                self._constants[name] = self._constant(name, self._kind, floats.reshape(*floats.shape, *more))
            else:
                scales = self._cast(self.weights.scales(name))
                self._constants[name] = self._integers(row, self.weights.stored_values(name), scales, more)
        return self._constants[name]

    def kernels(self, name: str, rows: int) -> list[Var]:
        """A matrix as the kernels of several convolutions, of so many outputs each but the last.

        Its values lie in the file once and in order, as a host that looks rows up wants them.
        """
        row = self.weights.plan.by_name[name]
        self.note(PackedWeight(name=name, storage=row.storage, shape=row.stored_shape))
        starts = range(0, row.stored_shape[0], rows)
        keys = [f"{name}.{PIECE}{index}" for index in range(len(starts))]
        if row.storage.is_float:
            floats = self._cast(self.weights.float(name))
            self.file.add_pieces(name, self._kind, floats, dict(zip(keys, starts, strict=True)))
            return [
                self._constant(key, self._kind, floats[start : start + rows, :, None, None])
                for key, start in zip(keys, starts, strict=True)
            ]
        values, scales = self.weights.stored_values(name), self._cast(self.weights.scales(name))
        shared = row.storage.palette or 1
        first = {f"{key}{SCALES}": start // shared for key, start in zip(keys, starts, strict=True)}
        self.file.add_pieces(name, row_kind(row), values, dict(zip(keys, starts, strict=True)))
        self.file.add_pieces(f"{name}{SCALES}", self._kind, scales, first)
        return [
            self._integers(
                replace(row, name=key, stored_shape=(len(values[start : start + rows]), row.stored_shape[1])),
                values[start : start + rows],
                scales[start // shared : (start + rows) // shared],
                (1, 1),
            )
            for key, start in zip(keys, starts, strict=True)
        ]

    def floats(self, name: str) -> Var:
        """A weight that every plan keeps in floats."""
        return self._noted(name, self._cast(self.weights.float(name)))

    def rms_norm(self, x: Var, weight: RmsNorm, *, axis: int) -> Var:
        """Normalize an axis to unit root mean square, then scale.

        x / sqrt(mean(x^2) + eps) = (x / m) / sqrt(mean((x / m)^2) + (sqrt(eps) / m)^2) for every m. With m
        the largest magnitude, or sqrt(eps) where that is larger, nothing that is squared exceeds 1, and the
        sum of squares is at least 1 / width or the root is of eps itself.
        """
        root = self.number(math.sqrt(weight.eps))
        peak = self.op("reduce_max", x=self.op("abs", x=x), axes=[axis], keep_dims=True)
        peak = self.op("maximum", x=peak, y=root)
        small = self.op("real_div", x=x, y=peak)
        mean = self.op("reduce_mean", x=self.op("square", x=small), axes=[axis], keep_dims=True)
        eps = self.op("square", x=self.op("real_div", x=root, y=peak))
        inverse = self.op("rsqrt", x=self.op("add", x=mean, y=eps), epsilon=self.number(0))
        unit = self.op("mul", x=small, y=inverse)
        return self.op("mul", x=unit, y=self._gain(weight, (1,) * (-1 - axis)))

    def rotate(self, x: Var, cosine: Var, sine: Var, *, axis: int) -> Var:
        """Turn the pairs that the halves of an axis make by the angles of a rotary embedding."""
        first, second = self.op("split", x=x, num_splits=2, axis=axis)
        turned = [
            self.op("sub", x=self.op("mul", x=first, y=cosine), y=self.op("mul", x=second, y=sine)),
            self.op("add", x=self.op("mul", x=second, y=cosine), y=self.op("mul", x=first, y=sine)),
        ]
        return self.op("concat", values=turned, axis=axis)

    def _gain(self, weight: RmsNorm, more: tuple[int, ...]) -> Var:
        """What an RMS norm multiplies by, with axes of size 1 behind its own."""
        name = f"{weight.name}.weight"
        gain = gain_array(self.weights.float(name), weight, half=self.half)
        return self._noted(name, gain, more)

    def zeros(self, size: int) -> Var:
        """The bias of linears without one, which the operator needs all the same."""
        name = f"zeros.{size}"
        if name not in self._constants:
            self._constants[name] = self._constant(name, self._kind, self._cast(np.zeros(size, np.float32)))
        return self._constants[name]

    def _integers(
        self, row: PlanRow, values: NDArray[Any], scales: NDArray[Any], more: tuple[int, ...]
    ) -> Var:
        shape = (*row.stored_shape, *more)
        stored = self._constant(row.name, row_kind(row), values, shape=shape, suffix=".values")
        if row.storage.palette:  # one for some outputs and all inputs, of single values
            scales = scales.reshape(len(scales), 1, *more, scales.shape[1], 1)
            palettes = self._constant(f"{row.name}{SCALES}", self._kind, scales)
            return mb.constexpr_lut_to_dense(indices=stored, lut=palettes, name=identifier(row.name))
        scale = self._constant(f"{row.name}{SCALES}", self._kind, scales.reshape(*scales.shape, *more))
        return mb.constexpr_blockwise_shift_scale(data=stored, scale=scale, name=identifier(row.name))

    def _noted(self, name: str, array: NDArray[Any], more: tuple[int, ...] = ()) -> Var:
        if name not in self._constants:
            storage = FLOAT16 if self.half else FLOAT32
            self.note(PackedWeight(name=name, storage=storage, shape=array.shape))
            self._constants[name] = self._constant(name, self._kind, array.reshape(*array.shape, *more))
        return self._constants[name]

    def _constant(
        self, key: str, kind: str, array: NDArray[Any], *, shape: tuple[int, ...] = (), suffix: str = ""
    ) -> Var:
        """A constant that lies in the weight file under `key`; packed integers have a shape of their own."""
        self.file.add(key, kind, array)
        # Packed integers are bytes with a note in their dtype, which a view keeps and a conversion drops.
        dtype = PACKED_DTYPES.get(kind) or np.dtype(kind)
        stand_in = np.broadcast_to(np.zeros((), f"{dtype.kind}{dtype.itemsize}"), shape or array.shape)
        value = mb.const(val=stand_in.view(dtype), name=identifier(f"{key}{suffix}"))
        value.op.weight_id = key
        return value

    @property
    def _kind(self) -> str:
        return "float16" if self.half else "float32"

    def _cast(self, array: NDArray[np.float32]) -> NDArray[Any]:
        return array.astype(np.float16 if self.half else np.float32)
