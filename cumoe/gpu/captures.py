"""What a CUDA graph reads and writes: memory that nobody else may get as long as the graph may be launched.

A graph goes to where the arrays of its capture lay, temporary ones among them, whoever has that memory by then. So a
call that is captured keeps all it has used with something that its user keeps: the layer, the weights, or the result.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from cumoe.door.arrays import Kind, cupy

_for_good: list[Any] = []


def captures(stream: int) -> bool:
    """Return whether a stream records a graph."""
    # The null stream cannot be captured, and must not be asked while another one is.
    return bool(stream and cupy.cuda.runtime.streamIsCapturing(stream))


@contextmanager
def kept_if_captured(held: list[Any], kind: Kind, *arrays: Any) -> Iterator[None]:
    """Keep arrays, and all memory that is allocated in the meantime, in `held` if the current stream records a graph.

    The graph will read and write where they lie, conversions on the way in among them.
    """
    if not (kind.on_gpu and captures(cupy.cuda.get_current_stream().ptr)):
        yield
        return
    held.append(arrays)
    allocate: Callable[[int], Any] = cupy.cuda.get_allocator()

    def kept(num_bytes: int) -> Any:
        held.append(allocate(num_bytes))
        return held[-1]

    with cupy.cuda.using_allocator(kept):
        yield


@contextmanager
def kept_by_results(kind: Kind, *arrays: Any) -> Iterator[Callable[[Any], Any]]:
    """Keep the same with every result: yield a function that returns an array on memory which keeps all of it.

    Outside of a capture the function returns what it is given.
    """
    held: list[Any] = []
    with kept_if_captured(held, kind, *arrays):
        yield lambda result: _holding(result, held) if held and result.size else result


def _holding(array: Any, held: list[Any]) -> Any:
    memory = cupy.cuda.UnownedMemory(array.data.ptr, array.nbytes, (array, held), array.device.id)
    return cupy.ndarray(array.shape, array.dtype, cupy.cuda.MemoryPointer(memory, 0), array.strides)


@contextmanager
def kept_for_good(kind: Kind, *arrays: Any) -> Iterator[Callable[[Any], Any]]:
    """Keep the same until the process ends: the result is an array of the user's, which can hold nothing."""
    with kept_if_captured(_for_good, kind, *arrays):
        yield lambda result: result
