"""Speed against imbalance: the same number of rows, spread more and more unevenly."""

from collections.abc import Sequence
from typing import Any

from cumoe.plot.style import MARKERS, Theme, caption, new_figure
from cumoe.plot.table import Row, needed, where_and_when

COLUMNS = ("layer", "tokens", "us", "routing", "balancedness", "experts_hit")
TICKS = (1, 2, 3, 5, 10, 20, 30, 50, 100, 200, 300, 500, 1000)
EVEN = ("balanced", "uniform", "zipf:0")
"""Which routing the others are compared with: the first of these that was measured."""


def imbalance(rows: Sequence[Row], theme: Theme) -> Any:
    """Draw a line a layer and number of tokens: time relative to an even routing, over largest load to mean.

    Parameters
    ----------
    rows : sequence of dict
        With the columns `COLUMNS`: a CSV file of the benchmark with several routings.
    theme : Theme

    Returns
    -------
    matplotlib.figure.Figure

    Raises
    ------
    ValueError
        If no layer was measured with an even routing and another.
    """
    lines = {}
    for key in dict.fromkeys((row["layer"], row["tokens"]) for row in rows):
        mine = {row["routing"]: row for row in rows if (row["layer"], row["tokens"]) == key}
        even = next((name for name in EVEN if name in mine), None)
        if even is not None and len(mine) > 1:
            base = needed(mine[even], "us")
            lines[key] = sorted(
                (1 / needed(row, "balancedness"), needed(row, "us") / base, name) for name, row in mine.items()
            )
    if not lines:
        raise ValueError(f"routing: expected a layer with one of {', '.join(EVEN)} and another routing, got none")
    figure = new_figure(theme, 10, 5)
    axes = figure.add_subplot()
    for i, ((layer, tokens), points) in enumerate(lines.items()):
        axes.plot(
            [point[0] for point in points], [point[1] for point in points], marker=MARKERS[i % len(MARKERS)], ms=5,
            lw=1.4, color=theme.series[i % len(theme.series)], label=f"{layer}, {int(tokens):,} tokens",
        )  # fmt: skip
    axes.axhline(1, color=theme.muted, lw=0.9, linestyle="--")
    axes.set_xscale("log")
    most = max(point[0] for points in lines.values() for point in points)
    axes.set_xticks([tick for tick in TICKS if tick <= 1.2 * most], minor=False)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.tick_params(axis="x", which="minor", bottom=False)
    axes.set_xlabel("tokens of the busiest expert over the mean (1: even)")
    axes.set_ylabel("time relative to an even routing")
    axes.set_ylim(bottom=0)
    axes.grid(visible=True)
    figure.legend(loc="outside right upper", fontsize=8.5)
    names = ", ".join(dict.fromkeys(name for points in lines.values() for _, _, name in points))
    about = f"routings: {names}. {where_and_when(rows)}"
    caption(figure, theme, "The same rows, more and more unevenly", about)
    return figure
