"""Time and peak host memory of `cumoe.load` for a layer of DeepSeek-V3's size, beside the disk and the copy to the GPU.

    PYTHONPATH=. python .ci/measure_loading.py

Writes a checkpoint of one layer (256 experts and a shared one, 22.6 GB of random bfloat16), or the largest part of it
for which there are disk, GPU memory and time, into a folder of its own that is removed at the end. Loads it with a cold
and a warm page cache, compares every matrix on the device with what was written, and measures what bounds the time:
reading the files into one buffer, and copying from pinned memory. Without a GPU the layer is loaded into memory.
"""

import argparse
import contextlib
import ctypes
import json
import mmap
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

import cumoe
from cumoe.checkpoint import pieces, read
from cumoe.checkpoint.files import INDEX, read_into
from cumoe.door.arrays import cupy
from cumoe.gpu.compile import gpu_is_there

HIDDEN, WIDTH, NUM_EXPERTS = 7168, 2048, 256
MATRIX_BYTES = 2 * HIDDEN * WIDTH
PARTS = {"gate_proj": (WIDTH, HIDDEN), "up_proj": (WIDTH, HIDDEN), "down_proj": (HIDDEN, WIDTH)}
EXPERTS_A_SHARD = 16
NUM_DISTINCT = 61  # matrices that are written in turn, 1.8 GB: a disk that compresses finds nothing
BLOCK = "model.layers.0.mlp"
SPARE_BYTES = 4 << 30  # of disk and of GPU memory


def say(label: str, text: str) -> None:
    """Print one labelled line now."""
    print(f"{label:<34} {text}", flush=True)


def rate(num_bytes: int, seconds: float) -> str:
    """Return a time and what it makes a second."""
    return f"{seconds:7.2f} s  {num_bytes / seconds / 1e9:6.2f} GB/s"


class Clock:
    """What is left of the time."""

    def __init__(self, seconds: float) -> None:
        self.end = time.monotonic() + seconds

    @property
    def left(self) -> float:
        """Seconds."""
        return self.end - time.monotonic()


class Checkpoint:
    """The files, and which matrix lies where."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        words = np.random.default_rng(0).integers(0, 2**64, NUM_DISTINCT * MATRIX_BYTES // 8, np.uint64)
        self.distinct = words.view(np.uint16).reshape(NUM_DISTINCT, -1)
        self.num_experts, self.files, self.weight_map = 0, [], {}

    @property
    def num_bytes(self) -> int:
        """Size of all files."""
        return sum(file.stat().st_size for file in self.files)

    def matrix(self, expert: int, part: int) -> np.ndarray:
        """Return the bits of a matrix; expert -1 is the shared one."""
        return self.distinct[(3 * (expert + 1) + part) % NUM_DISTINCT]

    def write(self, max_bytes: int, seconds: float) -> None:
        """Write as many experts as there are room and time for, then config.json and the index."""
        clock = Clock(seconds)
        firsts = range(0, NUM_EXPERTS, EXPERTS_A_SHARD)[: max_bytes // (3 * EXPERTS_A_SHARD * MATRIX_BYTES)]

        def write_experts(first: int) -> int:
            if clock.left < 0:
                return 0
            self._write_shard({f"{BLOCK}.experts.{e}": e for e in range(first, first + EXPERTS_A_SHARD)})
            return EXPERTS_A_SHARD

        with ThreadPoolExecutor(4) as pool:  # those that begin too late are the last ones
            self.num_experts = sum(pool.map(write_experts, firsts))
        self._write_shard({f"{BLOCK}.shared_experts": -1})
        router = np.ones((self.num_experts, HIDDEN), np.float32), np.zeros(self.num_experts, np.float32)
        names = (f"{BLOCK}.gate.weight", f"{BLOCK}.gate.e_score_correction_bias")
        self._write_file([(n, "F32", a.shape, a) for n, a in zip(names, router, strict=True)])
        config = {"model_type": "deepseek_v3", "num_experts_per_tok": 8, "n_group": 1, "topk_group": 1}
        (self.folder / "config.json").write_text(json.dumps(config))
        (self.folder / INDEX).write_text(json.dumps({"weight_map": self.weight_map}))

    def _write_shard(self, experts: dict[str, int]) -> None:
        self._write_file(
            [
                (f"{name}.{part}.weight", "BF16", shape, self.matrix(e, i))
                for name, e in experts.items()
                for i, (part, shape) in enumerate(PARTS.items())
            ]
        )

    def _write_file(self, tensors: list[tuple[str, str, tuple[int, ...], np.ndarray]]) -> None:
        header, offset = {}, 0
        for name, dtype, shape, bits in tensors:
            header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [offset, offset + bits.nbytes]}
            offset += bits.nbytes
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        file = self.folder / f"{tensors[0][0]}.safetensors"
        with file.open("wb", buffering=0) as stream:
            stream.write(len(text).to_bytes(8, "little") + text)
            for *_, bits in tensors:
                left = memoryview(bits).cast("B")
                while left:
                    left = left[stream.write(left) :]
            os.fsync(stream.fileno())
        self.files.append(file)
        self.weight_map |= dict.fromkeys(header, file.name)

    def forget(self) -> None:
        """Ask the system to drop the files from its cache."""
        for file in self.files:
            with file.open("rb") as stream:
                os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        with contextlib.suppress(OSError):
            Path("/proc/sys/vm/drop_caches").write_text("1")

    def cached(self) -> str:
        """Return how much of the files is in the system's cache."""
        pages = there = 0
        libc = ctypes.CDLL(None, use_errno=True)
        for file in self.files:
            mapped = np.memmap(file, np.uint8, "r")
            flags = np.zeros(-(-mapped.size // mmap.PAGESIZE), np.uint8)
            address, size = ctypes.c_void_p(mapped.ctypes.data), ctypes.c_size_t(mapped.size)
            if libc.mincore(address, size, ctypes.c_void_p(flags.ctypes.data)):
                return "unknown"
            pages += flags.size
            there += int(np.count_nonzero(flags & 1))
        return f"{100 * there / pages:.0f} %"

    def check(self, layer: Any) -> None:
        """Raise AssertionError unless every matrix of a loaded layer has the bits that were written."""
        xp = cupy if layer.kind.on_gpu else np
        distinct = xp.asarray(self.distinct)
        stacks = [(layer.experts.weights, range(self.num_experts)), (layer.shared[0].weights[0], [-1])]
        for weights, experts in stacks:
            for place, e in enumerate(experts):
                gate_up = weights.w_gate_up[place].view(xp.uint16).reshape(2, -1)
                for i, got in enumerate((*gate_up, weights.w_down[place].view(xp.uint16).reshape(-1))):
                    assert bool((got == distinct[(3 * (e + 1) + i) % NUM_DISTINCT]).all()), f"expert {e}, matrix {i}"


class PeakMemory:
    """The most resident memory of this process in a `with` block, sampled; what a driver pins may not be counted."""

    def __enter__(self) -> "PeakMemory":
        """Begin."""
        self._ended = threading.Event()
        self.before = self.peak = self._resident()
        self._thread = threading.Thread(target=self._sample)
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        """End."""
        self._ended.set()
        self._thread.join()

    def _sample(self) -> None:
        while not self._ended.wait(0.002):
            self.peak = max(self.peak, self._resident())

    @staticmethod
    def _resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE

    @property
    def growth(self) -> str:
        """How far the peak was above what was there before."""
        return f"{(self.peak - self.before) / 2**20:.0f} MiB"


def load(checkpoint: Checkpoint, device: str) -> tuple[float, str, Any]:
    """Return the time of loading, by how much the process's memory grew meanwhile, and the layer."""
    with PeakMemory() as memory:
        begin = time.perf_counter()
        layer = cumoe.load(checkpoint.folder, 0, device=device, progress="none")
        seconds = time.perf_counter() - begin
    return seconds, memory.growth, layer


def give_back() -> None:
    """Free the GPU memory of dropped layers."""
    if gpu_is_there():
        cupy.get_default_memory_pool().free_all_blocks()


def read_files(checkpoint: Checkpoint, num_threads: int, max_bytes: int) -> tuple[int, float]:
    """Read the files piece by piece, each thread into one buffer of its own; return bytes and seconds."""
    todo = iter(list(_spans(checkpoint, max_bytes)))
    lock, total = threading.Lock(), 0

    def work() -> int:
        buffer, done = np.empty(pieces.PIECE_BYTES, np.uint8), 0
        while True:
            with lock:
                file, begin, length = next(todo, (None, 0, 0))
            if file is None:
                return done
            read_into(file, begin, buffer[:length])
            done += length

    begin = time.perf_counter()
    with ThreadPoolExecutor(num_threads) as pool:
        total = sum(reader.result() for reader in [pool.submit(work) for _ in range(num_threads)])
    return total, time.perf_counter() - begin


def _spans(checkpoint: Checkpoint, max_bytes: int) -> Iterator[tuple[Path, int, int]]:
    for file in checkpoint.files:
        size = file.stat().st_size
        for begin in range(0, size, pieces.PIECE_BYTES):
            length = min(pieces.PIECE_BYTES, size - begin)
            max_bytes -= length
            if max_bytes < 0:
                return
            yield file, begin, length


def copy_rates(checkpoint: Checkpoint) -> None:
    """Print what a copy to the GPU makes from pinned memory, and from a mapped file as the driver does it alone."""
    num_bytes = 1 << 28
    memory = np.frombuffer(cupy.cuda.alloc_pinned_memory(num_bytes), np.uint8, num_bytes)
    memory[:] = 1
    device = cupy.empty(num_bytes, np.uint8)
    stream = cupy.cuda.Stream(non_blocking=True)
    best = min(_seconds(lambda: (device.set(memory, stream), stream.synchronize())) for _ in range(5))
    say("pinned memory to the GPU", rate(num_bytes, best))
    file = checkpoint.files[0]
    mapped = np.memmap(file, np.uint8, "r")
    seconds = done = 0
    for begin in range(0, mapped.size - num_bytes, num_bytes):
        part = mapped[begin : begin + num_bytes]
        seconds += _seconds(lambda part=part: device.set(part))
        done += num_bytes
    if done:
        say("mapped file to the GPU, cached", rate(done, seconds))


def _seconds(run: Callable[[], Any]) -> float:
    begin = time.perf_counter()
    run()
    return time.perf_counter() - begin


def measure(checkpoint: Checkpoint, device: str, clock: Clock) -> None:
    """Print all figures; those at the end are left out where the time is up."""
    num_bytes, readers = checkpoint.num_bytes, read.NUM_READERS
    checkpoint.forget()
    say("in the page cache before", checkpoint.cached())
    seconds, growth, layer = load(checkpoint, device)
    say("cumoe.load, cold", f"{rate(num_bytes, seconds)}  host memory +{growth}")
    if device == "gpu":
        say("pinned memory, counted or not", f"{2 * readers * pieces.PIECE_BYTES >> 20} MiB")
    checkpoint.check(layer)
    say("every matrix", "has the bits that were written")
    del layer
    give_back()
    checkpoint.forget()
    say("in the page cache before", checkpoint.cached())
    say(f"disk, {readers} threads", rate(*read_files(checkpoint, readers, num_bytes)))
    say("in the page cache before", checkpoint.cached())
    say(f"page cache, {readers} threads", rate(*read_files(checkpoint, readers, num_bytes)))
    seconds, growth, layer = load(checkpoint, device)
    say("cumoe.load, warm", f"{rate(num_bytes, seconds)}  host memory +{growth}")
    del layer
    give_back()
    if device == "gpu":
        copy_rates(checkpoint)
    for read.NUM_READERS, mebibytes in ((1, 8), (2, 8), (4, 8), (8, 2), (8, 8), (8, 32), (16, 8)):
        if clock.left < 15:
            say("the rest", "is left out: the time is up")
            return
        pieces.PIECE_BYTES = mebibytes << 20
        seconds, growth, layer = load(checkpoint, device)
        say(f"warm, {read.NUM_READERS} threads, {mebibytes} MiB", f"{rate(num_bytes, seconds)}  host memory +{growth}")
        del layer
        give_back()
    for num_threads in (1, 4, 16):
        if clock.left < 10:
            say("the rest", "is left out: the time is up")
            return
        checkpoint.forget()
        part = int(min(num_bytes, 4e9))
        say(f"disk, {num_threads} threads, {part / 1e9:.1f} GB", rate(*read_files(checkpoint, num_threads, part)))


def main() -> None:
    """Write, measure, remove."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path(), help="on the disk to measure (default: where you are)")
    parser.add_argument("--gb", type=float, default=23.0, help="at most (default: %(default)s, the whole layer)")
    parser.add_argument("--seconds", type=float, default=150.0, help="for everything (default: %(default)s)")
    options = parser.parse_args()
    clock = Clock(options.seconds)
    device = "gpu" if gpu_is_there() else "cpu"
    room = min(int(options.gb * 1e9), shutil.disk_usage(options.folder).free - SPARE_BYTES)
    if device == "gpu":
        room = min(room, cupy.cuda.runtime.memGetInfo()[0] - SPARE_BYTES)
    folder = Path(tempfile.mkdtemp(dir=options.folder, prefix="loading-"))
    try:
        checkpoint = Checkpoint(folder)
        seconds = _seconds(lambda: checkpoint.write(room, options.seconds * 0.4))
        if not checkpoint.num_experts:
            raise SystemExit(f"no room for {EXPERTS_A_SHARD} experts, or no time to write them")
        say("written", f"{rate(checkpoint.num_bytes, seconds)}  {checkpoint.num_experts} of {NUM_EXPERTS} experts")
        measure(checkpoint, device, clock)
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
