"""The command lines `medgemma-parity`, `medgemma-bench` and `medgemma-report`: parse, call, print."""

import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from medgemma_benchmarks.bundle import open_bundle
from medgemma_benchmarks.device import usable_cores
from medgemma_benchmarks.engine_process import EngineModel, parse_engine
from medgemma_benchmarks.engines import ENGINES
from medgemma_benchmarks.gates import load_gates
from medgemma_benchmarks.generation import measure_generation
from medgemma_benchmarks.generation_table import print_generation
from medgemma_benchmarks.latency import LatencyReport, TimedImage, measure_latency
from medgemma_benchmarks.operator_profile import OperatorShare
from medgemma_benchmarks.parity import check_parity
from medgemma_benchmarks.parity_report import LayerParity, ParityReport, PredictionParity
from medgemma_benchmarks.peers import parse_peer
from medgemma_benchmarks.prediction_parity import check_predictions
from medgemma_benchmarks.results import Result, read_result, to_json
from medgemma_benchmarks.timing import Repetition
from medgemma_runtime.artifact import open_artifact
from medgemma_runtime.backends.mil import Mode
from medgemma_runtime.command import CHECK_FAILED, printable, progress_bar, run_app
from medgemma_runtime.errors import EdgeError
from medgemma_runtime.files import check_destination, replacing
from medgemma_runtime.images import load_image
from medgemma_runtime.sample_images import LABELS, SAMPLE_IMAGES, load_sample

__all__ = ["parity_main", "bench_main", "report_main"]

_PARITY_EXAMPLES = """
Examples:

  medgemma-parity medsiglip-int8 --reference medsiglip-float

  medgemma-parity medsiglip-int8 --reference medsiglip-float --reference int8-packing --out parity.json

  medgemma-parity medgemma-int4 --reference medgemma-float --out parity.json

  medgemma-parity medgemma-coreml-int4 --reference medgemma-float --arithmetic fp16

  medgemma-parity medsiglip-executorch --reference medsiglip-float --per-layer
"""
_BENCH_EXAMPLES = """
Examples:

  medgemma-bench medsiglip-int8 --threads 4 --out bench.json

  medgemma-bench medsiglip-fp32 --batch 1,4

  medgemma-bench medsiglip-int8 --images ./films --against optimum=model.onnx --profile
"""
_GENERATE_EXAMPLES = """
Examples:

  medgemma-bench generate medgemma-int4 --threads 2 --out generation.json

  medgemma-bench generate medgemma-executorch --profile --rounds 2

  medgemma-bench generate medgemma-int4 --against llama=medgemma-q4_0.gguf@llama-env/bin/python
"""
_REPORT_EXAMPLES = """
Example:

  medgemma-report parity.json bench.json --out report
"""
_STYLE = {"PASS": "green", "NEAR_TIE": "yellow", "FAIL": "bold red"}
_SHOWN_OPERATORS = 8

_parity = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
_bench = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
_report = typer.Typer(add_completion=False, pretty_exceptions_enable=False)

_ArtifactPath = Annotated[
    Path, typer.Argument(metavar="ARTIFACT", help="Directory that medgemma-export wrote.")
]
_Out = Annotated[Path | None, typer.Option(help="Also write the result to this JSON file.")]
_AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for machines.")]
_Threads = Annotated[
    int | None, typer.Option(min=1, help="Threads for one operator; the engine chooses if unset.")
]


def parity_main() -> int:
    """Entry point of `medgemma-parity`; returns its exit code."""
    return run_app(_parity)


def bench_main() -> int:
    """Entry point of `medgemma-bench`; returns its exit code."""
    words = sys.argv[1:]
    if words and words[0] not in ("stages", "generate", "--help"):
        words = ["stages", *words]  # the command before there was another
    return run_app(_bench, words)


def report_main() -> int:
    """Entry point of `medgemma-report`; returns its exit code."""
    return run_app(_report)


@_parity.command(epilog=_PARITY_EXAMPLES)
def parity(
    artifact: _ArtifactPath,
    reference: Annotated[
        list[Path], typer.Option(help="Directory that medgemma-reference wrote; repeat for more.")
    ],
    gates: Annotated[Path | None, typer.Option(help="A TOML file of thresholds instead of ours.")] = None,
    show_images: Annotated[
        bool,
        typer.Option(
            "--show-images",
            help="Put thumbnails and names of your own images and notes into the result; samples always are.",
        ),
    ] = False,
    per_layer: Annotated[
        bool,
        typer.Option(
            "--per-layer",
            help="Also name the first layer that departs from a reference recorded with --per-layer.",
        ),
    ] = False,
    threads: _Threads = None,
    arithmetic: Annotated[
        Mode | None,
        typer.Option(
            help="How much of a Core ML program's float16 the evaluator honours; fp32, nothing, if unset."
        ),
    ] = None,
    out: _Out = None,
    as_json: _AsJson = False,
) -> None:
    """Hold an artifact against recorded references. Exit code 1 when a gate fails."""
    if out is not None:
        check_destination(out)
    limits = load_gates(gates)
    with progress_bar("checking files") as progress:
        opened = open_artifact(artifact)
        reports = []
        for directory in reference:
            bundle = open_bundle(directory)
            check = check_predictions if bundle.record.kind == "generative" else check_parity
            reports.append(
                check(
                    opened,
                    bundle,
                    gates=limits,
                    threads=threads,
                    arithmetic=arithmetic,
                    show_images=show_images,
                    per_layer=per_layer and bundle.record.kind != "packing",
                    progress=progress,
                )
            )
    _deliver(reports[0] if len(reports) == 1 else reports, out, as_json=as_json)
    if not as_json:
        for report in reports:
            _print_parity(report)
    if any(report.verdict == "FAIL" for report in reports):
        raise typer.Exit(CHECK_FAILED)


@_bench.callback(epilog=_BENCH_EXAMPLES)
def bench() -> None:
    """Measure an artifact on this device. `medgemma-bench ARTIFACT` is short for `stages ARTIFACT`."""


@_bench.command(epilog=_BENCH_EXAMPLES)
def stages(
    artifact: _ArtifactPath,
    images: Annotated[
        Path | None, typer.Option(help="Directory of PNG, JPEG or DICOM files to time.")
    ] = None,
    samples: Annotated[
        bool, typer.Option("--samples", help="Time the built-in images; so also if --images is unset.")
    ] = False,
    device: Annotated[Literal["cpu", "npu"], typer.Option(help="Where to run.")] = "cpu",
    threads: _Threads = None,
    batch: Annotated[
        str, typer.Option(help="Batch sizes for throughput, as 1,4; only 1 where activations are rounded.")
    ] = "1",
    seconds: Annotated[float, typer.Option(min=0, help="Least time for each stage.")] = 3.0,
    runs: Annotated[int, typer.Option(min=1, help="Least runs of each stage.")] = 20,
    against: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=PATH", help="An .onnx image tower to run in turns with; repeat for more."),
    ] = None,
    profile: Annotated[bool, typer.Option("--profile", help="Share of time by operator.")] = False,
    out: _Out = None,
    as_json: _AsJson = False,
) -> None:
    """Measure every stage from an image or a caption on: p50, p90, p99, load and memory."""
    if images is not None and samples:
        raise EdgeError("--images and --samples were both given; choose one")
    if out is not None:
        check_destination(out)
    opened = open_artifact(artifact)
    if device == "npu":
        raise EdgeError(
            f"--device npu was asked for and {opened.manifest.target} artifacts run on the CPU only in this "
            "version; measure with --device cpu"
        )
    timed = _directory(images) if images is not None else _samples()
    peers = [parse_peer(text) for text in against or ()]
    batches = _batches(batch)
    with progress_bar("starting") as progress:
        report = measure_latency(
            opened,
            timed,
            list(LABELS.values()),
            threads=threads,
            batches=batches,
            repetition=Repetition(seconds=seconds, min_runs=runs),
            peers=peers,
            profile=profile,
            progress=lambda what: progress(what, 0, 0),
        )
    _deliver(report, out, as_json=as_json)
    if not as_json:
        _print_latency(report)


@_bench.command(epilog=_GENERATE_EXAMPLES)
def generate(
    artifact: _ArtifactPath,
    against: Annotated[
        list[str] | None,
        typer.Option(
            metavar="ENGINE=MODEL@PYTHON",
            help=f"One of {', '.join(ENGINES)}, a model in its format, and the Python of an environment that "
            "has it; repeat for more.",
        ),
    ] = None,
    prompt: Annotated[
        list[int] | None,
        typer.Option(min=1, help="Tokens of a prompt; repeat for more. If unset, 17 and 512."),
    ] = None,
    decode: Annotated[int, typer.Option(min=1, help="Tokens timed after each prompt.")] = 64,
    rounds: Annotated[int, typer.Option(min=1, help="Runs of each engine; made even.")] = 6,
    threads: Annotated[
        int | None, typer.Option(min=1, help="For every engine; one for each usable core if unset.")
    ] = None,
    profile: Annotated[
        bool, typer.Option("--profile", help="Share of the artifact's time by operator, prefill and decode.")
    ] = False,
    out: _Out = None,
    as_json: _AsJson = False,
) -> None:
    """Time prefill and decode, in turns with other engines: same token ids, threads and counts."""
    if out is not None:
        check_destination(out)
    peers = [parse_engine(text) for text in against or ()]
    with progress_bar("checking files") as progress:
        report = measure_generation(
            open_artifact(artifact),
            EngineModel(engine="edge", model=artifact, python=sys.executable),
            peers,
            threads=threads or usable_cores(),
            prompts=prompt or (17, 512),
            decode=decode,
            rounds=rounds,
            profile=profile,
            progress=progress,
        )
    _deliver(report, out, as_json=as_json)
    if not as_json:
        print_generation(report)
        _print_profile(report.profile)


@_report.command(epilog=_REPORT_EXAMPLES)
def report(
    results: Annotated[
        list[Path], typer.Argument(metavar="FILE.json...", help="From medgemma-parity and medgemma-bench.")
    ],
    out: Annotated[Path, typer.Option(help="Directory for report.html and report.json.")],
) -> None:
    """Write one HTML page from parity, latency and generation results, several artifacts side by side."""
    from medgemma_benchmarks.report import write_report

    page = write_report([result for path in results for result in read_result(path)], out)
    typer.echo(printable(str(page)))


def _batches(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(size) for size in text.split(","))
    except ValueError:
        raise EdgeError(f"--batch {text!r} is no list of sizes; give it as 1,4") from None


def _samples() -> list[TimedImage]:
    return [TimedImage(name=sample.name, decode=partial(load_sample, sample)) for sample in SAMPLE_IMAGES]


def _directory(directory: Path) -> list[TimedImage]:
    paths = sorted(p for p in directory.glob("*") if p.is_file() and not p.name.startswith("."))
    if not paths:
        raise EdgeError(f"{directory} has no images; give a directory of PNG, JPEG or DICOM files")
    # A file name may name a patient; a result that is passed on has numbers.
    return [
        TimedImage(name=f"image {number}", decode=partial(load_image, path))
        for number, path in enumerate(paths, start=1)
    ]


def _deliver(results: Result | list[ParityReport], out: Path | None, *, as_json: bool) -> None:
    text = to_json(results)
    if out is not None:
        with replacing(out) as stream:
            stream.write(text.encode())
    if as_json:
        typer.echo(text, nl=False)


def _print_parity(report: ParityReport) -> None:
    reference = report.reference
    table = Table(
        title=printable(
            f"{report.artifact.name} ({report.artifact.precision}) against the {reference.kind} reference, "
            f"{reference.dtype} on {reference.device_name}"
            + (f", arithmetic {report.arithmetic}" if report.arithmetic else "")
        ),
        title_justify="left",
    )
    for heading in ("question", "of", "value", "measured", "limit", "verdict"):
        table.add_column(heading, justify="right" if heading in ("measured", "limit") else "left")
    for check in report.checks:
        table.add_row(
            check.question,
            check.subject,
            check.metric,
            "none" if check.value is None else f"{check.value:.6g}",
            check.limit,
            Text(check.verdict, style=_STYLE[check.verdict]),
        )
    console = Console()
    console.print(table)
    for component, layers in report.layers.items():
        console.print(_layers_table(component, layers))
    for name, found in report.predictions.items():
        console.print(Text(_predictions_line(name, found)))
    told = (c for c in report.checks if c.verdict != "PASS" or c.subject == "layers")
    for detail in dict.fromkeys(c.detail for c in told if c.detail):
        console.print(Text(printable(detail)))
    if report.verdict == "NEAR_TIE":
        ties = "near tie" if report.near_ties == 1 else "near ties"
        console.print(
            f"No gate failed; {report.near_ties} {ties} (margin {report.tie_margin_logits:g} logits)"
        )
    console.print(Text(f"{report.verdict}  manifest {report.artifact.manifest_sha256}"))


def _layers_table(component: str, layers: Sequence[LayerParity]) -> Table:
    table = Table(title=f"{component}, layer by layer", title_justify="left")
    for heading in ("residual stream", "relative error", "SQNR dB", "lowest cosine", "max error"):
        table.add_column(heading, justify="left" if heading == "residual stream" else "right")
    for layer in layers:
        values = (
            "" if layer.relative_error is None else f"{layer.relative_error:.2e}",
            "" if layer.sqnr_db is None else f"{layer.sqnr_db:.1f}",
            "" if layer.cosine_min is None else f"{layer.cosine_min:.7f}",
            "" if layer.max_abs_error is None else f"{layer.max_abs_error:.2e}",
        )
        table.add_row(layer.name, *(values if layer.is_seen else ("not seen", "", "", "")))
    return table


def _predictions_line(name: str, found: PredictionParity) -> str:
    if found.undefined is not None:
        return f"{name}: {found.undefined}"
    agreement = "none decided" if found.agreement is None else f"{found.agreement:.1%}"
    return (
        f"{name}, {found.tokens} predictions: KL {found.kl_mean:.3g} nats (p99 {found.kl_p99:.3g}), first "
        f"token the same {agreement} ({found.near_ties} near ties), perplexity {found.perplexity:.2f} "
        f"(reference {found.reference_perplexity:.2f})"
    )


def _print_latency(report: LatencyReport) -> None:
    device, artifact = report.device, report.artifact
    console = Console()
    console.print(
        Text(
            printable(
                f"{artifact.name} ({artifact.precision}, {artifact.size_bytes / 1e6:.1f} MB) on "
                f"{device.cpu}, threads: {device.threads or 'chosen by the engine'}"
            )
        )
    )
    stages = _table("stage", "runs", "min ms", "p50 ms", "p90 ms", "p99 ms")
    for name, time in report.stages.items():
        times = (time.min_ms, time.p50_ms, time.p90_ms, time.p99_ms)
        stages.add_row(name, str(time.runs), *(f"{value:.2f}" for value in times))
    console.print(stages)
    opening = _table("fresh process", "cold load ms", "first run ms", "warm load ms", "peak MB")
    for cost in report.processes:
        values = (cost.cold_load_ms, cost.first_run_ms, cost.warm_load_ms, cost.peak_rss_bytes / 1e6)
        opening.add_row(" and ".join(cost.components), *(f"{value:.1f}" for value in values))
    console.print(opening)
    for item in report.throughput:
        console.print(f"batch {item.batch}: {item.images_per_second:.1f} images/s")
    for peer in report.peers:
        console.print(
            Text(
                printable(
                    f"against {peer.name}: {peer.ratio_median:.2f} times as fast "
                    f"({peer.ratio_min:.2f} to {peer.ratio_max:.2f} over {peer.ours.runs} pairs), "
                    f"lowest cosine {peer.cosine_min:.6f}"
                )
            )
        )
    _print_profile(report.profile)


def _print_profile(profile: Mapping[str, Sequence[OperatorShare]] | None) -> None:
    for run, operators in (profile or {}).items():
        shares = _table(f"{run} operator", "calls", "ms", "share")
        for operator in operators[:_SHOWN_OPERATORS]:
            shares.add_row(
                operator.operator, f"{operator.calls:g}", f"{operator.ms:.2f}", f"{operator.share:.0%}"
            )
        Console().print(shares)


def _table(first: str, *numbers: str) -> Table:
    table = Table()
    table.add_column(first)
    for heading in numbers:
        table.add_column(heading, justify="right")
    return table
