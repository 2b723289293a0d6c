"""Recorded calls: the launches of a layer for one shape of call, repeated for arrays that lie elsewhere.

A call of a layer spends its host time on deciding (engines, tiles, grids) and packing (structs, tensor maps), and all
of that depends on nothing but shapes, strides, dtypes and alignments. So the first call of a kind is recorded, and
later ones write the addresses of their arrays into what was packed and launch it.
"""

import ctypes
import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from cumoe.door.arrays import cupy
from cumoe.gpu.driver import Launch
from cumoe.gpu.structs import Place

log = logging.getLogger("cumoe")

_thread = threading.local()


class Tape:
    """The launches of one recorded call, in order.

    Parameters
    ----------
    buffers : dict of str to CuPy array
        Parts of a workspace that the recorded launches write to. They are kept, for later calls write there too.
    **addresses : int
        Where the caller's arrays lie, by the name of the argument; 0 where there is none. Later calls bring others of
        the same shape, strides, dtype and alignment. The weights have to stay where they are.

    Attributes
    ----------
    launches : list of Launch
    allocated_bytes : int
        Memory that the recorded call asked for; where that is not 0, it did work that a tape does not repeat.
    """

    def __init__(self, buffers: dict[str, Any], **addresses: int) -> None:
        self.launches: list[Launch] = []
        self.allocated_bytes = 0
        self._buffers = buffers
        self._names = tuple(addresses)
        self._addresses = tuple(addresses.values())
        self._pointers: list[list[tuple[Any, int]]] = [[] for _ in addresses]
        self._encoded: list[dict[Any, list[memoryview]]] = [{} for _ in addresses]

    def add(self, launch: Launch, places: Sequence[Place]) -> None:
        """Keep a launch; `places` say what in its argument follows the caller's arrays."""
        self.launches.append(launch)
        for place in places:
            number = self._names.index(place.source)
            if place.encode is None:
                pointer = ctypes.c_uint64.from_buffer(launch.argument, place.at)
                self._pointers[number].append((pointer, place.offset))
            else:  # the same map in several places is encoded once
                length = len(place.encode(self._addresses[number] + place.offset))
                key = place.encode, place.offset
                self._encoded[number].setdefault(key, []).append(launch.argument[place.at : place.at + length])

    def play(self, addresses: tuple[int, ...]) -> None:
        """Launch everything on arrays at these addresses, in the order of the arguments; 0 where there is none.

        Raises
        ------
        RuntimeError
            If the driver refuses.
        """
        if addresses != self._addresses:
            self._move(addresses)
        for launch in self.launches:
            if status := launch.call(*launch.arguments):
                launch.retry(status)

    def _move(self, addresses: tuple[int, ...]) -> None:
        before, self._addresses = self._addresses, ()  # equal to nothing, should an encoding fail half-way
        for number, address in enumerate(addresses):
            if before and before[number] == address:
                continue
            for pointer, offset in self._pointers[number]:
                pointer.value = address + offset
            for (encode, offset), memories in self._encoded[number].items():
                encoded = encode(address + offset)
                for memory in memories:
                    memory[:] = encoded
        self._addresses = addresses

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Keep the launches of this thread in the meantime, and count the memory that it allocates."""
        allocate: Callable[[int], Any] = cupy.cuda.get_allocator()

        def counted(num_bytes: int) -> Any:
            self.allocated_bytes += num_bytes
            return allocate(num_bytes)

        _thread.tape = self
        try:
            with cupy.cuda.using_allocator(counted):
                yield
        finally:
            _thread.tape = None
        if self.allocated_bytes:
            log.info("a call that allocates %d bytes between its launches is not recorded", self.allocated_bytes)


def current_tape() -> Tape | None:
    """Return the tape that records this thread's launches, if one does."""
    return getattr(_thread, "tape", None)
