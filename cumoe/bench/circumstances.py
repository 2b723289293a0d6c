"""What a measurement was taken on: the columns that every row of a CSV file ends with."""

import datetime
from importlib import metadata
from typing import Any

import cumoe
from cumoe.bench.roofs import Roofs
from cumoe.doctor.nvidia import ask_driver, clocks
from cumoe.door.arrays import cupy


def circumstances(device: str, roofs: Roofs) -> dict[str, str]:
    """Return name and value of these columns; what cannot be found out is an empty text."""
    runtime = cupy.cuda.runtime
    try:
        release = ask_driver().release
    except (OSError, AttributeError):
        release = ""
    return {
        "gpu": device,
        "driver": release,
        "cuda_driver": cuda_version(runtime.driverGetVersion()),
        "cuda_runtime": cuda_version(runtime.runtimeGetVersion()),
        "nvrtc": ".".join(map(str, cupy.cuda.nvrtc.getVersion())),
        "cumoe": cumoe.__version__,
        "cupy": cupy.__version__,
        "torch": _version("torch"),
        "product_tflops": f"{roofs.product / 1e12:.4f}",
        "copy_tb_per_s": f"{roofs.copy / 1e12:.4f}",
        "read_tb_per_s": f"{roofs.read / 1e12:.4f}",
        "utc": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M:%S"),
    }


def cuda_version(number: int) -> str:
    """Return ``12.9`` for 12090."""
    return f"{number // 1000}.{number % 1000 // 10}"


def clocks_now() -> dict[str, int]:
    """Return the MHz that the current device runs at, "sm" and "memory"."""
    device: Any = cupy.cuda.Device()
    return clocks(device.pci_bus_id)


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""
