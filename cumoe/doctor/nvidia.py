"""Asking the NVIDIA driver through ctypes, without CuPy and without making a context."""

import ctypes
import sys
from typing import Any, NamedTuple

SUCCESS = 0
COMPUTE_CAPABILITY = (75, 76)  # CUdevice_attribute: major, minor
MULTIPROCESSORS = 16
CLOCKS = {"sm": 1, "memory": 2}  # nvmlClockType
NO_DEVICE = 100  # CUDA_ERROR_NO_DEVICE


class Gpu(NamedTuple):
    """One device."""

    name: str
    compute_capability: tuple[int, int]
    num_multiprocessors: int
    memory_bytes: int


class Driver(NamedTuple):
    """What the driver says of itself and its devices."""

    cuda: tuple[int, int]  # the newest CUDA version that it serves
    release: str  # such as "580.159", or "" where only the other library knows
    gpus: list[Gpu]
    trouble: str  # why there are no devices, where the driver refused to look


def _library(linux: str, windows: str) -> Any:
    return ctypes.CDLL(windows if sys.platform == "win32" else linux)


def ask_driver() -> Driver:
    """Return what the CUDA driver says.

    Raises
    ------
    OSError
        If there is no driver.
    """
    cuda = _library("libcuda.so.1", "nvcuda.dll")
    version = ctypes.c_int()
    cuda.cuDriverGetVersion(ctypes.byref(version))
    pair = (version.value // 1000, version.value % 1000 // 10)
    status = cuda.cuInit(0)
    if status:
        why = "no device is visible" if status == NO_DEVICE else f"cuInit returned {status}"
        return Driver(pair, _release(), [], why)
    count = ctypes.c_int()
    cuda.cuDeviceGetCount(ctypes.byref(count))
    return Driver(pair, _release(), [_gpu(cuda, i) for i in range(count.value)], "")


def _gpu(cuda: Any, ordinal: int) -> Gpu:
    device, name, size = ctypes.c_int(), ctypes.create_string_buffer(256), ctypes.c_size_t()
    cuda.cuDeviceGet(ctypes.byref(device), ordinal)
    cuda.cuDeviceGetName(name, len(name), device)
    cuda.cuDeviceTotalMem_v2(ctypes.byref(size), device)

    def attribute(number: int) -> int:
        value = ctypes.c_int()
        cuda.cuDeviceGetAttribute(ctypes.byref(value), number, device)
        return value.value

    major, minor = map(attribute, COMPUTE_CAPABILITY)
    return Gpu(name.value.decode(errors="replace"), (major, minor), attribute(MULTIPROCESSORS), size.value)


def clocks(pci_bus_id: str) -> dict[str, int]:
    """Return the MHz that a device runs at now: "sm" and "memory"; what cannot be read is missing."""
    try:
        nvml, device = _library("libnvidia-ml.so.1", "nvml.dll"), ctypes.c_void_p()
        nvml.nvmlInit_v2()
        if nvml.nvmlDeviceGetHandleByPciBusId_v2(pci_bus_id.encode(), ctypes.byref(device)) != SUCCESS:
            return {}
        found, mhz = {}, ctypes.c_uint()
        for name, number in CLOCKS.items():
            if nvml.nvmlDeviceGetClockInfo(device, number, ctypes.byref(mhz)) == SUCCESS:
                found[name] = mhz.value
    except (OSError, AttributeError):
        return {}
    return found


def _release() -> str:
    try:
        nvml, text = _library("libnvidia-ml.so.1", "nvml.dll"), ctypes.create_string_buffer(96)
        if nvml.nvmlInit_v2() != SUCCESS or nvml.nvmlSystemGetDriverVersion(text, len(text)) != SUCCESS:
            return ""
        return text.value.decode(errors="replace")
    except (OSError, AttributeError):
        return ""
