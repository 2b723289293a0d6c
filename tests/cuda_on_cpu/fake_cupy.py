"""What the package and its GPU tests use of CuPy and of the driver, in host memory with kernels of the CPU library.

An array is no NumPy array and does not become one by accident. Its memory is exactly as long as its elements, so that
AddressSanitizer sees what runs over it, and begins as 0xff bytes, which are NaN. A stream runs a kernel when it is
launched, or keeps it while it is captured; a graph runs what its stream has kept.
"""

import ctypes
import itertools
import os
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from types import SimpleNamespace
from typing import Any

import numpy as np

LIBRARY = "CUMOE_CUDA_ON_CPU"
"""The environment variable that says where the library lies."""

NUM_MULTIPROCESSORS = 3
"""Few, so that persistent blocks take several tiles and grids have several waves."""

DEFAULT_SHARED_BYTES, MAX_SHARED_BYTES = 48 << 10, 99 << 10
"""Dynamic shared memory of a block without and with asking, at compute capability 8.0."""

BLOCK_ALIGNMENT = 256

_thread = threading.local()  # what is current there: the stream, the allocator

num_launches: dict[str, int] = {}
"""Launches a kernel since the process began."""


@cache
def library() -> ctypes.PyDLL:
    """Return the library; its calls keep the interpreter lock, since it runs one launch at a time."""
    loaded = ctypes.PyDLL(os.environ[LIBRARY])
    loaded.cuda_on_cpu_allocate.restype = ctypes.c_void_p
    loaded.cuda_on_cpu_allocate.argtypes = (ctypes.c_size_t,)
    loaded.cuda_on_cpu_free.argtypes = (ctypes.c_void_p,)
    return loaded


class Memory:
    """A block of device memory."""

    def __init__(self, size: int) -> None:
        self.ptr, self.size = library().cuda_on_cpu_allocate(size), size
        weakref.finalize(self, library().cuda_on_cpu_free, self.ptr)

    def array(self, shape: Any, dtype: Any) -> np.ndarray:
        """Return a NumPy array of the whole block, which does not keep it alive."""
        raw = (ctypes.c_uint8 * self.size).from_address(self.ptr)
        return np.frombuffer(raw, np.uint8).view(dtype).reshape(shape) if self.size else np.empty(shape, dtype)


class MemoryPointer:
    """A place in a block of memory."""

    def __init__(self, memory: Memory, ptr: int) -> None:
        self.memory, self.ptr = memory, ptr

    device_id = 0

    def __add__(self, offset: int) -> "MemoryPointer":
        return MemoryPointer(self.memory, self.ptr + offset)


class MemoryPool:
    """Gives memory out, and keeps none of it back."""

    def __init__(self) -> None:
        self._used_bytes = 0

    def malloc(self, num_bytes: int) -> MemoryPointer:
        """Return memory of its own."""
        memory = Memory(num_bytes)
        self._add(num_bytes)
        weakref.finalize(memory, self._add, -num_bytes)
        return MemoryPointer(memory, memory.ptr)

    def _add(self, num_bytes: int) -> None:
        self._used_bytes += num_bytes

    def used_bytes(self) -> int:
        """Return how much is in use."""
        return self._used_bytes

    total_bytes = used_bytes


_pool = MemoryPool()


def get_default_memory_pool() -> MemoryPool:
    """Return the pool that arrays come from."""
    return _pool


def get_allocator() -> Callable[[int], MemoryPointer]:
    """Return what gives this thread its memory."""
    return getattr(_thread, "allocator", _pool.malloc)


@contextmanager
def using_allocator(allocator: Callable[[int], MemoryPointer]) -> Iterator[None]:
    """Let arrays of this thread come from elsewhere."""
    before = get_allocator()
    _thread.allocator = allocator
    try:
        yield
    finally:
        _thread.allocator = before


class ndarray:  # noqa: N801 - as CuPy spells it
    """An array; a view shares its memory, everything else gets memory of its own."""

    def __init__(self, shape: Any, dtype: Any = float, memptr: MemoryPointer | None = None) -> None:
        shape, dtype = (shape,) if isinstance(shape, int) else tuple(shape), np.dtype(dtype)
        num_bytes = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        if memptr is not None:  # a part of a block comes as fresh memory: its neighbours are out of bounds
            offset = memptr.ptr - memptr.memory.ptr
            assert offset % BLOCK_ALIGNMENT == 0, "cut at an odd place"
            assert 0 <= offset <= offset + num_bytes <= memptr.memory.size, "cut beyond the end of its block"
        self._memory = get_allocator()(num_bytes).memory if memptr is None else Memory(num_bytes)
        self._array = self._memory.array(shape, dtype)

    def _view(self, array: np.ndarray) -> "ndarray":
        view = object.__new__(ndarray)
        view._memory, view._array = self._memory, array
        return view

    shape = property(lambda self: self._array.shape)
    dtype = property(lambda self: self._array.dtype)
    strides = property(lambda self: self._array.strides)
    ndim = property(lambda self: self._array.ndim)
    size = property(lambda self: self._array.size)
    nbytes = property(lambda self: self._array.nbytes)
    flags = property(lambda self: SimpleNamespace(c_contiguous=self._array.flags.c_contiguous))
    device = SimpleNamespace(id=0)
    T = property(lambda self: self._view(self._array.T))

    @property
    def data(self) -> MemoryPointer:
        """Where the first element lies."""
        return MemoryPointer(self._memory, self._array.__array_interface__["data"][0])

    def __len__(self) -> int:
        return len(self._array)

    def __array__(self, *_: Any, **__: Any) -> Any:
        raise TypeError("Implicit conversion to a NumPy array is not allowed")

    def __getitem__(self, key: Any) -> "ndarray":
        return self._view(self._array[key])

    def __setitem__(self, key: Any, value: Any) -> None:
        self._array[key] = value._array if isinstance(value, ndarray) else value

    def __iadd__(self, other: Any) -> "ndarray":
        self._array += other._array if isinstance(other, ndarray) else other
        return self

    def __mul__(self, other: Any) -> "ndarray":
        return asarray(self._array * (other._array if isinstance(other, ndarray) else other))

    def fill(self, value: Any) -> None:
        """Set every element."""
        self._array.fill(value)

    def astype(self, dtype: Any, order: str = "K", copy: bool = True) -> "ndarray":
        """Convert; without `copy` an array that is as wanted is returned itself."""
        made = self._array.astype(dtype, order=order, copy=copy)
        return self if made is self._array else asarray(made)

    def copy(self) -> "ndarray":
        """Return a contiguous copy."""
        return asarray(np.ascontiguousarray(self._array))

    def swapaxes(self, first: int, second: int) -> "ndarray":
        """Return a view."""
        return self._view(self._array.swapaxes(first, second))

    def transpose(self, *axes: Any) -> "ndarray":
        """Return a view."""
        return self._view(self._array.transpose(*axes))

    def reshape(self, *shape: Any) -> "ndarray":
        """Return a view, or a copy where there is none."""
        made = self._array.reshape(*shape)
        return self._view(made) if np.may_share_memory(made, self._array) else asarray(made)

    def clip(self, *limits: Any) -> "ndarray":
        """Return a clipped copy."""
        return asarray(self._array.clip(*limits))


def empty(shape: Any, dtype: Any = float) -> ndarray:
    """Return an array of poison."""
    return ndarray(shape, dtype)


def full(shape: Any, value: Any, dtype: Any) -> ndarray:
    """Return an array of one value."""
    made = ndarray(shape, dtype)
    made.fill(value)
    return made


def zeros(shape: Any, dtype: Any = float) -> ndarray:
    """Return an array of zeros."""
    return full(shape, 0, dtype)


def asarray(array: Any) -> ndarray:
    """Copy to the device, with the order of axes in memory that the array has; a device array is returned itself."""
    if isinstance(array, ndarray):
        return array
    array = np.asarray(array)
    order = np.argsort([-abs(stride) for stride in array.strides], kind="stable")
    made = ndarray([array.shape[axis] for axis in order], array.dtype)
    made._array[...] = array.transpose(order)
    return made.transpose(np.argsort(order))


def ascontiguousarray(array: ndarray) -> ndarray:
    """Return the array itself if its rows lie one behind the other, else a copy."""
    return array if array.flags.c_contiguous else array.copy()


def asnumpy(array: ndarray) -> np.ndarray:
    """Copy to the host."""
    return array._array.copy()


class Kernel:
    """A kernel of the library, launched with one struct by value."""

    by_handle: dict[int, "Kernel"] = {}  # noqa: RUF012

    def __init__(self, name: str) -> None:
        self.name, self.max_dynamic_shared_size_bytes = name, DEFAULT_SHARED_BYTES
        self._launch = getattr(library(), f"launch_{name}")
        self._launch.restype = ctypes.c_char_p
        size = ctypes.c_size_t
        self._launch.argtypes = (ctypes.c_uint, ctypes.c_uint, size, ctypes.c_char_p, size)
        self.argument_bytes = ctypes.c_size_t.in_dll(library(), f"argument_bytes_{name}").value
        self.kernel = SimpleNamespace(ptr=1 + len(self.by_handle))
        self.by_handle[self.kernel.ptr] = self

    def launch(self, grid: int, block: int, packed: bytes, shared_bytes: int) -> None:
        """Run all blocks."""
        allowed = min(self.max_dynamic_shared_size_bytes, MAX_SHARED_BYTES)
        assert shared_bytes <= allowed, f"{self.name}: {shared_bytes} bytes of shared memory, allowed {allowed}"
        num_launches[self.name] = num_launches.get(self.name, 0) + 1
        error = self._launch(grid, block, shared_bytes, packed, len(packed))
        if error is not None:
            raise RuntimeError(error.decode())


def _launch_kernel(config: Any, function: Any, arguments: Any, extra: None) -> int:
    """Do what cuLaunchKernelEx does, with the argument as it is now; return 0."""
    asked, kernel = config._obj, Kernel.by_handle[function.value]
    assert asked.num_attributes == 0, "no programmatic launches at compute capability 8.0"
    assert asked.grid[1] == asked.grid[2] == asked.block[1] == asked.block[2] == 1 and extra is None
    packed = ctypes.string_at(arguments[0], kernel.argument_bytes)
    launched = kernel, asked.grid[0], asked.block[0], packed, asked.shared_bytes
    stream = Stream.by_handle.get(asked.stream or 0)
    if stream is not None and stream.captured is not None:
        stream.captured.append(launched)
    else:
        Kernel.launch(*launched)
    return 0


DRIVER = SimpleNamespace(cuLaunchKernelEx=_launch_kernel)
"""What the package calls of libcuda."""


class Stream:
    """A stream; what is launched on it has ended at once."""

    by_handle: "weakref.WeakValueDictionary[int, Stream]" = weakref.WeakValueDictionary()  # noqa: RUF012
    _handles = itertools.count(1000)

    def __init__(self, non_blocking: bool = False) -> None:
        self.ptr, self.captured = next(self._handles), None
        self._before: list[Any] = []
        self.by_handle[self.ptr] = self

    def __enter__(self) -> "Stream":
        self._before.append(_current_stream())
        _thread.stream = self
        return self

    def __exit__(self, *_: object) -> None:
        _thread.stream = self._before.pop()

    def begin_capture(self) -> None:
        """Keep launches from here on."""
        self.captured: list[Any] | None = []

    def end_capture(self) -> "Graph":
        """Return what was kept."""
        assert self.captured is not None
        launches, self.captured = self.captured, None
        return Graph(launches)

    def synchronize(self) -> None:
        """Nothing is pending."""


class Graph:
    """Launches that a stream has kept, with the arguments that they had; it keeps no memory alive."""

    def __init__(self, launches: list[Any]) -> None:
        self._launches = launches

    def launch(self, stream: Stream | None = None) -> None:
        """Run them all."""
        for launched in self._launches:
            Kernel.launch(*launched)


def _current_stream() -> Any:
    return getattr(_thread, "stream", SimpleNamespace(ptr=0))


def _is_capturing(handle: int) -> bool:
    return Stream.by_handle[handle].captured is not None


class RawModule:
    """A translation unit; the library has them all, compiled."""

    def __init__(self, code: str, options: tuple[str, ...]) -> None:
        self._kernels: dict[str, Kernel] = {}

    def compile(self) -> None:
        """Nothing is left to do."""

    def get_function(self, name: str) -> Kernel:
        """Return a kernel, the same object each time."""
        if name not in self._kernels:
            self._kernels[name] = Kernel(name)
        return self._kernels[name]


class Device:
    """The only device: a GPU of compute capability 8.0, before programmatic launches and wgmma."""

    id = 0
    compute_capability = "80"
    attributes = {  # noqa: RUF012
        "MultiProcessorCount": NUM_MULTIPROCESSORS,
        "MaxSharedMemoryPerBlockOptin": MAX_SHARED_BYTES,
    }

    def __init__(self, device: int = 0) -> None:
        assert device == 0

    def __enter__(self) -> "Device":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def synchronize(self) -> None:
        """Nothing is pending."""


cuda = SimpleNamespace(
    Device=Device,
    Graph=Graph,
    MemoryPool=MemoryPool,
    Stream=Stream,
    get_allocator=get_allocator,
    get_current_stream=_current_stream,
    is_available=lambda: True,
    nvrtc=SimpleNamespace(getVersion=lambda: (12, 9)),
    runtime=SimpleNamespace(getDevice=lambda: 0, streamIsCapturing=_is_capturing),
    using_allocator=using_allocator,
)
