"""How the pictures look: one light and one dark theme, fonts drawn as paths, the same bytes for the same numbers."""

import importlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

ThemeName = Literal["light", "dark"]


@dataclass(frozen=True)
class Theme:
    """Colours; every one is legible on `paper`."""

    paper: str
    ink: str  # text and axes
    muted: str  # text of second rank
    faint: str  # grids and empty boxes
    series: tuple[str, ...]  # the first is cumoe's


THEMES: dict[str, Theme] = {
    "light": Theme(
        "#ffffff",
        "#1f2328",
        "#59636e",
        "#d8dee4",
        ("#0969da", "#bc4c00", "#1a7f37", "#8250df", "#9a6700", "#bf3989", "#0b7a83", "#57606a"),
    ),
    "dark": Theme(
        "#0d1117",
        "#e6edf3",
        "#9198a1",
        "#30363d",
        ("#58a6ff", "#f0883e", "#3fb950", "#bc8cff", "#d29922", "#f778ba", "#39c5cf", "#8b949e"),
    ),
}

MARKERS = "osD^vP*X<>h"


def new_figure(theme: Theme, width: float, height: float) -> Any:
    """Return an empty figure of so many inches.

    Raises
    ------
    ImportError
        If matplotlib is not installed.
    """
    matplotlib: Any = importlib.import_module("matplotlib")
    figures: Any = importlib.import_module("matplotlib.figure")
    matplotlib.rcParams.update(
        {
            "font.size": 9.0,
            "font.family": "DejaVu Sans",  # it comes with matplotlib: the same picture everywhere
            "svg.fonttype": "path",
            "svg.hashsalt": "cumoe",
            "text.color": theme.ink,
            "axes.edgecolor": theme.muted,
            "axes.labelcolor": theme.ink,
            "axes.facecolor": theme.paper,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "xtick.color": theme.muted,
            "ytick.color": theme.muted,
            "xtick.labelcolor": theme.ink,
            "ytick.labelcolor": theme.ink,
            "grid.color": theme.faint,
            "grid.linewidth": 0.7,
            "legend.frameon": False,
            "hatch.linewidth": 0.8,
        }
    )
    return figures.Figure((width, height), facecolor=theme.paper, layout="constrained")


def save(figure: Any, path: Path) -> None:
    """Write a figure in the format of the suffix: .svg, .png or .pdf.

    Raises
    ------
    OSError, ValueError
        If the file cannot be written, or matplotlib knows no such format.
    """
    is_svg = path.suffix == ".svg"
    figure.savefig(path, dpi=160, facecolor=figure.get_facecolor(), metadata={"Date": None} if is_svg else None)
    if is_svg:  # matplotlib ends lines with spaces
        lines = path.read_text(encoding="utf-8").splitlines()
        path.write_text("\n".join(line.rstrip() for line in lines) + "\n", encoding="utf-8")


def caption(figure: Any, theme: Theme, title: str, about: str = "") -> None:
    """Put a title over the figure, and what was measured where below it."""
    figure.suptitle(title, x=0.01, ha="left", fontsize=12, fontweight="bold", color=theme.ink)
    if about:
        figure.supxlabel(about, x=0.01, ha="left", fontsize=8, color=theme.muted)
