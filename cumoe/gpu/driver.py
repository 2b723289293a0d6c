"""What CuPy does not offer of the CUDA driver, through ctypes: a launch that may overlap the kernel before it."""

import ctypes
from functools import cache
from typing import Any

PROGRAMMATIC_STREAM_SERIALIZATION = 6  # CUlaunchAttributeID


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


def launch_overlapping(function: int, grid: int, block: int, shared_bytes: int, stream: int, argument: int) -> None:
    """Launch a kernel whose blocks may start before the previous kernel on the stream has ended.

    Parameters
    ----------
    function, stream : int
        Handles of the kernel and the stream.
    argument : int
        Address of the kernel's only argument, which is copied.

    Raises
    ------
    RuntimeError
        If the driver refuses.
    """
    attribute = _Attribute(id=PROGRAMMATIC_STREAM_SERIALIZATION, value=1)
    config = _Config((grid, 1, 1), (block, 1, 1), shared_bytes, stream, ctypes.pointer(attribute), 1)
    arguments = (ctypes.c_void_p * 1)(argument)
    status = driver().cuLaunchKernelEx(ctypes.byref(config), ctypes.c_void_p(function), arguments, None)
    if status:
        raise RuntimeError(f"cumoe: cuLaunchKernelEx returned {status} for {grid} blocks of {block} threads")
