"""What the command lines of export print, for people or as JSON."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Literal

import typer
from rich.console import Console
from rich.table import Table

from medgemma_benchmarks.bundle import ReferenceBundle
from medgemma_benchmarks.parity_report import PredictionParity
from medgemma_export.build import Decision
from medgemma_export.targets.executorch import SHARES
from medgemma_quantization.plan import PlanRow
from medgemma_runtime.artifact import Artifact
from medgemma_runtime.command import printable

if TYPE_CHECKING:
    from medgemma_export.calibration.range_audit import RangeAudit
    from medgemma_export.targets.coreml_validation import FloatWeight, ReadFunction

__all__ = [
    "print_decision",
    "print_artifact",
    "print_bundle",
    "print_ablation",
    "print_ranges",
    "print_read_back",
]


def print_decision(decision: Decision, *, as_json: bool) -> None:
    """What will be done, and why, weight by weight."""
    plan, needs = decision.plan, decision.needs
    adapter, prompt = decision.checkpoint.adapter, decision.model.prompt
    if as_json:
        facts = {
            "model": decision.checkpoint.id,
            "adapter": adapter and adapter.name,
            "context": prompt and prompt.context,
            "bits_per_weight": plan.bits_per_weight,
            "predicted_kl": decision.predicted_kl,
            "disk_bytes": needs.disk_bytes,
            "memory_bytes": needs.memory_bytes,
            "plan": json.loads(plan.to_json()),
        }
        typer.echo(json.dumps(facts))
        return
    title = decision.checkpoint.id + (f" with adapter {adapter.name}" if adapter else "")
    context = f"context {prompt.context:,} tokens; " if prompt else ""
    predicted = ""
    if decision.predicted_kl is not None:
        predicted = f"predicted, not measured: KL {decision.predicted_kl:.2g} nats on the calibration set; "
    table = Table(
        title=printable(f"{title}, {plan.bits_per_weight:.2f} bits per weight"),
        caption=f"{predicted}{context}the export needs {needs.memory_bytes / 1e9:.1f} GB of memory and "
        f"{needs.disk_bytes / 1e9:.1f} GB of disk",
    )
    for heading in ("weights", "such as", "stored as", "MB", "why"):
        justify: Literal["right", "left"] = "right" if heading in ("weights", "MB") else "left"
        table.add_column(heading, justify=justify, overflow="fold")
    groups: dict[tuple[str, str], list[PlanRow]] = {}
    for row in plan.rows:
        groups.setdefault((str(row.storage), row.reason), []).append(row)
    for (storage, reason), rows in groups.items():
        size = sum(row.stored_bits for row in rows) / 8e6
        table.add_row(str(len(rows)), printable(rows[0].name), storage, f"{size:.1f}", reason)
    Console().print(table)


def print_bundle(bundle: ReferenceBundle, *, as_json: bool) -> None:
    """What a reference holds."""
    record = bundle.record
    if as_json:
        typer.echo(
            json.dumps({"bundle": str(bundle.directory), "sha256": bundle.sha256, "kind": record.kind})
        )
        return
    producer = record.producer
    held = f"{len(record.images)} images, {len(record.labels)} labels"
    if record.prompts:
        predictions = sum(prompt.predictions for prompt in record.prompts)
        held = f"{predictions} predictions in {len(record.prompts)} prompts, {len(record.images)} images"
    typer.echo(
        f"{bundle.directory}: {record.kind} reference of {record.model_id}, {held}, "
        f"{producer.dtype} on {producer.device} ({producer.device_name})"
    )


def print_artifact(artifact: Artifact, *, as_json: bool) -> None:
    """What has been made, and what it took."""
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
    adapter = f" with adapter {manifest.model.adapter.name}" if manifest.model.adapter else ""
    typer.echo(
        f"{artifact.directory}: {manifest.model.id}{adapter} as {manifest.target} {manifest.precision}, "
        f"{artifact.size_bytes / 1e6:.1f} MB ({manifest.quantization.bits_per_weight:.2f} bits per weight), "
        f"{manifest.build.seconds:.0f} s, peak memory {manifest.build.peak_rss_bytes / 1e9:.2f} GB"
    )
    if manifest.target == "executorch":
        _print_delegation(artifact)


def _print_delegation(artifact: Artifact) -> None:
    """What a delegate took of each method, and what it left to ExecuTorch's kernels."""
    said = json.loads(artifact.path(SHARES).read_text(encoding="utf-8"))
    for method, share in said["methods"].items():
        operations = share["delegated"] + share["kernels"]
        typer.echo(
            f"{method}: {said['delegate']} took {share['delegated']} of {operations} operations in "
            f"{share['calls']} calls, ExecuTorch's kernels the other {share['kernels']}"
        )


def print_ablation(model_id: str, found: Mapping[str, PredictionParity], *, as_json: bool) -> None:
    """What each change to the original costs its predictions."""
    if as_json:
        typer.echo(json.dumps({name: asdict(parity) for name, parity in found.items()}, indent=2))
        return
    typer.echo(f"{model_id} in float32, against itself unchanged; KL divergence in nats")
    table = Table("change", box=None)
    for heading in ("tokens", "KL mean", "KL p99", "same first", "perplexity", "unchanged"):
        table.add_column(heading, justify="right")
    for name, parity in found.items():
        share = "none" if parity.agreement is None else f"{parity.agreement:.1%}"
        divergence = (f"{parity.kl_mean:.2g}", f"{parity.kl_p99:.2g}")
        perplexity = (f"{parity.perplexity:.2f}", f"{parity.reference_perplexity:.2f}")
        table.add_row(name, str(parity.tokens), *divergence, share, *perplexity)
    Console().print(table)


def print_ranges(model_id: str, samples: str, audit: "RangeAudit", *, headroom: float, as_json: bool) -> None:
    """How large activations became in each layer, and the residual scale that float16 needs."""
    scale = audit.residual_scale(headroom)
    if as_json:
        rows = [
            {**asdict(peak), "share": peak.share, "residual_scale": peak.residual_scale(headroom)}
            for peak in audit.peaks
        ]
        facts = {"model": model_id, "calibration": samples, "headroom": headroom, "residual_scale": scale}
        typer.echo(json.dumps({**facts, "peaks": rows}, indent=2))
        return
    needs = "no decoder to scale" if scale is None else f"residual_scale = {scale:g}"
    typer.echo(f"{model_id} in float32 on {samples}; at a headroom of {headroom:g}: {needs}")
    table = Table("layer", "largest input of", box=None)
    for heading in ("input", "residual", "of 65,504", "scale"):
        table.add_column(heading, justify="right")
    for layer, peaks in audit.layers().items():
        inputs = [peak for peak in peaks if peak.kind == "input"]
        sums = [peak for peak in peaks if peak.kind == "residual"]
        largest = max(inputs, key=lambda peak: peak.value, default=None)
        scales = [wanted for peak in sums if (wanted := peak.residual_scale(headroom)) is not None]
        table.add_row(
            layer,
            largest.name.removeprefix(f"{layer}.") if largest else "",
            f"{largest.value:,.1f}" if largest else "",
            f"{max(peak.value for peak in sums):,.1f}" if sums else "",
            f"{max(peak.share for peak in peaks):.1%}",
            f"{min(scales):g}" if scales else "",
        )
    Console().print(table)


def print_read_back(functions: "Sequence[ReadFunction]", *, as_json: bool) -> None:
    """What coremltools found in the packages of an artifact."""
    if as_json:
        typer.echo(json.dumps([asdict(function) for function in functions]))
        return
    for function in functions:
        operators = ", ".join(f"{count} {kind}" for kind, count in function.operators.items())
        stored = ", ".join(f"{count} {storage}" for storage, count in function.stored.items())
        typer.echo(f"{function.package}, {function.function}: {operators}; weights: {stored}")
        groups: dict[str, list[FloatWeight]] = {}
        for weight in function.floats:
            groups.setdefault(f"{weight.storage}, {weight.reason}", []).append(weight)
        for reason, weights in groups.items():
            names = ", ".join(printable(weight.name) for weight in weights[:3])
            more = f" and {len(weights) - 3} more" if len(weights) > 3 else ""
            typer.echo(f"  {reason}: {names}{more}")
