"""The command line `medgemma-export`: parse, call, print."""

import os
from pathlib import Path
from typing import Annotated

import typer

from medgemma_export.build import build, decide
from medgemma_export.package import partial_directory
from medgemma_export.printing import (
    print_artifact,
    print_decision,
)
from medgemma_export.recipe import Recipe
from medgemma_export.targets import TARGETS, Delegate, Units, choose_target
from medgemma_quantization.budget import Budget, parse_size
from medgemma_quantization.methods import MethodName
from medgemma_quantization.scheme import SCHEMES, Scheme, load_scheme
from medgemma_runtime.command import progress_bar, run_app
from medgemma_runtime.errors import EdgeError
from medgemma_runtime.manifest import Precision, TargetName

__all__ = ["AsJson", "Model", "Revision", "export_main", "run"]

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

_app = typer.Typer(add_completion=False, rich_markup_mode="rich", pretty_exceptions_enable=False)
Model = Annotated[
    str, typer.Option(help="A directory, a hub id such as google/medsiglip-448, or sample:NAME.")
]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub id.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]


def export_main() -> int:
    """Entry point of `medgemma-export`."""
    return run(_app)


def run(app: typer.Typer) -> int:
    """Run a command line of this package; its exit code."""
    # transformers warns about token ids of SigLIP's own default configuration; its errors still show.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    return run_app(app)


@_app.command(epilog=_EXAMPLES)
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
        Delegate | None,
        typer.Option(help="Who computes in an ExecuTorch program; xnnpack if left. coreml takes encoders."),
    ] = None,
    separate_weights: Annotated[
        bool,
        typer.Option("--separate-weights", help="Put an ExecuTorch program's weights into a .ptd file."),
    ] = False,
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
    wish = _scheme(precision, scheme, target, units)
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
            separate_weights=separate_weights,
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
    try:
        with progress_bar("read the checkpoint") as progress:
            artifact = build(recipe, progress=progress)
    except KeyboardInterrupt:
        if (partial := partial_directory(recipe.out)).exists():
            typer.echo(f"the same command goes on with what is finished in {partial}", err=True)
        raise
    print_artifact(artifact, as_json=as_json)


def _scheme(precision: Precision, scheme: str | None, target: TargetName, units: Units | None) -> Scheme:
    if precision not in SCHEMES:
        raise EdgeError(f"precision {precision!r} is unknown; the precisions are {', '.join(SCHEMES)}")
    if target not in TARGETS:
        raise EdgeError(f"target {target!r} is unknown; the targets are {', '.join(TARGETS)}")
    chosen = choose_target(target, units=units)
    if scheme is None:
        return chosen.scheme(precision)
    if scheme == "mobile":
        return chosen.scheme("mobile")
    if not Path(scheme).exists():
        raise EdgeError(
            f"scheme {scheme} is no file and not mobile, the one that is built in; name one of these, or "
            "give --precision alone"
        )
    return load_scheme(Path(scheme))


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
