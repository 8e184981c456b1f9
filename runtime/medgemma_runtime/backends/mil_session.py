"""Runs a component of a Core ML artifact with the evaluator of ML Programs: a proof, not an engine.

On a Mac or a phone Core ML itself runs the same package.
"""

import time
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medgemma_runtime.artifact import Artifact
from medgemma_runtime.backends.mil import Function, MilProgram, Mode, Observer
from medgemma_runtime.errors import ArtifactError, EdgeError
from medgemma_runtime.manifest import ComponentEntry, ImageSpec
from medgemma_runtime.session import check_inputs

__all__ = ["MilSession"]

# How far from a whole level a pixel may be for float32's rounding to be why.
_MAX_LEVEL_ERROR = 0.01


class MilSession:
    """One component of an artifact of target `coreml`, evaluated with numpy.

    A component with several functions, such as a decoder's `prefill` and `decode`, runs the one that takes
    inputs of the names and sizes given. What the functions keep between calls, the session keeps.

    Args:
        artifact: An opened artifact of target `coreml`.
        component: A name from its manifest, whose program is a `.mlpackage`.
        mode: How much of the program's fp16 is honoured: `fp32` tells whether graph and weights are right.
        observe: Called with every tensor.

    Attributes:
        entry: The component's inputs and outputs as the manifest states them.
        load_seconds: Time that reading and checking the program took.
        program: The program.

    Raises:
        ArtifactError: If there is no such component, its package is damaged, or it is not the program that
            the manifest describes.
        EdgeError: If it needs an operator that is not evaluated.
    """

    entry: ComponentEntry
    load_seconds: float

    def __init__(
        self, artifact: Artifact, component: str, *, mode: Mode = "fp32", observe: Observer | None = None
    ) -> None:
        self.entry = artifact.component(component)
        self._component, self._mode, self._observe = component, mode, observe
        self._image = artifact.manifest.image
        started = time.perf_counter()
        # The manifest lists a package's files, not the package.
        self.program = MilProgram.open(artifact.directory / self.entry.program)
        for function in self.program.functions.values():
            self._check_signature(function)
        self._state = self.program.new_state()
        self._is_open = True
        self.load_seconds = time.perf_counter() - started

    def run(self, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """See `Session`. Images are given as the manifest states them: normalized, [1, 3, rows, columns].

        Raises:
            EdgeError: If a name, dtype or shape differs from `entry`, no function takes inputs of this size,
                or the session is closed.
            NotFiniteError: If a tensor leaves its format.
        """
        self._check_open()
        check_inputs(self.entry, inputs)
        function = self._function_for(inputs)
        given = {name: self._converted(function, name, array) for name, array in inputs.items()}
        results = self.program.run(
            function.name, given, state=self._state, mode=self._mode, observe=self._observe
        )
        return {spec.name: results[spec.name].astype(spec.dtype, copy=False) for spec in self.entry.outputs}

    def run_into(self, inputs: Mapping[str, NDArray[Any]], outputs: Mapping[str, NDArray[Any]]) -> None:
        """See `Session`.

        Raises:
            EdgeError: As `run`.
        """
        if outputs.keys() != {spec.name for spec in self.entry.outputs}:
            raise EdgeError(f"component {self._component!r} needs an array for every output")
        for name, array in self.run(inputs).items():
            np.copyto(outputs[name], array)

    def reset(self) -> None:
        """Forget what the functions keep between calls: a new conversation.

        Raises:
            EdgeError: If the session is closed.
        """
        self._check_open()
        self._state = self.program.new_state()

    def close(self) -> None:
        """See `Session`."""
        if self._is_open:
            self._is_open = False
            self._state = {}
            del self.program

    def _check_open(self) -> None:
        if not self._is_open:
            raise EdgeError(f"component {self._component!r} is closed; open it again to run it")

    def _check_signature(self, function: Function) -> None:
        """Hold a function against the manifest: names, and the inputs it may leave out."""
        outputs = {spec.name for spec in self.entry.outputs}
        taken = {spec.name for spec in self.entry.inputs}
        required = {spec.name for spec in self.entry.inputs if spec.default is None}
        if not required <= set(function.inputs) <= taken or outputs != set(function.outputs):
            raise ArtifactError(
                f"function {function.name!r} of component {self._component!r} takes "
                f"{sorted(function.inputs)} and gives {sorted(function.outputs)}, and the manifest says "
                f"{sorted(taken)} and {sorted(outputs)}; export again"
            )

    def _function_for(self, inputs: Mapping[str, NDArray[Any]]) -> Function:
        for function in self.program.functions.values():
            if function.inputs.keys() == inputs.keys() and all(
                len(kind.shape) == inputs[name].ndim
                and all(
                    size in (None, given) for size, given in zip(kind.shape, inputs[name].shape, strict=True)
                )
                for name, kind in function.inputs.items()
            ):
                return function
        sizes = {
            function.name: {name: str(kind) for name, kind in function.inputs.items()}
            for function in self.program.functions.values()
        }
        raise EdgeError(
            f"no function of component {self._component!r} takes inputs of the shapes "
            f"{ {name: list(array.shape) for name, array in inputs.items()} }; they take {sizes}"
        )

    def _converted(self, function: Function, name: str, array: NDArray[Any]) -> NDArray[Any]:
        """An input as the manifest states it, as the program takes it."""
        if name in function.images:
            if self._image is None:
                raise ArtifactError(f"{name!r} is an image and the manifest has no image spec; export again")
            return _to_levels(name, array, self._image)
        if array.dtype == np.int64 and function.inputs[name].dtype == "int32":
            limits = np.iinfo(np.int32)
            if array.size and not (array.min() >= limits.min and array.max() <= limits.max):
                raise EdgeError(f"input {name!r} reaches {array.max()}, which does not fit int32")
            return array.astype(np.int32)
        return array


def _to_levels(name: str, pixels: NDArray[np.float32], spec: ImageSpec) -> NDArray[np.uint8]:
    """[1, 3, rows, columns] normalized as an ImageSpec says, back to RGB uint8 [rows, columns, 3]."""
    channels = np.moveaxis(pixels[0].astype(np.float64), 0, -1)
    levels = (channels * np.array(spec.std) + np.array(spec.mean)) / spec.rescale
    whole = np.rint(levels)
    if np.abs(levels - whole).max() > _MAX_LEVEL_ERROR or whole.min() < 0 or whole.max() > 255:
        raise EdgeError(
            f"input {name!r} is no image of levels 0 to 255 normalized as {spec.name!r}, and the program "
            "takes an image; give what images.normalize makes of one"
        )
    return np.asarray(whole.astype(np.uint8))
