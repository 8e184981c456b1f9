"""The command line `medgemma-reference`: what the original computes, and what quantization costs it."""

from pathlib import Path
from typing import Annotated

import typer

from medgemma_benchmarks.bundle import DecodedImage
from medgemma_benchmarks.quantization_table import print_quantization
from medgemma_benchmarks.results import to_json
from medgemma_export.calibration.reach import takes
from medgemma_export.checkpoint import open_checkpoint
from medgemma_export.cli import AsJson, Model, Revision, run
from medgemma_export.models import load_model
from medgemma_export.printing import (
    print_ablation,
    print_bundle,
    print_ranges,
    print_read_back,
)
from medgemma_export.reference.decoders import record_text_reference, records_text, sees_images
from medgemma_export.reference.encoders import record_reference
from medgemma_export.reference.images import directory_images, read_labels, sample_images, sample_labels
from medgemma_export.reference.original import Device, Dtype
from medgemma_export.reference.plain_onnx import export_plain_onnx
from medgemma_export.reference.prompts import (
    PromptText,
    directory_prompts,
    image_prompts,
    note_prompts,
)
from medgemma_quantization.calibration import BUILTIN, open_set
from medgemma_runtime.artifact import open_artifact
from medgemma_runtime.command import progress_bar
from medgemma_runtime.errors import EdgeError
from medgemma_runtime.sample_images import LABELS

__all__ = ["reference_main"]

_EXAMPLES = """
Examples:

  medgemma-reference record --model google/medsiglip-448 --out reference

  medgemma-reference record --model ./my-finetune --images ./studies --labels labels.toml --out reference

  medgemma-reference record --model google/medgemma-4b-it --notes ./notes --device cuda --out reference

  medgemma-reference ranges --model google/medgemma-4b-it --calibration ./studies

  medgemma-reference packing medsiglip-int8 --model google/medsiglip-448 --reference reference --out packing

  medgemma-reference coreml medsiglip-coreml

  medgemma-reference quantization --model ./my-finetune --row rtn:int4 --row gptq:5.5 --out table.json
"""

PerLayer = Annotated[
    bool,
    typer.Option("--per-layer", help="Also keep what leaves each layer, for medgemma-parity --per-layer."),
]

_app = typer.Typer(
    add_completion=False,
    rich_markup_mode="rich",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Record what the original model computes, to hold artifacts against.",
    epilog=_EXAMPLES,
)


def reference_main() -> int:
    """Entry point of `medgemma-reference`."""
    return run(_app)


@_app.command()
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
    per_layer: PerLayer = False,
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
                per_layer=per_layer,
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
            per_layer=per_layer,
            progress=progress,
        )
    print_bundle(bundle, as_json=as_json)


@_app.command()
def packing(
    artifact: Annotated[Path, typer.Argument(help="A quantized artifact.")],
    model: Model,
    reference: Annotated[Path, typer.Option(help="The float reference of the same checkpoint.")],
    out: Annotated[Path, typer.Option(help="Bundle directory; must not exist yet.")],
    revision: Revision = None,
    per_layer: PerLayer = False,
    as_json: AsJson = False,
) -> None:
    """Compute what an artifact's integers should give, from the checkpoint and the plan alone."""
    from medgemma_export.reference.packing import record_packing  # PyTorch, which --help need not wait for

    with progress_bar("read the checkpoint") as progress:
        bundle = record_packing(
            artifact, model, reference, out, revision=revision, per_layer=per_layer, progress=progress
        )
    print_bundle(bundle, as_json=as_json)


@_app.command()
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
    from medgemma_export.reference.ablation import (
        ablate as measure,  # PyTorch, which --help need not wait for
    )

    checkpoint = open_checkpoint(model, revision=revision)
    prompts, shown = _prompts(notes, sees_images=sees_images(checkpoint))
    with progress_bar("read the checkpoint") as progress:
        found = measure(
            model, prompts=prompts, images=shown, revision=revision, device=device, progress=progress
        )
    print_ablation(checkpoint.id, found, as_json=as_json)


@_app.command()
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
    from medgemma_export.calibration.quantization_table import DEFAULT_ROWS, parse_row, tabulate  # PyTorch

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


@_app.command()
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
    from medgemma_export.calibration.inputs import model_inputs  # PyTorch, which --help need not wait for
    from medgemma_export.calibration.range_audit import audit_ranges

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


@_app.command()
def coreml(
    artifact: Annotated[Path, typer.Argument(help="An artifact of target coreml.")], as_json: AsJson = False
) -> None:
    """Have coremltools read every package back, and hold what each weight is stored as against the plan.

    Operators are counted by kind, and weights that are not compressed are listed with the plan's reason.
    coremltools holds all weights of a function in memory, two bytes or one each.
    """
    from medgemma_export.targets.coreml_validation import read_back  # coremltools, which --help need not

    functions = []
    with progress_bar("read back") as progress:
        for done, function in enumerate(read_back(open_artifact(artifact))):
            functions.append(function)
            progress(f"{function.package} {function.function}", done, done + 1)
    print_read_back(functions, as_json=as_json)


@_app.command()
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
