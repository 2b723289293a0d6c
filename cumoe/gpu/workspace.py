"""Memory that a layer allocates once and reuses: one block a stream, cut into named arrays."""

import threading
from collections import OrderedDict
from collections.abc import Hashable
from typing import Any

import numpy as np

from cumoe.data.weights import ExpertWeights, SharedExperts
from cumoe.door.arrays import cupy
from cumoe.gpu import experts, group
from cumoe.gpu.captures import captures
from cumoe.gpu.experts import Buffers
from cumoe.gpu.tape import Tape

ALIGNMENT = 256  # as cudaMalloc gives it: whole cache lines, and any vector load is aligned
MAX_TAPES = 64  # of a block; a tape is some 10 to 30 KB on the host


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


class Block:
    """Memory for the calls of one stream, and what was recorded of calls that use it."""

    def __init__(self, num_bytes: int) -> None:
        self.memory = cupy.empty(num_bytes, np.uint8)
        self._tapes: OrderedDict[Hashable, Tape] = OrderedDict()

    def arrays(self, buffers: Buffers) -> dict[str, Any]:
        """Return the named arrays, uninitialised."""
        arrays, offset = {}, 0
        for name, (shape, dtype) in buffers.items():
            arrays[name] = cupy.ndarray(shape, dtype, memptr=self.memory.data + offset)
            offset += _padded_bytes(shape, dtype)
        return arrays

    def tape(self, key: Hashable) -> Tape | None:
        """Return what was recorded of a call of this kind; None if nothing was, or it was long ago."""
        tape = self._tapes.get(key)
        if tape is not None:
            self._tapes.move_to_end(key)
        return tape

    def keep(self, key: Hashable, tape: Tape) -> None:
        """Keep a tape in place of the one that was used least recently."""
        self._tapes[key] = tape
        if len(self._tapes) > MAX_TAPES:
            self._tapes.popitem(last=False)

    def forget(self) -> None:
        """Drop all tapes."""
        self._tapes.clear()


class Workspace:
    """A block of device memory for each (device, stream) that used it; it grows and never shrinks.

    Hold `lock` from `block` until the last launch that uses it: two threads on one stream share a block. A block that
    a stream capture has seen is kept as long as the workspace lives, since the graph writes to it; so is what the graph
    reads, and its output.

    Parameters
    ----------
    reserved_bytes : int
        What every block has at least.
    """

    def __init__(self, reserved_bytes: int = 0) -> None:
        self.reserved_bytes = reserved_bytes
        self.lock = threading.Lock()
        self._blocks: dict[tuple[int, int], Block] = {}
        self._captured: dict[int, Block] = {}
        self.held: list[Any] = []

    def hold_if_captured(self, stream: int, *arrays: Any) -> None:
        """Keep arrays as long as the workspace lives if the stream records a graph, which goes to where they lie."""
        if captures(stream):
            self.held.append(arrays)

    def block(self, device_id: int, stream: int, num_bytes: int = 0) -> Block | None:
        """Return the block of a device and stream if it has at least so many bytes."""
        block = self._blocks.get((device_id, stream))
        if block is None or block.memory.size < num_bytes:
            return None
        if captures(stream):
            self._captured[block.memory.data.ptr] = block
        return block

    def grown(self, device_id: int, stream: int, num_bytes: int) -> Block:
        """Return the block of a device and stream, a new one where it has fewer bytes."""
        block = self.block(device_id, stream, num_bytes)
        if block is None:
            self._blocks[device_id, stream] = Block(max(num_bytes, self.reserved_bytes))
            block = self.block(device_id, stream)
            assert block is not None
        return block

    def forget_tapes(self) -> None:
        """Drop what was recorded, since the weights or the routing of the layer are others."""
        with self.lock:
            for block in self._blocks.values():
                block.forget()
