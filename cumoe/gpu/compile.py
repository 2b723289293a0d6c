"""Compiling the CUDA sources when the package is imported, and handing out kernels."""

import logging
import os
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from typing import Any, NamedTuple

from cumoe.door.arrays import cupy
from cumoe.door.checks import refuse
from cumoe.gpu.config import Gpu
from cumoe.gpu.driver import Launch
from cumoe.gpu.sources import OPTIONS, UNITS, WGMMA_OPTIONS, WGMMA_UNITS, unit_source
from cumoe.gpu.structs import Packed
from cumoe.gpu.tape import current_tape

log = logging.getLogger("cumoe")

MIN_COMPUTE_CAPABILITY = 80
"""cp.async and bf16 mma.sync begin with sm_80 (Ampere)."""

WGMMA_COMPUTE_CAPABILITY = 90
WGMMA_NVRTC = (12, 9)

OVERLAP_COMPUTE_CAPABILITY = 90

KERNEL_UNIT = {
    "router_gemm": "router_gemm",
    "route_and_group": "route_and_group",
    "route_and_count": "route_and_count",
    "route": "route",
    "group": "group",
    "grouped_gemm_mma_bfloat16": "grouped_gemm_bfloat16",
    "grouped_gemm_mma_float16": "grouped_gemm_float16",
    "grouped_gemm_simt": "grouped_gemm_simt",
    **{unit: unit for unit in WGMMA_UNITS},
    "shared_gate": "gate",
    "ends": "ends",
    "combine": "combine",
}
"""The beginning of a kernel's name, and the translation unit that holds it."""

_failure: str | None = None


def gpu_is_there() -> bool:
    """Return whether CuPy sees a CUDA device; never raises."""
    try:
        return cupy is not None and bool(cupy.cuda.is_available())
    except Exception:  # noqa: BLE001 - a broken driver may raise anything
        return False


def why_no_gpu() -> str:
    """Return why CuPy sees no CUDA device, and what would help; never raises."""
    if cupy is None:
        return "CuPy cannot be imported"
    try:
        driver, runtime = cupy.cuda.runtime.driverGetVersion(), cupy.cuda.runtime.runtimeGetVersion()
        if driver == 0:
            return "no NVIDIA driver"
        if driver // 1000 < runtime // 1000:
            return f"the NVIDIA driver serves CUDA {_version(driver)}, CuPy needs {runtime // 1000}: get a newer one"
        return "no CUDA device" if cupy.cuda.runtime.getDeviceCount() == 0 else "CUDA was not ready when it was asked"
    except Exception as error:  # noqa: BLE001 - a broken driver may raise anything
        return _what_helps(error)


def _version(number: int) -> str:
    return f"{number // 1000}.{number % 1000 // 10}"


def _what_helps(error: Exception) -> str:
    """Return an error of CuPy, CUDA or NVRTC, and what to do about it."""
    text = f"{type(error).__name__}: {error}"
    if "NoDevice" in text:
        return "no CUDA device"
    if "nitializationError" in text or "NOT_INITIALIZED" in text:
        return f"{text}. CUDA does not survive a fork: start processes with 'spawn' or 'forkserver'"
    if any(word in text for word in ("PTX_VERSION", "INVALID_IMAGE", "NO_BINARY", "InsufficientDriver")):
        try:
            driver, nvrtc = _version(cupy.cuda.runtime.driverGetVersion()), cupy.cuda.nvrtc.getVersion()
        except Exception:  # noqa: BLE001 - what is asked here may be what is missing
            return f"{text}. The NVIDIA driver is older than the compiler: install a newer one"
        found = f"The NVIDIA driver is for CUDA {driver}, the compiler is NVRTC {'.'.join(map(str, nvrtc))}"
        return f"{text}. {found}: install a newer driver"
    packages = "nvidia-cuda-nvrtc-cu12 nvidia-cuda-runtime-cu12"
    return f"{text}. pip install {packages} brings the compiler and its headers"


@contextmanager
def _no_kernel_cache() -> Iterator[None]:
    """Let CuPy compile without its cache on disk."""
    name = "CUPY_CACHE_IN_MEMORY"  # read at each compilation
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        os.environ.pop(name)
        if before is not None:
            os.environ[name] = before


@cache
def modules() -> dict[str, Any]:
    """Return the RawModules by translation unit; constructing them compiles nothing."""
    portable = {unit: cupy.RawModule(code=unit_source(unit), options=OPTIONS) for unit in UNITS}
    hopper = {unit: cupy.RawModule(code=unit_source(unit), options=WGMMA_OPTIONS) for unit in WGMMA_UNITS}
    return portable | hopper


class Note(NamedTuple):
    """A launch that was described and not done."""

    kernel: str
    grid: int
    block: int
    shared_bytes: int
    arrays: tuple[Any, ...]  # that its argument points to
    work: Any  # what the launching function says of it


class Rehearsal(NamedTuple):
    """A GPU that need not be there, and what was to be launched on it."""

    gpu: Gpu
    notes: list[Note]


_thread = threading.local()


@contextmanager
def rehearsed(gpu: Gpu) -> Iterator[list[Note]]:
    """Let this thread note its launches for a GPU of this description instead of doing them."""
    _thread.rehearsal = Rehearsal(gpu, [])
    try:
        yield _thread.rehearsal.notes
    finally:
        _thread.rehearsal = None


def rehearsal() -> Rehearsal | None:
    """Return the rehearsal of this thread, if there is one."""
    return getattr(_thread, "rehearsal", None)


def current_device() -> int:
    """Return the number of the current device; -1 in a rehearsal."""
    return -1 if rehearsal() else int(cupy.cuda.runtime.getDevice())


def gpu_of(device_id: int) -> Gpu:
    """Return what decides about kernels on a device, or on the one of the rehearsal."""
    playing = rehearsal()
    return _gpu_of(device_id) if playing is None else playing.gpu


@cache
def _gpu_of(device_id: int) -> Gpu:
    attributes = cupy.cuda.Device(device_id).attributes
    engine = "wgmma" if _has_wgmma(device_id) else "mma"
    return Gpu(int(attributes["MultiProcessorCount"]), int(attributes["MaxSharedMemoryPerBlockOptin"]), engine)


def has_wgmma(device_id: int) -> bool:
    """Return whether the Hopper kernels serve this device; if only the compiler is too old, a warning says so once."""
    return gpu_of(device_id).engine == "wgmma"


@cache
def _has_wgmma(device_id: int) -> bool:
    if int(cupy.cuda.Device(device_id).compute_capability) != WGMMA_COMPUTE_CAPABILITY:
        return False
    version = cupy.cuda.nvrtc.getVersion()
    if version < WGMMA_NVRTC:
        found, wanted = (".".join(map(str, v)) for v in (version, WGMMA_NVRTC))
        log.warning("the Hopper kernels need NVRTC %s or newer, found %s; the portable kernels serve", wanted, found)
    return bool(version >= WGMMA_NVRTC)


def _compile(units: tuple[str, ...], device_id: int) -> None:
    def compile_one(module: Any) -> None:
        with cupy.cuda.Device(device_id):
            module.compile()

    first, *others = (modules()[unit] for unit in units)
    compile_one(first)  # alone: it fills CuPy's per-process cache of the options that all units share
    with ThreadPoolExecutor(len(others)) as pool:
        list(pool.map(compile_one, others))


def compile_all() -> None:
    """Compile, or load from CuPy's cache, every kernel for the current device. A failure is kept for the first use."""
    global _failure  # noqa: PLW0603 - one process has one outcome
    begin = time.perf_counter()
    try:
        device = cupy.cuda.Device()
        if int(device.compute_capability) < MIN_COMPUTE_CAPABILITY:
            _failure = refuse("cumoe", "a GPU of compute capability 8.0 or newer", device.compute_capability)
            log.warning("%s; NumPy arrays still run on the CPU", _failure)
            return
        units = UNITS + (tuple(WGMMA_UNITS) if _has_wgmma(device.id) else ())
        log.info("compiling %d CUDA units for sm_%s (cached afterwards)", len(units), device.compute_capability)

        try:
            _compile(units, device.id)
        except OSError as error:  # the cache: no right to write, no space, a folder where a file should be
            log.warning("CuPy's kernel cache is no use (%s): CUPY_CACHE_DIR names another folder for it", error)
            with _no_kernel_cache():
                _compile(units, device.id)
    except Exception as error:  # noqa: BLE001 - import must succeed; the message reaches the first use
        _failure = f"cumoe: the CUDA kernels could not be compiled: {_what_helps(error)}"
        log.warning("%s", _failure)
        return
    log.info("CUDA kernels ready after %.2f s", time.perf_counter() - begin)


@cache
def kernel(name: str) -> Any:
    """Return a kernel by name.

    Raises
    ------
    RuntimeError
        If the kernels could not be compiled on this machine; the text says why.
    """
    if _failure is not None:
        raise RuntimeError(_failure)
    unit = next(unit for prefix, unit in KERNEL_UNIT.items() if name == prefix or name.startswith(prefix + "_"))
    return modules()[unit].get_function(name)


_allowed: dict[tuple[str, int], int] = {}  # (kernel, device) -> dynamic shared memory it may use


def launch(
    name: str,
    grid: int,
    block: int,
    argument: Packed,
    shared_bytes: int = 0,
    *,
    overlap: bool = False,
    work: Any = None,
) -> None:
    """Launch a kernel with one by-value struct on the current stream of the current device.

    `overlap` lets it begin before the previous kernel has ended, where the GPU can; it has to wait by itself then. A
    tape that records this thread keeps the launch; a rehearsal only notes it, and `work`.
    """
    if (playing := rehearsal()) is not None:
        playing.notes.append(Note(name, grid, block, shared_bytes, argument.arrays, work))
        return
    function, device_id = kernel(name), cupy.cuda.runtime.getDevice()
    if shared_bytes > 48 * 1024:
        key = (name, device_id)
        if _allowed.get(key, 0) < shared_bytes:
            function.max_dynamic_shared_size_bytes = shared_bytes
            _allowed[key] = shared_bytes
    stream, early = cupy.cuda.get_current_stream().ptr, overlap and can_overlap(device_id)
    made = Launch(name, function.kernel.ptr, grid, block, shared_bytes, stream, argument.data, overlap=early)
    made()
    if (tape := current_tape()) is not None:
        tape.add(made, argument.places)


@cache
def can_overlap(device_id: int) -> bool:
    """Return whether kernels on this device may begin before the previous one has ended."""
    return int(cupy.cuda.Device(device_id).compute_capability) >= OVERLAP_COMPUTE_CAPABILITY


def num_multiprocessors(device_id: int) -> int:
    """Return the number of SMs of a device."""
    return gpu_of(device_id).num_multiprocessors


def max_shared_bytes(device_id: int) -> int:
    """Return how much shared memory a block may have on a device."""
    return gpu_of(device_id).shared_bytes
