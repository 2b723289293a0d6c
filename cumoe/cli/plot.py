"""``cumoe plot``: pictures from the files of the benchmark, and a trace of the stages."""

import importlib.util
import json
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

import cumoe
from cumoe.bench.distributions import Distribution
from cumoe.bench.shapes import SHAPES
from cumoe.cli.refusal import Refusal
from cumoe.cli.report import print_pair
from cumoe.plot import flow, imbalance, load, models, roles, roofline, timeline
from cumoe.plot.style import THEMES, Theme, save
from cumoe.plot.table import read_rows

FROM_FILES: dict[str, tuple[Callable[[list[dict[str, str]], Theme], Any], tuple[str, ...]]] = {
    "roofline": (roofline.roofline, roofline.COLUMNS),
    "models": (models.models, models.COLUMNS),
    "imbalance": (imbalance.imbalance, imbalance.COLUMNS),
    "timeline": (timeline.timeline, timeline.COLUMNS),
}
DRAWN: dict[str, Callable[[Theme], Any]] = {"flow": flow.flow, "roles": roles.roles}
KINDS = (*FROM_FILES, "load", *DRAWN)
SUFFIXES = (".svg", ".png", ".pdf")


def plot(options: Namespace) -> int:
    """Write a picture, one file a theme, or a trace; return 0.

    Raises
    ------
    Refusal
        If an option is missing or has no effect, a file cannot be read or written, or matplotlib is not installed.
    """
    rows: list[dict[str, str]] = []
    if options.kind in FROM_FILES:
        if not options.csv:
            raise Refusal(f"--csv: expected the files that {options.kind} is drawn from, got none")
        rows = _refusing(read_rows, options.csv, FROM_FILES[options.kind][1])
    elif options.csv:
        raise Refusal(f"--csv: expected no file for {options.kind}, got {options.csv[0]}")
    if options.trace is not None:
        if options.kind != "timeline":
            raise Refusal(f"--trace: expected the timeline with it, got {options.kind}")
        _refusing(options.trace.write_text, json.dumps(_refusing(timeline.trace, rows)))
        print_pair("saved", str(options.trace))
        if options.output is None:
            return 0
    if options.output is None or options.output.suffix not in SUFFIXES:
        raise Refusal(f"--output: expected a file that ends in {', '.join(SUFFIXES)}, got {options.output}")
    if importlib.util.find_spec("matplotlib") is None:
        raise Refusal("pictures need matplotlib: pip install matplotlib")
    for name in options.theme:
        path = themed(options.output, name, len(options.theme))
        _refusing(save, _refusing(_draw, options, rows, THEMES[name]), path)
        print_pair("saved", str(path))
    return 0


def themed(path: Path, theme: str, num_themes: int) -> Path:
    """Return the path of a theme's file: the name itself, or with the theme in it where there are several."""
    return path if num_themes == 1 else path.with_stem(f"{path.stem}-{theme}")


def _draw(options: Namespace, rows: list[dict[str, str]], theme: Theme) -> Any:
    if options.kind in FROM_FILES:
        return FROM_FILES[options.kind][0](rows, theme)
    if options.kind in DRAWN:
        return DRAWN[options.kind](theme)
    shape, loads = SHAPES[options.layer], {}
    for name in options.routing[: load.MAX_PANELS]:
        distribution = Distribution(name)
        distribution.check(shape)
        routing = distribution.routing(np, shape, options.tokens)
        loads[name] = cumoe.expert_load(routing, shape.num_experts).tokens_per_expert
    about = f"{options.layer}: {options.tokens:,} tokens, {shape.top_k} of {shape.num_experts} experts a token"
    return load.load(loads, theme, about)


def _refusing(call: Callable[..., Any], *arguments: Any) -> Any:
    """Call; turn what is wrong with a file or its cells into a refusal of one line."""
    try:
        return call(*arguments)
    except OSError as error:
        raise Refusal(f"{error.filename}: {error.strerror or error}") from None
    except ValueError as error:
        raise Refusal(" ".join(str(error).split())) from None
