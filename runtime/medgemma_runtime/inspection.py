"""`medgemma-run inspect`: what the programs of a Core ML artifact are made of."""

from collections import Counter
from dataclasses import asdict
from math import prod
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from medgemma_runtime.artifact import Artifact
from medgemma_runtime.backends.mil import Contents, MilProgram, contents
from medgemma_runtime.command import printable
from medgemma_runtime.errors import EdgeError
from medgemma_runtime.manifest import read_manifest
from medgemma_runtime.terminal import ArtifactPath, AsJson, print_json

__all__ = ["inspect_artifact"]


def inspect_artifact(artifact: ArtifactPath, as_json: AsJson = False) -> None:
    """Count a Core ML program's operators by kind and weights by storage; name what is left in floats.

    Of floats, vectors are counted and all others named. A .mlpackage of any maker, for iOS 18 or later, is
    taken too.
    """
    found = {
        f"{name}, {function}": contents(program.functions[function])
        for name, program in _programs(artifact).items()
        for function in program.functions
    }
    if as_json:
        print_json({name: asdict(item) for name, item in found.items()})
        return
    for name, item in found.items():
        _print(name, item)


def _programs(path: Path) -> dict[str, MilProgram]:
    if (path / "Manifest.json").is_file():
        return {path.name: MilProgram.open(path)}
    opened = Artifact(directory=path, manifest=read_manifest(path))
    if opened.manifest.target != "coreml":
        raise EdgeError(
            f"{path} is an artifact of target {opened.manifest.target}, and what is inspected is programs of "
            "Core ML; see medgemma-run info"
        )
    programs = [entry.program for entry in opened.manifest.components.values()]
    return {
        program: MilProgram.open(path / program) for program in programs if program.endswith(".mlpackage")
    }


def _print(name: str, item: Contents) -> None:
    counts, sizes = Counter[str](), Counter[str]()
    for weight in item.weights:
        counts[weight.storage] += 1
        sizes[weight.storage] += weight.size_bytes
    weights = Table("weights stored as", box=None)
    weights.add_column("count", justify="right")
    weights.add_column("MB", justify="right")
    for storage, size in sizes.most_common():
        weights.add_row(storage, str(counts[storage]), f"{size / 1e6:.1f}")
    operators = Table("operator", box=None)
    operators.add_column("count", justify="right")
    for operator, count in item.operators.items():
        operators.add_row(printable(operator), str(count))
    console = Console()
    console.print(Text(printable(f"\n{name}: {sum(item.operators.values())} operations"), style="bold"))
    both = Table.grid(padding=(0, 4))
    both.add_row(operators, weights)
    console.print(both)
    for weight in item.weights:
        if not weight.is_float or prod(weight.shape[1:]) == 1:
            continue  # vectors, biases and gains, always are floats
        shape = " x ".join(map(str, weight.shape))
        console.print(Text(printable(f"{weight.storage} of {shape}: {weight.name}")))
