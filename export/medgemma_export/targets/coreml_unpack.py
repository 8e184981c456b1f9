"""Reads the weights back from a finished Core ML package, to compare them with what a plan says they are."""

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medgemma_export.models.spec import Component
from medgemma_export.ops import RmsNorm
from medgemma_export.plan_ops import PlanOps
from medgemma_export.targets.coreml_builder import PIECE, gain_array, identifier
from medgemma_quantization.affine import unpack_integers
from medgemma_quantization.plan import QuantPlan
from medgemma_quantization.weights import QuantizedWeights
from medgemma_runtime.backends.mil import MilProgram, Weight, contents
from medgemma_runtime.errors import ArtifactError, EdgeError

__all__ = ["compare_package", "compare_rows", "compare_storage"]

_PIECE = re.compile(rf"_{PIECE}\d+$")


@dataclass
class _Norms(PlanOps):
    """Notes the RMS norms of a component, whose gains are stored with the 1 added."""

    norms: dict[str, RmsNorm] = field(default_factory=dict)

    def rms_norm(self, x: None, weight: RmsNorm) -> None:
        self.norms[f"{weight.name}.weight"] = weight
        super().rms_norm(x, weight)


def compare_storage(package: Path, component: Component, plan: QuantPlan) -> None:
    """Hold how a finished package stores each weight against the plan, without reading one.

    `compare_packed` asks what was meant; this asks the file, and whatever else it holds.

    Raises:
        RuntimeError: If a function lacks a weight, stores one in another way, or holds a matrix that no plan
            knows; the target is defective then.
    """
    survey = _Norms()
    component.forward(survey, dict.fromkeys((spec.name for spec in component.inputs), None))
    rows = {identifier(weight.name): plan.by_name[weight.name] for weight in survey.weights}
    program = MilProgram.open(package)
    for name, function in program.functions.items():
        found = _joined(contents(function).weights)
        for key, row in rows.items():
            # A block as wide as the matrix is a scale for each channel: no file tells them apart.
            is_whole = len(row.stored_shape) > 1 and row.storage.block == row.stored_shape[1]
            wanted = replace(row.storage, block=0) if is_whole else row.storage
            stored = "nothing"
            if key in found:
                shape = found[key].shape
                rank = len(row.stored_shape)
                # Axes of size 1 behind its own: the kernel of a convolution in a matrix's place, channels.
                stored = f"{found[key].storage} {shape[:rank] if set(shape[rank:]) <= {1} else shape}"
            if stored != f"{wanted} {row.stored_shape}":
                raise RuntimeError(
                    f"{package.name}, function {name}, holds {stored} for {row.name} and the plan says "
                    f"{wanted} {row.stored_shape}"
                )
        for key in found.keys() - rows.keys():
            if len(found[key].shape) > 1:
                raise RuntimeError(f"{package.name}, function {name}, holds {key}, which no plan knows")


def _joined(weights: Iterable[Weight]) -> dict[str, Weight]:
    """The weights of a function by name, those that are in pieces as one; pieces that differ stay apart."""
    joined: dict[str, Weight] = {}
    for weight in weights:
        name = _PIECE.sub("", weight.name)
        before = joined.get(name)
        if before is None or before.storage != weight.storage or before.shape[1:] != weight.shape[1:]:
            joined[name if before is None else weight.name] = replace(weight, name=name)
        else:
            rows = before.shape[0] + weight.shape[0]
            size_bytes = before.size_bytes + weight.size_bytes
            joined[name] = replace(before, shape=(rows, *before.shape[1:]), size_bytes=size_bytes)
    return joined


def compare_package(package: Path, component: Component, weights: QuantizedWeights) -> None:
    """Hold every weight of a component, integer by integer and scale by scale, against the file that ships.

    Every function is held against the plan.

    Args:
        package: An .mlpackage that `medgemma_export.targets.coreml` wrote.
        component: What it computes.
        weights: The integers, made from checkpoint and plan.

    Raises:
        ArtifactError: Naming the first weight that is missing, differs, or is stored in another way.
    """
    survey = _Norms()
    component.forward(survey, dict.fromkeys((spec.name for spec in component.inputs), None))
    program = MilProgram.open(package)
    for function in program.functions:
        for name in dict.fromkeys(weight.name for weight in survey.weights):
            stored = _stored(program, function, identifier(name))
            if not all(_same(name, stored, survey.norms.get(name), weights)):
                raise ArtifactError(
                    f"{package.name}, function {function}, does not carry {name} as the plan and the "
                    "checkpoint give it; its weight file is damaged or was made otherwise: export again"
                )


def compare_rows(description: Path, weights: QuantizedWeights, *, tables: Sequence[str]) -> None:
    """Hold the rows that a host looks up against the plan.

    Args:
        description: The JSON file of an `embed` component.
        weights: The integers, made from checkpoint and plan.
        tables: The weights that are looked up, in the order of their rows.

    Raises:
        ArtifactError: If they differ.
    """
    pieces = json.loads(description.read_text(encoding="utf-8"))["pieces"]
    same = [
        _same_rows(description, facts, name, weights) for facts, name in zip(pieces, tables, strict=False)
    ]
    if len(pieces) != len(tables) or not all(same):
        raise ArtifactError(
            f"{description.name} does not lead to {', '.join(tables)} as the plan and the checkpoint give "
            "it; export again"
        )


def _same_rows(description: Path, facts: dict[str, Any], name: str, weights: QuantizedWeights) -> bool:
    data = np.memmap(description.parent.parent / facts["file"], mode="r")
    row = weights.plan.by_name[name]
    if row.storage.is_float:
        dtype = np.dtype(f"float{row.storage.bits}")
        expected = [(facts["values_offset"], weights.float(name).astype(dtype))]
    else:
        expected = [
            (facts["values_offset"], weights.stored_values(name)),
            (facts["scales_offset"], weights.scales(name).astype(facts["scales_dtype"])),
        ]
    found = all(
        data[offset : offset + array.nbytes].tobytes() == array.tobytes() for offset, array in expected
    )
    return found and (facts["rows"], facts["bits"]) == (row.stored_shape[0], row.storage.bits)


def _same(
    name: str, stored: dict[str, NDArray[Any]], norm: RmsNorm | None, weights: QuantizedWeights
) -> Iterator[bool]:
    row = weights.plan.by_name[name]
    half = weights.plan.activations == "float16"
    if row.storage.is_float:
        true = weights.float(name)
        expected = (
            gain_array(true, norm, half=half) if norm else true.astype(np.float16 if half else true.dtype)
        )
        found = stored.get("val")
        yield found is not None and found.dtype == expected.dtype and _equal(found, expected)
        return
    values, scales = unpack_integers(weights.stored_values(name), row.storage), weights.scales(name)
    parts: dict[str, NDArray[Any]] = {"data": values, "scale": scales}
    if row.storage.palette:
        parts = {"indices": values, "lut": scales[:, None, :, None]}
    yield stored.keys() == parts.keys()
    for part, array in parts.items():
        yield _equal(stored[part], array)


def _stored(program: MilProgram, function: str, name: str) -> dict[str, NDArray[Any]]:
    """What a package stores of a weight, its pieces put together; nothing if it has no such weight."""
    constants = program.functions[function].constants
    pieces = [key for key in constants if _PIECE.sub("", key) == name]  # in the order of the program
    try:
        parts = [program.stored(function, piece) for piece in pieces]
    except EdgeError:
        return {}
    if len({tuple(part) for part in parts}) != 1:
        return {}
    return {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}


def _equal(found: NDArray[Any], expected: NDArray[Any]) -> bool:
    """Whether an array is another, as it is, or with axes of size 1 behind the first or the second."""
    more = [(first, count) for first in (1, 2) for count in (0, 1, 2)]
    shapes = [(*expected.shape[:first], *(1,) * count, *expected.shape[first:]) for first, count in more]
    return found.shape in shapes and bool(np.array_equal(found.reshape(expected.shape), expected))
