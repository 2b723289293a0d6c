"""What cumoe runs on."""

import importlib.metadata
import platform
from collections.abc import Callable
from typing import Any, Literal

from cumoe.door.arrays import cupy
from cumoe.door.checks import check_word
from cumoe.gpu.compile import gpu_is_there, why_no_gpu
from cumoe.gpu.sources import kernels_directory
from cumoe.version import __version__


def _probe(read: Callable[[], Any]) -> str:
    """Return what `read` finds, or why it found nothing: a report must always print."""
    try:
        return str(read())
    except Exception as error:  # noqa: BLE001 - any failure is an answer
        return f"not available ({type(error).__name__})"


def _versions() -> dict[str, Callable[[], Any]]:
    version = importlib.metadata.version
    return {
        "cumoe": lambda: __version__,
        "Python": platform.python_version,
        "NumPy": lambda: version("numpy"),
        "ml_dtypes": lambda: version("ml_dtypes"),
        "CuPy": lambda: cupy.__version__,
        "CUDA sources": kernels_directory,
    }


def _gpu() -> dict[str, Callable[[], Any]]:
    def nvrtc() -> str:
        return ".".join(map(str, cupy.cuda.nvrtc.getVersion()))

    def name() -> str:
        return cupy.cuda.runtime.getDeviceProperties(cupy.cuda.Device().id)["name"].decode()

    return {
        "GPU": name,
        "Compute capability": lambda: cupy.cuda.Device().compute_capability,
        "Driver (CUDA)": cupy.cuda.runtime.driverGetVersion,
        "NVRTC": nvrtc,
    }


def show_config(mode: Literal["stdout", "dicts"] = "stdout") -> dict[str, str] | None:
    """Print versions and devices, or return them.

    Parameters
    ----------
    mode : {"stdout", "dicts"}
        Print, or return a dict of strings, as `numpy.show_config` does.

    Returns
    -------
    dict or None

    Raises
    ------
    ValueError
        If the word is unknown.
    """
    check_word("mode", mode, ("stdout", "dicts"))
    probes = _versions() | (
        _gpu() if gpu_is_there() else {"GPU": lambda: f"none; NumPy arrays run on the CPU ({why_no_gpu()})"}
    )
    found = {label: _probe(read) for label, read in probes.items()}
    if mode == "dicts":
        return found
    width = max(map(len, found))
    for label, value in found.items():
        print(f"{label:<{width}} : {value}")
    return None
