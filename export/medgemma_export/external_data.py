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

__all__ = ["ExternalData", "piece_name"]

_LARGE_BYTES = 1 << 20
_LARGE_ALIGNMENT = 1 << 16
_SMALL_ALIGNMENT = 64
# Below this a tensor stays in the program: ONNX Runtime reads shapes and axes only from there.
_INLINE_BYTES = 1024


class ExternalData:
    """An open weight file; use as a context manager.

    Args:
        path: The file to create.
        shared: Large tensors of programs written before, by name; one that comes again is not written again
            but referred to where it lies, so that a table tied to the output head is on disk once.
    """

    def __init__(self, path: Path, shared: dict[str, ir.ExternalTensor]) -> None:
        self._path = path
        self._shared = shared
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
        data_type = ir.DataType.from_numpy(array.dtype)
        if name in self._shared:
            earlier = self._shared[name]
            if (earlier.dtype, earlier.nbytes) != (data_type, array.nbytes):
                raise RuntimeError(f"{name} was written before in another form")
            return _refer(Path(earlier.path), earlier.offset or 0, array, name)
        alignment = _LARGE_ALIGNMENT if array.nbytes >= _LARGE_BYTES else _SMALL_ALIGNMENT
        offset = -(-self._stream.tell() // alignment) * alignment
        self._stream.seek(offset)
        self._stream.write(array.data)
        self._shared[name] = _refer(self._path, offset, array, name)
        return self._shared[name]

    def add_in_pieces(self, name: str, array: NDArray[Any], rows: int) -> list[ir.TensorProtocol]:
        """Append an array as `add` does, and return a tensor for every so many rows of it.

        An engine that copies a weight into a layout of its own then holds one piece twice, not all of it. Not
        for arrays so small that they lie in the program.
        """
        self.add(name, array)
        whole = self._shared[name]
        return [
            _refer(
                Path(whole.path),
                (whole.offset or 0) + array[:start].nbytes,
                array[start : start + rows],
                piece_name(name, start, min(start + rows, len(array))),
            )
            for start in range(0, len(array), rows)
        ]


def piece_name(name: str, start: int, stop: int) -> str:
    """What some rows of a tensor are called."""
    return f"{name}[{start}:{stop}]"


def _refer(path: Path, offset: int, array: NDArray[Any], name: str) -> ir.ExternalTensor:
    return ir.ExternalTensor(
        path.name,
        offset,
        array.nbytes,
        ir.DataType.from_numpy(array.dtype),
        shape=ir.Shape(array.shape),
        name=name,
        base_dir=path.parent,
    )
