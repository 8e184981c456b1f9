"""The command lines `medgemma-export` and `medgemma-reference`: parse, call, print."""

import json
import os
from collections import Counter
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from medgemma_benchmarks.bundle import ReferenceBundle
from medgemma_export.build import Decision, build, decide
from medgemma_export.plain_onnx import export_plain_onnx
from medgemma_export.recipe import Recipe
from medgemma_export.reference import Device, Dtype, record_reference
from medgemma_export.reference_images import directory_images, read_labels, sample_images, sample_labels
from medgemma_quantization.scheme import SCHEMES, Scheme, load_scheme
from medgemma_runtime.artifact import Artifact
from medgemma_runtime.command import progress_bar, run_app
from medgemma_runtime.errors import EdgeError
from medgemma_runtime.manifest import Precision, TargetName

__all__ = ["export_main", "reference_main"]

_EXAMPLES = """
Examples:

  medgemma-export --target onnx --model sample:medsiglip-tiny --precision int8

  medgemma-export --target onnx --model google/medsiglip-448 --precision int4 --out medsiglip-int4

  medgemma-export --target onnx --model ./my-finetune --precision int8 --components image --dry-run
"""

_REFERENCE_EXAMPLES = """
Examples:

  medgemma-reference record --model google/medsiglip-448 --out reference

  medgemma-reference record --model ./my-finetune --images ./studies --labels labels.toml --out reference

  medgemma-reference packing medsiglip-int8 --model google/medsiglip-448 --reference reference --out packing
"""

_export = typer.Typer(add_completion=False, rich_markup_mode="rich", pretty_exceptions_enable=False)
_reference = typer.Typer(
    add_completion=False,
    rich_markup_mode="rich",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Record what the original model computes, to hold artifacts against.",
    epilog=_REFERENCE_EXAMPLES.replace("\n\n", "\n\n\n"),
)

Model = Annotated[
    str, typer.Option(help="A directory, a hub id such as google/medsiglip-448, or sample:NAME.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]


def export_main() -> int:
    """Entry point of `medgemma-export`."""
    return _run(_export)


def reference_main() -> int:
    """Entry point of `medgemma-reference`."""
    return _run(_reference)


def _run(app: typer.Typer) -> int:
    # transformers warns about token ids of SigLIP's own default configuration; its errors still show.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    return run_app(app)


@_export.command(epilog=_EXAMPLES.replace("\n\n", "\n\n\n"))
def export(
    model: Model,
    target: Annotated[TargetName, typer.Option(help="The format of the device's engine.")],
    precision: Annotated[Precision, typer.Option(help="Storage of the weights.")] = "int8",
    scheme: Annotated[Path | None, typer.Option(help="A TOML file instead of --precision.")] = None,
    components: Annotated[
        list[str] | None, typer.Option(help="Export only this component; repeat for more.")
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Hub revision.")] = None,
    out: Annotated[Path | None, typer.Option(help="Artifact directory; must not exist yet.")] = None,
    dry_run: Annotated[bool, typer.Option(help="Print the plan and stop before reading weights.")] = False,
    as_json: AsJson = False,
) -> None:
    """Turn a checkpoint into an artifact that a phone, a tablet or a laptop runs."""
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
    with progress_bar("read the checkpoint") as progress:
        artifact = build(recipe, progress=progress)
    _print_artifact(artifact, as_json=as_json)


@_reference.command()
def record(
    model: Model,
    out: Annotated[Path, typer.Option(help="Bundle directory; must not exist yet.")],
    images: Annotated[
        Path | None, typer.Option(help="A directory of images instead of the built-in ones.")
    ] = None,
    labels: Annotated[
        Path | None, typer.Option(help="A TOML file of zero-shot labels; needed with --images.")
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Hub revision.")] = None,
    device: Annotated[Device, typer.Option(help="Where the original model runs.")] = "cpu",
    dtype: Annotated[Dtype, typer.Option(help="What it computes in; parity takes float32 only.")] = "float32",
    as_json: AsJson = False,
) -> None:
    """Run the original model with transformers and keep inputs and outputs as a bundle.

    The bundle holds the pixels and the file names of --images: treat it as you treat those files.
    """
    if (images is None) != (labels is None):
        raise EdgeError("--images and --labels go together: a directory, and the labels to tell it apart by")
    with progress_bar("decode images") as progress:
        if images is not None and labels is not None:
            named = read_labels(labels)
            recorded = directory_images(images, named, progress=progress)
            captions = named.labels
        else:
            recorded, captions = sample_images(progress), sample_labels()
        bundle = record_reference(
            model,
            out,
            images=recorded,
            labels=captions,
            revision=revision,
            device=device,
            dtype=dtype,
            progress=progress,
        )
    _print_bundle(bundle, as_json=as_json)


@_reference.command()
def packing(
    artifact: Annotated[Path, typer.Argument(help="A quantized artifact.")],
    model: Model,
    reference: Annotated[Path, typer.Option(help="The float reference of the same checkpoint.")],
    out: Annotated[Path, typer.Option(help="Bundle directory; must not exist yet.")],
    as_json: AsJson = False,
) -> None:
    """Compute what an artifact's integers should give, from the checkpoint and the plan alone."""
    from medgemma_export.packing import record_packing  # PyTorch, which --help need not wait for

    with progress_bar("read the checkpoint") as progress:
        bundle = record_packing(artifact, model, reference, out, progress=progress)
    _print_bundle(bundle, as_json=as_json)


@_reference.command()
def plain_onnx(
    model: Model,
    out: Annotated[Path, typer.Option(help="The .onnx file; must not exist yet.")],
) -> None:
    """Export the image tower by plain torch.onnx, a peer for medgemma-bench --against."""
    with progress_bar("export with torch.onnx"):
        export_plain_onnx(model, out)
    typer.echo(str(out))


def _scheme(precision: Precision, path: Path | None) -> Scheme:
    if path is not None:
        return load_scheme(path)
    if precision not in SCHEMES:
        raise EdgeError(f"precision {precision!r} is unknown; the precisions are {', '.join(SCHEMES)}")
    return SCHEMES[precision]


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


def _print_bundle(bundle: ReferenceBundle, *, as_json: bool) -> None:
    record = bundle.record
    if as_json:
        typer.echo(
            json.dumps({"bundle": str(bundle.directory), "sha256": bundle.sha256, "kind": record.kind})
        )
        return
    producer = record.producer
    typer.echo(
        f"{bundle.directory}: {record.kind} reference of {record.model_id}, {len(record.images)} images, "
        f"{len(record.labels)} labels, {producer.dtype} on {producer.device} ({producer.device_name})"
    )


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
