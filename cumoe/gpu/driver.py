"""What CuPy does not offer of the CUDA driver, through ctypes: launches that are prepared once and may overlap."""

import ctypes
from functools import cache
from typing import Any

from cumoe.door.arrays import cupy

PROGRAMMATIC_STREAM_SERIALIZATION = 6  # CUlaunchAttributeID
NO_CONTEXT = 201  # CUDA_ERROR_INVALID_CONTEXT
ARGUMENT_ALIGNMENT = 64  # of the copy on the host, which holds tensor maps


class _Attribute(ctypes.Structure):
    """CUlaunchAttribute; of the union of 64 bytes only the first integer is used."""

    _fields_ = (("id", ctypes.c_int), ("padding", ctypes.c_int), ("value", ctypes.c_int), ("rest", ctypes.c_int * 15))


class _Config(ctypes.Structure):
    """CUlaunchConfig."""

    _fields_ = (
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared_bytes", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(_Attribute)),
        ("num_attributes", ctypes.c_uint),
    )


@cache
def driver() -> Any:
    """Return the CUDA driver's library; CuPy has loaded it before."""
    return ctypes.CDLL("libcuda.so.1")


class Launch:
    """A launch of a kernel with one struct by value: everything that cuLaunchKernelEx reads, in memory of its own.

    Parameters
    ----------
    name : str
        Of the kernel, for messages.
    function, stream : int
        Handles of the kernel and the stream.
    grid, block, shared_bytes : int
    argument : bytes
        The struct; a copy is kept, which `argument` lets change between two launches.
    overlap : bool
        Whether blocks may start before the previous kernel on the stream has ended; the kernel has to wait by itself.

    Attributes
    ----------
    argument : memoryview
        The bytes that the next launch passes.
    """

    def __init__(
        self,
        name: str,
        function: int,
        grid: int,
        block: int,
        shared_bytes: int,
        stream: int,
        argument: bytes,
        *,
        overlap: bool,
    ) -> None:
        memory = (ctypes.c_char * (len(argument) + ARGUMENT_ALIGNMENT))()
        begin = -ctypes.addressof(memory) % ARGUMENT_ALIGNMENT
        self.name, self.overlap = name, overlap
        self.argument = memoryview(memory).cast("B")[begin : begin + len(argument)]
        self.argument[:] = argument
        attribute = _Attribute(id=PROGRAMMATIC_STREAM_SERIALIZATION, value=1)
        self.config = _Config(
            (grid, 1, 1), (block, 1, 1), shared_bytes, stream, ctypes.pointer(attribute), int(overlap)
        )
        pointers = (ctypes.c_void_p * 1)(ctypes.addressof(memory) + begin)
        self.call = driver().cuLaunchKernelEx
        self.arguments = ctypes.byref(self.config), ctypes.c_void_p(function), pointers, None

    def __call__(self) -> None:
        """Launch.

        Raises
        ------
        RuntimeError
            If the driver refuses.
        """
        if status := self.call(*self.arguments):
            self.retry(status)

    def retry(self, status: int) -> None:
        """Launch again where a thread that has used no GPU before lacked a context; raise on any other `status`."""
        if status == NO_CONTEXT:
            cupy.cuda.runtime.setDevice(cupy.cuda.runtime.getDevice())
            status = self.call(*self.arguments)
        if status:
            grid, block = self.config.grid[0], self.config.block[0]
            raise RuntimeError(f"cumoe: cuLaunchKernelEx returned {status} for {self.name}, {grid} x {block} threads")
