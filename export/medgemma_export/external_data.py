"""The file beside an ONNX program that holds its weights, written as they come.

Offsets are aligned so that ONNX Runtime can map the file instead of copying it: 64 KiB, Windows' allocation
granularity, for large tensors; a cache line for small ones.
"""

from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

__all__ = ["ExternalData"]

_LARGE_BYTES = 1 << 20
_LARGE_ALIGNMENT = 1 << 16
_SMALL_ALIGNMENT = 64
# Below this a tensor stays in the program: ONNX Runtime reads shapes and axes only from there.
_INLINE_BYTES = 1024


class ExternalData:
    """An open weight file; use as a context manager."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._stream = path.open("wb")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stream.close()

    def add(self, name: str, array: NDArray[Any]) -> ir.TensorProtocol:
        """Append an array and return the tensor that refers to it."""
        array = np.asarray(array, order="C")
        if array.nbytes < _INLINE_BYTES:
            return ir.tensor(array, name=name)
        alignment = _LARGE_ALIGNMENT if array.nbytes >= _LARGE_BYTES else _SMALL_ALIGNMENT
        offset = -(-self._stream.tell() // alignment) * alignment
        self._stream.seek(offset)
        self._stream.write(array.data)
        return ir.ExternalTensor(
            self._path.name,
            offset,
            array.nbytes,
            ir.DataType.from_numpy(array.dtype),
            shape=ir.Shape(array.shape),
            name=name,
            base_dir=self._path.parent,
        )
