"""From files to a GPU: every reader thread has two buffers, so that it reads the next piece while one is copied."""

import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from itertools import cycle
from typing import Any

import numpy as np

from cumoe.checkpoint.files import read_into
from cumoe.checkpoint.pieces import Piece, Put
from cumoe.door.arrays import cupy

log = logging.getLogger("cumoe")


def upload(max_bytes: int) -> Callable[[], AbstractContextManager[Put]]:
    """Return what gives a reader thread its way to the current GPU, for pieces of up to `max_bytes`.

    Pieces go through pinned host memory on a stream of the thread's own, behind all that the caller's current stream
    was given before, since arrays from a pool may still be in use there. Pieces that become wider travel as they are
    and are converted on the GPU. When the context ends all pieces of the thread have arrived.
    """
    device = cupy.cuda.Device().id
    ready = cupy.cuda.get_current_stream().record()

    @contextmanager
    def putter() -> Iterator[Put]:
        with cupy.cuda.Device(device), cupy.cuda.Stream(non_blocking=True) as stream:
            stream.wait_event(ready)
            buffers = [(host_buffer(max_bytes), cupy.cuda.Event(block=True, disable_timing=True)) for _ in range(2)]
            turns = cycle(buffers)

            def put(piece: Piece) -> None:
                buffer, was_copied = next(turns)
                was_copied.synchronize()  # an event that was never recorded does not wait
                memory = buffer[: piece.num_bytes]
                read_into(piece.file, piece.begin, memory)
                _send(memory, piece, stream)
                was_copied.record(stream)

            try:
                yield put
            finally:
                stream.synchronize()

    return putter


def _send(memory: np.ndarray, piece: Piece, stream: Any) -> None:
    """Copy a piece to its place in the order of the stream, which is the current one."""
    target = piece.target
    arrived = target if target.dtype == piece.dtype else cupy.empty(target.shape, piece.dtype)
    to_device = cupy.cuda.runtime.memcpyHostToDevice
    cupy.cuda.runtime.memcpyAsync(arrived.data.ptr, memory.ctypes.data, memory.nbytes, to_device, stream.ptr)
    if arrived is not target:
        target[...] = arrived


def host_buffer(num_bytes: int) -> np.ndarray:
    """Return pinned host memory, or plain memory, which the driver copies once more, where the system gives none."""
    try:
        memory = cupy.cuda.PinnedMemoryPointer(cupy.cuda.PinnedMemory(num_bytes), 0)
    except cupy.cuda.runtime.CUDARuntimeError as error:
        log.info("no pinned memory (%s): copies to the GPU go through the driver's own", error)
        return np.empty(num_bytes, np.uint8)
    return np.frombuffer(memory, np.uint8, num_bytes)
