"""Memory that a layer allocates once and reuses: one block a stream, cut into named arrays."""

import threading
from typing import Any

import numpy as np

from cumoe.data.weights import ExpertWeights, SharedExperts
from cumoe.door.arrays import cupy
from cumoe.gpu import experts, group
from cumoe.gpu.experts import Buffers

ALIGNMENT = 256  # as cudaMalloc gives it: whole cache lines, and any vector load is aligned


def layer_buffers(num_tokens: int, top_k: int, weights: ExpertWeights, shared: tuple[SharedExperts, ...]) -> Buffers:
    """Return name, shape and dtype of all that a forward writes besides its output."""
    wanted = group.buffers(num_tokens, top_k, weights.w_down.shape[0])
    wanted |= experts.buffers(num_tokens, top_k, weights, shared)
    return wanted


def total_bytes(buffers: Buffers) -> int:
    """Return the size of a block that holds all `buffers`."""
    return sum(_padded_bytes(*spec) for spec in buffers.values())


def _padded_bytes(shape: tuple[int, ...], dtype: np.dtype) -> int:
    size = dtype.itemsize
    for length in shape:
        size *= length  # Python integers: no overflow
    return -(-size // ALIGNMENT) * ALIGNMENT


def is_captured() -> bool:
    """Whether the current stream records a graph."""
    stream = cupy.cuda.get_current_stream().ptr
    return bool(stream and cupy.cuda.runtime.streamIsCapturing(stream))


class Workspace:
    """A block of device memory for each (device, stream) that used it; it grows and never shrinks.

    Hold `lock` from `arrays` until the last launch that uses them: two threads on one stream share a block. A block
    that a stream capture has seen is kept as long as the workspace lives, since the graph writes to it; so is what the
    graph reads, and its output.
    """

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self._blocks: dict[tuple[int, int], Any] = {}
        self._captured: dict[int, Any] = {}
        self._held: list[tuple[Any, ...]] = []

    def hold_if_captured(self, *arrays: Any) -> None:
        """Keep arrays as long as the workspace lives if a graph is being recorded, which goes to where they lie."""
        if is_captured():
            self._held.append(arrays)

    def arrays(self, buffers: Buffers, at_least: int = 0) -> dict[str, Any]:
        """Return the named arrays for the current device and stream, uninitialised."""
        size = max(total_bytes(buffers), at_least)
        stream = cupy.cuda.get_current_stream()
        key = (cupy.cuda.runtime.getDevice(), stream.ptr)
        block = self._blocks.get(key)
        if block is None or block.size < size:
            block = self._blocks[key] = cupy.empty(size, np.uint8)
        if is_captured():
            self._captured[block.data.ptr] = block
        arrays, offset = {}, 0
        for name, (shape, dtype) in buffers.items():
            arrays[name] = cupy.ndarray(shape, dtype, memptr=block.data + offset)
            offset += _padded_bytes(shape, dtype)
        return arrays
