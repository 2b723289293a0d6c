"""Arrays of other owners: read-only maps of files, factors in any float type, interfaces, streams of other libraries.

DLPack itself is tested in test_dlpack_*.py, hand-over on a GPU in test_handover_gpu.py.
"""

import logging
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from support import BF16, CPU, DTYPES, GPU, assert_close, gpu_is_there, random_layer

import cumoe
from cumoe.door import streams

needs_gpu = pytest.mark.skipif(not gpu_is_there(), reason="no CUDA device")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("weight_on", ["input", "output"])
def test_weights_may_be_read_only_maps_of_a_file(tmp_path, dtype, weight_on):
    """Nothing is copied, and nothing is written: the operating system would not let it."""
    layer = random_layer(np.random.default_rng(0), dtype, shared_sizes=(16,), biases=True, weight_on=weight_on)
    expected = layer.run(CPU)
    for name in ("w_gate_up", "w_down", "b_gate_up", "b_down"):
        array = layer.experts[name]
        array.view(np.uint16 if array.itemsize == 2 else np.uint32).tofile(tmp_path / name)
        mapped = np.memmap(tmp_path / name, np.uint8, "r").view(array.dtype).reshape(array.shape)
        assert not mapped.flags.writeable
        layer.experts[name] = mapped
    layer.x.flags.writeable = layer.topk_ids.flags.writeable = layer.topk_weights.flags.writeable = False
    experts = layer.build(CPU)[2]
    assert np.shares_memory(experts.weights.w_gate_up, layer.experts["w_gate_up"])
    assert layer.run(CPU).tobytes() == expected.tobytes()


@pytest.mark.parametrize("factors", ["float16", "bfloat16", "float64", "float32"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_routing_weights_are_converted_not_reinterpreted(backend, dtype, factors):
    """Numbers that every type holds give the same bits; seen through another type's eyes they would be far off."""
    layer = random_layer(np.random.default_rng(1), dtype, num_tokens=20, top_k=3)
    layer.topk_weights = np.random.default_rng(2).choice([0.5, 0.75, 1.5], layer.topk_ids.shape).astype(np.float32)
    expected = layer.run(backend)
    layer.topk_weights = layer.topk_weights.astype(DTYPES.get(factors, factors))
    assert layer.run(backend).tobytes() == expected.tobytes()


# --- __cuda_array_interface__ ---


class Interface:
    """Device memory with an interface and nothing else, as Numba has it."""

    def __init__(self, array, stream=None, read_only=False):
        self.array = array
        interface = {**array.__cuda_array_interface__}
        interface |= {"data": (interface["data"][0], read_only), "stream": stream}
        self.__cuda_array_interface__ = interface


@pytest.mark.gpu
@needs_gpu
def test_what_has_an_interface_alone_is_viewed():
    """Weights, tokens and routing; the result is a CuPy array, `out` is written in place unless it says read-only."""
    import cupy

    layer = random_layer(np.random.default_rng(3), "float32", shared_sizes=(16,))
    expected = layer.run(GPU)
    stream = cupy.cuda.get_current_stream().ptr or 1
    made = layer.build(SimpleNamespace(asarray=lambda array: Interface(GPU.asarray(array), stream)))
    x, routing, experts, shared = made
    assert experts.kind == ("cupy", "cuda:0")
    y = cumoe.moe(x, routing, experts, shared)
    assert isinstance(y, cupy.ndarray) and (cupy.asnumpy(y) == expected).all()
    out = Interface(cupy.full_like(y, np.nan))
    assert cumoe.moe(x, routing, experts, shared, out=out) is out
    assert (cupy.asnumpy(out.array) == expected).all()
    with pytest.raises(ValueError, match="out: expected a writable array, got a read-only one"):
        cumoe.moe(x, routing, experts, shared, out=Interface(cupy.zeros_like(y), read_only=True))


@pytest.mark.gpu
@needs_gpu
def test_the_stream_of_an_interface_is_waited_for_by_the_device():
    """Tokens that are not there yet when the call returns; the host does not wait."""
    import cupy

    layer = random_layer(np.random.default_rng(4), "float32")
    expected = layer.run(GPU)
    x, routing, experts, shared = layer.build(GPU)
    late = cupy.full_like(x, np.nan)
    producer, consumer = cupy.cuda.Stream(non_blocking=True), cupy.cuda.Stream(non_blocking=True)
    cupy.cuda.Device().synchronize()
    with consumer:
        cumoe.moe(x, routing, experts, shared)  # memory for the next call is in the pool of the stream
    consumer.synchronize()
    spin = cupy.RawKernel(
        'extern "C" __global__ void spin(long long n) { for (long long b = clock64(); clock64() - b < n;); }', "spin"
    )
    with producer:
        spin((1,), (1,), (np.int64(1_000_000_000),))  # about half a second
        late[...] = x
    with consumer:
        y = cumoe.moe(Interface(late, producer.ptr), routing, experts, shared)
        assert not producer.done
        consumer.synchronize()
    assert (cupy.asnumpy(y) == expected).all()


def fake_cupy(monkeypatch, current=0):
    """Put a CuPy in place that records whose stream becomes the current one; return the record."""
    entered = []

    class Entering:
        def __init__(self, what):
            self.what = what

        def __enter__(self):
            entered.append(self.what)

        def __exit__(self, *_):
            pass

    class Stream:
        null = Entering("null")

        @staticmethod
        def from_external(handle):
            return Entering(handle.__cuda_stream__())

    cuda = SimpleNamespace(
        Device=lambda i: Entering(f"device {i}"), Stream=Stream, get_current_stream=lambda: SimpleNamespace(ptr=current)
    )
    monkeypatch.setitem(sys.modules, "cupy", SimpleNamespace(cuda=cuda))
    return entered


class Tensor:
    """A tensor of a torch that is none."""

    is_cuda, device = True, SimpleNamespace(index=1)


Tensor.__module__ = "torch"


@pytest.mark.parametrize(
    ("theirs", "ours", "entered"),
    [(77, 0, ["device 1", (0, 77)]), (0, 5, ["device 1", "null"]), (5, 5, ["device 1"]), (0, 0, ["device 1"])],
)
def test_a_call_with_tensors_runs_on_the_stream_of_torch(monkeypatch, theirs, ours, entered):
    """Of the device of the tensor, wherever among the arguments it is; it is left again."""
    stream_of = {1: SimpleNamespace(cuda_stream=theirs)}
    torch = SimpleNamespace(cuda=SimpleNamespace(current_stream=lambda device: stream_of[device.index]))
    monkeypatch.setitem(sys.modules, "torch", torch)
    record = fake_cupy(monkeypatch, ours)
    seen = streams.on_producers_stream(lambda *_, **__: list(record))
    assert seen(Tensor()) == entered
    record.clear()
    assert seen(None, 3, out=Tensor()) == entered


def test_a_call_without_tensors_stays_where_it_is(monkeypatch):
    """NumPy arrays, and tensors on the host."""
    record = fake_cupy(monkeypatch)
    on_host = type("Tensor", (), {"is_cuda": False, "__module__": "torch"})()
    for torch in ({}, {"torch": SimpleNamespace()}):
        for name in ("torch",):
            monkeypatch.delitem(sys.modules, name, raising=False)
        for name, module in torch.items():
            monkeypatch.setitem(sys.modules, name, module)
        assert streams.on_producers_stream(lambda x, y: (x, y))(on_host, y=2) == (on_host, 2)
    assert record == []


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_graph_of_torch_captures_a_layer(dtype):
    """On torch's stream, tensors in and out, without a wait that would end the capture; replayed with other tokens."""
    torch = pytest.importorskip("torch")

    def tensor(array):
        wide = array.astype(np.float32) if array.dtype == BF16 else array
        return torch.from_numpy(np.ascontiguousarray(wide)).to(getattr(torch, array.dtype.name)).cuda()

    arrays = random_layer(np.random.default_rng(5), dtype, num_tokens=40, shared_sizes=(16,))
    x, _, experts, shared = arrays.build(SimpleNamespace(asarray=tensor))
    logits = tensor(np.random.default_rng(6).standard_normal((40, 6)).astype(np.float32))
    layer = cumoe.MoE(cumoe.Router(2, renormalize=True), experts, shared)
    out = torch.full_like(x, torch.nan)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        layer(x, logits, out=out)  # memory is taken before the capture
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        layer(x, logits, out=out)
    for seed in (7, 8):
        tokens = tensor(np.random.default_rng(seed).standard_normal(arrays.x.shape).astype(arrays.x.dtype))
        expected = layer(tokens, logits)
        x.copy_(tokens)
        out.fill_(torch.nan)
        graph.replay()
        assert torch.equal(out, expected)


@pytest.mark.gpu
@needs_gpu
def test_a_call_does_not_wait_for_torch():
    """While torch's stream is busy a call returns, and what it gives is right when the stream gets there."""
    torch = pytest.importorskip("torch")
    arrays = random_layer(np.random.default_rng(9), "float32")
    x, routing, experts, shared = arrays.build(SimpleNamespace(asarray=lambda a: torch.from_numpy(a.copy()).cuda()))
    wide = routing.topk_ids.long(), routing.topk_weights.double()  # to be converted on the same stream
    expected = cumoe.moe(x, routing, experts, shared)
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        cumoe.moe(x + 0, tuple(part + 0 for part in wide), experts, shared)  # memory and CuPy's own kernels are there
        stream.synchronize()
        torch.cuda._sleep(1_000_000_000)  # about half a second
        late, (ids, weights) = x + 0, (part + 0 for part in wide)
        y = cumoe.moe(late, (ids, weights), experts, shared)
        assert not stream.query()
    stream.synchronize()
    assert torch.equal(y, expected)


def test_an_import_without_a_cache_folder_says_what_to_do(monkeypatch, caplog):
    """CuPy makes its folder when it is imported; where it cannot, arrays are NumPy's and the log has the variable."""
    import importlib

    from cumoe.door import arrays

    class Broken:
        def find_spec(self, name, *_):
            if name == "cupy":
                raise PermissionError("[Errno 13] Permission denied: '/nowhere'")

    source = importlib.util.find_spec("cumoe.door.arrays")
    copy = importlib.util.module_from_spec(source)
    monkeypatch.delitem(sys.modules, "cupy", raising=False)
    monkeypatch.setattr(sys, "meta_path", [Broken(), *sys.meta_path])
    with caplog.at_level(logging.INFO, "cumoe"):
        source.loader.exec_module(copy)
    assert copy.cupy is None and arrays is not copy
    assert "PermissionError" in caplog.text and "set CUPY_CACHE_DIR to a folder that can be written" in caplog.text


def test_values_close_in_every_dtype_of_logits(backend):
    """Logits may be of another float type than the tokens."""
    layer = random_layer(np.random.default_rng(10), "float32", num_tokens=9)
    x, _, experts, _ = layer.build(backend)
    logits = np.random.default_rng(11).integers(-8, 9, (9, 6)).astype(np.float32) / 4
    results = []
    for dtype in DTYPES.values():
        made = cumoe.MoE(cumoe.Router(2), experts)
        results.append(backend.asnumpy(made(x, backend.asarray(logits.astype(dtype)))))
    for result in results[1:]:
        assert_close(result, results[0], np.float32)
