"""The command lines `medgemma-export` and `medgemma-reference`: parse, call, print."""

import os
from pathlib import Path
from typing import Annotated

import typer

from medgemma_benchmarks.bundle import DecodedImage
from medgemma_benchmarks.quantization_table import print_quantization
from medgemma_benchmarks.results import to_json
from medgemma_export.build import build, decide
from medgemma_export.calibration_reach import takes
from medgemma_export.checkpoint import open_checkpoint
from medgemma_export.models import load_model
from medgemma_export.original import Device, Dtype
from medgemma_export.plain_onnx import export_plain_onnx
from medgemma_export.printing import (
    print_ablation,
    print_artifact,
    print_bundle,
    print_decision,
    print_ranges,
)
from medgemma_export.recipe import Recipe
from medgemma_export.reference import record_reference
from medgemma_export.reference_images import directory_images, read_labels, sample_images, sample_labels
from medgemma_export.reference_prompts import (
    PromptText,
    directory_prompts,
    image_prompts,
    note_prompts,
)
from medgemma_export.reference_text import record_text_reference, records_text, sees_images
from medgemma_export.targets import TARGETS, Delegate, Units
from medgemma_quantization.budget import Budget, parse_size
from medgemma_quantization.calibration import BUILTIN, open_set
from medgemma_quantization.methods import MethodName
from medgemma_quantization.scheme import SCHEMES, Scheme, load_scheme
from medgemma_runtime.command import progress_bar, run_app
from medgemma_runtime.errors import EdgeError
from medgemma_runtime.manifest import Precision, TargetName
from medgemma_runtime.sample_images import LABELS

__all__ = ["export_main", "reference_main"]

_EXAMPLES = """
Examples:

  medgemma-export --target onnx --model sample:medsiglip-tiny --precision int8

  medgemma-export --target onnx --model google/medsiglip-448 --precision int4 --out medsiglip-int4

  medgemma-export --target onnx --model google/medgemma-4b-it --scheme mobile

  medgemma-export --target onnx --model ./my-finetune --precision int8 --components image --dry-run

  medgemma-export --target onnx --model google/medgemma-1.5-4b-it --adapter ./my-lora --precision int4

  medgemma-export --target onnx --model ./my-finetune --precision int4 --method gptq --calibration builtin

  medgemma-export --target onnx --model ./my-finetune --precision int4 --method gptq --calibration builtin \\
      --budget 2.6GB --sensitivity my-finetune.json
"""

_REFERENCE_EXAMPLES = """
Examples:

  medgemma-reference record --model google/medsiglip-448 --out reference

  medgemma-reference record --model ./my-finetune --images ./studies --labels labels.toml --out reference

  medgemma-reference record --model google/medgemma-4b-it --notes ./notes --device cuda --out reference

  medgemma-reference ranges --model google/medgemma-4b-it --calibration ./studies

  medgemma-reference packing medsiglip-int8 --model google/medsiglip-448 --reference reference --out packing

  medgemma-reference quantization --model ./my-finetune --row rtn:int4 --row gptq:5.5 --out table.json
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
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub id.")]
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
    scheme: Annotated[
        str | None,
        typer.Option(help="A TOML file, or mobile (MedGemma in int4, its image tower in int8)."),
    ] = None,
    components: Annotated[
        list[str] | None, typer.Option(help="Export only this component; repeat for more.")
    ] = None,
    revision: Revision = None,
    adapter: Annotated[
        Path | None, typer.Option(help="A directory with a LoRA adapter as PEFT saves it, to merge in.")
    ] = None,
    context: Annotated[
        int | None, typer.Option(help="Most tokens of prompt and answer together; all the model has if left.")
    ] = None,
    units: Annotated[
        Units | None, typer.Option(help="Whose layout a Core ML program gets; gpu if left.")
    ] = None,
    delegate: Annotated[
        Delegate | None, typer.Option(help="Who computes in an ExecuTorch program; xnnpack if left.")
    ] = None,
    method: Annotated[MethodName, typer.Option(help="How integers are found.")] = "rtn",
    calibration: Annotated[
        str | None,
        typer.Option(
            help="Samples to calibrate on: a directory, a manifest file, or builtin. Needed by static ranges "
            "and by all methods but rtn and search."
        ),
    ] = None,
    calibration_memory: Annotated[
        float, typer.Option(help="GB of memory for their activations; the rest goes to the disk.")
    ] = 2.0,
    budget: Annotated[
        str | None,
        typer.Option(
            help="Most that weights may take, such as 2.6GB: int8 for those that need it, else int4."
        ),
    ] = None,
    max_kl: Annotated[
        float | None, typer.Option(help="The same by what the plan may cost predictions: nats, as predicted.")
    ] = None,
    sensitivity: Annotated[
        Path | None,
        typer.Option(help="File with what 4 bits cost each weight; measured and written if not there."),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Artifact directory; must not exist yet.")] = None,
    dry_run: Annotated[
        bool, typer.Option(help="Print the plan and stop; weights are read for a budget alone.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Turn a checkpoint into an artifact that a phone, a tablet or a laptop runs."""
    wish = _scheme(precision, scheme, target)
    try:
        recipe = Recipe(
            model=model,
            revision=revision,
            target=target,
            scheme=wish,
            components=tuple(components or ()),
            out=out or _default_out(model, adapter, target, wish),
            adapter=adapter,
            context=context,
            method=method,
            calibration=calibration,
            calibration_bytes=int(calibration_memory * 1e9),
            delegate=delegate,
            budget=_budget(budget, max_kl),
            sensitivity=sensitivity,
            units=units,
        )
    except ValueError as error:
        raise EdgeError(str(error)) from None
    if dry_run:
        with progress_bar("read the checkpoint") as progress:
            decision = decide(recipe, progress=progress)
        print_decision(decision, as_json=as_json)
        return
    with progress_bar("read the checkpoint") as progress:
        artifact = build(recipe, progress=progress)
    print_artifact(artifact, as_json=as_json)


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
    notes: Annotated[
        Path | None,
        typer.Option(help="A directory of .txt files to predict, in place of the built-in notes and images."),
    ] = None,
    revision: Revision = None,
    device: Annotated[Device, typer.Option(help="Where the original model runs.")] = "cpu",
    dtype: Annotated[Dtype, typer.Option(help="What it computes in; parity takes float32 only.")] = "float32",
    as_json: AsJson = False,
) -> None:
    """Run the original model with transformers and keep inputs and outputs as a bundle.

    Of MedSigLIP, embeddings of images and captions; of MedGemma, what it predicts after each token of texts
    and of answers about images. The bundle holds what is in --images and --notes, and their file names: treat
    it as you treat those files.
    """
    checkpoint = open_checkpoint(model, revision=revision)
    if records_text(checkpoint):
        if images is not None or labels is not None:
            raise EdgeError(f"{model} answers; --images and --labels are of encoders: give --notes, or none")
        prompts, shown = _prompts(notes, sees_images=sees_images(checkpoint))
        with progress_bar("read the checkpoint") as progress:
            bundle = record_text_reference(
                model,
                out,
                prompts=prompts,
                images=shown,
                revision=revision,
                device=device,
                dtype=dtype,
                progress=progress,
            )
        print_bundle(bundle, as_json=as_json)
        return
    if notes is not None:
        raise EdgeError(f"{model} is an encoder; --notes are for models that answer: leave them out")
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
    print_bundle(bundle, as_json=as_json)


@_reference.command()
def packing(
    artifact: Annotated[Path, typer.Argument(help="A quantized artifact.")],
    model: Model,
    reference: Annotated[Path, typer.Option(help="The float reference of the same checkpoint.")],
    out: Annotated[Path, typer.Option(help="Bundle directory; must not exist yet.")],
    revision: Revision = None,
    as_json: AsJson = False,
) -> None:
    """Compute what an artifact's integers should give, from the checkpoint and the plan alone."""
    from medgemma_export.packing import record_packing  # PyTorch, which --help need not wait for

    with progress_bar("read the checkpoint") as progress:
        bundle = record_packing(artifact, model, reference, out, revision=revision, progress=progress)
    print_bundle(bundle, as_json=as_json)


@_reference.command()
def ablate(
    model: Model,
    notes: Annotated[
        Path | None,
        typer.Option(help="A directory of .txt files to predict, in place of the built-in notes and images."),
    ] = None,
    revision: Revision = None,
    device: Annotated[Device, typer.Option(help="Where the original model runs.")] = "cpu",
    as_json: AsJson = False,
) -> None:
    """Measure what the details that ports get wrong are worth: KL divergence from the original, in nats."""
    from medgemma_export.ablation import ablate as measure  # PyTorch, which --help need not wait for

    checkpoint = open_checkpoint(model, revision=revision)
    prompts, shown = _prompts(notes, sees_images=sees_images(checkpoint))
    with progress_bar("read the checkpoint") as progress:
        found = measure(
            model, prompts=prompts, images=shown, revision=revision, device=device, progress=progress
        )
    print_ablation(checkpoint.id, found, as_json=as_json)


@_reference.command()
def quantization(
    model: Model,
    out: Annotated[Path, typer.Option(help="The table, a JSON file; rows it holds already are kept.")],
    row: Annotated[
        list[str] | None,
        typer.Option(help="METHOD:SCHEME, such as gptq:int4 or gptq:mine.toml, or a peer; repeat for more."),
    ] = None,
    calibration: Annotated[
        str, typer.Option(help="Samples to calibrate on: a directory, a manifest file, or builtin.")
    ] = BUILTIN,
    tokens: Annotated[
        int | None, typer.Option(help="Most tokens of each held-out note to predict; all if left.")
    ] = None,
    revision: Revision = None,
    calibration_memory: Annotated[
        float, typer.Option(help="GB of memory for activations; the rest goes to the disk.")
    ] = 2.0,
    as_json: AsJson = False,
) -> None:
    """Measure what ways to quantize cost a checkpoint, on notes or images that calibration never saw.

    Weights only: activations stay float. One row for each method and scheme, and for what other toolchains
    make of the same weights; medgemma-report draws the table.
    """
    from medgemma_export.quantization_table import DEFAULT_ROWS, parse_row, tabulate  # PyTorch

    requests = [parse_row(text) for text in row or DEFAULT_ROWS]
    with progress_bar("read the checkpoint") as progress:
        report = tabulate(
            model,
            out,
            rows=requests,
            calibration=calibration,
            tokens_per_text=tokens,
            revision=revision,
            memory_bytes=int(calibration_memory * 1e9),
            progress=progress,
        )
    if as_json:
        typer.echo(to_json(report), nl=False)
        return
    print_quantization(report)


@_reference.command()
def ranges(
    model: Model,
    calibration: Annotated[
        str, typer.Option(help="Prompts: a directory, a manifest file, or builtin.")
    ] = BUILTIN,
    headroom: Annotated[
        float, typer.Option(min=1.0, help="How many times the largest activation seen must fit float16.")
    ] = 4.0,
    revision: Revision = None,
    as_json: AsJson = False,
) -> None:
    """Show how large activations become in each layer, and the residual scale that float16 needs."""
    from medgemma_export.calibration_inputs import model_inputs  # PyTorch, which --help need not wait for
    from medgemma_export.range_audit import audit_ranges

    checkpoint = open_checkpoint(model, revision=revision)
    described = load_model(checkpoint)
    samples = open_set(
        calibration, images=takes(described, "pixel_values"), texts=takes(described, "input_ids")
    )
    with progress_bar("prepare calibration samples") as progress:
        audit = audit_ranges(
            described,
            described.reader(checkpoint),
            model_inputs(samples, described, checkpoint),
            memory_bytes=2 << 30,
            progress=lambda done, total: progress("run the model", done, total),
        )
    print_ranges(checkpoint.id, samples.summary, audit, headroom=headroom, as_json=as_json)


@_reference.command()
def plain_onnx(
    model: Model,
    out: Annotated[Path, typer.Option(help="The .onnx file; must not exist yet.")],
    revision: Revision = None,
) -> None:
    """Export the image tower by plain torch.onnx, a peer for medgemma-bench --against."""
    with progress_bar("export with torch.onnx"):
        export_plain_onnx(model, out, revision=revision)
    typer.echo(str(out))


def _prompts(
    notes: Path | None, *, sees_images: bool
) -> tuple[tuple[PromptText, ...], tuple[DecodedImage, ...]]:
    """The user's notes, or the built-in ones, and questions about built-in images where a model sees any."""
    if notes is not None:
        return directory_prompts(notes), ()
    if not sees_images:
        return note_prompts(), ()
    with progress_bar("decode images") as progress:
        shown = sample_images(progress)
    return (*image_prompts(shown, LABELS), *note_prompts()), shown


def _scheme(precision: Precision, scheme: str | None, target: TargetName) -> Scheme:
    if precision not in SCHEMES:
        raise EdgeError(f"precision {precision!r} is unknown; the precisions are {', '.join(SCHEMES)}")
    if target not in TARGETS:
        raise EdgeError(f"target {target!r} is unknown; the targets are {', '.join(TARGETS)}")
    if scheme is None:
        return TARGETS[target].scheme(precision)
    return TARGETS[target].scheme("mobile") if scheme == "mobile" else load_scheme(Path(scheme))


def _budget(size: str | None, max_kl: float | None) -> Budget | None:
    if size is not None and max_kl is not None:
        raise EdgeError("--budget and --max-kl are two ways to say how far to go; give one")
    if size is None and max_kl is None:
        return None
    return Budget(size_bytes=None if size is None else parse_size(size), max_kl=max_kl)


def _default_out(model: str, adapter: Path | None, target: TargetName, scheme: Scheme) -> Path:
    names = [Path(model.removeprefix("sample:")).name, target, scheme.name]
    if adapter is not None:
        names.insert(1, adapter.resolve().name)
    return Path("-".join(names))
