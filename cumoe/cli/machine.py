"""The two machines that the demo runs on: how each makes numbers, takes the time and counts memory."""

import os
import time
import tracemalloc
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np

import cumoe
from cumoe.cli.refusal import Refusal
from cumoe.door.arrays import cupy
from cumoe.gpu.compile import gpu_is_there, kernel

Run = Callable[[], Any]


class Machine(Protocol):
    """What the demo asks of a machine."""

    xp: Any  # NumPy or CuPy
    name: str
    default_dtype: str
    default_tokens: int
    default_hidden_size: int | None  # None: that of the family
    seconds_to_spend: float  # on timed runs of one candidate

    def max_weights(self, itemsize: int) -> int:
        """Return how many numbers the weights of the demo may have."""

    def to_numpy(self, array: Any) -> np.ndarray:
        """Copy to the host."""

    def seconds(self, run: Run) -> float:
        """Return how long one run takes until its result exists."""

    def peak_bytes(self, run: Run) -> int:
        """Return the most memory that one run holds at a time beyond what was there, its result included."""


class Cpu:
    """NumPy on the host."""

    xp: Any = np
    default_dtype, default_tokens = "float32", 512
    default_hidden_size: int | None = 384
    seconds_to_spend = 0.15

    def __init__(self) -> None:
        self.name = f"CPU with {os.cpu_count()} cores, NumPy {np.__version__}"

    def max_weights(self, itemsize: int) -> int:
        """Return what keeps the demo at about a second; memory is no limit here."""
        return 16_000_000

    def to_numpy(self, array: Any) -> np.ndarray:
        """Return the array itself."""
        return np.asarray(array)

    def seconds(self, run: Run) -> float:
        """Measure with the clock."""
        begin = time.perf_counter()
        run()
        return time.perf_counter() - begin

    def peak_bytes(self, run: Run) -> int:
        """Trace what NumPy allocates."""
        tracemalloc.start()
        try:
            before = tracemalloc.get_traced_memory()[0]
            tracemalloc.reset_peak()
            run()
            return tracemalloc.get_traced_memory()[1] - before
        finally:
            tracemalloc.stop()


class Gpu:
    """CuPy on the current device and stream."""

    xp: Any = cupy
    default_dtype, default_tokens = "bfloat16", 4096
    default_hidden_size: int | None = None
    seconds_to_spend = 0.5

    def __init__(self) -> None:
        found = cumoe.show_config(mode="dicts") or {}
        self.name = f"{found['GPU']}, compute capability {found['Compute capability']}, CuPy {found['CuPy']}"

    def max_weights(self, itemsize: int) -> int:
        """Return what half of the free memory holds."""
        free_bytes, _ = cupy.cuda.runtime.memGetInfo()
        return int(free_bytes // (2 * itemsize))

    def to_numpy(self, array: Any) -> np.ndarray:
        """Copy to the host."""
        return np.asarray(cupy.asnumpy(array))

    def seconds(self, run: Run) -> float:
        """Measure with events on the stream, after everything before has ended."""
        begin, end = cupy.cuda.Event(), cupy.cuda.Event()
        cupy.cuda.get_current_stream().synchronize()
        begin.record()
        run()
        end.record()
        end.synchronize()
        return float(cupy.cuda.get_elapsed_time(begin, end)) / 1e3

    def peak_bytes(self, run: Run) -> int:
        """Allocate from a pool of its own; a pool keeps what it once had, so its size is the peak."""
        pool = cupy.cuda.MemoryPool()
        with cupy.cuda.using_allocator(pool.malloc):
            result = run()
        cupy.cuda.get_current_stream().synchronize()
        size = int(pool.total_bytes())
        del result
        pool.free_all_blocks()
        return size


def choose_machine(device: str) -> tuple[Machine, str]:
    """Return the machine for "auto", "gpu" or "cpu", and why it is not the GPU that was hoped for."""
    if device == "cpu":
        return Cpu(), ""
    trouble = "no CUDA device is there"
    if gpu_is_there():
        try:
            kernel("group_place")
        except RuntimeError as error:
            trouble = " ".join(str(error).split())
        else:
            return Gpu(), ""
    if device == "gpu":
        raise Refusal(f"--device gpu: {trouble}")
    return Cpu(), trouble
