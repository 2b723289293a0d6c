"""When compiler, headers, driver or kernel cache are missing, too old, spoiled or cannot be written."""

import logging
import os
from types import SimpleNamespace

import numpy as np
import pytest
from fresh_python import run_python
from support import CPU, assert_close, random_layer

import cumoe
from cumoe.gpu import compile as compiling


@pytest.fixture
def compiled(monkeypatch):
    """Return a function that compiles on a machine whose parts are given; what came of it is undone afterwards."""

    def on(capability="80", compile_unit=lambda: None, nvrtc=(12, 9), driver=12080):
        version = nvrtc if callable(nvrtc) else lambda: nvrtc

        class Device:
            id = 0
            compute_capability = capability

            def __init__(self, _=0):
                pass

            def __enter__(self):
                return self

            def __exit__(self, *_):
                pass

        cuda = SimpleNamespace(
            Device=Device, is_available=lambda: True, nvrtc=SimpleNamespace(getVersion=version),
            runtime=SimpleNamespace(driverGetVersion=lambda: driver, runtimeGetVersion=lambda: 12090),
        )  # fmt: skip
        monkeypatch.setattr(compiling, "cupy", SimpleNamespace(cuda=cuda))
        monkeypatch.setattr(compiling, "_failure", None)
        module = SimpleNamespace(compile=compile_unit, get_function=lambda name: name)
        monkeypatch.setattr(
            compiling, "modules", lambda: dict.fromkeys((*compiling.UNITS, *compiling.WGMMA_UNITS), module)
        )
        compiling._has_wgmma.cache_clear()
        compiling.kernel.cache_clear()
        compiling.compile_all()

    yield on
    monkeypatch.undo()
    compiling._has_wgmma.cache_clear()
    compiling.kernel.cache_clear()


def raising(error):
    """Return a function that raises."""

    def fail():
        raise error

    return fail


PTX_VERSION = "CUDA_ERROR_UNSUPPORTED_PTX_VERSION: the provided PTX was compiled with an unsupported toolchain."
INITIALIZATION = "cudaErrorInitializationError: initialization error"
INSUFFICIENT = "cudaErrorInsufficientDriver: CUDA driver version is insufficient for CUDA runtime version"
NO_DEVICE = "cudaErrorNoDevice: no CUDA-capable device is detected"
CANNOT_COMPILE = {
    "a GPU that is too old": (
        {"capability": "75"}, "cumoe: expected a GPU of compute capability 8.0 or newer, got 75",
    ),
    "no NVRTC": (
        {"compile_unit": raising(RuntimeError('Failure finding "libnvrtc.so"'))},
        r"could not be compiled: RuntimeError: .*libnvrtc.*pip install nvidia-cuda-nvrtc-cu12 nvidia-cuda-runtime-cu12",
    ),
    "no NVRTC on Hopper": (
        {"capability": "90", "nvrtc": raising(RuntimeError('Failure finding "libnvrtc.so"'))},
        "pip install nvidia-cuda-nvrtc-cu12 nvidia-cuda-runtime-cu12 brings the compiler and its headers",
    ),
    "no headers": (
        {"compile_unit": raising(RuntimeError("Failed to find CUDA headers"))}, "brings the compiler and its headers",
    ),
    "a driver that is too old": (
        {"compile_unit": raising(RuntimeError(PTX_VERSION)), "nvrtc": (13, 0)},
        r"The NVIDIA driver is for CUDA 12.8, the compiler is NVRTC 13.0: install a newer driver",
    ),
    "an old driver and no NVRTC": (
        {
            "compile_unit": raising(RuntimeError(INSUFFICIENT)),
            "nvrtc": raising(RuntimeError('Failure finding "libnvrtc.so"')),
        },
        "The NVIDIA driver is older than the compiler: install a newer one",
    ),
    "a fork": (
        {"compile_unit": raising(RuntimeError(INITIALIZATION))},
        "CUDA does not survive a fork: start processes with 'spawn' or 'forkserver'",
    ),
}  # fmt: skip


@pytest.mark.parametrize("machine", CANNOT_COMPILE)
def test_the_first_use_says_what_is_missing(compiled, caplog, machine):
    """The import logs it and goes on; a kernel that is asked for raises it; NumPy arrays are served."""
    options, message = CANNOT_COMPILE[machine]
    with caplog.at_level(logging.WARNING, "cumoe"):
        compiled(**options)
    with pytest.raises(RuntimeError, match=message) as caught:
        compiling.kernel("route_float32")
    assert str(caught.value) in caplog.text
    layer = random_layer(np.random.default_rng(7), "float32")
    assert_close(layer.run(CPU), layer.expected(), "float32")


def test_an_older_compiler_on_hopper_serves_with_the_portable_kernels(compiled, caplog):
    """And says so."""
    with caplog.at_level(logging.WARNING, "cumoe"):
        compiled(capability="90", nvrtc=(12, 4))
    assert compiling.kernel("route_float32") == "route_float32"
    assert "the Hopper kernels need NVRTC 12.9 or newer, found 12.4; the portable kernels serve" in caplog.text


@pytest.mark.parametrize("error", [PermissionError(13, "Permission denied"), OSError(28, "No space left on device")])
@pytest.mark.parametrize("before", [None, "0"])
def test_a_cache_that_cannot_be_written_is_done_without(compiled, caplog, monkeypatch, error, before):
    """Kernels are compiled in memory, the log says what would help, and the environment is as it was."""
    monkeypatch.delenv("CUPY_CACHE_IN_MEMORY", raising=False)
    if before is not None:
        monkeypatch.setenv("CUPY_CACHE_IN_MEMORY", before)
    compiled_units = []

    def compile_unit():
        if os.environ.get("CUPY_CACHE_IN_MEMORY") != "1":
            raise error
        compiled_units.append(1)

    with caplog.at_level(logging.WARNING, "cumoe"):
        compiled(compile_unit=compile_unit)
    assert len(compiled_units) == len(compiling.UNITS)
    assert os.environ.get("CUPY_CACHE_IN_MEMORY") == before
    assert compiling.kernel("combine_float32_float32_4") == "combine_float32_float32_4"
    assert "kernel cache is no use" in caplog.text and "CUPY_CACHE_DIR" in caplog.text


WHY = {
    "no driver": (0, raising(RuntimeError(INSUFFICIENT)), "no NVIDIA driver"),
    "old driver": (11040, raising(RuntimeError(INSUFFICIENT)), "serves CUDA 11.4, CuPy needs 12: get a newer one"),
    "hidden": (12080, raising(RuntimeError(NO_DEVICE)), "no CUDA device"),
    "none": (12080, lambda: 0, "no CUDA device"),
    "forked": (12080, raising(RuntimeError(INITIALIZATION)), "does not survive a fork"),
}  # fmt: skip


@pytest.mark.parametrize("machine", WHY)
def test_why_there_is_no_gpu(monkeypatch, machine):
    """In words that say what to do, in the report and in the log."""
    driver, count, words = WHY[machine]
    runtime = SimpleNamespace(driverGetVersion=lambda: driver, runtimeGetVersion=lambda: 12090, getDeviceCount=count)
    cuda = SimpleNamespace(runtime=runtime, is_available=lambda: False)
    monkeypatch.setattr(compiling, "cupy", SimpleNamespace(cuda=cuda))
    assert words in compiling.why_no_gpu()
    assert words in cumoe.show_config("dicts")["GPU"]


CACHED = """
import logging, os, pathlib, sys
import cupy
logging.basicConfig(level=logging.INFO)
seen = cupy.cuda.is_available
cupy.cuda.is_available = lambda: False      # the import compiles nothing: two units are enough here
import cumoe
from cumoe.gpu import compile as compiling
cupy.cuda.is_available = seen
compiling.UNITS = ("gate", "group")
compiling.has_wgmma = lambda device: False
compiling.compile_all()
ids = cupy.asarray([[2, 0], [1, 2]], dtype=cupy.int32)
print(cumoe.group(ids, 3).permutation.tolist())
"""


@pytest.mark.gpu
@pytest.mark.parametrize("fault", ["cut", "changed", "emptied", "a folder", "read-only"])
def test_a_kernel_cache_that_is_spoiled(tmp_path, fault):
    """Kernels are compiled again, or without it; what comes out is right."""
    cache = tmp_path / "cache"
    first = run_python(CACHED, CUPY_CACHE_DIR=str(cache))
    assert first.stdout == "[1, 2, 0, 3]\n", first.stderr
    files = list(cache.glob("*.cubin"))
    assert len(files) >= 2
    for path in files:
        content = path.read_bytes()
        if fault == "a folder":
            path.unlink()
            path.mkdir()
        elif fault == "read-only":
            path.unlink()
        else:
            path.write_bytes({"cut": content[:100], "changed": content[:-9] + b"123456789", "emptied": b""}[fault])
    if fault == "read-only":
        cache.chmod(0o500)
        if os.access(cache, os.W_OK):  # as root: nothing can be made in a folder that is gone either
            cache.rename(tmp_path / "elsewhere")
            program = CACHED.replace("import cumoe\n", f"import cumoe, shutil; shutil.rmtree({str(cache)!r})\n", 1)
            again = run_python(program, CUPY_CACHE_DIR=str(cache))
        else:
            again = run_python(CACHED, CUPY_CACHE_DIR=str(cache))
        cache.chmod(0o700) if cache.exists() else None
    else:
        again = run_python(CACHED, CUPY_CACHE_DIR=str(cache))
    assert again.stdout == "[1, 2, 0, 3]\n", again.stderr
    assert ("kernel cache is no use" in again.stderr) == (fault in ("a folder", "read-only"))
