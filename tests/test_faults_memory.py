"""When there is no memory, at any point of a call; and what a captured graph keeps alive."""

import gc
import weakref
from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
import pytest
from support import DTYPES, GPU, random_layer

import cumoe


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


STAGES = ["route", "group", "grouped_gemm", "combine", "expert_load"]


def stage_call(stage):
    """Return a call of a stage on arrays that nobody else holds; it gives one of its results alone."""
    rng = np.random.default_rng(6)
    logits = rng.standard_normal((700, 6)).astype(np.float32)
    ids, weights = cumoe.route(logits, cumoe.Router(2))
    if stage == "route":
        on_gpu = GPU.asarray(logits)
        return lambda: cumoe.route(on_gpu, cumoe.Router(2)).topk_weights
    if stage in ("group", "expert_load"):
        wide = GPU.asarray(ids.astype(np.int64))  # converted inside, as the factors are
        if stage == "group":
            return lambda: cumoe.group(wide, 6).tokens_per_expert
        on_gpu, factors = GPU.asarray(logits), GPU.asarray(weights.astype(np.float64))
        return lambda: cumoe.expert_load((wide, factors), 6, on_gpu).aux_loss
    order = cumoe.Groups(*map(GPU.asarray, cumoe.group(ids, 6)))
    factors = GPU.asarray(weights.astype(np.float64))
    rows = GPU.asarray(rng.standard_normal((1400, 72)).astype(np.float32))[:, ::-1]
    if stage == "combine":
        return lambda: cumoe.combine(rows, order, factors, dtype=np.float16)
    matrices = GPU.asarray(rng.standard_normal((6, 40, 72)).astype(np.float32))
    return lambda: cumoe.grouped_gemm(rows, matrices, order, row_scale=factors, dtype=np.float16)


@pytest.mark.gpu
@pytest.mark.parametrize("stage", STAGES[:-1])
def test_what_a_captured_stage_uses_is_held(monkeypatch, stage):
    """Every block of memory that it has allocated or been given, by what its results hold."""
    import cupy

    from cumoe.gpu import captures

    if not hasattr(cupy, "num_launches"):
        pytest.skip("only the stand-in's memory can be watched")
    blocks, holding, allocate = [], [], cupy.cuda.get_allocator()

    def watched(num_bytes):
        pointer = allocate(num_bytes)
        blocks.append(weakref.ref(pointer.memory))
        return pointer

    monkeypatch.setattr(captures, "captures", lambda stream: True)
    monkeypatch.setattr(captures, "_holding", lambda array, held: holding.append(held) or array)
    with cupy.cuda.using_allocator(watched):
        captured = stage_call(stage)
        given = len(blocks)
        captured()
        del captured
    gc.collect()
    assert len(blocks) > given > 0
    assert holding
    assert sum(block() is None for block in blocks) == 0


@pytest.mark.gpu
@pytest.mark.parametrize("stage", STAGES)
def test_what_a_stage_in_a_graph_uses_is_kept(stage):
    """By any of its results: inputs, conversions, temporary arrays and the other results are let go."""
    import cupy

    wanted = GPU.asnumpy(stage_call(stage)())
    stream = cupy.cuda.Stream(non_blocking=True)
    cupy.cuda.Device().synchronize()
    with stream:
        captured = stage_call(stage)
        captured()
        stream.synchronize()
        stream.begin_capture()
        result = captured()
        graph = stream.end_capture()
        del captured
        gc.collect()
        junk = [cupy.full(size, 255, np.uint8) for size in (512, 1024, 4096, 8192, 16384, 65536) for _ in range(50)]
        for _ in range(3):
            result.reshape(-1).view(np.uint8)[...] = 255
            graph.launch(stream)
            stream.synchronize()
            same = GPU.asnumpy(result).tobytes() == wanted.tobytes()
            assert same  # the bytes themselves would be compared at length
        assert all(int((block != 255).sum()) == 0 for block in junk)


def test_a_capture_is_what_holds(monkeypatch):
    """Outside of one nothing is kept, or a layer would grow with every call."""
    from cumoe.gpu import captures, workspace

    runtime = SimpleNamespace(streamIsCapturing=lambda stream: stream == 7)
    held = workspace.Workspace()
    for stream, kept in ((0, 0), (5, 0), (7, 1), (7, 2), (5, 2)):
        cuda = SimpleNamespace(get_current_stream=lambda stream=stream: SimpleNamespace(ptr=stream), runtime=runtime)
        monkeypatch.setattr(captures, "cupy", SimpleNamespace(cuda=cuda))
        held.hold_if_captured(stream, object())
        assert len(held.held) == kept
