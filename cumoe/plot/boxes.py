"""Boxes with text, and arrows between them, on axes in inches."""

import importlib
from typing import Any, NamedTuple

from cumoe.plot.style import Theme


class Box(NamedTuple):
    """A rectangle, by its lower left corner and its size."""

    x: float
    y: float
    width: float
    height: float

    @property
    def left(self) -> tuple[float, float]:
        """Middle of the left edge."""
        return self.x, self.y + self.height / 2

    @property
    def right(self) -> tuple[float, float]:
        """Middle of the right edge."""
        return self.x + self.width, self.y + self.height / 2

    @property
    def top(self) -> tuple[float, float]:
        """Middle of the upper edge."""
        return self.x + self.width / 2, self.y + self.height

    @property
    def bottom(self) -> tuple[float, float]:
        """Middle of the lower edge."""
        return self.x + self.width / 2, self.y


class Sheet:
    """Axes without ticks on which one unit is an inch."""

    def __init__(self, figure: Any, theme: Theme, width: float, height: float) -> None:
        self._patches: Any = importlib.import_module("matplotlib.patches")
        figure.set_layout_engine("none")
        self.theme, self.axes = theme, figure.add_axes((0, 0, 1, 1))
        self.axes.set(xlim=(0, width), ylim=(0, height))
        self.axes.set_axis_off()

    def box(self, box: Box, title: str, about: str = "", *, color: str = "") -> Box:
        """Draw a box with a title and smaller lines below it; return it."""
        theme = self.theme
        self._outline(box, color or theme.muted, "-")
        x, y = box.x + box.width / 2, box.y + box.height / 2
        lines = about.count("\n") + 1 if about else 0
        lift = 0.075 * lines
        self.axes.text(x, y + lift, title, ha="center", va="center", fontsize=9.5, fontweight="bold", color=theme.ink)
        if about:
            self.axes.text(x, y - 0.1, about, ha="center", va="center", fontsize=8, color=theme.muted, linespacing=1.35)
        return box

    def frame(self, box: Box, text: str) -> None:
        """Draw a dashed line around other boxes, with a text below its lower right corner."""
        self._outline(box, self.theme.muted, "--")
        self.text(box.x + box.width, box.y - 0.14, text, ha="right", color=self.theme.muted)

    def _outline(self, box: Box, color: str, line: str) -> None:
        shape = "round,pad=0,rounding_size=0.06"
        patch = self._patches.FancyBboxPatch(
            (box.x, box.y), box.width, box.height, boxstyle=shape, lw=1.3, edgecolor=color, fill=False, linestyle=line
        )
        self.axes.add_patch(patch)

    def arrow(self, begin: tuple[float, float], end: tuple[float, float], *, color: str = "", bend: float = 0) -> None:
        """Draw an arrow, straight or bent."""
        style = f"arc3,rad={bend}" if bend else "arc3"
        patch = self._patches.FancyArrowPatch(
            begin, end, arrowstyle="-|>", mutation_scale=11, lw=1.3, color=color or self.theme.muted,
            connectionstyle=style, shrinkA=1, shrinkB=1,
        )  # fmt: skip
        self.axes.add_patch(patch)

    def bar(self, box: Box, text: str, color: str) -> None:
        """Draw a filled bar with a short text."""
        self.axes.add_patch(self._patches.Rectangle((box.x, box.y), box.width, box.height, facecolor=color, lw=0))
        self.axes.text(
            box.x + box.width / 2, box.y + box.height / 2, text, ha="center", va="center", fontsize=7.5,
            color=self.theme.paper,
        )  # fmt: skip

    def text(self, x: float, y: float, text: str, **how: Any) -> None:
        """Write."""
        self.axes.text(x, y, text, **({"fontsize": 8.5, "va": "center", "color": self.theme.ink} | how))
