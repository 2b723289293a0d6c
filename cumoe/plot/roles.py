"""Who does what in a block of the Hopper kernel; needs no file, and is not to scale."""

from typing import Any

from cumoe.plot.boxes import Box, Sheet
from cumoe.plot.style import Theme, new_figure

WIDTH, HEIGHT = 11.0, 4.9
LEFT, LANE, BAR = 3.05, 0.62, 0.42
STAGES = 4
STEP = 0.42  # inches of a stage
STAGES_OF_A_TILE = 6


def roles(theme: Theme) -> Any:
    """Draw a lane a role, two tiles long: plan, weights, tokens, two consumers, report.

    Parameters
    ----------
    theme : Theme

    Returns
    -------
    matplotlib.figure.Figure

    Notes
    -----
    Names and counts are those of the card in kernels/grouped_gemm_wgmma.cuh.
    """
    figure = new_figure(theme, WIDTH, HEIGHT)
    sheet = Sheet(figure, theme, WIDTH, HEIGHT)
    lanes = [
        ("planner", "a warp: which tile, rows, factors", "warpgroup 1"),
        ("weights", "two threads: TMA, a half each", "warpgroup 1"),
        ("tokens", "128 threads: cp.async, or TMA", "warpgroup 0"),
        ("consumer 0", "wgmma, 128 of 256 weight rows", "warpgroup 2"),
        ("consumer 1", "wgmma, the other 128", "warpgroup 3"),
        ("reporter", "a thread: tells the second product", "warpgroup 1"),
    ]
    tops = [HEIGHT - 0.75 - LANE * i for i in range(len(lanes))]
    for (name, what, where), y in zip(lanes, tops, strict=True):
        sheet.text(0.15, y + 0.1, name, fontweight="bold", fontsize=9.5)
        sheet.text(0.15, y - 0.11, f"{what}  ({where})", fontsize=7.5, color=theme.muted)
        sheet.axes.plot([LEFT, WIDTH - 0.2], [y, y], color=theme.faint, lw=0.8, zorder=0)
    first, second = theme.series[0], theme.series[1]
    plan, weights, tokens, zero, one, report = tops
    begin = LEFT + 0.55
    for tile, color in enumerate((first, second)):
        at = begin + tile * STAGES_OF_A_TILE * STEP
        planned = LEFT if tile == 0 else at - 2.1 * STEP
        sheet.bar(Box(planned, plan - BAR / 2, 0.5, BAR), f"tile {tile}", color)
        for k in range(STAGES_OF_A_TILE):
            stage = (tile * STAGES_OF_A_TILE + k) % STAGES
            for y in (weights, tokens):
                sheet.bar(Box(at + k * STEP, y - BAR / 2, STEP - 0.04, BAR), f"s{stage}", color)
        for consumer, (y, late) in enumerate(((zero, 1.2), (one, 1.7))):
            start = at + late * STEP + tile * 0.9 * STEP
            for k in range(STAGES_OF_A_TILE):
                stage = (tile * STAGES_OF_A_TILE + k) % STAGES
                sheet.bar(Box(start + k * STEP, y - BAR / 2, STEP - 0.04, BAR), f"s{stage}", color)
            end = start + STAGES_OF_A_TILE * STEP
            sheet.bar(Box(end, y - BAR / 2, 0.85 * STEP, BAR), "store", theme.series[2])
            if consumer:
                sheet.bar(Box(end + 0.9 * STEP, report - BAR / 2, 0.42, BAR), "done", color)
                sheet.arrow((end + 0.42 * STEP, y - BAR / 2), (end + 0.95 * STEP, report + BAR / 2))
    sheet.arrow((LEFT + 0.3, plan - BAR / 2), (begin + 0.12, weights + BAR / 2))
    sheet.text(LEFT + 0.66, (plan + weights) / 2 + 0.02, "told", fontsize=7.5, color=theme.muted)
    sheet.arrow((begin + 0.3 * STEP, tokens - BAR / 2), (begin + 1.45 * STEP, zero + BAR / 2))
    sheet.text(begin + 0.2 * STEP, (tokens + zero) / 2, "full[s0]", ha="right", fontsize=7.5, color=theme.muted)
    back = begin + 2.2 * STEP
    sheet.arrow((back, zero + BAR / 2), (begin + 4.3 * STEP, tokens - BAR / 2))
    sheet.text(begin + 4.45 * STEP, (tokens + zero) / 2, "empty[s0], by both", fontsize=7.5, color=theme.muted)
    wanted = begin + 4.2 * STEP
    sheet.arrow((wanted, weights + BAR / 2), (wanted + 0.1, plan - BAR / 2))
    sheet.text(wanted + 0.14, (plan + weights) / 2 + 0.02, "wanted", fontsize=7.5, color=theme.muted)
    sheet.text(0.15, HEIGHT - 0.25, "A block of the Hopper kernel: whatever waits for memory has a warp of its own",
               fontsize=12, fontweight="bold")  # fmt: skip
    about = (
        "Time goes to the right, not to scale. s0 to s3 are stages of shared memory: 256 weight rows and the tokens' "
        "rows at 64 inner positions.\nWeights and tokens run ahead across tiles; consumer 1 starts later, so that one "
        "multiplies while the other stores. Producers have 24 or 40 registers, consumers 216 or 224."
    )
    sheet.text(0.15, 0.3, about, fontsize=8, color=theme.muted, linespacing=1.5)
    return figure
