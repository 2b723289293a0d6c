"""How large, how small and how odd sizes and arrays may be: the right answer, or a refusal in one sentence.

Offsets beyond 2^31 on a GPU are in test_large.py, wrong kinds and shapes in test_refusals*.py.
"""

import numpy as np
import pytest
from support import BF16, CPU, DTYPES, GPU, assert_close, gpu_is_there, random_layer

import cumoe

SIZES = (1, 7, 33, 72, 96, 131, 352, 704, 1408, 1856, 2688, 2880)
needs_gpu = pytest.mark.skipif(not gpu_is_there(), reason="no CUDA device")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("which", ["hidden_size", "intermediate_size"])
def test_sizes(backend, dtype, size, which):
    """Sizes of published models and awkward ones, whole tiles and not, of both axes."""
    sizes = {"hidden_size": 72, "intermediate_size": 40} | {which: size}
    layer = random_layer(
        np.random.default_rng(size), dtype, num_tokens=5, num_experts=3, shared_sizes=(min(size, 352),), **sizes
    )
    assert_close(layer.run(backend), layer.expected(), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_experts", [1, 2, 3, 5, 7, 31, 32, 33, 129, 257, 384, 513, 896, 1000, 1023, 1024])
def test_numbers_of_experts(backend, dtype, num_experts):
    """Powers of 2 and their neighbours; the first and the last expert are chosen."""
    top_k = min(num_experts, 8)
    layer = random_layer(
        np.random.default_rng(num_experts), dtype, num_tokens=9, hidden_size=16, intermediate_size=8,
        num_experts=num_experts, top_k=top_k,
    )  # fmt: skip
    layer.topk_ids[0, 0], layer.topk_ids[-1, -1] = 0, num_experts - 1
    assert_close(layer.run(backend), layer.expected(), dtype)


@pytest.mark.parametrize("num_experts", [1, 2, 7, 33, 64, 1024])
def test_every_token_to_every_expert(backend, num_experts):
    """With top_k = num_experts the router leaves nobody out, and the layer is the sum of all experts."""
    rng = np.random.default_rng(num_experts)
    layer = random_layer(
        rng, "float32", num_tokens=3, hidden_size=16, intermediate_size=8, num_experts=num_experts, top_k=num_experts
    )
    logits = rng.standard_normal((3, num_experts)).astype(np.float32)
    routing = cumoe.route(backend.asarray(logits), cumoe.Router(num_experts, renormalize=True))
    layer.topk_ids, layer.topk_weights = map(backend.asnumpy, routing)
    assert (np.sort(layer.topk_ids, axis=1) == np.arange(num_experts)).all()
    np.testing.assert_allclose(layer.topk_weights.sum(axis=1), 1, rtol=1e-5)
    assert_close(layer.run(backend), layer.expected(), "float32")


def test_more_experts_than_a_gpu_takes():
    """On a CPU there is no limit."""
    layer = random_layer(np.random.default_rng(0), "float32", num_experts=3000, hidden_size=8, intermediate_size=4)
    assert_close(layer.run(CPU), layer.expected(), "float32")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_tokens", [0, 1])
@pytest.mark.parametrize("top_k", [1, 3])
def test_no_token_and_one(backend, dtype, num_tokens, top_k):
    """Through every stage, with shared experts, with routing given and made."""
    layer = random_layer(
        np.random.default_rng(1), dtype, num_tokens=num_tokens, top_k=top_k, shared_sizes=(16, 8), gated_shared=True
    )
    assert_close(layer.run(backend), layer.expected(), dtype)
    x, _, experts, shared = layer.build(backend)
    weight = backend.asarray(np.ones((6, 72), np.float32))
    y = cumoe.MoE(cumoe.Router(top_k, renormalize=True), experts, shared, router_weight=weight)(x)
    assert y.shape == (num_tokens, 72) and np.isfinite(backend.asnumpy(y).astype(np.float32)).all()
    groups = cumoe.group(backend.asarray(np.zeros((num_tokens, top_k), np.int32)), 6)
    product = cumoe.grouped_gemm(x, experts.weights.w_gate_up, groups, rows="tokens", dtype=np.float32)
    assert product.shape == (num_tokens * top_k, 48)
    assert cumoe.combine(product, groups).shape == (num_tokens, 48)


@pytest.mark.parametrize("dtype", DTYPES)
def test_more_tokens_than_two_bytes_count(backend, dtype):
    """65,546 tokens, which is no multiple of anything: the first and the last are as they are in a small batch."""
    num_tokens, few = 65546, 1009
    layer = random_layer(
        np.random.default_rng(2), dtype, num_tokens=few, hidden_size=24, intermediate_size=8, num_experts=5, top_k=2,
        shared_sizes=(8,),
    )  # fmt: skip
    expected = layer.expected()
    for name in ("x", "topk_ids", "topk_weights"):
        setattr(layer, name, np.resize(getattr(layer, name), (num_tokens, getattr(layer, name).shape[1])))
    y = layer.run(backend)
    assert_close(y[:few], expected, dtype)
    assert_close(y[-few:], np.resize(expected, (num_tokens, 24))[-few:], dtype)
    assert_close(y, np.resize(expected, y.shape), dtype)


def test_weights_beyond_4_gib_of_a_file(tmp_path):
    """The experts at both ends of 2^31 elements of bfloat16, in a file that has holes elsewhere."""
    num_experts, hidden_size, intermediate_size = 1024, 1048, 1032
    shapes = {
        "w_gate_up": (num_experts, 2 * intermediate_size, hidden_size),
        "w_down": (num_experts, hidden_size, intermediate_size),
    }
    assert np.prod(shapes["w_gate_up"], dtype=np.int64) > 2**31
    rng = np.random.default_rng(3)
    small, stacks = {}, {}
    for name, shape in shapes.items():
        small[name] = (rng.standard_normal((2, *shape[1:])) * shape[-1] ** -0.5).astype(BF16)
        stack = np.memmap(tmp_path / name, np.uint16, "w+", shape=shape)
        stack[0], stack[-1] = small[name].view(np.uint16)
        stacks[name] = np.memmap(tmp_path / name, np.uint16, "r", shape=shape).view(BF16)
    x = rng.standard_normal((3, hidden_size)).astype(BF16)
    ids, weights = np.array([[0], [1], [1]], np.int32), np.ones((3, 1), np.float32)
    y = cumoe.moe(x, (ids * (num_experts - 1), weights), cumoe.Experts(**stacks))
    assert_close(y, cumoe.reference.moe(x, cumoe.Routing(ids, weights), cumoe.Experts(**small)), BF16)


# --- odd arrays ---


def off_by_a_byte(array):
    """Return the same numbers, each of them at an odd address."""
    moved = np.frombuffer(b"\0" + array.tobytes(), np.uint8)[1:].view(array.dtype).reshape(array.shape)
    assert not moved.flags.aligned or array.itemsize == 1
    return moved


@pytest.mark.parametrize("dtype", DTYPES)
def test_misaligned_numpy_arrays(dtype):
    """NumPy reads them, and so does the layer."""
    layer = random_layer(np.random.default_rng(4), dtype, shared_sizes=(16,), biases=True)
    expected = layer.expected()
    layer.x, layer.topk_ids, layer.topk_weights = map(off_by_a_byte, (layer.x, layer.topk_ids, layer.topk_weights))
    for name in ("w_gate_up", "w_down", "b_gate_up", "b_down"):
        layer.experts[name] = off_by_a_byte(layer.experts[name])
    assert_close(layer.run(CPU), expected, dtype)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("name", ["x", "w_gate_up", "topk_ids", "topk_weights", "out"])
def test_misaligned_cupy_arrays_are_refused(name):
    """A GPU cannot read them: without the refusal the process would have no GPU any more."""
    import cupy

    layer = random_layer(np.random.default_rng(5), "float32")

    def odd(array):
        array = cupy.ascontiguousarray(array)
        room = cupy.zeros(array.nbytes + 1, np.uint8)[1:]
        return cupy.ndarray(array.shape, array.dtype, memptr=room.data)

    x, routing, experts, _ = layer.build(GPU)
    given = {"x": x, "topk_ids": routing.topk_ids, "topk_weights": routing.topk_weights, "out": cupy.empty_like(x)}
    given["w_gate_up"] = experts.weights.w_gate_up
    given[name] = odd(given[name])
    with pytest.raises(ValueError, match=f"^{name}: expected elements at multiples of 4 bytes, got address 0x"):
        cumoe.moe(
            given["x"], (given["topk_ids"], given["topk_weights"]),
            cumoe.Experts(given["w_gate_up"], experts.weights.w_down), out=given["out"],
        )  # fmt: skip
    assert_close(layer.run(GPU), layer.expected(), "float32")


VIEWS = {
    "backward": (lambda a: a[..., ::-1], lambda a: a[..., ::-1]),
    "backward rows": (lambda a: a[..., ::-1, :], lambda a: a[..., ::-1, :]),
    "backward experts": (lambda a: a[::-1], lambda a: a[::-1]),
    "every third": (lambda a: np.repeat(a, 3, axis=-1), lambda a: a[..., ::3]),
    "every second row": (lambda a: np.repeat(a, 2, axis=-2), lambda a: a[..., ::2, :]),
    "transposed": (lambda a: a.swapaxes(-1, -2), lambda a: a.swapaxes(-1, -2)),
    "experts innermost": (lambda a: a.transpose(1, 2, 0), lambda a: a.transpose(2, 0, 1)),
    "all axes backward": (lambda a: a.T, lambda a: a.T),
}
"""How weights are put into memory, and what is then seen of it."""


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("view", VIEWS)
def test_weights_may_be_any_view(backend, dtype, view):
    """Also those that no fast kernel reads."""
    layer = random_layer(np.random.default_rng(6), dtype, num_tokens=20, hidden_size=72, intermediate_size=40)
    x, routing, _, _ = layer.build(backend)
    put, see = VIEWS[view]
    weights = [see(backend.asarray(np.ascontiguousarray(put(layer.experts[n])))) for n in ("w_gate_up", "w_down")]
    assert not any(w.flags.c_contiguous for w in weights)
    y = cumoe.moe(x, routing, cumoe.Experts(*weights))
    assert_close(backend.asnumpy(y), layer.expected(), dtype)


def test_one_matrix_may_serve_all_experts(backend):
    """A broadcast stack, whose experts are the same memory."""
    layer = random_layer(np.random.default_rng(7), "float32", num_experts=1, top_k=1)
    x, routing, one, _ = layer.build(backend)
    expected = layer.run(backend)
    if backend.name == "gpu":
        import cupy as xp
    else:
        xp = np
    stacks = [xp.broadcast_to(w, (50, *w.shape[1:])) for w in one.weights[:2]]
    ids = backend.asarray(np.arange(33, dtype=np.int32)[:, None])
    y = cumoe.moe(x, (ids, routing.topk_weights), cumoe.Experts(*stacks))
    assert_close(backend.asnumpy(y), expected, "float32")


# --- where `out` lies ---


def identity_layer(backend, num_tokens=20):
    """Return a layer with identity experts, which reads its tokens until the end, and such tokens."""
    layer = random_layer(np.random.default_rng(8), "float32", num_tokens=num_tokens, hidden_size=24, num_experts=4)
    _, _, experts, _ = layer.build(backend)
    weight = backend.asarray(np.random.default_rng(9).standard_normal((6, 24)).astype(np.float32))
    return cumoe.MoE(cumoe.Router(3), experts, num_identity_experts=2, router_weight=weight), layer.x


def shifted(backend, x):
    """Return tokens and an array of their shape that begins one token further on, in the same memory."""
    memory = backend.asarray(np.concatenate([x, np.full((1, x.shape[1]), np.nan, x.dtype)]))
    return memory[:-1], memory[1:]


def test_out_may_lie_over_the_tokens_in_any_way(backend):
    """All is read before anything is written."""
    layer = random_layer(np.random.default_rng(10), "float32", shared_sizes=(16,))
    _, routing, experts, shared = layer.build(backend)
    expected = layer.run(backend)
    tokens, out = shifted(backend, layer.x)
    cumoe.moe(tokens, routing, experts, shared, out=out)
    assert backend.asnumpy(out).tobytes() == expected.tobytes()


def test_out_over_tokens_that_are_read_to_the_end(backend):
    """As the tokens themselves it is right; shifted it is right on a CPU and refused on a GPU."""
    made, x = identity_layer(backend)
    expected = backend.asnumpy(made(backend.asarray(x)))
    tokens, out = shifted(backend, x)
    if backend.name == "gpu":
        with pytest.raises(ValueError, match=r"^out: expected memory that x has no part in, got an overlapping array$"):
            made(tokens, out=out)
        assert (backend.asnumpy(tokens) == x).all()
    else:
        made(tokens, out=out)
        assert (out == expected).all()
    tokens = backend.asarray(x.copy())
    assert made(tokens, out=tokens) is tokens
    assert (backend.asnumpy(tokens) == expected).all()


@pytest.mark.parametrize("over", ["rows", "shared_rows"])
def test_combine_into_what_it_reads(backend, over):
    """Right on a CPU; on a GPU, where other tokens' rows would be gone, refused."""
    rng = np.random.default_rng(11)
    rows, shared = rng.standard_normal((9, 8)).astype(np.float32), rng.standard_normal((1, 9, 8)).astype(np.float32)
    ids = rng.permutation(9).astype(np.int32)[:, None]
    given = {"rows": backend.asarray(rows.copy()), "shared_rows": backend.asarray(shared.copy())}
    groups = cumoe.group(backend.asarray(ids), 9)
    expected = backend.asnumpy(cumoe.combine(given["rows"], groups, None, given["shared_rows"]))
    out = given[over] if over == "rows" else given[over][0]
    if backend.name == "gpu":
        with pytest.raises(ValueError, match=f"^out: expected memory that {over} has no part in, got an overlapping"):
            cumoe.combine(given["rows"], groups, None, given["shared_rows"], out=out)
    else:
        cumoe.combine(given["rows"], groups, None, given["shared_rows"], out=out)
        assert (out == expected).all()


@pytest.mark.parametrize("strides", [(0, 4), (96, 0), (4, 4), (92, 4), (8, 12)])
def test_out_whose_elements_are_the_same_memory(strides):
    """What is written last would stay: refused. A view without such elements is written."""
    layer = random_layer(np.random.default_rng(12), "float32", num_tokens=5, hidden_size=24)
    x, routing, experts, _ = layer.build(CPU)
    memory = np.zeros(1000, np.float32)
    out = np.lib.stride_tricks.as_strided(memory, x.shape, strides)
    with pytest.raises(ValueError, match=r"^out: expected elements that share no memory, got strides"):
        cumoe.moe(x, routing, experts, out=out)
    assert not memory.any()
    expected = cumoe.moe(x, routing, experts)
    for fine in ((96, 4), (100, 4), (4, 20), (4, 24), (-96, -4), (12, 64)):
        memory = np.zeros(2000, np.float32)
        out = np.lib.stride_tricks.as_strided(memory[1000:], x.shape, fine)
        assert (cumoe.moe(x, routing, experts, out=out) == expected).all()
