"""What one operator is given, read with the types its definition states."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medgemma_runtime.errors import EdgeError

__all__ = ["Arguments"]


class Arguments:
    """The parameters of one operator by name.

    Every reader notes what it read: a parameter that no reader asked for would change the result without the
    evaluator knowing.

    Args:
        values: By parameter, one array or the several of a tuple.
    """

    def __init__(self, values: Mapping[str, Sequence[NDArray[Any]]]) -> None:
        self._values = values
        self._unread = set(values)

    def unread(self) -> set[str]:
        """The parameters that nobody asked for."""
        return self._unread

    def arrays(self, name: str) -> Sequence[NDArray[Any]]:
        """A tuple of tensors."""
        self._unread.discard(name)
        if name not in self._values:
            raise EdgeError(f"parameter {name!r} is missing")
        return self._values[name]

    def array(self, name: str) -> NDArray[Any]:
        """A tensor that must be there."""
        [array] = self.arrays(name)
        return array

    def optional(self, name: str) -> NDArray[Any] | None:
        """A tensor, or None where it was left out."""
        return self.array(name) if name in self._values else None

    def integer(self, name: str, default: int | None = None) -> int:
        """One integer; `default` where it was left out, if it may be."""
        if default is not None and name not in self._values:
            return default
        return int(self.array(name).item())

    def integers(self, name: str, default: Sequence[int] | None = None) -> tuple[int, ...]:
        """Several integers; `default` where they were left out, if they may be."""
        if default is not None and name not in self._values:
            return tuple(default)
        return tuple(int(item) for item in self.array(name).reshape(-1))

    def number(self, name: str, default: float) -> np.float32:
        """One float; `default` where it was left out."""
        given = self.optional(name)
        return np.float32(default if given is None else given.item())

    def flag(self, name: str, *, default: bool = False) -> bool:
        """One truth value; `default` where it was left out."""
        given = self.optional(name)
        return default if given is None else bool(given.item())

    def flags(self, name: str, count: int) -> tuple[bool, ...]:
        """`count` truth values; all false where they were left out."""
        given = self.optional(name)
        return (False,) * count if given is None else tuple(bool(item) for item in given.reshape(-1))

    def text(self, name: str, default: str | None = None) -> str:
        """One string; `default` where it was left out, if it may be."""
        if default is not None and name not in self._values:
            return default
        return str(self.array(name).item())
