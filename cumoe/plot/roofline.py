"""The roofline: what a layer reaches over the operations that it does for every byte of weights."""

from collections.abc import Sequence
from typing import Any

from cumoe.plot.style import MARKERS, Theme, caption, new_figure
from cumoe.plot.table import Row, distinct, needed, where_and_when

COLUMNS = ("layer", "tokens", "tflops", "tb_per_s", "product_tflops", "read_tb_per_s")


def roofline(rows: Sequence[Row], theme: Theme) -> Any:
    """Draw a line a layer below the two roofs that were measured beside it.

    With weights alone counted, operations a byte are 2 m W / (2 W) = m, the tokens of an expert; a shared expert, whose
    weights meet all tokens, raises the mean.

    Parameters
    ----------
    rows : sequence of dict
        With the columns `COLUMNS`: a CSV file of the benchmark.
    theme : Theme

    Returns
    -------
    matplotlib.figure.Figure
    """
    figure = new_figure(theme, 10, 5.6)
    axes = figure.add_subplot()
    layers = distinct(rows, "layer")
    intensities = [needed(row, "tflops") / needed(row, "tb_per_s") for row in rows]
    low, high = min(intensities) / 1.6, max(intensities) * 1.6
    product = max(needed(row, "product_tflops") for row in rows)
    read = max(needed(row, "read_tb_per_s") for row in rows)
    knee = product / read
    axes.plot([low, min(knee, high)], [low * read, min(knee, high) * read], color=theme.muted, linestyle="--", lw=1.3)
    if high > knee:
        axes.plot([max(knee, low), high], [product] * 2, color=theme.muted, linestyle=":", lw=1.6)
    for i, layer in enumerate(layers):
        points = sorted(
            (needed(row, "tflops") / needed(row, "tb_per_s"), needed(row, "tflops"))
            for row in rows
            if row["layer"] == layer
        )
        color = theme.series[i % len(theme.series)]
        axes.plot(*zip(*points, strict=True), marker=MARKERS[i % len(MARKERS)], ms=5, lw=1.4, color=color, label=layer)
    axes.set(xscale="log", yscale="log", xlim=(low, high), ylim=(None, 1.5 * product))
    axes.set_xlabel("operations a byte of weights that are read (tokens an expert, where no expert is shared)")
    axes.set_ylabel("TFLOP/s")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter("{x:g}")
    axes.grid(visible=True)
    memory = f"read-only stream, {read:.2f} TB/s"
    handles = [
        axes.plot([], [], color=theme.muted, linestyle=style, label=label)[0]
        for style, label in (("--", memory), (":", f"cuBLAS, {product:.0f} TFLOP/s"))
    ]
    lines = [line for line in axes.get_lines() if line.get_label() in layers]
    figure.legend(handles=[*handles, *lines], loc="outside right upper", fontsize=8.5)
    caption(figure, theme, "Roofline: both roofs measured in the same run", where_and_when(rows))
    return figure
