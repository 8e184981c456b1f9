"""A quantization report in a terminal."""

from rich.console import Console
from rich.table import Table
from rich.text import Text

from medgemma_benchmarks.quantization_report import QuantizationReport
from medgemma_runtime.command import printable

__all__ = ["print_quantization"]


def print_quantization(report: QuantizationReport) -> None:
    """Print one line for each row, in the order in which they were measured."""
    console = Console()
    console.print(
        Text(
            printable(
                f"{report.model_id}, weights rounded and activations float; calibrated on "
                f"{report.calibration}; measured on {report.held_out}"
            )
        )
    )
    table = Table(box=None)
    for heading in ("method", "stored as"):
        table.add_column(heading, overflow="fold")
    for heading in ("bits", "MB", "KL mean", "KL p99", "same first", "perplexity", "float"):
        table.add_column(heading, justify="right", no_wrap=True)
    shown = Table(box=None)
    for heading in ("method", "stored as"):
        shown.add_column(heading, overflow="fold")
    for heading in ("bits", "MB", "cosine mean", "lowest", "same label"):
        shown.add_column(heading, justify="right", no_wrap=True)
    for row in report.rows:
        what = (printable(row.method), printable(row.storage))
        size = (f"{row.bits_per_weight:.3f}", f"{row.size_bytes / 1e6:.1f}")
        if (found := row.predictions) is not None:
            table.add_row(
                *what,
                *size,
                f"{found.kl_mean:.4f}",
                f"{found.kl_p99:.3f}",
                f"{found.agreement:.1%}",
                f"{found.perplexity:.2f}",
                f"{found.reference_perplexity:.2f}",
            )
        if (seen := row.embeddings) is not None:
            shown.add_row(
                *what,
                *size,
                f"{seen.cosine_mean:.6f}",
                f"{seen.cosine_min:.6f}",
                f"{seen.agreement:.0%} of {seen.images}",
            )
    for one in (table, shown):
        if one.row_count:
            console.print(one)
