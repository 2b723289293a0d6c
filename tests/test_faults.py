"""When something around the layer fails: memory, compiler, driver, cache, processes; and who keeps what alive."""

import gc
import logging
import os
import subprocess
import sys
import threading
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from support import CPU, DTYPES, GPU, assert_close, random_layer

import cumoe
from cumoe.gpu import compile as compiling

ROOT = Path(__file__).resolve().parent.parent


def run_python(program, **environment):
    """Run a program with this checkout; return the finished process."""
    changed = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"} | environment
    return subprocess.run(
        [sys.executable, "-c", program], env=changed, capture_output=True, text=True, check=False, timeout=300
    )


# --- memory ---


@contextmanager
def failing_allocation(monkeypatch, number):
    """Let the allocation of that number fail, counted from 0; yield a list of one boolean: whether it came to that."""
    import cupy

    real = not hasattr(cupy, "num_launches")  # what the stand-in of cuda_on_cpu counts
    counted, came = iter(range(10**6)), [False]

    def count(size):
        if next(counted) == number:
            came[0] = True
            raise cupy.cuda.memory.OutOfMemoryError(size, 0) if real else MemoryError

    if real:
        pool = cupy.get_default_memory_pool()

        def allocate(size):
            count(size)
            return pool.malloc(size)

        with cupy.cuda.using_allocator(allocate):
            yield came
    else:  # the stand-in of cuda_on_cpu
        allocate = cupy.Memory.__init__

        def init(self, size):
            count(size)
            allocate(self, size)

        with monkeypatch.context() as patch:
            patch.setattr(cupy.Memory, "__init__", init)
            yield came


def call_function(made, x):
    experts, shared = made
    logits = x[:, :6]
    routing = cumoe.route(logits, cumoe.Router(2))
    return cumoe.moe(x, routing, experts, shared, weight_on="input")


def call_stages(made, x):
    experts, _ = made
    routing = cumoe.route(x[:, :6], cumoe.Router(2))
    groups = cumoe.group(routing.topk_ids, 6)
    rows = cumoe.grouped_gemm(x, experts.weights.w_gate_up, groups, rows="tokens", dtype=np.float32)
    return cumoe.combine(rows, groups, routing.topk_weights)


CALLS = {"moe": call_function, "stages": call_stages}


@pytest.mark.gpu
@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_any_allocation_of_a_call_may_fail(monkeypatch, call, dtype):
    """One after the other: an exception, earlier results as they were, and the next call gives the right bits."""
    arrays = random_layer(np.random.default_rng(0), dtype, num_tokens=30, shared_sizes=(16,), gated_shared=True)
    x, _, experts, shared = arrays.build(GPU)
    earlier = CALLS[call]((experts, shared), x)
    expected = GPU.asnumpy(earlier).tobytes()
    for number in range(100):
        with failing_allocation(monkeypatch, number) as came:
            try:
                result = CALLS[call]((experts, shared), x)
            except MemoryError:
                result = None
        assert GPU.asnumpy(earlier).tobytes() == expected
        assert GPU.asnumpy(x).tobytes() == arrays.x.tobytes()
        if not came[0]:
            break
        assert result is None
        assert GPU.asnumpy(CALLS[call]((experts, shared), x)).tobytes() == expected
    assert number > 5
    assert GPU.asnumpy(result).tobytes() == expected


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_layer_that_cannot_grow_stays_as_it_was(monkeypatch, dtype):
    """Memory for a larger batch is not there: small batches go on, and the larger one works as soon as it is."""
    arrays = random_layer(np.random.default_rng(1), dtype, num_tokens=60, shared_sizes=(16,))
    x, _, experts, shared = arrays.build(GPU)
    weight = GPU.asarray(np.random.default_rng(2).standard_normal((6, 72)).astype(np.float32))
    layer = cumoe.MoE(cumoe.Router(2), experts, shared, router_weight=weight)
    whole = GPU.asnumpy(cumoe.MoE(cumoe.Router(2), experts, shared, router_weight=weight)(x)).tobytes()
    few = GPU.asnumpy(layer(x[:5]))
    for number in range(10):
        out = GPU.asarray(np.full_like(arrays.x, 7))
        with failing_allocation(monkeypatch, number) as came:
            try:
                layer(x, out=out)
            except MemoryError:
                assert (GPU.asnumpy(out) == 7).all()
        if not came[0]:
            break
        assert GPU.asnumpy(layer(x[:5])).tobytes() == few.tobytes()
        assert layer._workspace.lock.acquire(blocking=False)
        layer._workspace.lock.release()
    assert number > 0
    assert GPU.asnumpy(layer(x)).tobytes() == whole


@pytest.mark.gpu
def test_a_pool_with_a_limit():
    """CuPy's own exception, and the layer afterwards."""
    import cupy

    if not hasattr(cupy, "get_default_memory_pool"):
        pytest.skip("no pool")
    arrays = random_layer(np.random.default_rng(3), "bfloat16", num_tokens=20)
    expected = arrays.run(GPU).tobytes()
    pool = cupy.get_default_memory_pool()
    x = cupy.zeros((2_000_000, 72), DTYPES["bfloat16"])
    _, _, experts, _ = arrays.build(GPU)
    routing = cupy.zeros((2_000_000, 2), np.int32), cupy.ones((2_000_000, 2), np.float32)
    pool.free_all_blocks()
    before = pool.get_limit()
    pool.set_limit(pool.total_bytes() + (64 << 20))
    try:
        with pytest.raises(cupy.cuda.memory.OutOfMemoryError):
            cumoe.moe(x, routing, experts)
    finally:
        pool.set_limit(before)
    assert arrays.run(GPU).tobytes() == expected


# --- graphs ---


@pytest.mark.gpu
@pytest.mark.parametrize("kept", ["layer", "experts"])
def test_what_a_graph_uses_is_kept(kept):
    """Tokens, logits, ids of another type, all let go after the capture: their memory is not given to others."""
    import cupy

    arrays = random_layer(np.random.default_rng(4), "bfloat16", num_tokens=50, shared_sizes=(16,))
    _, _, experts, shared = arrays.build(GPU)
    logits = np.random.default_rng(5).standard_normal((50, 6)).astype(np.float32)
    router = cumoe.Router(2, renormalize=True)
    layer = cumoe.MoE(router, experts, shared)
    ids, weights = map(GPU.asnumpy, cumoe.route(GPU.asarray(logits), router))
    wanted = GPU.asnumpy(cumoe.moe(GPU.asarray(arrays.x), tuple(map(GPU.asarray, (ids, weights))), experts, shared))
    stream = cupy.cuda.Stream(non_blocking=True)
    cupy.cuda.Device().synchronize()

    def call(out):
        x = GPU.asarray(arrays.x)
        if kept == "layer":
            on_gpu = GPU.asarray(logits)
            return lambda: layer(x, on_gpu, out=out)
        routing = GPU.asarray(ids.astype(np.int64)), GPU.asarray(weights.astype(np.float64))
        return lambda: cumoe.moe(x, routing, experts, shared, out=out)

    with stream:
        out = cupy.full(arrays.x.shape, np.nan, np.float32).astype(arrays.x.dtype)
        captured = call(out)
        captured()
        stream.synchronize()
        stream.begin_capture()
        captured()
        graph = stream.end_capture()
        del captured
        gc.collect()
        junk = [cupy.full(size, 255, np.uint8) for size in (512, 1024, 4096, 8192, 16384, 65536) for _ in range(50)]
        for _ in range(3):
            out.view(np.uint8).fill(255)
            graph.launch(stream)
            stream.synchronize()
            assert GPU.asnumpy(out).tobytes() == wanted.tobytes()
        assert all(int((block != 255).sum()) == 0 for block in junk)


def test_a_capture_is_what_holds(monkeypatch):
    """Outside of one nothing is kept, or a layer would grow with every call."""
    from cumoe.gpu import workspace

    runtime = SimpleNamespace(streamIsCapturing=lambda stream: stream == 7)
    held = workspace.Workspace()
    for stream, kept in ((0, 0), (5, 0), (7, 1), (7, 2), (5, 2)):
        cuda = SimpleNamespace(get_current_stream=lambda stream=stream: SimpleNamespace(ptr=stream), runtime=runtime)
        monkeypatch.setattr(workspace, "cupy", SimpleNamespace(cuda=cuda))
        held.hold_if_captured(stream, object())
        assert len(held.held) == kept


# --- several at once ---


@pytest.mark.gpu
def test_two_gpus_at_once():
    """A layer on each, called in turn and from two threads; arrays of the other are refused."""
    import cupy

    if cupy.cuda.runtime.getDeviceCount() < 2:
        pytest.skip("one GPU")
    made, expected = [], []
    for device in range(2):
        with cupy.cuda.Device(device):
            arrays = random_layer(np.random.default_rng(device), "bfloat16", num_tokens=300, hidden_size=136)
            made.append(arrays.build(GPU))
            expected.append(arrays.expected())
    for device in (1, 0):  # whichever device is the current one
        with cupy.cuda.Device(device):
            for (x, routing, experts, _), wanted in zip(made, expected, strict=True):
                y = cumoe.moe(x, routing, experts)
                assert y.device == x.device
                assert_close(cupy.asnumpy(y), wanted, "bfloat16")
    bits = [cupy.asnumpy(cumoe.moe(x, routing, experts)).tobytes() for x, routing, experts, _ in made]
    wrong: list[int] = []

    def work(device):
        x, routing, experts, _ = made[device]
        with cupy.cuda.Device(device), cupy.cuda.Stream(non_blocking=True):
            results = [cupy.asnumpy(cumoe.moe(x, routing, experts)).tobytes() for _ in range(50)]
        wrong.extend(device for result in results if result != bits[device])

    threads = [threading.Thread(target=work, args=(device,)) for device in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    with pytest.raises(TypeError, match="x: expected a cupy array on cuda:1, like experts, got a cupy array on cuda:0"):
        cumoe.moe(made[0][0], made[1][1], made[1][2])


@pytest.mark.gpu
def test_a_second_context_on_the_same_gpu():
    """Another thread works in a context of its own, as other libraries do; neither sees the other."""
    import ctypes

    from cumoe.gpu.driver import driver

    arrays = random_layer(np.random.default_rng(6), "bfloat16", num_tokens=100, hidden_size=136)
    expected = arrays.run(GPU).tobytes()
    begin, done, status = threading.Event(), threading.Event(), []

    def other():
        cuda, context, memory = driver(), ctypes.c_void_p(), ctypes.c_uint64()
        create = getattr(cuda, "cuCtxCreate_v2")  # noqa: B009 - the version is part of the name
        status.append(create(ctypes.byref(context), 0, 0))
        status.append(cuda.cuMemAlloc_v2(ctypes.byref(memory), ctypes.c_size_t(1 << 20)))
        begin.set()
        while not done.is_set():
            status.append(cuda.cuMemsetD8_v2(memory, ctypes.c_ubyte(255), ctypes.c_size_t(1 << 20)))
            status.append(cuda.cuCtxSynchronize())
        status.append(cuda.cuCtxDestroy_v2(context))

    thread = threading.Thread(target=other)
    thread.start()
    begin.wait(60)
    try:
        for _ in range(50):
            assert arrays.run(GPU).tobytes() == expected
    finally:
        done.set()
        thread.join()
    assert len(status) > 4 and not any(status)


FORKED = """
import os, sys
import numpy as np
BEFORE
rng = np.random.default_rng(0)
x, up, down = (rng.standard_normal(s).astype(np.float32) for s in ((40, 64), (4, 128, 64), (4, 64, 64)))
ids = rng.integers(0, 4, (40, 2)).astype(np.int32)
def compute():
    import cumoe
    return cumoe.moe(x, (ids, np.ones((40, 2), np.float32)), cumoe.Experts(up, down))
PARENT
child = os.fork()
if child == 0:
    import logging
    logging.basicConfig(level=logging.INFO)
    y = compute()
    import cumoe
    told = cumoe.show_config("dicts")["GPU"]
    print("child", float(y.sum()), told, flush=True)
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
print("parent", float(compute().sum()))
"""


@pytest.mark.parametrize("parent", ["", "compute()"], ids=["import_in_the_child", "import_in_the_parent"])
def test_a_forked_process_computes(parent):
    """Imported before the fork or after it."""
    done = run_python(FORKED.replace("BEFORE", "").replace("PARENT", parent))
    assert done.returncode == 0, done.stderr
    child, own = (line.split()[1] for line in done.stdout.splitlines())
    assert child == own


@pytest.mark.gpu
def test_a_process_that_forked_after_cuda_began():
    """The import goes through and NumPy arrays are served; the log says why the GPU is not."""
    begun = "import cupy; cupy.zeros(3)"
    done = run_python(FORKED.replace("BEFORE", begun).replace("PARENT", ""))
    assert done.returncode == 0, done.stderr
    assert "start processes with 'spawn' or 'forkserver'" in done.stdout + done.stderr


# --- compiler, driver, cache ---


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
