"""``cumoe bench``: the time of published layers, beside what the GPU could do at best and what others take."""

import csv
import sys
from argparse import Namespace
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any, NamedTuple

from cumoe.bench.baselines import out_of_memory, run_of
from cumoe.bench.case import HEADER, Case, Measured, case_of
from cumoe.bench.circumstances import circumstances, clocks_now, cuda_version
from cumoe.bench.distributions import Distribution
from cumoe.bench.draw import Weights
from cumoe.bench.problem import Problem
from cumoe.bench.roofs import PRODUCT_SIZE, Roofs, measure_roofs
from cumoe.bench.shapes import SHAPES
from cumoe.bench.timer import REPEATS, Timer, free_pool
from cumoe.cli.files import DTYPES
from cumoe.cli.host import HEADER as HOST_HEADER
from cumoe.cli.host import host_lines
from cumoe.cli.machine import choose_machine
from cumoe.cli.progress import say, with_progress
from cumoe.cli.refusal import Refusal
from cumoe.cli.report import print_pair
from cumoe.cli.stages import bench_stages
from cumoe.door.arrays import cupy

SPARE_BYTES = 3 << 29  # beside the weights: what drawing them takes, and the buffer that flushes the L2 cache


class Job(NamedTuple):
    """A layer with everything that is measured with one drawing of its weights."""

    layer: str
    distribution: Distribution
    tokens: int


def bench(options: Namespace) -> int:
    """Print a line a layer, routing and number of tokens; return 0.

    Raises
    ------
    Refusal
        If there is no GPU that the kernels run on, no cuBLAS, a routing cannot be read or does not fit a layer, or the
        CSV file cannot be written.
    """
    distributions = _distributions(options)
    machine, trouble = choose_machine("auto")
    if trouble:
        raise Refusal(f"{trouble}; python -m cumoe doctor tells what is missing")
    if options.host:
        return _bench_host(options, machine.name)
    with ExitStack() as stack:
        file = None
        if options.csv is not None:
            try:
                file = stack.enter_context(options.csv.open("w", newline="", encoding="utf-8", buffering=1))
            except OSError as error:
                raise Refusal(f"--csv {options.csv}: {error.strerror or error}") from None
        if options.stages:
            return bench_stages(options, machine.name, lambda name: _weights(name, DTYPES[options.dtype]), file)
        timer = Timer()
        roofs = _print_head(timer, machine.name, options.dtype)
        around = circumstances(machine.name, roofs)
        if file is not None:
            csv.writer(file).writerow([*Case._fields, *around])
        jobs = [Job(layer, d, tokens) for layer in options.layers for d in distributions for tokens in options.tokens]
        for found in _cases(jobs, options, timer, roofs):
            say(found.line())
            if file is not None:
                csv.writer(file).writerow([*found.row(), *around.values()])
    return 0


def _bench_host(options: Namespace, device: str) -> int:
    """Print what calls cost the host, a line a layer and number of tokens; return 0."""
    print_pair("device", device)
    print_pair("layers", f"{options.dtype}; us of host time, medians")
    print(HOST_HEADER, flush=True)
    for name in options.layers:
        weights = _weights(name, DTYPES[options.dtype])
        if weights is not None:
            for line in host_lines(name, SHAPES[name], weights.experts, weights.shared, tuple(options.tokens)):
                print(line, flush=True)
            del weights  # they are gone before the next layer's are drawn
    return 0


def _distributions(options: Namespace) -> list[Distribution]:
    try:
        found = [Distribution(name) for name in options.routing]
        for layer in options.layers:
            for each in found:
                each.check(SHAPES[layer])
    except ValueError as error:
        raise Refusal(f"--routing: {error}") from None
    return found


def _print_head(timer: Timer, device: str, dtype: str) -> Roofs:
    """Print what the numbers were taken on and the roofs, then the header of the table; return the roofs."""
    runtime = cupy.cuda.runtime
    driver, toolkit = map(cuda_version, (runtime.driverGetVersion(), runtime.runtimeGetVersion()))
    print_pair("device", device)
    print_pair("CUDA", f"driver {driver}, runtime {toolkit}")
    sys.stdout.flush()
    try:
        roofs = measure_roofs(timer, DTYPES[dtype])
    except ImportError as error:
        raise Refusal(str(error)) from None
    print_pair("product", f"{roofs.product / 1e12:.0f} TFLOP/s: {PRODUCT_SIZE}^3 in {dtype} through cuBLAS")
    print_pair("copy", f"{roofs.copy / 1e12:.2f} TB/s, read and written")
    print_pair("read", f"{roofs.read / 1e12:.2f} TB/s, nothing written")
    print_pair("layers", f"{dtype}; times in us, median of {REPEATS} with a cold L2 cache; TB/s of distinct weights")
    print_pair("baselines", "how many times as long they take; copies: replication of the tokens, where it applies")
    print(HEADER, flush=True)
    return roofs


def _cases(jobs: list[Job], options: Namespace, timer: Timer, roofs: Roofs) -> Iterator[Case]:
    """Measure the jobs; say so where there is too little memory for a layer, or for some number of tokens."""
    weights, drawn = None, ""
    for job in with_progress(jobs, "case"):
        if job.layer != drawn:
            weights, drawn = None, job.layer  # the old ones are freed before the new ones are drawn
            weights = _weights(job.layer, DTYPES[options.dtype])
        if weights is None:
            continue
        try:
            found = _case(job, weights, options, timer, roofs)
        except MemoryError:
            say(f"{job.layer:<16}  {job.tokens:>6}  skipped: not enough memory beside the weights")
            continue
        yield found


def _case(job: Job, weights: Weights, options: Namespace, timer: Timer, roofs: Roofs) -> Case:
    free_pool()
    shape = SHAPES[job.layer]
    weight_on = options.weight_on or shape.weight_on
    problem = Problem(cupy, shape, weights, job.tokens, weight_on, job.distribution)
    return case_of(job.layer, problem, measure(problem, timer, options.baselines), roofs, job.distribution.name)


def _weights(layer: str, dtype: Any) -> Weights | None:
    """Return the weights of a layer, or None, which is told, where they do not fit into the memory that is free."""
    free_pool()
    shape = SHAPES[layer]
    free_bytes, needed = cupy.cuda.runtime.memGetInfo()[0], shape.weight_bytes(shape.num_experts)
    if needed + SPARE_BYTES > free_bytes:
        sizes = f"its weights take {needed / 2**30:.1f} GiB, and {free_bytes / 2**30:.1f} GiB are free"
        say(f"{layer:<16}  skipped: {sizes}")
        return None
    return Weights(cupy, shape, dtype)


def measure(problem: Problem, timer: Timer, baselines: list[str]) -> Measured:
    """Take the times of a problem and of those baselines that can compute it."""
    free_pool()
    ours = timer.times(problem.run)
    clocks = clocks_now()
    on_output = timer.us(lambda: problem.run("output")) if problem.weight_on == "input" else None
    return Measured(ours, on_output, {name: _baseline_us(name, problem, timer) for name in baselines}, clocks)


def _baseline_us(name: str, problem: Problem, timer: Timer) -> float | None:
    free_pool()
    try:
        found = run_of(name, problem)
        return None if found is None else timer.us(*found)
    except Exception as error:
        if out_of_memory(error):
            return None
        raise
