"""One HTML page from all kinds of reports: verdict first, then the evidence."""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from medgemma_benchmarks.gates import Verdict, worst
from medgemma_benchmarks.generation import GenerationReport, Spread
from medgemma_benchmarks.identity import ArtifactDescription
from medgemma_benchmarks.latency import LatencyReport
from medgemma_benchmarks.parity_report import Check, ImageParity, ParityReport, ReferenceDescription
from medgemma_benchmarks.plots import (
    Plot,
    plot_cosines,
    plot_heat_map,
    plot_latency,
    plot_layers,
    plot_quantization,
    plot_size,
)
from medgemma_benchmarks.quantization_report import QuantizationReport
from medgemma_benchmarks.results import Result
from medgemma_runtime.errors import EdgeError, missing_package
from medgemma_runtime.files import replacing

__all__ = ["write_report"]

# A page with more images than this is slow on a phone and read by nobody.
_SHOWN_IMAGES = 40
_PRECISIONS = ("fp32", "fp16", "int8", "int4")
# The columns of the summary, and the values that say most about each, the first that was judged.
_KEY_METRICS = {
    "pixels": ("differing_uint8",),
    "tokens": ("differing_ids",),
    "lowering": ("max_abs_error", "max_standardized_error"),
    "packing": ("max_abs_error",),
    "scheme": ("kl_mean", "cosine_min"),
    "end-to-end": ("agreement",),
    "layers": ("relative_error",),
}
_OfArtifact = ParityReport | LatencyReport | GenerationReport
_SEVERITY = {"DIFFERENT": 0, None: 0, "NEAR_TIE": 1, "SAME": 2}


@dataclass(frozen=True, kw_only=True)
class _Subject:
    """One artifact and what was found about it."""

    label: str
    artifact: ArtifactDescription
    parities: tuple[ParityReport, ...]
    latencies: tuple[LatencyReport, ...]
    generations: tuple[GenerationReport, ...]

    @property
    def per_image(self) -> ParityReport | None:
        """The parity report with images, against the float reference where there is one."""
        shown = [p for p in self.parities if p.images is not None]
        return min(shown, key=lambda p: p.reference.kind != "float", default=None)


def write_report(results: Sequence[Result], out: Path) -> Path:
    """Write `report.html` and, beside it, `report.json` with everything it was made from.

    The page is one file: no script, no other resource.

    Args:
        results: Parity, latency and generation reports of artifacts of one checkpoint, and tables of what its
            quantization costs.
        out: A directory; created if absent.

    Raises:
        EdgeError: If there is no report, they are of several checkpoints, or two answer the same question.
    """
    if not results:
        raise EdgeError("there is nothing to report; give files of medgemma-parity and medgemma-bench")
    tables = [result for result in results if isinstance(result, QuantizationReport)]
    of_artifacts = [result for result in results if not isinstance(result, QuantizationReport)]
    checkpoints = {result.artifact.weights_sha256 for result in of_artifacts}
    checkpoints |= {table.weights_sha256 for table in tables}
    if len(checkpoints) > 1:
        raise EdgeError(
            f"the results are of {len(checkpoints)} checkpoints and a report shows artifacts of one; "
            "write a report for each"
        )
    page = _render(_context(_subjects(of_artifacts), tables))
    out.mkdir(parents=True, exist_ok=True)
    data = {
        "parity": [asdict(result) for result in results if isinstance(result, ParityReport)],
        "latency": [asdict(result) for result in results if isinstance(result, LatencyReport)],
        "generation": [asdict(result) for result in results if isinstance(result, GenerationReport)],
        "quantization": [asdict(table) for table in tables],
    }
    with replacing(out / "report.json") as stream:
        stream.write((json.dumps(data, indent=2, allow_nan=False) + "\n").encode())
    with replacing(out / "report.html") as stream:
        stream.write(page.encode())
    return out / "report.html"


def _subjects(results: Sequence[_OfArtifact]) -> tuple[_Subject, ...]:
    """Results by artifact, most precise first, each with a label that no other has."""
    seen = set()
    for result in results:
        about = (
            result.reference.bundle_sha256 if isinstance(result, ParityReport) else None,
            result.report,
            result.artifact.manifest_sha256,
            result.device.cpu,
        )
        if about in seen:
            raise EdgeError(
                f"two {result.report} results are of {result.artifact.name} and answer the same; give one"
            )
        seen.add(about)
    artifacts = {result.artifact.manifest_sha256: result.artifact for result in results}
    ordered = sorted(artifacts.values(), key=lambda a: (_PRECISIONS.index(a.precision), a.name))
    precisions = [artifact.precision for artifact in ordered]
    return tuple(
        _Subject(
            label=(
                artifact.precision
                if precisions.count(artifact.precision) == 1
                else f"{artifact.name} ({artifact.manifest_sha256[:6]})"
            ),
            artifact=artifact,
            parities=_of(artifact, results, ParityReport),
            latencies=_of(artifact, results, LatencyReport),
            generations=_of(artifact, results, GenerationReport),
        )
        for artifact in ordered
    )


def _of(artifact: ArtifactDescription, results: Sequence[_OfArtifact], kind: type) -> tuple[Any, ...]:
    return tuple(
        result
        for result in results
        if isinstance(result, kind) and result.artifact.manifest_sha256 == artifact.manifest_sha256
    )


def _context(subjects: Sequence[_Subject], tables: Sequence[QuantizationReport]) -> dict[str, Any]:
    """Everything the template shows, in the order it shows it."""
    parities = [parity for subject in subjects for parity in subject.parities]
    latencies = [latency for subject in subjects for latency in subject.latencies]
    generations = [generation for subject in subjects for generation in subject.generations]
    results: list[_OfArtifact] = [*parities, *latencies, *generations]
    model = subjects[0].artifact if subjects else tables[0]
    # The same reference for every artifact, so that columns can be compared.
    with_images = [subject for subject in subjects if subject.per_image is not None]
    reference = with_images[0].per_image if with_images else None
    comparable = [
        subject
        for subject in with_images
        if reference
        and subject.per_image
        and subject.per_image.reference.bundle_sha256 == reference.reference.bundle_sha256
    ]
    shown = _shown_rows(comparable)
    return {
        "model": model,
        "is_sample": model.model_id.startswith("sample:"),
        "verdict": worst(tuple(parity.verdict for parity in parities)) if parities else None,
        "near_ties": sum(parity.near_ties for parity in parities),
        "tie_margins": sorted({parity.tie_margin_logits for parity in parities}),
        "subjects": subjects,
        "summary": _summary(subjects),
        "parities": parities,
        "latencies": latencies,
        "generations": generations,
        "held_against": list(dict.fromkeys(_held_against(parity.reference) for parity in parities)),
        "references": list({p.reference.bundle_sha256: p.reference for p in parities}.values()),
        "devices": list({str(result.device): result.device for result in results}.values()),
        "predicted": [(s.label, p) for s in subjects for p in s.parities if p.predictions],
        "reference": reference,
        "comparable": comparable,
        "rows": shown,
        "hidden": len(reference.images or ()) - len(shown) if reference else 0,
        "plots": _plots(subjects, comparable, shown),
        "quantizations": [(table, _quantization_plots(table)) for table in tables],
        "stages": list(dict.fromkeys(stage for latency in latencies for stage in latency.stages)),
    }


def _held_against(reference: ReferenceDescription) -> str:
    device = "CUDA" if reference.device == "cuda" else "the CPU"
    return f"{reference.kind} reference in {reference.dtype} on {device}, {reference.device_name}"


def _summary(subjects: Sequence[_Subject]) -> dict[str, dict[str, tuple[Verdict, Check] | None]]:
    """By artifact and question: the verdict, and the check that says most about it."""
    table: dict[str, dict[str, tuple[Verdict, Check] | None]] = {}
    for subject in subjects:
        checks = [check for parity in subject.parities for check in parity.checks]
        row: dict[str, tuple[Verdict, Check] | None] = {}
        for column, metrics in _KEY_METRICS.items():
            group = [check for check in checks if _column(check) == column]
            # Gates of the user may hold none of these; then any of them stands for the question.
            judged = [metric for metric in metrics if any(check.metric == metric for check in group)]
            telling = [check for check in group if check.metric in judged[:1]] or group[:1]
            verdict = worst(tuple(check.verdict for check in group)) if group else None
            row[column] = (verdict, min(telling, key=_headroom)) if verdict else None
        if checks:
            table[subject.label] = row
    asked = [column for column in _KEY_METRICS if any(row[column] for row in table.values())]
    return {label: {column: row[column] for column in asked} for label, row in table.items()}


def _column(check: Check) -> str:
    return check.subject if check.subject in ("end-to-end", "layers") else check.question


def _headroom(check: Check) -> float:
    """Orders checks of one metric, the worst first; what could not be computed is worse than any value."""
    if check.value is None:
        return -math.inf
    return -check.value if check.limit.startswith("≤") else check.value


def _shown_rows(comparable: Sequence[_Subject]) -> list[int]:
    """Which images to show, in their order: those that differ before those that agree."""
    tables = [subject.per_image.images for subject in comparable if subject.per_image]
    if not tables or tables[0] is None:
        return []

    def severity(row: int) -> int:
        return min(_SEVERITY[table[row].agreement] for table in tables if table is not None)

    return sorted(sorted(range(len(tables[0])), key=severity)[:_SHOWN_IMAGES])


def _plots(
    subjects: Sequence[_Subject], comparable: Sequence[_Subject], shown: Sequence[int]
) -> dict[str, list[Plot]]:
    plots: dict[str, list[Plot]] = {"cosines": [], "heat_maps": [], "latency": [], "size": []}
    cosines: dict[str, list[float]] = {}
    points: dict[str, tuple[int, float]] = {}
    names: list[str] = []
    for subject in comparable:
        images = subject.per_image.images if subject.per_image else None
        values = [image.cosine for image in images or () if image.cosine is not None]
        if images and len(values) == len(images):
            names = [images[row].name for row in shown]
            cosines[subject.label] = [values[row] for row in shown]
            points[subject.label] = (subject.artifact.size_bytes, min(values))
    if cosines:
        plots["cosines"].append(plot_cosines(names, cosines))
        plots["size"].append(plot_size(points))
    plots["heat_maps"] = _heat_maps(comparable, shown)
    timed = _timed(subjects)
    plots["layers"] = _layer_plots(subjects)
    if timed:
        plots["latency"].append(plot_latency({label: result.stages for label, result in timed.items()}))
    return plots


def _layer_plots(subjects: Sequence[_Subject]) -> list[Plot]:
    """By component and number of layers: the errors of every artifact that was asked for them."""
    names: dict[tuple[str, int], list[str]] = {}
    errors: dict[tuple[str, int], dict[str, list[float | None]]] = {}
    for subject in subjects:
        for parity in subject.parities:
            for component, layers in parity.layers.items():
                key = component, len(layers)
                names[key] = [layer.name for layer in layers]
                errors.setdefault(key, {})[subject.label] = [layer.relative_error for layer in layers]
    return [plot_layers(key[0], names[key], errors[key]) for key in names]


def _quantization_plots(table: QuantizationReport) -> list[Plot]:
    """The curve of cost against bits, for predictions or for embeddings."""
    predicted: dict[str, list[tuple[float, float]]] = {}
    embedded: dict[str, list[tuple[float, float]]] = {}
    for row in table.rows:
        if row.predictions is not None:
            predicted.setdefault(row.method, []).append((row.bits_per_weight, row.predictions.kl_mean))
        if row.embeddings is not None:
            # What float32 cannot tell from 1 has no logarithm.
            error = max(1 - row.embeddings.cosine_mean, 1e-7)
            embedded.setdefault(row.method, []).append((row.bits_per_weight, error))
    measures = (("mean KL divergence, nats", predicted), ("1 - mean cosine", embedded))
    return [plot_quantization(curves, measure=measure) for measure, curves in measures if curves]


def _heat_maps(comparable: Sequence[_Subject], shown: Sequence[int]) -> list[Plot]:
    panels: dict[str, list[tuple[float, ...]]] = {}
    names: list[str] = []
    labels: tuple[str, ...] = ()
    for subject in comparable:
        parity = subject.per_image
        if parity is None or parity.zero_shot is None or parity.images is None:
            continue
        zero_shot = parity.zero_shot["end-to-end"]
        if not panels:
            names, labels = [parity.images[row].name for row in shown], parity.labels
            title = f"reference ({parity.reference.dtype})"
            panels[title] = [zero_shot.reference_probabilities[row] for row in shown]
        if zero_shot.probabilities is not None:
            panels[subject.label] = [zero_shot.probabilities[row] for row in shown]
    highest = max((max(row) for matrix in panels.values() for row in matrix), default=1.0)
    return [plot_heat_map(title, names, labels, matrix, highest=highest) for title, matrix in panels.items()]


def _timed(subjects: Sequence[_Subject]) -> dict[str, LatencyReport]:
    """Latency reports by a label that also names the device where there are several."""
    devices = {latency.device.cpu for subject in subjects for latency in subject.latencies}
    return {
        subject.label if len(devices) == 1 else f"{subject.label}, {latency.device.cpu}": latency
        for subject in subjects
        for latency in subject.latencies
    }


def _render(context: dict[str, Any]) -> str:
    try:
        import jinja2
    except ImportError:
        raise missing_package("jinja2", extra="bench", purpose="write a report") from None
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= _FILTERS
    template = files("medgemma_benchmarks") / "templates" / "report.html.jinja"
    return environment.from_string(template.read_text(encoding="utf-8")).render(context)


def _megabytes(size_bytes: float) -> str:
    return f"{size_bytes / 1e6:.1f} MB" if size_bytes < 1e9 else f"{size_bytes / 1e9:.2f} GB"


def _milliseconds(value: float) -> str:
    return f"{value:.2f}" if value < 10 else f"{value:.1f}" if value < 100 else f"{value:.0f}"


def _value(value: float | None) -> str:
    """A measured value with the digits that matter, or a dash where there is none."""
    if value is None:
        return "–"  # noqa: RUF001 - an en dash reads as "no value" in a table
    if value == int(value) and abs(value) < 1e6:
        return str(int(value))
    return f"{value:.2e}" if abs(value) < 1e-3 else f"{value:.5f}"


def _spread(spread: Spread | None) -> str:
    """A median and, in brackets, what it was taken from, with as many digits as say something."""
    if spread is None:
        return _value(None)
    median, lowest, highest = (
        f"{value:.2f}" if value < 10 else f"{value:.0f}" for value in (spread.median, spread.min, spread.max)
    )
    return f"{median} ({lowest} to {highest})"


def _percent(value: float | None) -> str:
    return _value(None) if value is None else f"{value:.0%}"


def _words(name: str) -> str:
    """`NEAR_TIE` and `max_abs_error` as a reader says them."""
    return name.replace("_", " ").lower()


def _label_verdict(image: ImageParity) -> str:
    """The class of an image's cell: the same words as for gates."""
    return {"SAME": "PASS", "NEAR_TIE": "NEAR_TIE"}.get(image.agreement or "", "FAIL")


def _measured(check: Check) -> str:
    return _percent(check.value) if check.metric in ("agreement", "near_tie_share") else _value(check.value)


_FILTERS: dict[str, Callable[..., Any]] = {
    "megabytes": _megabytes,
    "milliseconds": _milliseconds,
    "value": _value,
    "spread": _spread,
    "percent": _percent,
    "words": _words,
    "label_verdict": _label_verdict,
    "measured": _measured,
}
