"""Holds the packages of a finished Core ML artifact against coremltools' own reader, and against the plan.

coremltools reads a saved program back operator by operator and infers every type again, so what is malformed
is found without a Mac. It takes every weight of a function into memory, int4 a byte each.
"""

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medgemma_export.targets.coreml_builder import PIECE, identifier
from medgemma_export.targets.coreml_mil import load_program, proto
from medgemma_export.targets.coreml_package import MODEL_PATH, WEIGHTS_PATH
from medgemma_quantization.plan import PlanRow, QuantPlan, read_plan
from medgemma_runtime.artifact import Artifact
from medgemma_runtime.backends.mil import MilProgram, Weight, contents
from medgemma_runtime.errors import ArtifactError, EdgeError

__all__ = ["ReadFunction", "FloatWeight", "read_back"]

_CONSTANTS = ("const", "constexpr_blockwise_shift_scale", "constexpr_lut_to_dense")
_PIECE = re.compile(rf"_{PIECE}\d+$")


@dataclass(frozen=True, kw_only=True)
class FloatWeight:
    """A weight that is not compressed, and the plan's reason for that."""

    name: str
    storage: str
    shape: tuple[int, ...]
    reason: str


@dataclass(frozen=True, kw_only=True)
class ReadFunction:
    """A function that coremltools has read back.

    Attributes:
        package: Name of its package.
        function: Its name.
        operators: How many operations of each kind run, as coremltools counts them.
        stored: How many weights are stored in each way.
        floats: The weights that are not compressed.
    """

    package: str
    function: str
    operators: Mapping[str, int]
    stored: Mapping[str, int]
    floats: tuple[FloatWeight, ...]


def read_back(artifact: Artifact) -> Iterator[ReadFunction]:
    """Read every function of every package, one at a time.

    Raises:
        EdgeError: If the artifact is of another target.
        ArtifactError: If coremltools refuses a program, or a weight is stored in another way than the plan
            says, or is in no plan.
    """
    if artifact.manifest.target != "coreml":
        raise EdgeError(
            f"{artifact.directory.name} is an artifact of target {artifact.manifest.target}, and what is "
            "read back is packages of Core ML; give one of target coreml"
        )
    plan = read_plan(artifact.directory / artifact.manifest.quantization.plan)
    rows = {identifier(row.name): row for row in plan.rows}
    for entry in artifact.manifest.components.values():
        if entry.program.endswith(".mlpackage"):
            yield from _read_package(artifact.directory / entry.program, plan, rows)


def _read_package(package: Path, plan: QuantPlan, rows: Mapping[str, PlanRow]) -> Iterator[ReadFunction]:
    program = MilProgram.open(package)
    if program.metadata.get("plan_sha256") != plan.sha256:
        raise ArtifactError(f"{package.name} was made of another plan than lies beside it; export again")
    for name, function in program.functions.items():
        weights = contents(function).weights
        yield ReadFunction(
            package=package.name,
            function=name,
            operators=_operators(package, name),
            stored=dict(Counter(weight.storage for weight in weights)),
            floats=tuple(_planned(package, rows, weights)),
        )


def _operators(package: Path, function: str) -> dict[str, int]:
    """The operations of one function, when coremltools has read it and inferred its types."""
    model = proto.Model_pb2.Model()
    model.ParseFromString((package / MODEL_PATH).read_bytes())
    for other in [name for name in model.mlProgram.functions if name != function]:
        del model.mlProgram.functions[other]
    try:
        program: Any = load_program(
            model,
            specification_version=model.specificationVersion,
            file_weights_dir=str((package / WEIGHTS_PATH).parent),
        )
    except Exception as error:  # whatever its asserts and look-ups raise
        reason = str(error).strip().splitlines()
        raise ArtifactError(
            f"coremltools cannot read function {function!r} of {package.name} back: "
            f"{type(error).__name__} {reason[0] if reason else ''}; export again"
        ) from error
    kinds = Counter(operation.op_type for operation in program.functions[function].operations)
    return {kind: count for kind, count in kinds.most_common() if kind not in _CONSTANTS}


def _planned(
    package: Path, rows: Mapping[str, PlanRow], weights: tuple[Weight, ...]
) -> Iterator[FloatWeight]:
    """Those that are floats; each weight must be stored as the plan says."""
    for weight in weights:
        row = rows.get(_PIECE.sub("", weight.name))
        if row is None and len(weight.shape) == 1:
            continue  # the zero biases of linears that have none
        # A block as wide as its matrix and a scale for each channel are one in the file.
        wanted = "in no plan" if row is None else str(row.storage)
        if row is not None and row.storage.block and row.storage.block == row.stored_shape[-1]:
            wanted = wanted.replace(f"block {row.storage.block}", "per channel")
        if row is None or weight.storage != wanted:
            raise ArtifactError(
                f"{package.name} stores {weight.name} as {weight.storage} and the plan says {wanted}; "
                "it is altered, or the target is defective: export again"
            )
        if weight.is_float:
            yield FloatWeight(name=row.name, storage=weight.storage, shape=weight.shape, reason=row.reason)
