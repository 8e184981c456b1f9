"""A function of an ML Program, checked and made ready to run."""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from math import prod

from medgemma_runtime.backends.mil.constants import DECOMPRESSIONS, Constant, Decompressed, Stored
from medgemma_runtime.backends.mil.operators import COMPUTES, MOVES
from medgemma_runtime.backends.mil.package import WeightFiles
from medgemma_runtime.backends.mil.spec import (
    BlobReference,
    Feature,
    FunctionSpec,
    Operation,
    TensorType,
    Value,
)
from medgemma_runtime.errors import ArtifactError, EdgeError

__all__ = ["Function", "Step", "prepare", "OPERATORS"]

READ_STATE, WRITE_STATE, SLICE_UPDATE = "read_state", "write_state", "slice_update"

OPERATORS = frozenset({"const", READ_STATE, WRITE_STATE, *DECOMPRESSIONS, *MOVES, *COMPUTES})
"""Every operator that this evaluates."""

# What is asked of an operation by name before it runs: to plan its run, or to say what a weight is.
_NEEDED = {
    READ_STATE: ("input",),
    WRITE_STATE: ("input", "data"),
    SLICE_UPDATE: ("x",),
    "constexpr_blockwise_shift_scale": ("data", "scale"),
    "constexpr_lut_to_dense": ("indices", "lut"),
}

_OPSETS = ("CoreML8", "CoreML9")  # iOS 18 and 26: coremltools 9.0 defines no operator anew for the second


@dataclass(frozen=True, kw_only=True)
class Step:
    """An operation that runs.

    Attributes:
        operation: What it is, and the types of its results.
        bindings: By parameter, the names or constants it is given.
        last_uses: The tensors that nothing needs after it.
        is_in_place: Whether it replaces elements of a state, and nothing needs the state as it was.
    """

    operation: Operation
    bindings: Mapping[str, tuple[str | Constant, ...]]
    last_uses: tuple[str, ...]
    is_in_place: bool = False


@dataclass(frozen=True, kw_only=True)
class Function:
    """What a function takes, keeps and gives, and how it computes.

    Attributes:
        name: Of the function.
        inputs: Types by name.
        images: What an app passes as an image, among `inputs`.
        states: Types by name.
        outputs: Types by name.
        operators: How many operations of each operator it has.
        constants: By name, all that is the same in every run.
        steps: What runs, in order.
    """

    name: str
    inputs: Mapping[str, TensorType]
    images: Mapping[str, Feature]
    states: Mapping[str, TensorType]
    outputs: Mapping[str, TensorType]
    operators: Counter[str]
    constants: Mapping[str, Constant]
    steps: tuple[Step, ...]

    def nearest_weight(self, tensor: str) -> str | None:
        """The weight that was used last on the way to a tensor: its name tells the layer.

        Returns:
            The constant's name; None where only inputs lead to the tensor.
        """
        producers = {output.name: step for step in self.steps for output in step.operation.outputs}
        queue, seen = [tensor], {tensor}
        for name in queue:
            if name not in producers:
                continue
            items = [item for items in producers[name].bindings.values() for item in items]
            weights = [item for item in items if isinstance(item, Stored | Decompressed) and item.is_weight]
            if weights:
                return max(weights, key=lambda item: prod(size or 0 for size in item.type.shape)).name
            new = [item for item in items if isinstance(item, str) and item not in seen]
            seen.update(new)
            queue += new  # breadth first: the list grows while it is read
        return None


def prepare(
    spec: FunctionSpec, described: tuple[tuple[Feature, ...], tuple[Feature, ...]], files: WeightFiles
) -> Function:
    """Check a function as written and order what it needs.

    Args:
        spec: The function.
        described: The inputs and states, and the outputs, that the model states for it.
        files: The model's weight files.

    Raises:
        EdgeError: If it has an operator that is not evaluated, or is for another iOS.
        ArtifactError: If it uses what is not defined, a constant is not where it should be, or the model
            describes another signature.
    """
    if spec.opset not in _OPSETS:
        raise EdgeError(
            f"function {spec.name!r} is of opset {spec.opset!r} and this evaluates {' and '.join(_OPSETS)}; "
            "convert the model for iOS 18 or later"
        )
    operators = Counter(operation.type for operation in spec.operations)
    unknown = sorted(set(operators) - OPERATORS)
    if unknown:
        first = next(operation for operation in spec.operations if operation.type == unknown[0])
        raise EdgeError(
            f"operator {', '.join(map(repr, unknown))} of function {spec.name!r} is not evaluated "
            f"(first at {first.name!r}); express it in others"
        )
    inputs = {item.name: item.type for item in spec.inputs if not item.is_state}
    states = {item.name: item.type for item in spec.inputs if item.is_state}
    constants: dict[str, Constant] = {}
    types, running = dict(inputs), []
    for operation in spec.operations:
        bound = {
            name: tuple(_bound(operation, name, items, constants)) for name, items in operation.inputs.items()
        }
        _check_names(spec.name, operation, bound, types, states)
        if operation.type == "const" or operation.type in DECOMPRESSIONS:
            constants[operation.name] = _constant(spec.name, operation, bound)
        else:
            types |= {item.name: item.type for item in operation.outputs}
            running.append((operation, bound))
    for constant in _all_stored(constants, running):
        if isinstance(constant.value.content, BlobReference):
            files.check(constant.value.content, constant.type, constant.name)
    known = types | {name: constant.type for name, constant in constants.items()}
    missing = [name for name in spec.outputs if name not in known]
    if missing:
        raise ArtifactError(
            f"output {missing[0]!r} of function {spec.name!r} is computed nowhere; export again"
        )
    _check_description(spec, described)
    return Function(
        name=spec.name,
        inputs=inputs,
        images={feature.name: feature for feature in described[0] if feature.kind == "image"},
        states=states,
        outputs={name: known[name] for name in spec.outputs},
        operators=operators,
        constants=constants,
        steps=tuple(_in_place(list(_steps(running, keep=set(spec.outputs))))),
    )


def _bound(
    operation: Operation, parameter: str, items: tuple[str | Value, ...], constants: Mapping[str, Constant]
) -> Iterator[str | Constant]:
    """What a parameter is bound to, constants in place of their names."""
    for item in items:
        if isinstance(item, Value):
            yield Stored(name=f"{operation.name}.{parameter}", value=item)
        else:
            yield constants.get(item, item)


def _check_names(
    function: str,
    operation: Operation,
    bound: Mapping[str, tuple[str | Constant, ...]],
    types: Mapping[str, TensorType],
    states: Mapping[str, TensorType],
) -> None:
    """What is needed is there, whatever is named comes before, and only states are read and written so."""
    single = {*_NEEDED.get(operation.type, ()), *(bound if operation.type in DECOMPRESSIONS else ())}
    for parameter in sorted(single):
        if (count := len(bound.get(parameter, ()))) != 1:
            raise ArtifactError(
                f"{operation.type} {operation.name!r} of function {function!r} needs one {parameter!r} and "
                f"has {count}; the package is altered: export again"
            )
    for parameter, items in bound.items():
        is_state = operation.type in (READ_STATE, WRITE_STATE) and parameter == "input"
        for item in items:
            if not isinstance(item, str) and not is_state:
                continue
            name = item if isinstance(item, str) else "a constant"
            if name not in (states if is_state else types):
                what = f"the state {name!r}" if is_state else repr(name)
                why = f"the states are {sorted(states)}" if is_state else "nothing before it has that name"
                raise ArtifactError(
                    f"{operation.type} {operation.name!r} of function {function!r} takes {what} as "
                    f"{parameter!r} and {why}; the package is altered: export again"
                )


def _constant(
    function: str, operation: Operation, bound: Mapping[str, tuple[str | Constant, ...]]
) -> Constant:
    if operation.type == "const":
        if operation.value is None:
            raise ArtifactError(
                f"constant {operation.name!r} of function {function!r} has no value; export again"
            )
        return Stored(name=operation.name, value=operation.value)
    inputs = {}
    for parameter, items in bound.items():
        [item] = items
        if isinstance(item, str):
            raise ArtifactError(
                f"{operation.type} {operation.name!r} of function {function!r} takes {item!r}, "
                "which is no constant; export again"
            )
        inputs[parameter] = item
    return Decompressed(
        name=operation.name, operator=operation.type, type=operation.outputs[0].type, inputs=inputs
    )


def _all_stored(
    constants: Mapping[str, Constant],
    running: list[tuple[Operation, dict[str, tuple[str | Constant, ...]]]],
) -> Iterator[Stored]:
    """Every constant that is written out, wherever it is used."""
    queue = list(constants.values())
    queue += [
        item
        for _, bound in running
        for items in bound.values()
        for item in items
        if not isinstance(item, str)
    ]
    while queue:
        constant = queue.pop()
        if isinstance(constant, Stored):
            yield constant
        elif isinstance(constant, Decompressed):
            queue.extend(constant.inputs.values())


def _steps(
    running: list[tuple[Operation, dict[str, tuple[str | Constant, ...]]]], keep: set[str]
) -> Iterator[Step]:
    """Operations with the tensors that end with each."""
    seen = set(keep)
    steps = []
    for operation, bound in reversed(running):
        names = {item for items in bound.values() for item in items if isinstance(item, str)}
        names |= {item.name for item in operation.outputs}  # what nothing takes ends at once
        steps.append(Step(operation=operation, bindings=bound, last_uses=tuple(sorted(names - seen))))
        seen |= names
    return reversed(steps)


def _in_place(steps: list[Step]) -> Iterator[Step]:
    """Mark the updates that change a state where it lies, as those of caches can.

    Such an update is written to its state at once, and nothing that may share the state's memory is needed
    after it: not the state as it was read, and no view of it.
    """
    ends = {name: place for place, step in enumerate(steps) for name in step.last_uses}
    shares: dict[str, str] = {}  # tensor: the state whose memory it may be in
    for place, step in enumerate(steps):
        operation = step.operation
        names = [item for items in step.bindings.values() for item in items if isinstance(item, str)]
        if operation.type == READ_STATE:
            shares[operation.name] = names[0]
        if operation.type == SLICE_UPDATE and place + 1 < len(steps):
            [x] = step.bindings["x"]
            state, following = shares.get(str(x)), steps[place + 1]
            written = {"input": (state,), "data": (operation.name,)}
            is_shared = any(
                ends.get(name, len(steps)) > place for name, origin in shares.items() if origin == state
            )
            if following.operation.type == WRITE_STATE and following.bindings == written and not is_shared:
                step = replace(step, is_in_place=True)
        if operation.type in MOVES or operation.type == "cast":  # they may give a view
            for name in names:
                if name in shares:
                    shares |= {output.name: shares[name] for output in operation.outputs}
        yield step


def _check_description(
    spec: FunctionSpec, described: tuple[tuple[Feature, ...], tuple[Feature, ...]]
) -> None:
    """What the model states to apps must be what the function has."""
    taken = {item.name: "state" if item.is_state else "input" for item in spec.inputs}
    stated = {item.name: "state" if item.kind == "state" else "input" for item in described[0]}
    written, promised = (
        {(kind, name) for name, kind in named.items()} | {("output", name) for name in outputs}
        for named, outputs in ((taken, spec.outputs), (stated, [item.name for item in described[1]]))
    )
    for kind, name in sorted(written ^ promised):
        is_written = (kind, name) in written
        raise ArtifactError(
            f"function {spec.name!r} {'has' if is_written else 'lacks'} the {kind} {name!r} and the "
            f"model's description {'lacks' if is_written else 'has'} it; the package is altered: export again"
        )
