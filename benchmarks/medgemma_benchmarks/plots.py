"""The report's figures: each a self-contained SVG and a sentence that says what it shows."""

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from medgemma_benchmarks.timing import Distribution
from medgemma_runtime.errors import missing_package

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = [
    "Plot",
    "plot_cosines",
    "plot_heat_map",
    "plot_latency",
    "plot_layers",
    "plot_quantization",
    "plot_size",
]

# Distinct in grey and for the common colour blindnesses (Okabe and Ito), by order of the artifacts.
_COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00")
_MARKERS = ("o", "s", "D", "^", "v", "P")
_INK, _GRID = "#1f2933", "#d9dee4"
# Below this, 1 - cosine is rounding of the float32 outputs (2^-24 each), and a logarithm needs a floor.
_SMALLEST_ERROR = 1e-7


@dataclass(frozen=True, kw_only=True)
class Plot:
    """A figure as a data URI, what a screen reader says of it, and its caption."""

    uri: str
    alt: str
    caption: str


def plot_cosines(names: Sequence[str], cosines: Mapping[str, Sequence[float]]) -> Plot:
    """1 - cosine of each image's embedding with the reference's, a mark for each artifact.

    Args:
        names: Of the images.
        cosines: By artifact, one for each image.
    """
    figure, axes = _figure(width=7.2, height=1.1 + 0.24 * len(names))
    rows = np.arange(len(names))
    for index, (label, values) in enumerate(cosines.items()):
        errors = np.maximum(1 - np.array(values), _SMALLEST_ERROR)
        axes.plot(errors, rows, _MARKERS[index % 6], color=_COLOURS[index % 6], label=label, markersize=6)
    axes.set_xscale("log")
    axes.set_yticks(rows, names)
    axes.invert_yaxis()
    axes.set_xlabel("1 - cosine, down to 1e-7 (logarithmic; further left is closer to the reference)")
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=6, frameon=False)
    worst = {label: min(values) for label, values in cosines.items()}
    return _plot(
        figure,
        alt="Cosine of each image's embedding with the reference's. Lowest: "
        + ", ".join(f"{label} {value:.6f}" for label, value in worst.items()),
        caption="How far each image's embedding turns away from the reference's.",
    )


def plot_heat_map(
    title: str,
    names: Sequence[str],
    labels: Sequence[str],
    probabilities: Sequence[Sequence[float]],
    *,
    highest: float,
) -> Plot:
    """Zero-shot probabilities, images by labels, the chosen label of each image framed.

    Args:
        title: Whose probabilities.
        names: Of the images, the rows.
        labels: Of the columns.
        probabilities: By row and column.
        highest: What the darkest colour stands for, the same in every map of a page.
    """
    matrix = np.array(probabilities)
    figure, axes = _figure(width=1.9 + 0.27 * len(labels), height=1.9 + 0.22 * len(names))
    from matplotlib.ticker import PercentFormatter

    axes.grid(visible=False)
    image = axes.imshow(matrix, cmap="Blues", vmin=0, vmax=highest, aspect="auto")
    chosen = matrix.argmax(axis=1)
    axes.plot(chosen, np.arange(len(names)), "s", markersize=8, markerfacecolor="none", color="#d55e00")
    axes.set_xticks(range(len(labels)), labels, rotation=55, ha="right", rotation_mode="anchor")
    axes.set_yticks(range(len(names)), names)
    bar = figure.colorbar(image, ax=axes, fraction=0.035, pad=0.02, format=PercentFormatter(1, decimals=0))
    bar.ax.tick_params(labelsize=8, length=0)
    bar.outline.set_visible(False)
    return _plot(
        figure,
        alt=f"Zero-shot probabilities of {title}: "
        + "; ".join(
            f"{name} {labels[column]} {matrix[row, column]:.0%}"
            for row, (name, column) in enumerate(zip(names, chosen, strict=True))
        ),
        caption=title,
    )


def plot_latency(stages: Mapping[str, Mapping[str, Distribution]]) -> Plot:
    """Bars of p50 with marks at p90 and p99, by stage and artifact.

    Args:
        stages: By artifact, then by stage.
    """
    order = list(dict.fromkeys(stage for times in stages.values() for stage in times))
    figure, axes = _figure(width=7.2, height=1.2 + len(order) * (0.16 + 0.2 * len(stages)))
    thickness = 0.8 / len(stages)
    for index, (label, times) in enumerate(stages.items()):
        colour = _COLOURS[index % 6]
        rows = np.array([order.index(stage) for stage in times]) - 0.4 + thickness * (index + 0.5)
        p50, p90, p99 = (
            [getattr(time, percentile) for time in times.values()]
            for percentile in ("p50_ms", "p90_ms", "p99_ms")
        )
        axes.barh(rows, p50, height=thickness * 0.85, color=colour, label=label)
        axes.hlines(rows, p50, p99, color=_INK, linewidth=1)
        axes.plot(p90, rows, "|", color=_INK, markersize=7)
        axes.plot(p99, rows, ">", color=_INK, markersize=4)
    axes.set_yticks(range(len(order)), order)
    axes.invert_yaxis()
    axes.set_xlim(left=0)
    axes.set_xlabel("milliseconds: bar p50, bar mark p90, arrow p99")
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=6, frameon=False)
    return _plot(
        figure,
        alt="Latency by stage, p50: "
        + "; ".join(
            f"{label} " + ", ".join(f"{stage} {time.p50_ms:.2f} ms" for stage, time in times.items())
            for label, times in stages.items()
        ),
        caption="Time of each stage, for one image or one caption.",
    )


def plot_layers(title: str, names: Sequence[str], errors: Mapping[str, Sequence[float | None]]) -> Plot:
    """Relative error of the residual stream by layer, a line for each artifact.

    Args:
        title: The component.
        names: Of the states, in order.
        errors: By artifact, one for each state; None where it was not seen.
    """
    figure, axes = _figure(width=7.2, height=3.0)
    places = np.arange(len(names))
    for index, (label, values) in enumerate(errors.items()):
        heights = [np.nan if value is None else max(value, _SMALLEST_ERROR) for value in values]
        axes.plot(places, heights, f"{_MARKERS[index % 6]}-", color=_COLOURS[index % 6], label=label)
    axes.set_yscale("log")
    axes.set_xticks(places, names, rotation=90)
    axes.set_ylabel("relative error")
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=6, frameon=False)
    largest = {
        label: max((v for v in values if v is not None), default=0) for label, values in errors.items()
    }
    return _plot(
        figure,
        alt=f"{title}: relative error of the residual stream by layer. Largest: "
        + ", ".join(f"{label} {value:.2g}" for label, value in largest.items()),
        caption=f"{title}: how far the stream is from the reference's after each layer.",
    )


def plot_size(points: Mapping[str, tuple[int, float]]) -> Plot:
    """Size on disk against the worst cosine.

    Args:
        points: By artifact: bytes, and the lowest cosine of an image.
    """
    figure, axes = _figure(width=7.2, height=3.0)
    for index, (label, (size, value)) in enumerate(points.items()):
        error = max(1 - value, _SMALLEST_ERROR)
        axes.plot(
            size / 1e6, error, _MARKERS[index % 6], color=_COLOURS[index % 6], markersize=9, label=label
        )
    axes.legend(frameon=False)  # names beside the points would lie on each other where sizes are alike
    axes.set_yscale("log")
    axes.set_xlim(left=0)
    axes.margins(x=0.15, y=0.25)
    axes.set_xlabel("size on disk, MB")
    axes.set_ylabel("1 - lowest cosine")
    return _plot(
        figure,
        alt="Size against the lowest cosine of an image: "
        + "; ".join(f"{label} {size / 1e6:.1f} MB, {value:.6f}" for label, (size, value) in points.items()),
        caption="What smaller costs: down and left is better.",
    )


def plot_quantization(curves: Mapping[str, Sequence[tuple[float, float]]], *, measure: str) -> Plot:
    """What rounding costs against the bits it takes; the points of one method are joined.

    Args:
        curves: By method: bits per weight and cost of each row.
        measure: What the cost is.
    """
    figure, axes = _figure(width=7.2, height=4.2)
    for index, (label, points) in enumerate(curves.items()):
        bits, costs = zip(*sorted(points), strict=True)
        axes.plot(
            bits,
            costs,
            marker=_MARKERS[index % 6],
            color=_COLOURS[index % 6],
            markersize=7,
            linewidth=1.2,
            label=label,
        )
    axes.set_yscale("log")
    axes.margins(x=0.08, y=0.12)
    axes.set_xlabel("bits per weight over all weights, scales included")
    axes.set_ylabel(f"{measure} (logarithmic)")
    axes.legend(loc="upper right", frameon=False)
    return _plot(
        figure,
        alt=f"{measure} against bits per weight: "
        + "; ".join(
            f"{label} " + ", ".join(f"{cost:.3g} at {bits:.2f}" for bits, cost in sorted(points))
            for label, points in curves.items()
        ),
        caption="What fewer bits cost, by method: down and left is better.",
    )


def _figure(*, width: float, height: float) -> tuple["Figure", "Axes"]:
    try:
        # The object interface, not pyplot: no global state, no display.
        from matplotlib.backends.backend_svg import FigureCanvasSVG
        from matplotlib.figure import Figure
    except ImportError:
        raise missing_package("matplotlib", extra="bench", purpose="draw a report") from None
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasSVG(figure)
    axes = figure.add_subplot()
    axes.grid(color=_GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(which="both", colors=_INK, length=0, labelsize=8.5)
    for spine in axes.spines.values():
        spine.set_visible(False)
    return figure, axes


def _plot(figure: "Figure", *, alt: str, caption: str) -> Plot:
    import matplotlib as mpl

    stream = io.BytesIO()
    # Text as outlines looks the same everywhere; a fixed salt and no date make equal figures equal files.
    with mpl.rc_context({"svg.fonttype": "path", "svg.hashsalt": "medgemma-edge"}):
        figure.savefig(stream, format="svg", transparent=True, metadata={"Date": None})
    uri = "data:image/svg+xml;base64," + base64.b64encode(stream.getvalue()).decode("ascii")
    return Plot(uri=uri, alt=alt, caption=caption)
