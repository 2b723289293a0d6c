"""``cumoe bench --host``: what a call costs the host, which has to be ready before the GPU is."""

import statistics
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

import cumoe
from cumoe.bench.shapes import Shape
from cumoe.bench.timer import Run
from cumoe.door.arrays import cupy

CALLS = 200
BETWEEN_WAITS = 40
"""Calls that are sent off before the host waits for the GPU: a full queue would make it wait inside a call."""


class HostTimes(NamedTuple):
    """Medians in us of host time, from the call to its return; the GPU may not have begun by then."""

    first: float  # of this shape: it decides about kernels and packs their arguments
    call: float  # layer(x)
    into_out: float  # layer(x, out=y)
    residual: float  # layer(x, residual=x, out=y)
    replay: float  # of layer.capture(num_tokens)
    function: float  # cumoe.moe(x, routing, experts, shared), which keeps nothing

    def line(self, name: str, tokens: int) -> str:
        """Return the line that is printed below `HEADER`."""
        return f"{name:<16}  {tokens:>6}" + "".join(f"  {us:>8.1f}" for us in self)


HEADER = f"{'layer':<16}  {'tokens':>6}" + "".join(
    f"  {title:>8}" for title in ("first", "call", "out=", "residual", "replay", "moe()")
)


def median_us(run: Run) -> float:
    """Return the median host time of a call, after a few that do not count."""
    for _ in range(3):
        run()
    times = []
    for number in range(CALLS):
        if number % BETWEEN_WAITS == 0:
            cupy.cuda.get_current_stream().synchronize()
        begin = time.perf_counter_ns()
        run()
        times.append(time.perf_counter_ns() - begin)
    return statistics.median(times) / 1e3


def host_times(layer: cumoe.MoE, x: Any) -> HostTimes:
    """Measure a layer on tokens of CuPy, which it must not have seen before."""
    out = cupy.empty(x.shape, x.dtype)
    logits = cupy.zeros((x.shape[0], layer.num_choices), np.float32)
    routing = cumoe.route(logits, layer.router)
    begin = time.perf_counter_ns()
    layer(x)
    first = (time.perf_counter_ns() - begin) / 1e3
    captured = layer.capture(x.shape[0])
    return HostTimes(
        first,
        median_us(lambda: layer(x)),
        median_us(lambda: layer(x, out=out)),
        median_us(lambda: layer(x, residual=x, out=out)),
        median_us(captured),
        median_us(lambda: cumoe.moe(x, routing, layer.experts, layer.shared, weight_on=layer.weight_on, out=out)),
    )


def host_lines(
    name: str, shape: Shape, experts: cumoe.Experts, shared: Any, num_tokens: tuple[int, ...]
) -> Iterator[str]:
    """Measure a layer of these weights, all of whose tokens choose the same experts; yield a line a batch."""
    weight = cupy.zeros((shape.num_experts, shape.hidden_size), experts.dtype)
    router = cumoe.Router(shape.top_k, scoring=shape.scoring)
    layer = cumoe.MoE(
        router, experts, shared, weight_on=shape.weight_on, router_weight=weight, max_tokens=max(num_tokens)
    )
    for tokens in num_tokens:
        x = cupy.zeros((tokens, shape.hidden_size), experts.dtype)
        layer(x, residual=x)  # kernels are loaded, memory is taken; a call without a residual is of another kind
        yield host_times(layer, x).line(name, tokens)
