"""A generation report in a terminal."""

from rich.console import Console
from rich.table import Table
from rich.text import Text

from medgemma_benchmarks.generation import GenerationReport, Spread
from medgemma_runtime.command import printable

__all__ = ["print_generation"]


def print_generation(report: GenerationReport) -> None:
    """Print what was measured: each engine's cost first, then rates and ratios by prompt."""
    device, artifact = report.device, report.artifact
    busy = "unknown" if report.load_average is None else f"{report.load_average:.2f}"
    console = Console()
    console.print(
        Text(
            printable(
                f"{artifact.name} ({artifact.precision}) on {device.cpu}, threads: {device.threads}, "
                f"{report.rounds} rounds, load average before: {busy}"
            )
        )
    )
    engines = (report.ours, *report.peers)
    cost = _table("model", "engine", "MB", "load ms", "peak MB")
    for engine in engines:
        peak = "unknown" if engine.peak_rss_bytes is None else f"{engine.peak_rss_bytes / 1e6:.0f}"
        sizes = (f"{engine.size_bytes / 1e6:.1f}", f"{engine.load_seconds * 1e3:.0f}", peak)
        cost.add_row(printable(engine.model), printable(f"{engine.engine} {engine.version}"), *sizes)
    console.print(cost)
    for index, workload in enumerate(report.ours.workloads):
        rates = _table("model", "", "tokens/s", "ours / this", "same")
        rates.title = f"prompt of {workload.prompt_tokens} tokens, {workload.decode_tokens} after it"
        rates.title_justify = "left"
        for engine in engines:
            speed = engine.workloads[index]
            same = "" if speed.same_tokens is None else f"{speed.same_tokens}/{speed.decode_tokens + 1}"
            rates.add_row(
                printable(engine.model), "prefill", _spread(speed.prefill_rate), _spread(speed.prefill_ratio)
            )
            rates.add_row("", "decode", _spread(speed.decode_rate), _spread(speed.decode_ratio), same)
        console.print(rates)


def _table(model: str, *others: str) -> Table:
    """Numbers stay whole where a terminal is narrow; a long name does not."""
    table = Table()
    table.add_column(model, overflow="fold")
    for heading in others:
        table.add_column(heading, no_wrap=heading != "engine", overflow="fold")
    return table


def _spread(spread: Spread | None) -> str:
    """A median and what it was taken from; nothing where there is none."""
    if spread is None:
        return ""
    digits = 2 if spread.median < 10 else 1 if spread.median < 100 else 0
    median, lowest, highest = (f"{value:.{digits}f}" for value in (spread.median, spread.min, spread.max))
    return f"{median} ({lowest} to {highest})"
