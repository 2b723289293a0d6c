"""``cumoe bench``: the time of published layers, beside what the GPU could do at best."""

import csv
import statistics
import sys
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import numpy as np

import cumoe
from cumoe.cli.files import DTYPES
from cumoe.cli.host import HEADER as HOST_HEADER
from cumoe.cli.host import host_lines
from cumoe.cli.machine import Run, choose_machine
from cumoe.cli.refusal import Refusal
from cumoe.cli.report import print_pair
from cumoe.cli.shapes import HEADER, SHAPES, Case, Roofs, Shape, case
from cumoe.door.arrays import cupy
from cumoe.gpu.compile import num_multiprocessors

REPEATS = 20
FLUSH_BYTES = 256 << 20  # more than twice the L2 cache of any GPU
STREAM_BYTES = 8 << 30  # what the bandwidths are measured with
PRODUCT_SIZE = 8192
CHUNK = 1 << 25  # numbers drawn at a time: an intermediate array takes 128 MiB, and there are at most four
SPARE_BYTES = 3 << 29  # beside the weights: what drawing them takes, and the buffer that flushes the L2 cache

READ_SOURCE = r"""
extern "C" __global__ void read_all(const uint4* data, size_t size, unsigned int* out) {
    const size_t stride = (size_t)gridDim.x * blockDim.x;
    size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    unsigned int found = 0;
    for (; i + 7 * stride < size; i += 8 * stride) {
        uint4 v[8];
        #pragma unroll
        for (int j = 0; j < 8; ++j) v[j] = data[i + j * stride];
        #pragma unroll
        for (int j = 0; j < 8; ++j) found |= v[j].x ^ v[j].y ^ v[j].z ^ v[j].w;
    }
    for (; i < size; i += stride) found |= data[i].x ^ data[i].y ^ data[i].z ^ data[i].w;
    if (found == 1) *out = found;  // never so, but now the loads have to be done
}
"""


def fill(xp: Any, array: Any, seed: int, scale: float) -> Any:
    """Fill an array with normal numbers of that deviation, a chunk at a time; return it.

    Each is an integer hash of its index, put through Box and Muller: cupy.random would need cuRAND.
    """
    flat = array.reshape(-1)
    for number, first in enumerate(range(0, flat.size, CHUNK)):
        size = min(CHUNK, flat.size - first)
        keys = np.random.default_rng((seed, number)).integers(2**32, size=2, dtype=np.uint32)
        radius = _uniform(xp, size, keys[0])
        xp.log(radius, out=radius)
        radius *= np.float32(-2 * scale * scale)
        xp.sqrt(radius, out=radius)
        angle = _uniform(xp, size, keys[1])
        angle *= np.float32(2 * np.pi)
        xp.cos(angle, out=angle)
        angle *= radius
        flat[first : first + size] = angle
    return array


def _uniform(xp: Any, size: int, key: Any) -> Any:
    """Return float32 numbers in (0, 1]."""
    bits = xp.arange(size, dtype=np.uint32)
    bits ^= bits >> np.uint32(16)
    bits *= np.uint32(0x7FEB352D)
    bits += key
    bits ^= bits >> np.uint32(15)
    bits *= np.uint32(0x846CA68B)
    bits ^= bits >> np.uint32(16)
    uniform = bits.astype(np.float32)
    uniform += np.float32(1)
    uniform *= np.float32(2.0**-32)
    return uniform


class Timer:
    """Takes times on a stream of its own, each run with a cold L2 cache."""

    def __init__(self) -> None:
        self._stream = cupy.cuda.Stream(non_blocking=True)
        self._flush = cupy.empty(FLUSH_BYTES, np.uint8)

    def us(self, run: Run, *, as_graph: bool = True) -> float:
        """Return the median of `REPEATS` runs, replayed from a CUDA graph unless `run` cannot be captured."""
        cupy.cuda.Device().synchronize()  # what `run` reads was written on another stream
        pool = cupy.cuda.MemoryPool()  # its own: nothing else may get the memory that the graph writes to
        with self._stream, cupy.cuda.using_allocator(pool.malloc):
            try:
                for _ in range(2):
                    run()
                self._stream.synchronize()
                replay = self._captured(run) if as_graph else run
                replay()
                return statistics.median([self._once(replay) for _ in range(REPEATS)])
            finally:
                self._stream.synchronize()
                pool.free_all_blocks()

    def _captured(self, run: Run) -> Callable[[], Any]:
        self._stream.begin_capture()
        try:
            run()
        finally:
            graph = self._stream.end_capture()
        return lambda: graph.launch(self._stream)

    def _once(self, run: Run) -> float:
        begin, end = cupy.cuda.Event(), cupy.cuda.Event()
        self._flush.fill(1)
        begin.record()
        run()
        end.record()
        end.synchronize()
        return float(cupy.cuda.get_elapsed_time(begin, end)) * 1e3


def measure_roofs(timer: Timer, dtype: Any) -> Roofs:
    """Measure a matrix product and the bandwidths.

    Raises
    ------
    Refusal
        If cuBLAS is not installed.
    """
    a, b, c = (fill(cupy, cupy.empty((PRODUCT_SIZE, PRODUCT_SIZE), dtype), seed, 1.0) for seed in range(3))
    try:
        product = timer.us(lambda: cupy.matmul(a, b, out=c), as_graph=False)  # CuPy does not let cuBLAS be captured
    except ImportError as error:
        reason = " ".join(str(error).split())
        raise Refusal(f"the ceiling needs cuBLAS, pip install nvidia-cublas-cu12 brings it: {reason}") from None
    free_pool()
    num_bytes = min(STREAM_BYTES, cupy.cuda.runtime.memGetInfo()[0] // 2) // 32 * 32
    data = fill(cupy, cupy.empty(num_bytes // 2, dtype), 3, 1.0).view(np.uint8)
    half, other = data[: num_bytes // 2], data[num_bytes // 2 :]
    copy = timer.us(lambda: other.data.copy_from_device_async(half.data, half.nbytes), as_graph=False)
    kernel, out = cupy.RawKernel(READ_SOURCE, "read_all"), cupy.zeros(1, np.uint32)
    grid = (8 * num_multiprocessors(cupy.cuda.Device().id),)
    read = timer.us(lambda: kernel(grid, (256,), (data, np.uint64(num_bytes // 16), out)))
    return Roofs(2e6 * PRODUCT_SIZE**3 / product, 1e6 * num_bytes / copy, 1e6 * num_bytes / read)


def free_pool() -> None:
    """Give what no array holds back to the GPU."""
    cupy.get_default_memory_pool().free_all_blocks()


def bench(options: Namespace) -> int:
    """Print a line a layer and number of tokens; return 0.

    Raises
    ------
    Refusal
        If there is no GPU that the kernels run on, no cuBLAS, or the CSV file cannot be written.
    """
    machine, trouble = choose_machine("auto")
    if trouble:
        raise Refusal(trouble)
    if options.host:
        return _bench_host(options, machine.name)
    with ExitStack() as stack:
        file = None
        if options.csv is not None:
            try:
                file = stack.enter_context(options.csv.open("w", newline="", encoding="utf-8", buffering=1))
            except OSError as error:
                raise Refusal(f"--csv {options.csv}: {error.strerror or error}") from None
            csv.writer(file).writerow(Case._fields)
        timer = Timer()
        roofs = _print_head(timer, machine.name, options.dtype)
        for name in options.layers:
            for found in _cases(name, options, timer, roofs):
                print(found.line(), flush=True)
                if file is not None:
                    csv.writer(file).writerow(found.row())
    return 0


def _bench_host(options: Namespace, device: str) -> int:
    """Print what calls cost the host, a line a layer and number of tokens; return 0."""
    print_pair("device", device)
    print_pair("layers", f"{options.dtype}; us of host time, medians")
    print(HOST_HEADER, flush=True)
    for name in options.layers:
        if not _fits(name):
            continue
        # No name holds the weights: they are gone before the next layer's are drawn.
        for line in host_lines(
            name, SHAPES[name], *draw_weights(SHAPES[name], DTYPES[options.dtype]), tuple(options.tokens)
        ):
            print(line, flush=True)
    return 0


def _fits(name: str) -> bool:
    """Return whether the weights of a layer fit into the free memory; say so where they do not."""
    free_pool()
    free_bytes, needed = cupy.cuda.runtime.memGetInfo()[0], SHAPES[name].weight_bytes(SHAPES[name].num_experts)
    if needed + SPARE_BYTES > free_bytes:
        sizes = f"its weights take {needed / 2**30:.1f} GiB, and {free_bytes / 2**30:.1f} GiB are free"
        print(f"{name:<16}  skipped: {sizes}", flush=True)
    return bool(needed + SPARE_BYTES <= free_bytes)


def _print_head(timer: Timer, device: str, dtype: str) -> Roofs:
    """Print what the numbers were taken on and the roofs, then the header of the table; return the roofs."""
    runtime = cupy.cuda.runtime
    versions = [f"{v // 1000}.{v % 1000 // 10}" for v in (runtime.driverGetVersion(), runtime.runtimeGetVersion())]
    print_pair("device", device)
    print_pair("CUDA", f"driver {versions[0]}, runtime {versions[1]}")
    sys.stdout.flush()
    roofs = measure_roofs(timer, DTYPES[dtype])
    print_pair("product", f"{roofs.product / 1e12:.0f} TFLOP/s: {PRODUCT_SIZE}^3 in {dtype} through cuBLAS")
    print_pair("copy", f"{roofs.copy / 1e12:.2f} TB/s, read and written")
    print_pair("read", f"{roofs.read / 1e12:.2f} TB/s, nothing written")
    print_pair("layers", f"{dtype}; times in us, median of {REPEATS} with a cold L2 cache; TB/s of distinct weights")
    print(HEADER, flush=True)
    return roofs


def _cases(name: str, options: Namespace, timer: Timer, roofs: Roofs) -> Iterator[Case]:
    """Measure a layer; say so where there is too little memory for it, or for some number of tokens."""
    shape, dtype = SHAPES[name], DTYPES[options.dtype]
    weight_on = options.weight_on or shape.weight_on
    if not _fits(name):
        return
    experts, shared = draw_weights(shape, dtype)
    for tokens in options.tokens:
        free_pool()
        try:
            hit, times = _measure(shape, experts, shared, tokens, weight_on, timer)
        except MemoryError:
            print(f"{name:<16}  {tokens:>6}  skipped: not enough memory beside the weights", flush=True)
            continue
        yield case(name, shape, tokens, (options.dtype, weight_on), hit, times, roofs)


def draw_weights(shape: Shape, dtype: Any) -> tuple[cumoe.Experts, cumoe.SharedExperts | None]:
    """Return weights with which activations stay near 1."""

    def projections(num: int, width: int, seed: int) -> tuple[Any, Any]:
        hidden = shape.hidden_size
        gate_up, down = cupy.empty((num, 2 * width, hidden), dtype), cupy.empty((num, hidden, width), dtype)
        return fill(cupy, gate_up, seed, hidden**-0.5), fill(cupy, down, seed + 1, width**-0.5)

    experts = cumoe.Experts(*projections(shape.num_experts, shape.intermediate_size, 0))
    if not shape.shared_width:
        return experts, None
    return experts, cumoe.SharedExperts(*projections(shape.num_shared, shape.shared_size, 2))


def _measure(
    shape: Shape, experts: cumoe.Experts, shared: Any, tokens: int, weight_on: Any, timer: Timer
) -> tuple[int, tuple[float, float | None]]:
    """Return how many experts are hit, and the us; those on the output too where the weights are on the input."""
    x = fill(cupy, cupy.empty((tokens, shape.hidden_size), experts.dtype), 4, 1.0)
    y = cupy.empty_like(x)
    logits = np.random.default_rng(tokens).standard_normal((tokens, shape.num_experts), np.float32)
    routing = cumoe.route(cupy.asarray(logits), cumoe.Router(shape.top_k, scoring=shape.scoring))
    hit = np.unique(cupy.asnumpy(routing.topk_ids)).size
    free_pool()

    def us(where: Any) -> float:
        return timer.us(lambda: cumoe.moe(x, routing, experts, shared, weight_on=where, out=y))

    return hit, (us(weight_on), us("output") if weight_on == "input" else None)
