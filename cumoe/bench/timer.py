"""Taking times on a GPU: a stream of its own, a cold L2 cache unless it shall be warm, replay from a CUDA graph."""

import importlib
import statistics
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import numpy as np

from cumoe.door.arrays import cupy

REPEATS = 20
FLUSH_BYTES = 256 << 20  # more than twice the L2 cache of any GPU

Run = Callable[[], Any]
Cache = Literal["cold", "warm"]
Replay = Literal["graph", "torch graph", "launches"]
"""How runs are repeated: captured by CuPy, captured by torch with its own allocator, or launched each time."""


class Times(NamedTuple):
    """us of the repeated runs."""

    us: float  # median
    us_20: float  # 20 % of the runs were faster
    us_80: float  # 80 % of the runs were faster


def times_of(runs: list[float]) -> Times:
    """Return the median and the quantiles of single runs."""
    ordered = sorted(runs)
    last = len(ordered) - 1
    return Times(statistics.median(ordered), ordered[round(0.2 * last)], ordered[round(0.8 * last)])


def free_pool() -> None:
    """Give what no array holds back to the GPU."""
    cupy.get_default_memory_pool().free_all_blocks()


class Timer:
    """Takes times on a stream of its own."""

    def __init__(self) -> None:
        self._stream = cupy.cuda.Stream(non_blocking=True)
        self._flush = cupy.empty(FLUSH_BYTES, np.uint8)

    def times(self, run: Run, replay: Replay = "graph", cache: Cache = "cold") -> Times:
        """Return the times of `REPEATS` runs, after two that do not count."""
        cupy.cuda.Device().synchronize()  # what `run` reads was written on another stream
        if replay == "torch graph":
            return self._of_torch(run)
        pool = cupy.cuda.MemoryPool()  # its own: nothing else may get the memory that the graph writes to
        with self._stream, cupy.cuda.using_allocator(pool.malloc):
            try:
                for _ in range(2):
                    run()
                self._stream.synchronize()
                return self._repeated(self._captured(run) if replay == "graph" else run, cache)
            finally:
                self._stream.synchronize()
                pool.free_all_blocks()

    def us(self, run: Run, replay: Replay = "graph", cache: Cache = "cold") -> float:
        """Return the median alone."""
        return self.times(run, replay, cache).us

    def _captured(self, run: Run) -> Run:
        self._stream.begin_capture()
        try:
            run()
        finally:
            graph = self._stream.end_capture()
        return lambda: graph.launch(self._stream)

    def _of_torch(self, run: Run) -> Times:
        torch: Any = importlib.import_module("torch")  # there is a `run` of torch, so it is imported already
        stream, graph = torch.cuda.ExternalStream(self._stream.ptr), torch.cuda.CUDAGraph()
        with self._stream, torch.cuda.stream(stream), torch.inference_mode():
            for _ in range(2):
                run()
            self._stream.synchronize()
            with torch.cuda.graph(graph, stream=stream):
                run()
            try:
                return self._repeated(graph.replay)
            finally:
                self._stream.synchronize()
                graph.reset()
                torch.cuda.empty_cache()  # CuPy's arrays want that memory

    def _repeated(self, replay: Run, cache: Cache = "cold") -> Times:
        replay()
        return times_of([self._once(replay, cache) for _ in range(REPEATS)])

    def _once(self, run: Run, cache: Cache) -> float:
        begin, end = cupy.cuda.Event(), cupy.cuda.Event()
        if cache == "cold":
            self._flush.fill(1)
        begin.record()
        run()
        end.record()
        end.synchronize()
        return float(cupy.cuda.get_elapsed_time(begin, end)) * 1e3
