"""The command lines `medgemma-export` and `medgemma-reference`: parse, call, print."""

import json
from collections import Counter
from pathlib import Path
from typing import Annotated

import typer
from medgemma_quantization.scheme import SCHEMES, Scheme, load_scheme
from medgemma_runtime.artifact import Artifact
from medgemma_runtime.command import run_app
from medgemma_runtime.errors import EdgeError
from medgemma_runtime.manifest import Precision, TargetName
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from medgemma_export.build import Decision, build, decide
from medgemma_export.recipe import Recipe

__all__ = ["export_main"]

_EXAMPLES = """
Examples:

  medgemma-export --target onnx --model sample:medsiglip-tiny --precision int8

  medgemma-export --target onnx --model google/medsiglip-448 --precision int4 --out medsiglip-int4

  medgemma-export --target onnx --model ./my-finetune --precision int8 --components image --dry-run
"""

_export = typer.Typer(add_completion=False, rich_markup_mode="rich")


def export_main() -> None:
    """Entry point of `medgemma-export`."""
    run_app(_export)


@_export.command(epilog=_EXAMPLES.replace("\n\n", "\n\n\n"))
def export(
    model: Annotated[
        str, typer.Option(help="A directory, a hub id such as google/medsiglip-448, or sample:NAME.")
    ],
    target: Annotated[TargetName, typer.Option(help="The format of the device's engine.")],
    precision: Annotated[Precision, typer.Option(help="Storage of the weights.")] = "int8",
    scheme: Annotated[Path | None, typer.Option(help="A TOML file instead of --precision.")] = None,
    components: Annotated[
        list[str] | None, typer.Option(help="Export only this component; repeat for more.")
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Hub revision.")] = None,
    out: Annotated[Path | None, typer.Option(help="Artifact directory; must not exist yet.")] = None,
    dry_run: Annotated[bool, typer.Option(help="Print the plan and stop before reading weights.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Turn a checkpoint into an artifact that a phone, a tablet or a laptop runs."""
    console = Console(stderr=True)
    wish = _scheme(precision, scheme)
    try:
        recipe = Recipe(
            model=model,
            revision=revision,
            target=target,
            scheme=wish,
            components=tuple(components or ()),
            out=out or Path(f"{Path(model.removeprefix('sample:')).name}-{target}-{wish.name}"),
        )
    except ValueError as error:
        raise EdgeError(str(error)) from None
    if dry_run:
        _print_decision(decide(recipe), as_json=as_json)
        return
    with _progress(console) as bar:
        task = bar.add_task("read the checkpoint", total=None)
        artifact = build(
            recipe,
            progress=lambda what, done, total: bar.update(
                task, description=what, completed=done, total=total
            ),
        )
    _print_artifact(artifact, as_json=as_json)


def _scheme(precision: Precision, path: Path | None) -> Scheme:
    if path is not None:
        return load_scheme(path)
    if precision not in SCHEMES:
        raise EdgeError(f"precision {precision!r} is unknown; the precisions are {', '.join(SCHEMES)}")
    return SCHEMES[precision]


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description:<20}"),
        BarColumn(),
        TimeElapsedColumn(),
        console=console,
        transient=True,
    )


def _print_decision(decision: Decision, *, as_json: bool) -> None:
    plan = decision.plan
    if as_json:
        typer.echo(plan.to_json())
        return
    table = Table(title=f"{decision.checkpoint.id}, {plan.bits_per_weight:.2f} bits per weight")
    for heading in ("weights", "stored as", "MB", "why"):
        table.add_column(heading, justify="right" if heading in ("weights", "MB") else "left")
    counts: Counter[tuple[str, str]] = Counter()
    sizes: Counter[tuple[str, str]] = Counter()
    for row in plan.rows:
        counts[str(row.storage), row.reason] += 1
        sizes[str(row.storage), row.reason] += row.stored_bits // 8
    for (storage, reason), count in counts.items():
        table.add_row(str(count), storage, f"{sizes[storage, reason] / 1e6:.1f}", reason)
    Console().print(table)


def _print_artifact(artifact: Artifact, *, as_json: bool) -> None:
    manifest = artifact.manifest
    if as_json:
        facts = {
            "artifact": str(artifact.directory),
            "size_bytes": artifact.size_bytes,
            "bits_per_weight": manifest.quantization.bits_per_weight,
            "seconds": manifest.build.seconds,
            "peak_rss_bytes": manifest.build.peak_rss_bytes,
        }
        typer.echo(json.dumps(facts))
        return
    typer.echo(
        f"{artifact.directory}: {manifest.model.id} as {manifest.target} {manifest.precision}, "
        f"{artifact.size_bytes / 1e6:.1f} MB ({manifest.quantization.bits_per_weight:.2f} bits per weight), "
        f"{manifest.build.seconds:.0f} s, peak memory {manifest.build.peak_rss_bytes / 1e9:.2f} GB"
    )
