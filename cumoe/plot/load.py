"""The load of the experts: how many tokens each has, and what tiles make of them."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from cumoe.plot.style import Theme, caption, new_figure

STEP = 8  # rows: the Hopper kernels cut an expert's rows into even runs of multiples of it
TILE = 128  # rows of a tile that is always whole
MAX_PANELS = 6


def padding(tokens_per_expert: np.ndarray, step: int) -> float:
    """Return how many rows are computed for every row that is wanted, less one, in tiles of `step` rows."""
    wanted = int(tokens_per_expert.sum())
    return float((-(-tokens_per_expert // step) * step).sum() / wanted - 1) if wanted else 0.0


def load(loads: Mapping[str, np.ndarray], theme: Theme, about: str) -> Any:
    """Draw a panel a routing: the experts from the busiest on, their mean, and the rows that whole tiles would add.

    Parameters
    ----------
    loads : mapping from str to (num_experts,) array
        tokens_per_expert by the name of the routing; at most 6.
    theme : Theme
    about : str
        Which layer and how many tokens.

    Returns
    -------
    matplotlib.figure.Figure
    """
    shown = list(loads.items())[:MAX_PANELS]
    columns = 2 if len(shown) > 1 else 1
    rows = -(-len(shown) // columns)
    figure = new_figure(theme, 10, 1.2 + 2.6 * rows)
    panels = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes, (name, counts) in zip(panels, shown, strict=False):
        ordered = np.sort(counts)[::-1]
        paid = -(-ordered // TILE) * TILE
        edges = np.arange(ordered.size + 1) - 0.5
        axes.stairs(paid, edges, fill=True, color=theme.faint, label=f"rows that tiles of {TILE} compute")
        axes.stairs(ordered, edges, fill=True, color=theme.series[0], label="tokens of an expert")
        mean, most = ordered.mean(), max(int(ordered.max()), 1)
        axes.axhline(mean, color=theme.series[1], lw=1.3, linestyle="--", label="mean")
        axes.set(xlim=(-0.5, ordered.size - 0.5), ylim=(0, 1.12 * max(int(paid.max()), 1)))
        axes.set_title(
            f"{name}\nbalancedness {mean / most:.2f}; padding {100 * padding(counts, STEP):.0f} % in steps of {STEP}, "
            f"{100 * padding(counts, TILE):.0f} % in tiles of {TILE}",
            loc="left", fontsize=9,
        )  # fmt: skip
        axes.set_xlabel("experts, the busiest first")
        axes.set_ylabel("tokens")
        axes.grid(visible=True, axis="y")
        axes.set_axisbelow(True)
    for axes in panels[len(shown) :]:
        axes.set_visible(False)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper right", ncols=3, fontsize=8.5)
    caption(figure, theme, "Load of the experts", about)
    return figure
