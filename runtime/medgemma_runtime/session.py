"""A `Session` runs one component of an artifact: named arrays in, named arrays out."""

from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from medgemma_runtime.errors import EdgeError
from medgemma_runtime.manifest import ComponentEntry

__all__ = ["Session", "check_inputs"]


class Session(Protocol):
    """One loaded component.

    Attributes:
        entry: The component's inputs and outputs as the manifest states them.
        load_seconds: Time that opening took.
    """

    entry: ComponentEntry
    load_seconds: float

    def run(self, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Run once.

        Args:
            inputs: An array for every input of `entry`, to its dtype and shape; those with a default may be
                left out.

        Returns:
            An array for every output of `entry`.

        Raises:
            EdgeError: If a name, dtype or shape differs from `entry`.
        """
        ...

    def run_into(self, inputs: Mapping[str, NDArray[Any]], outputs: Mapping[str, NDArray[Any]]) -> None:
        """Run once, and write the results into arrays of the caller's.

        Args:
            inputs: As for `run`.
            outputs: An array for every output of `entry`. It may be an input too, where the program appends
                to what it is given: then a cache of keys or values grows in place.

        Raises:
            EdgeError: If a name, dtype or shape differs from `entry`.
        """
        ...

    def close(self) -> None:
        """Free the component's memory; `run` may not be called afterwards."""
        ...


def check_inputs(entry: ComponentEntry, inputs: Mapping[str, NDArray[Any]]) -> None:
    """Hold arrays against the component's TensorSpecs.

    Raises:
        EdgeError: On a missing or unknown name, another dtype or rank, an empty array, or a size
            that contradicts the spec.
    """
    expected = {spec.name: spec for spec in entry.inputs}
    required = {spec.name for spec in entry.inputs if spec.default is None}
    if not required <= set(inputs) <= set(expected):
        raise EdgeError(f"the component takes {sorted(expected)} and was given {sorted(inputs)}")
    sizes: dict[str, int] = {}
    for name, spec in expected.items():
        if name not in inputs:
            continue
        array = inputs[name]
        fits = array.dtype == np.dtype(spec.dtype) and array.ndim == len(spec.shape)
        if fits:
            for dim, size in zip(spec.shape, array.shape, strict=True):
                wanted = sizes.setdefault(dim, size) if isinstance(dim, str) else dim
                fits = fits and size == wanted and (size > 0 or (spec.may_be_empty and dim != "batch"))
        if not fits:
            known = f" where {sizes}" if sizes else ""
            raise EdgeError(
                f"input {name!r} must be {spec.dtype} {list(spec.shape)}{known} "
                f"and is {array.dtype} {list(array.shape)}"
            )
