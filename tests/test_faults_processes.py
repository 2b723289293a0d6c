"""Several at once: GPUs, contexts of one GPU, processes that fork."""

import threading

import numpy as np
import pytest
from fresh_python import run_python
from support import GPU, assert_close, random_layer

import cumoe


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
