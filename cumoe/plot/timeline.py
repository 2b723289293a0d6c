"""The stages of a layer to scale, as a picture and as a trace for chrome://tracing and Perfetto."""

from collections.abc import Sequence
from typing import Any

from cumoe.plot.style import Theme, caption, new_figure
from cumoe.plot.table import Row, needed, number, where_and_when

COLUMNS = ("layer", "tokens", "stage", "us")
"""Of a file with a line a stage, in order. ``begin_us`` says when one begins, else it begins where the one before
ended; ``percent`` says how much of its own roof it reaches."""

MAX_CASES = 6


def cases_of(rows: Sequence[Row]) -> dict[tuple[str, str], list[tuple[str, float, float, float | None]]]:
    """Return (stage, begin in us, us, per cent of its roof) of every stage, by layer and tokens."""
    found: dict[tuple[str, str], list[tuple[str, float, float, float | None]]] = {}
    for row in rows:
        stages = found.setdefault((row["layer"], row["tokens"]), [])
        end = stages[-1][1] + stages[-1][2] if stages else 0.0
        begin = number(row, "begin_us")
        stages.append((row["stage"], end if begin is None else begin, needed(row, "us"), number(row, "percent")))
    return found


def case_name(layer: str, tokens: str) -> str:
    """Return what a case is called."""
    return f"{layer}, {int(tokens):,} token{'' if tokens == '1' else 's'}"


def timeline(rows: Sequence[Row], theme: Theme) -> Any:
    """Draw a panel a layer and number of tokens, a lane a stage, each to the scale of its panel.

    Parameters
    ----------
    rows : sequence of dict
        With the columns `COLUMNS`; the first 6 cases are drawn, from the fourth on in two columns.
    theme : Theme

    Returns
    -------
    matplotlib.figure.Figure
    """
    cases = list(cases_of(rows).items())[:MAX_CASES]
    columns = 1 if len(cases) <= MAX_CASES // 2 else 2
    height = -(-len(cases) // columns)
    lanes = max(len(stages) for _, stages in cases) + 2
    figure = new_figure(theme, 10, 0.8 + 0.3 * height * lanes)
    panels = figure.subplots(height, columns, squeeze=False).T.ravel()
    for axes in panels[len(cases) :]:
        axes.set_axis_off()
    for axes, ((layer, tokens), stages) in zip(panels, cases, strict=False):
        total = max(begin + us for _, begin, us, _ in stages)
        for lane, (_, begin, us, percent) in enumerate(stages):
            axes.barh(lane, us, left=begin, height=0.72, color=theme.series[lane % len(theme.series)])
            text = f"{us:,.1f} us" + (f", {percent:.0f} % of its roof" if percent is not None else "")
            right = begin + us < 0.6 * total  # room for the label behind the bar, else before it or inside
            at = begin + us + 0.01 * total if right else max(begin, 0.01 * total) - 0.01 * total
            inside = not right and begin < 0.4 * total
            axes.text(
                begin + us - 0.01 * total if inside else at, lane, text, va="center", fontsize=8,
                ha="left" if right else "right", color=theme.paper if inside else theme.ink,
            )  # fmt: skip
        axes.set_yticks(range(len(stages)), [stage for stage, *_ in stages])
        axes.set(xlim=(0, total), ylim=(len(stages) - 0.4, -0.6))
        axes.set_title(f"{case_name(layer, tokens)}: {total:,.0f} us", loc="left", fontsize=9.5)
        axes.grid(visible=True, axis="x")
        axes.set_axisbelow(True)
        axes.set_xlabel("us")
    caption(figure, theme, "Where the time goes", where_and_when(rows))
    return figure


def trace(rows: Sequence[Row]) -> dict[str, Any]:
    """Return the stages as a trace: a process a case, a complete event a stage, in us.

    Notes
    -----
    The format is the JSON object of the Trace Event Format that chrome://tracing and Perfetto read.
    """
    events: list[dict[str, Any]] = []
    for process, ((layer, tokens), stages) in enumerate(cases_of(rows).items()):
        name = {"name": case_name(layer, tokens)}
        events.append({"ph": "M", "name": "process_name", "pid": process, "tid": 0, "args": name})
        for stage, begin, us, percent in stages:
            event = {"ph": "X", "name": stage, "pid": process, "tid": 0, "ts": begin, "dur": us}
            events.append(event | ({"args": {"per cent of its roof": percent}} if percent is not None else {}))
    return {"traceEvents": events, "displayTimeUnit": "ns"}
