"""Where a case runs, with memory that is NaN until somebody writes it."""

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import numpy as np
from support import GPU


def poison(array: np.ndarray) -> np.ndarray:
    """Fill with bytes that are NaN in every float type and -1 in every integer type."""
    if array.size:
        array.view(np.uint8).fill(255)
    return array


class Host:
    """NumPy arrays."""

    name = "cpu"
    move = staticmethod(np.copy)
    back = staticmethod(np.copy)
    streams = False
    where = f"CPU, NumPy {np.__version__}"

    @contextlib.contextmanager
    def poisoned(self) -> Iterator[None]:
        """Let every `np.empty` be NaN."""
        empty, empty_like = np.empty, np.empty_like
        with (
            mock.patch.object(np, "empty", lambda *args, **options: poison(empty(*args, **options))),
            mock.patch.object(np, "empty_like", lambda *args, **options: poison(empty_like(*args, **options))),
        ):
            yield

    def poison_layer(self, layer: Any) -> None:
        """Nothing is kept between calls."""


class Device:
    """CuPy arrays; where `cupy` is the stand-in of cuda_on_cpu, all memory is poisoned by itself."""

    name = "gpu"
    move = staticmethod(GPU.asarray)
    back = staticmethod(GPU.asnumpy)

    def __init__(self) -> None:
        import cupy

        self.cupy = cupy
        self.streams = not hasattr(cupy, "num_launches")  # what the stand-in counts
        self.where = "the CUDA sources on the CPU"
        if self.streams:
            self.where = cupy.cuda.runtime.getDeviceProperties(cupy.cuda.Device().id)["name"].decode()
            self.other_stream = cupy.cuda.Stream(non_blocking=True)

    @contextlib.contextmanager
    def poisoned(self) -> Iterator[None]:
        """Let every allocation be NaN when it is handed out."""
        if not self.streams:
            yield
            return
        pool, runtime = self.cupy.get_default_memory_pool(), self.cupy.cuda.runtime

        def allocate(size: int) -> Any:
            block = pool.malloc(size)
            if size:
                runtime.memsetAsync(block.ptr, 255, size, self.cupy.cuda.get_current_stream().ptr)
            return block

        with self.cupy.cuda.using_allocator(allocate):
            yield

    def poison_layer(self, layer: Any) -> None:
        """Fill what a layer keeps between calls, on every stream."""
        for block in layer._workspace._blocks.values():
            block.memory.fill(255)

    @contextlib.contextmanager
    def elsewhere(self) -> Iterator[Any]:
        """Make another stream the current one, and wait for it at the end."""
        self.cupy.cuda.Device().synchronize()
        with self.other_stream:
            yield self.other_stream
        self.other_stream.synchronize()


PLACES = {"cpu": Host, "gpu": Device}
