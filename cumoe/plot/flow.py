"""How the data flows through a layer, with shapes; needs no file."""

from typing import Any

from cumoe.plot.boxes import Box, Sheet
from cumoe.plot.style import Theme, new_figure

WIDTH, HEIGHT = 10.6, 4.5


def flow(theme: Theme) -> Any:
    """Draw the stages and what goes between them.

    Parameters
    ----------
    theme : Theme

    Returns
    -------
    matplotlib.figure.Figure
    """
    figure = new_figure(theme, WIDTH, HEIGHT)
    sheet = Sheet(figure, theme, WIDTH, HEIGHT)
    routed, shared, order = theme.series[0], theme.series[2], theme.series[1]
    tokens = sheet.box(Box(0.2, 1.6, 1.15, 0.8), "tokens x", "(a, D)")
    logits = sheet.box(Box(1.75, 3.5, 1.5, 0.8), "logits", "x router_weight^T\n(a, E) float32")
    route = sheet.box(Box(3.7, 3.5, 1.9, 0.8), "route", "topk_ids (a, k)\ntopk_weights (a, k)", color=order)
    group = sheet.box(Box(6.05, 3.5, 2.2, 0.8), "group", "permutation (a k)\nexpert_offsets (E + 1)", color=order)
    hidden = sheet.box(Box(3.1, 1.75, 2.2, 0.85), "gate, up, phi", "E experts\nhidden (a k, I)", color=routed)
    rows = sheet.box(Box(6.05, 1.75, 1.7, 0.85), "down", "E experts\nrows (a k, D)", color=routed)
    wide = sheet.box(Box(3.1, 0.55, 2.2, 0.85), "gate, up, phi", "shared experts\nhidden (a, I_s)", color=shared)
    dense = sheet.box(Box(6.05, 0.55, 1.7, 0.85), "down", "shared experts\nrows (a, D)", color=shared)
    combine = sheet.box(Box(8.4, 1.15, 1.1, 0.85), "combine", "float32 sum,\none rounding")
    sheet.frame(Box(2.85, 0.35, 5.15, 2.45), "one launch on Hopper")
    sheet.arrow(tokens.top, (1.75, 3.75), bend=-0.25)
    sheet.arrow(logits.right, route.left)
    sheet.arrow(route.right, group.left)
    sheet.arrow((4.65, 3.5), (4.0, 2.6), color=order)
    sheet.text(4.2, 3.15, "weights w: a factor in an epilogue", ha="right", color=theme.muted, fontsize=8)
    sheet.arrow((7.15, 3.5), (4.75, 2.6), color=order)
    sheet.text(6.75, 3.15, "which rows, which expert", ha="left", color=theme.muted, fontsize=8)
    sheet.arrow((1.35, 2.1), hidden.left, color=routed)
    sheet.text(2.05, 2.42, "read through\nthe permutation", ha="center", fontsize=7.5, color=theme.muted)
    sheet.arrow((1.35, 1.8), wide.left, color=shared)
    sheet.text(1.85, 1.1, "read as\nthey are", ha="center", fontsize=7.5, color=theme.muted)
    sheet.arrow(hidden.right, rows.left, color=routed)
    sheet.arrow(wide.right, dense.left, color=shared)
    sheet.arrow(rows.right, (8.4, 1.75), color=routed)
    sheet.arrow(dense.right, (8.4, 1.4), color=shared)
    sheet.arrow(combine.right, (9.85, 1.575))
    sheet.text(9.92, 1.66, "y", fontsize=10, fontweight="bold")
    sheet.text(9.92, 1.45, "(a, D)", fontsize=8, color=theme.muted)
    return figure
