"""The constants of a function, decompressed when they are used.

A constant is a `const`, or what a `constexpr_...` operator makes of others. Its key says where its bytes come
from, so functions that share a weight in the file share it in memory too.
"""

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from medgemma_runtime.backends.mil.arithmetic import Mode, to_fp16
from medgemma_runtime.backends.mil.package import WeightFiles
from medgemma_runtime.backends.mil.spec import BlobReference, TensorType, Value
from medgemma_runtime.errors import ArtifactError

__all__ = ["Constant", "Stored", "Decompressed", "ConstantCache", "DECOMPRESSIONS"]


class Constant(Protocol):
    """Something that has the same value in every run."""

    @property
    def type(self) -> TensorType:
        """Element type and shape."""
        ...

    @property
    def key(self) -> Hashable:
        """Equal for constants that are equal by origin."""
        ...

    def read(self, files: WeightFiles, mode: Mode) -> NDArray[Any]:
        """Its elements; floating ones as float32."""
        ...


@dataclass(frozen=True, kw_only=True)
class Stored:
    """A constant that is written out, in the model or in a weight file."""

    name: str
    value: Value
    key: Hashable = field(init=False, compare=False)

    def __post_init__(self) -> None:
        content = self.value.content
        origin = content if isinstance(content, BlobReference) else content.tobytes()
        object.__setattr__(self, "key", (origin, self.type.dtype, self.type.shape))

    @property
    def type(self) -> TensorType:
        """See `Constant`."""
        return self.value.type

    @property
    def is_weight(self) -> bool:
        """Whether it is in a weight file; whatever else is constant is a parameter of an operator."""
        return isinstance(self.value.content, BlobReference)

    def raw(self, files: WeightFiles) -> NDArray[Any]:
        """Its elements, in the type they are stored in; packed integers one to a byte."""
        content = self.value.content
        if isinstance(content, BlobReference):
            return files.read(content, self.type, self.name)
        return content

    def read(self, files: WeightFiles, mode: Mode) -> NDArray[Any]:
        """See `Constant`."""
        raw = self.raw(files)
        if raw.dtype.kind != "f":
            return raw
        array = raw.astype(np.float32)
        if not np.isfinite(array).all():
            raise ArtifactError(
                f"constant {self.name!r} holds infinite values or NaN, on which devices differ; "
                "build it of finite ones"
            )
        return array


@dataclass(frozen=True, kw_only=True)
class Decompressed:
    """What a `constexpr_...` operator makes of other constants."""

    name: str
    operator: str
    type: TensorType
    inputs: Mapping[str, Constant]
    key: Hashable = field(init=False, compare=False)
    is_weight: bool = field(init=False, default=True)

    def __post_init__(self) -> None:
        object.__setattr__(
            self, "key", (self.operator, *sorted((name, item.key) for name, item in self.inputs.items()))
        )

    def read(self, files: WeightFiles, mode: Mode) -> NDArray[Any]:
        """See `Constant`."""
        arrays = {name: item.read(files, mode) for name, item in self.inputs.items()}
        try:
            dense = DECOMPRESSIONS[self.operator](**arrays)
        except (ValueError, IndexError, TypeError) as error:
            raise ArtifactError(
                f"constant {self.name!r} cannot be decompressed by {self.operator} ({error}); "
                "export the model again"
            ) from None
        return to_fp16(dense) if mode != "fp32" and self.type.dtype == "fp16" else dense


def _blockwise_shift_scale(
    data: NDArray[Any], scale: NDArray[np.float32], offset: NDArray[Any] | None = None
) -> NDArray[np.float32]:
    """`scale * (data - offset)`, one scale and offset for each block of the size that the shapes imply."""
    blocks = _in_blocks(data.astype(np.float32), scale.shape)
    if offset is not None:
        blocks = blocks - _beside_blocks(offset.astype(np.float32))
    return np.asarray((blocks * _beside_blocks(scale)).reshape(data.shape))


def _lut_to_dense(
    indices: NDArray[np.uint8], lut: NDArray[Any], vector_axis: NDArray[np.int32] | None = None
) -> NDArray[Any]:
    """Table entries by index, one table [entries, vector] for each block of indices.

    Vectors of more than one entry are laid out along `vector_axis`.
    """
    *groups, entries, vector = lut.shape
    if int(indices.max(initial=0)) >= entries:
        raise ValueError(f"index {indices.max()} into a table of {entries}")
    tables = np.arange(int(np.prod(groups)), dtype=np.int32).reshape(groups) * entries
    places = (_in_blocks(indices, tuple(groups)) + _beside_blocks(tables)).reshape(indices.shape)
    dense = np.take(lut.reshape(-1, vector), places, 0)
    if vector == 1:
        return np.asarray(dense[..., 0])
    if vector_axis is None:
        raise ValueError("vectors and no vector_axis")
    axis = int(vector_axis.item()) % indices.ndim
    shape = list(indices.shape)
    shape[axis] *= vector
    return np.asarray(np.moveaxis(dense, -1, axis + 1).reshape(shape))


DECOMPRESSIONS: dict[str, Callable[..., NDArray[Any]]] = {
    "constexpr_blockwise_shift_scale": _blockwise_shift_scale,
    "constexpr_lut_to_dense": _lut_to_dense,
}
"""The compression formats of iOS 18 that weights are in."""


def _in_blocks(x: NDArray[Any], counts: tuple[int, ...]) -> NDArray[Any]:
    """[D0, D1 ...] as [n0, D0 / n0, n1, D1 / n1 ...]."""
    shape = [part for size, count in zip(x.shape, counts, strict=True) for part in (count, size // count)]
    return x.reshape(shape)


def _beside_blocks(per_block: NDArray[Any]) -> NDArray[Any]:
    """[n0, n1 ...] as [n0, 1, n1, 1 ...], to broadcast against `_in_blocks`."""
    return per_block.reshape([part for count in per_block.shape for part in (count, 1)])


class ConstantCache:
    """Decompressed constants, kept up to a number of bytes.

    What was kept stays: a program uses its constants in the same order run after run, and dropping the oldest
    would drop each just before it is wanted again. Constants of one mode are kept at a time.

    Args:
        files: The model's weight files.
        max_bytes: Bytes to keep; what does not fit is decompressed for every use.
    """

    def __init__(self, files: WeightFiles, max_bytes: int) -> None:
        self._files = files
        self._max_bytes = max_bytes
        self._kept: dict[Hashable, NDArray[Any]] = {}
        self._kept_bytes = 0
        self._mode: Mode = "fp32"

    def get(self, constant: Constant, mode: Mode) -> NDArray[Any]:
        """A constant's elements, not to be written to; floating ones as float32."""
        if mode != self._mode:
            self._kept.clear()
            self._kept_bytes, self._mode = 0, mode
        kept = self._kept.get(constant.key)
        if kept is not None:
            return kept
        array = constant.read(self._files, mode)
        array.flags.writeable = False
        if self._kept_bytes + array.nbytes <= self._max_bytes:
            self._kept[constant.key] = array
            self._kept_bytes += array.nbytes
        return array
