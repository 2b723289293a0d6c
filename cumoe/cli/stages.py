"""``cumoe bench --stages``: where the time of a layer goes."""

import csv
from argparse import Namespace
from collections.abc import Callable
from typing import Any

from cumoe.bench.circumstances import circumstances
from cumoe.bench.draw import Weights
from cumoe.bench.roofs import Roofs
from cumoe.bench.shapes import SHAPES
from cumoe.bench.stages import HEADER, StageTimes, stage_times
from cumoe.bench.timer import REPEATS, Timer, free_pool
from cumoe.cli.progress import say, with_progress
from cumoe.cli.report import print_pair

TIMELINE = ("router GEMM", "route + group", "experts", "combine")
"""What a file holds: stages that follow each other; the picture `timeline` is drawn from it."""


def bench_stages(options: Namespace, device: str, weights_of: Callable[[str], Weights | None], file: Any) -> int:
    """Print a line a layer, number of tokens and stage; return 0. `weights_of` draws the weights of a layer."""
    print_pair("device", device)
    print_pair("stages", f"{options.dtype}; us, medians of {REPEATS} graph replays; 'nothing' is an empty kernel")
    print(HEADER, flush=True)
    timer = Timer()
    around = circumstances(device, Roofs(0.0, 0.0, 0.0))
    if file is not None:
        csv.writer(file).writerow([*StageTimes._fields, *around])
    for name in with_progress(list(options.layers), "layer"):
        weights = weights_of(name)
        if weights is None:
            continue
        for tokens in options.tokens:
            for found in stage_times(name, SHAPES[name], weights, tokens, timer):
                say(found.line())
                if file is not None and found.stage in TIMELINE:
                    csv.writer(file).writerow([*found, *around.values()])
            free_pool()
        del weights  # they are gone before the next layer's are drawn
    return 0
