"""Where an ExecuTorch program shows the residual stream: which argument of which instruction holds it.

A value inside a delegate's call is seen by nobody. But attention stands between two calls of XNNPACK, so the
stream after a layer leaves one call and enters the next; ExecuTorch's event tracer records what a call is
given and gives. The stream after the last layer of a decoder stays inside; it is judged by the logits.
"""

import json
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from medgemma_runtime.backends.executorch_layers import LAYERS, MethodLayers, Place
from medgemma_runtime.layers import MAX_TOKENS

__all__ = ["name_value", "mark_names", "write_layers"]

_KEY = "medgemma_name"
_CALL = "DELEGATE_CALL"

# What does not fit ends the process, so there is room for more than values take one after another.
_ALIGNMENT, _SPARE_BYTES = 64, 1 << 20


@torch.library.custom_op("medgemma_edge::named", mutates_args=())
def name_value(x: Tensor, name: str) -> Tensor:
    """`x`, with a name that `mark_names` finds in an exported program."""
    return x.clone()


@name_value.register_fake
def _(x: Tensor, name: str) -> Tensor:
    return torch.empty_like(x)


def mark_names(program: torch.export.ExportedProgram) -> torch.export.ExportedProgram:
    """Take the calls of `name_value` out of a program, and leave the names with what they name."""
    graph = program.graph_module.graph
    for node in list(graph.nodes):
        if node.op == "call_function" and node.target is torch.ops.medgemma_edge.named.default:
            value, name = node.args
            value.meta["custom"] = {**value.meta.get("custom", {}), _KEY: name}
            node.replace_all_uses_with(value)
            graph.erase_node(node)
    program.graph_module.recompile()
    return program


def write_layers(directory: Path, programs: Mapping[str, torch.export.ExportedProgram]) -> None:
    """Write where lowered methods show the values that `mark_names` marked.

    Args:
        directory: That of the program.
        programs: By method, as they are serialized: instructions in order, delegates with what they took.
    """
    found = {name: asdict(_find_layers(program)) for name, program in programs.items()}
    (directory / LAYERS).write_text(json.dumps(found, indent=1), encoding="utf-8")


def _find_layers(program: torch.export.ExportedProgram) -> MethodLayers:
    places: dict[str, Place] = {}
    events: Counter[str] = Counter()
    given = program.graph_module.graph.output_node().all_input_nodes  # the method's results, once more
    values = sum(_bytes(value) for node in given for value in _flat(node.meta.get("val")))
    for node in program.graph_module.graph.nodes:
        if node.op != "call_function":
            continue
        event, results = _event(program, node)
        if event is None:
            continue
        for index, result in enumerate(results):
            name = result.meta.get("custom", {}).get(_KEY)
            if name is not None and name not in places:
                places[name] = Place(event=event, number=events[event], argument=index - len(results))
        events[event] += 1
        values += sum(_bytes(value) for value in _recorded(event, node))
    return MethodLayers(places=places, debug_bytes=values + _SPARE_BYTES)


def _event(program: torch.export.ExportedProgram, node: Node) -> tuple[str | None, list[Node]]:
    """What the tracer calls a node's instruction, and the nodes that made its results."""
    if "executorch_call_delegate" in str(node.target):
        lowered = getattr(program.graph_module, node.args[0].target)  # type: ignore[union-attr, arg-type]
        return _CALL, list(lowered.original_module.graph_module.graph.output_node().args[0])
    schema = getattr(node.target, "_schema", None)
    if schema is None or not schema.overload_name:
        return None, []
    return f"native_call_{schema.name.partition('::')[2]}.{schema.overload_name}", [node]


def _recorded(event: str, node: Node) -> Iterator[Tensor]:
    """Of a kernel the tracer records what it gives, of a delegate's call also what it is given."""
    for argument in (node, *(node.all_input_nodes if event == _CALL else ())):
        yield from _flat(argument.meta.get("val"))


def _flat(value: Any) -> Iterable[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    return [part for part in value if isinstance(part, Tensor)] if isinstance(value, tuple | list) else []


def _bytes(tensor: Tensor) -> int:
    size = math.prod(_size(size) for size in tensor.shape) * tensor.element_size()
    return size + -size % _ALIGNMENT


def _size(size: int | torch.SymInt) -> int:
    """A size, every unknown in it being the most tokens that are compared."""
    if isinstance(size, int):
        return size
    expression = size.node.expr
    return int(expression.subs(dict.fromkeys(expression.free_symbols, MAX_TOKENS)))
