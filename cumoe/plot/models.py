"""Bars: what share of the ceiling a layer reaches, beside its baselines, losses included."""

import importlib
from collections.abc import Sequence
from typing import Any

from cumoe.plot.style import Theme, caption, new_figure
from cumoe.plot.table import Row, distinct, needed, number, where_and_when

COLUMNS = ("layer", "tokens", "percent")
LABELS = {
    "best_public": "best public layer",
    "replication": "replication",
    "cublas_loop": "cuBLAS, expert by expert",
    "torch": "torch._grouped_mm",
}
MAX_LAYERS = 11
INSIDE = 25  # per cent: lower bars have their number above them


def percents(row: Row) -> dict[str, float | None]:
    """Return the per cent of the ceiling by series: "cumoe", and each baseline of which there is a column.

    A baseline's own column ``percent_NAME`` counts, else its time ``us_NAME`` against the ceiling of the row, for which
    the row needs ``us``.
    """
    own = needed(row, "percent")
    found: dict[str, float | None] = {"cumoe": own}
    for name in LABELS:
        percent, us = number(row, f"percent_{name}"), number(row, f"us_{name}")
        if percent is None and us is not None:
            percent = own * needed(row, "us") / us
        found[name] = percent
    return found


def models(rows: Sequence[Row], theme: Theme) -> Any:
    """Draw a panel a number of tokens, a group of bars a layer; the number of whoever leads is bold.

    Parameters
    ----------
    rows : sequence of dict
        With the columns `COLUMNS`, and ``percent_NAME``, or ``us`` and ``us_NAME``, of baselines. Of several
        routings the first is drawn.
    theme : Theme

    Returns
    -------
    matplotlib.figure.Figure
    """
    rows = [row for row in rows if row.get("routing") == rows[0].get("routing")]
    layers, tokens = distinct(rows, "layer")[:MAX_LAYERS], distinct(rows, "tokens")
    cells = {(row["layer"], row["tokens"]): percents(row) for row in rows}
    highest = max(value for cell in cells.values() for value in cell.values() if value is not None)
    shown = ["cumoe", *(name for name in LABELS if any(cell[name] is not None for cell in cells.values()))]
    figure = new_figure(theme, 11, 1.1 + 1.35 * len(tokens))
    panels = figure.subplots(len(tokens), 1, sharex=True, squeeze=False)[:, 0]
    width = 0.84 / len(shown)
    for axes, count in zip(panels, tokens, strict=True):
        for i, layer in enumerate(layers):
            cell = cells.get((layer, count))
            if cell is not None:
                _group(axes, theme, i, cell, shown, width)
        axes.set(ylim=(0, max(115, 1.1 * highest)), yticks=(0, 50, 100), xlim=(-0.6, len(layers) - 0.4))
        axes.grid(visible=True, axis="y")
        axes.set_axisbelow(True)
        axes.axhline(100, color=theme.muted, lw=0.9, linestyle="--")
        axes.set_ylabel(f"{int(count):,} token{'s' if count != '1' else ''}", rotation=0, ha="right", va="center")
    panels[-1].set_xticks(range(len(layers)), [broken(layer) for layer in layers], fontsize=8.5)
    patches: Any = importlib.import_module("matplotlib.patches")
    keys = [patches.Patch(color=theme.series[k], label=LABELS.get(name, name)) for k, name in enumerate(shown)]
    figure.legend(handles=keys, loc="outside upper right", ncols=len(shown))
    caption(figure, theme, "Per cent of the ceiling", where_and_when(rows))
    return figure


def broken(name: str) -> str:
    """Return a name on two lines, broken at the hyphen that is nearest to its middle."""
    hyphens = [i for i, letter in enumerate(name) if letter == "-"]
    if not hyphens:
        return name
    at = min(hyphens, key=lambda i: abs(2 * i - len(name)))
    return f"{name[:at]}\n{name[at + 1 :]}"


def _group(axes: Any, theme: Theme, at: int, cell: dict[str, float | None], shown: list[str], width: float) -> None:
    """Draw the bars of a layer side by side; the numbers of those that lead are bold."""
    there = {name: value for name in shown if (value := cell[name]) is not None}
    best = max(there.values())
    for k, (name, value) in enumerate(there.items()):
        x = at + (k - (len(there) - 1) / 2) * width
        axes.bar(x, value, 0.92 * width, color=theme.series[shown.index(name)])
        inside = value > INSIDE
        axes.annotate(
            f"{value:.0f}", (x, value), (0, -2 if inside else 1), textcoords="offset points", ha="center",
            va="top" if inside else "bottom", color=theme.paper if inside else theme.ink,
            fontsize=8 if len(shown) < 4 else 6.5, fontweight="bold" if best - value < 0.5 else "normal",
        )  # fmt: skip
