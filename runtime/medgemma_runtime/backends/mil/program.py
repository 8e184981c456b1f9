"""An ML Program: opened, and run."""

from collections.abc import Callable, Mapping, MutableMapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medgemma_runtime.backends.mil.arguments import Arguments
from medgemma_runtime.backends.mil.arithmetic import FP16_LIMIT, Mode, arithmetic_of, to_fp16
from medgemma_runtime.backends.mil.constants import Constant, ConstantCache, Decompressed, Stored
from medgemma_runtime.backends.mil.function import READ_STATE, WRITE_STATE, Function, Step, prepare
from medgemma_runtime.backends.mil.operators import COMPUTES, MOVES, Result, slice_update
from medgemma_runtime.backends.mil.package import WeightFiles, model_path
from medgemma_runtime.backends.mil.spec import NUMPY_DTYPES, Feature, TensorType, read_model
from medgemma_runtime.errors import ArtifactError, EdgeError, NotFiniteError

__all__ = ["MilProgram", "NotFiniteTensorError", "Observer", "State"]

State = MutableMapping[str, NDArray[Any]]
"""States by name; floating ones as float32."""

Observer = Callable[[str, str, NDArray[Any]], None]
"""Called with every tensor that a run takes or computes: its name, its operator, its elements (read only)."""

_DEFAULT_CACHE_BYTES = 2 << 30


class NotFiniteTensorError(NotFiniteError):
    """A tensor that its format cannot hold.

    Attributes:
        tensor: Its name.
        operator: What computed it, or `input`.
        weight: The weight nearest before it, which tells the layer; None if there is none.
        peak: The largest magnitude before rounding; NaN or infinite where it arose inside the operator.
    """

    def __init__(
        self, function: Function, tensor: str, operator: str, peak: float, dtype: str, mode: Mode
    ) -> None:
        self.tensor, self.operator, self.peak = tensor, operator, peak
        self.weight = function.nearest_weight(tensor)
        place = f", after weight {self.weight!r}," if self.weight else ""
        super().__init__(
            f"tensor {tensor!r} ({operator}, {dtype}) of function {function.name!r}{place} reaches "
            f"{peak:,.0f} in mode {mode}, which is not finite in its format; rescale what leads to it or "
            "compute it in fp32"
        )


class MilProgram:
    """A Core ML model of the kind ML Program, evaluated with numpy on any machine.

    ```python
    program = MilProgram.open(Path("decoder.mlpackage"))
    state = program.new_state()
    program.run("prefill", {"inputs_embeds": prompt, ...}, state=state)
    logits = program.run("decode", {"inputs_embeds": token, ...}, state=state)["logits"]
    ```

    Attributes:
        functions: Signature, constants and operators of every function, by name.
        default_function: The one an app gets without naming one.
        metadata: What the model says of itself (`author`, `license`, `version`, `description` and its maker's
            own keys).
        features: What the model tells apps of its inputs and states, and outputs, by function.
    """

    def __init__(self, package: Path, *, cache_bytes: int = _DEFAULT_CACHE_BYTES) -> None:
        path = model_path(package)
        spec = read_model(memoryview(path.read_bytes()))
        undescribed = sorted(set(spec.functions) ^ set(spec.features))
        if undescribed or spec.default_function not in spec.functions:
            name = (undescribed or [spec.default_function])[0]
            raise ArtifactError(
                f"{package.name} describes the functions {sorted(spec.features)} and has "
                f"{sorted(spec.functions)}: {name!r} is missing on one side; export again"
            )
        self._files = WeightFiles(path)
        self._cache = ConstantCache(self._files, cache_bytes)
        self.functions: Mapping[str, Function] = {
            name: prepare(function, spec.features[name], self._files)
            for name, function in spec.functions.items()
        }
        self.default_function = spec.default_function
        self.metadata = spec.metadata
        self.features = spec.features

    @classmethod
    def open(cls, package: Path, *, cache_bytes: int = _DEFAULT_CACHE_BYTES) -> "MilProgram":
        """Read and check a package; weights are mapped and stay on disk until they are used.

        Args:
            package: The `.mlpackage` directory.
            cache_bytes: Memory for decompressed weights, 4 bytes each; those that do not fit are decompressed
                for every use.

        Raises:
            ArtifactError: If it is no such package, or is damaged, altered or incomplete.
            EdgeError: If it needs an operator or an opset that is not evaluated.
        """
        return cls(package, cache_bytes=cache_bytes)

    def function(self, name: str) -> Function:
        """A function by name.

        Raises:
            EdgeError: If there is none of that name.
        """
        if name not in self.functions:
            raise EdgeError(
                f"there is no function {name!r}; the program has {', '.join(sorted(self.functions))}"
            )
        return self.functions[name]

    def new_state(self, *functions: str) -> State:
        """States as an app's `makeState` gives them, zeros; those of all functions where none is named.

        Raises:
            EdgeError: If two functions have different states under one name.
        """
        types: dict[str, TensorType] = {}
        for name in functions or self.functions:
            for state, kind in self.function(name).states.items():
                if types.setdefault(state, kind) != kind:
                    raise EdgeError(
                        f"state {state!r} is {kind} in function {name!r} and {types[state]} elsewhere"
                    )
        return {name: np.zeros(_sizes(kind), _held_dtype(kind)) for name, kind in types.items()}

    def stored(self, function: str, constant: str) -> dict[str, NDArray[Any]]:
        """A constant as the package stores it, to hold its integers and scales against their source.

        Returns:
            The parameters of the operator that decompresses it (`data`, `scale`, `offset`; `indices`, `lut`),
            packed integers one to a byte; or `val` for one that is not compressed.

        Raises:
            EdgeError: If there is no such constant, or it is decompressed from what is compressed itself.
        """
        found = self.function(function).constants.get(constant)
        if isinstance(found, Stored):
            return {"val": found.raw(self._files)}
        if isinstance(found, Decompressed):
            parts = {name: part for name, part in found.inputs.items() if isinstance(part, Stored)}
            if len(parts) == len(found.inputs):
                return {name: part.raw(self._files) for name, part in parts.items()}
        raise EdgeError(f"function {function!r} stores no constant {constant!r} as it is")

    def run(
        self,
        function: str,
        inputs: Mapping[str, NDArray[Any]],
        *,
        state: State | None = None,
        mode: Mode = "fp32",
        observe: Observer | None = None,
    ) -> dict[str, NDArray[Any]]:
        """Evaluate a function once.

        Args:
            function: Its name.
            inputs: An array for every input: float16 or float32 where the program says fp16 or fp32, else of
                its own type; for an image uint8 [rows, columns, 3], RGB, or [rows, columns] if it is grey.
            state: From `new_state`; updated when the run has succeeded, left as it is when not.
            mode: How much of fp16 is honoured, see `medgemma_runtime.backends.mil.arithmetic`.
            observe: Called with every tensor.

        Returns:
            Every output by name; floating ones as float32.

        Raises:
            EdgeError: If there is no such function, or an input or state is not as it must be.
            NotFiniteTensorError: If a tensor is infinite or NaN in its format.
            ArtifactError: If a constant is damaged, or an operator gives another type than the program says.
        """
        run = _Run(self.function(function), self._cache, mode, observe)
        run.take_state(state)
        run.take_inputs(inputs)
        with np.errstate(all="ignore"):  # what is not finite is found tensor by tensor
            for step in run.function.steps:
                run.execute(step)
        if state is not None:
            state.update(run.states)
        return {name: np.array(run.value(name)) for name in run.function.outputs}


class _Run:
    """One evaluation of one function."""

    def __init__(
        self, function: Function, cache: ConstantCache, mode: Mode, observe: Observer | None
    ) -> None:
        self.function = function
        self.states: dict[str, NDArray[Any]] = {}
        self._cache, self._mode, self._observe = cache, mode, observe
        self._values: dict[str, NDArray[Any]] = {}

    def take_state(self, state: State | None) -> None:
        """Start from the states as they are."""
        for name, kind in self.function.states.items():
            if state is None or name not in state:
                held = "no state" if state is None else f"a state of {sorted(state)}"
                raise EdgeError(
                    f"function {self.function.name!r} reads the state {name!r} and was given {held}; "
                    "make one with new_state"
                )
            # A copy: what is updated in place must not be the caller's if the run fails.
            self.states[name] = np.array(_matching(f"state {name!r}", kind, state[name]))

    def take_inputs(self, inputs: Mapping[str, NDArray[Any]]) -> None:
        """Check inputs against the signature."""
        if inputs.keys() != self.function.inputs.keys():
            raise EdgeError(
                f"function {self.function.name!r} takes {sorted(self.function.inputs)} and was given "
                f"{sorted(inputs)}"
            )
        for name, kind in self.function.inputs.items():
            array = inputs[name]
            if name in self.function.images:
                array = _from_image(self.function.images[name], array)
            self._settle(name, "input", kind, _matching(f"input {name!r}", kind, array))

    def value(self, name: str) -> NDArray[Any]:
        """A tensor or constant by name."""
        constant = self.function.constants.get(name)
        return self._values[name] if constant is None else self._cache.get(constant, self._mode)

    def execute(self, step: Step) -> None:
        """Run one operation, keep what it gives and drop what nothing needs any more."""
        operator, outputs = step.operation.type, step.operation.outputs
        try:
            results = self._results(step)
            for result, output in zip(results, outputs, strict=True):
                _check_type(output.type, result)
        except (EdgeError, ValueError, IndexError, TypeError) as error:
            raise ArtifactError(
                f"{operator} {step.operation.name!r} of function {self.function.name!r} cannot be evaluated: "
                f"{error}"
            ) from None
        for result, output in zip(results, outputs, strict=True):
            self._settle(output.name, operator, output.type, result)
        for name in step.last_uses:
            self._values.pop(name, None)

    def _results(self, step: Step) -> tuple[NDArray[Any], ...]:
        operator, bindings = step.operation.type, step.bindings
        if operator == READ_STATE:
            [name] = bindings["input"]
            return (self.states[str(name)],)
        if operator == WRITE_STATE:
            [name], [data] = bindings["input"], bindings["data"]
            written = self._bound(data)
            _check_type(self.function.states[str(name)], written)
            if written is not self.states[str(name)]:  # it is after an update in place
                self.states[str(name)] = np.array(written)  # each state has memory of its own
            return ()
        arguments = Arguments(
            {parameter: tuple(map(self._bound, items)) for parameter, items in bindings.items()}
        )
        if step.is_in_place and self._observe is None:  # an observer may keep what it is shown
            result: Result = slice_update(arguments, in_place=True)
        elif operator in MOVES:
            result = MOVES[operator](arguments)
        else:
            dtype = step.operation.outputs[0].type.dtype
            result = COMPUTES[operator](arguments, arithmetic_of(self._mode, dtype))
        if arguments.unread():
            raise EdgeError(f"its parameters {sorted(arguments.unread())} are not evaluated")
        return result if isinstance(result, tuple) else (np.asarray(result),)

    def _bound(self, item: str | Constant) -> NDArray[Any]:
        return self._values[item] if isinstance(item, str) else self._cache.get(item, self._mode)

    def _settle(self, name: str, operator: str, kind: TensorType, x: NDArray[Any]) -> None:
        """Bring a tensor into its format, and keep it."""
        if x.dtype == np.float32 and x.size and operator not in MOVES and operator != READ_STATE:
            is_narrow = self._mode != "fp32" and kind.dtype == "fp16"
            peak = max(abs(float(x.min())), abs(float(x.max())))
            if not peak < (FP16_LIMIT if is_narrow else np.inf):
                raise NotFiniteTensorError(self.function, name, operator, peak, kind.dtype, self._mode)
            if is_narrow:
                x = to_fp16(x)
        self._values[name] = x
        if self._observe is not None:
            self._observe(name, operator, x)


def _from_image(feature: Feature, image: NDArray[Any]) -> NDArray[Any]:
    """An image as the tensor a program gets: [1, channels, rows, columns], 0 to 255."""
    size = feature.size or (0, 0)
    channels = () if feature.color == "grayscale" else (3,)
    if feature.color is None or image.dtype != np.uint8 or image.shape != size + channels:
        raise EdgeError(
            f"input {feature.name!r} is an image ({feature.color or 'of an unknown kind'}) and must be uint8 "
            f"{[*size, *channels]}; it is {image.dtype} {list(image.shape)}"
        )
    planes = image[None] if not channels else np.moveaxis(image, -1, 0)
    return (planes[::-1] if feature.color == "bgr" else planes)[None].astype(np.float32)


def _matching(what: str, kind: TensorType, array: NDArray[Any]) -> NDArray[Any]:
    """An array from outside as tensors are held; floats may come in either width."""
    held = _held_dtype(kind)
    is_float = held == np.float32 and array.dtype in (np.float16, np.float32)
    if not (is_float or array.dtype == held) or not _fits(kind, array.shape):
        raise EdgeError(f"{what} must be {kind} and is {array.dtype} {list(array.shape)}")
    return array.astype(held, copy=False)


def _check_type(kind: TensorType, x: NDArray[Any]) -> None:
    if x.dtype != _held_dtype(kind) or not _fits(kind, x.shape):
        raise EdgeError(f"it gives {x.dtype} {list(x.shape)} and the program says {kind}")


def _held_dtype(kind: TensorType) -> np.dtype[Any]:
    """What numpy holds a tensor as.

    Raises:
        EdgeError: If it can be a constant alone, such as integers of 6 bits.
    """
    if kind.dtype not in NUMPY_DTYPES:
        raise EdgeError(f"tensors of {kind.dtype} are not evaluated")
    return np.dtype("float32" if kind.dtype in ("fp16", "fp32") else NUMPY_DTYPES[kind.dtype])


def _fits(kind: TensorType, shape: tuple[int, ...]) -> bool:
    return len(shape) == len(kind.shape) and all(
        stated in (None, size) for stated, size in zip(kind.shape, shape, strict=True)
    )


def _sizes(kind: TensorType) -> tuple[int, ...]:
    """A shape without free sizes, as states have."""
    return tuple(size or 0 for size in kind.shape)
