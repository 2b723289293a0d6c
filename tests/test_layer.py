"""The layer as an object: routing of its own, memory of its own, graphs, threads, and arrays of other libraries."""

import gc
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from support import CPU, DTYPES, GPU, assert_close, random_layer

import cumoe
from cumoe.door.arrays import give_back

ROUTER = cumoe.Router(2, renormalize=True, scale=2.5)


@dataclass
class Made:
    """A layer on a backend, and what it was made of."""

    layer: cumoe.MoE
    arrays: Any  # the support.Layer with the NumPy arrays
    router_weight: np.ndarray
    router_bias: np.ndarray

    def tokens(self, seed, num_tokens):
        """Draw other tokens, in NumPy."""
        shape = (num_tokens, self.arrays.x.shape[1])
        return np.random.default_rng(seed).standard_normal(shape).astype(self.arrays.x.dtype)

    def expected(self):
        """Return the output by definition: logits and all that follows in float64."""
        x, weight = (array.astype(np.float64) for array in (self.arrays.x, self.router_weight))
        routing = cumoe.reference.route(x @ weight.T + self.router_bias, ROUTER)
        _, _, experts, shared = self.arrays.build(CPU)
        return cumoe.reference.moe(self.arrays.x, routing, experts, shared, weight_on=self.layer.weight_on)


def make(backend, dtype="float32", *, weight_on="output", max_tokens=0, router_dtype=None, **sizes):
    """Make a layer with two gated shared experts that routes by itself."""
    rng = np.random.default_rng(0)
    sizes = {"num_tokens": 40, "shared_sizes": (16, 40), "gated_shared": True, "biases": True} | sizes
    arrays = random_layer(rng, dtype, weight_on=weight_on, **sizes)
    _, _, experts, shared = arrays.build(backend)
    weight = (rng.standard_normal((6, 72)) * 72**-0.5).astype(DTYPES[router_dtype or dtype])
    bias = rng.standard_normal(6)
    layer = cumoe.MoE(
        ROUTER, experts, shared, weight_on=weight_on, max_tokens=max_tokens,
        router_weight=backend.asarray(weight), router_bias=backend.asarray(bias),
    )  # fmt: skip
    return Made(layer, arrays, weight, bias)


def eager(made, tokens):
    """Return what a call gives for NumPy tokens on the GPU, as NumPy."""
    return GPU.asnumpy(made.layer(GPU.asarray(tokens)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("weight_on", ["input", "activation", "output"])
def test_layer_routes_and_computes(backend, dtype, weight_on):
    """By definition, from tokens alone."""
    made = make(backend, dtype, weight_on=weight_on)
    assert_close(backend.asnumpy(made.layer(backend.asarray(made.arrays.x))), made.expected(), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("weight_on", ["input", "activation", "output"])
def test_layer_with_logits_is_route_then_moe(backend, dtype, weight_on):
    """The same bits; the layer's own projection plays no part."""
    made = make(backend, dtype, weight_on=weight_on)
    x, _, experts, shared = made.arrays.build(backend)
    logits = backend.asarray(np.random.default_rng(1).standard_normal((40, 6)).astype(np.float32))
    together = cumoe.moe(x, cumoe.route(logits, ROUTER), experts, shared, weight_on=weight_on)
    assert (backend.asnumpy(made.layer(x, logits)) == backend.asnumpy(together)).all()
    assert not (backend.asnumpy(made.layer(x)) == backend.asnumpy(together)).all()
    plain = cumoe.MoE(ROUTER, experts, shared, weight_on=weight_on)
    assert (backend.asnumpy(plain(x, logits)) == backend.asnumpy(together)).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("router_dtype", DTYPES)
def test_router_weight_may_have_its_own_dtype(backend, dtype, router_dtype):
    """Each pair of dtypes gives the float64 routing."""
    made = make(backend, dtype, router_dtype=router_dtype)
    assert_close(backend.asnumpy(made.layer(backend.asarray(made.arrays.x))), made.expected(), dtype)


def chosen(backend, dtype, router_weight, router_bias=None):
    """Return the expert that a token of eight ones is sent to."""
    eye = np.eye(8, dtype=dtype)
    stack = np.stack([eye] * 8), np.stack([(e + 1) * eye for e in range(8)])  # expert e multiplies by e + 1
    experts = cumoe.Experts(*map(backend.asarray, stack), activation="identity", layout="ungated")
    layer = cumoe.MoE(
        cumoe.Router(1, renormalize=True), experts,
        router_weight=backend.asarray(router_weight), router_bias=backend.asarray(router_bias),
    )  # fmt: skip
    y = backend.asnumpy(layer(backend.asarray(np.ones((1, 8), dtype))))
    assert (y == y[0, 0]).all()
    return int(y[0, 0]) - 1


@pytest.mark.parametrize("dtype", DTYPES)
def test_float32_router_weights_are_not_rounded(backend, dtype):
    """Rows that differ in the twelfth bit: in 16 bits they would tie, and expert 0 would win."""
    weight = np.repeat(1 + np.arange(8) * np.float32(2**-12), 8).reshape(8, 8)
    assert chosen(backend, DTYPES[dtype], weight.astype(np.float32)) == 7


@pytest.mark.parametrize("dtype", DTYPES)
def test_logits_are_not_rounded(backend, dtype):
    """256 + e / 32 in 16 bits would tie, and expert 0 would win."""
    weight = np.zeros((8, 8), DTYPES[dtype])
    weight[:, 0], weight[:, 5] = 256, np.arange(8) / 32
    assert chosen(backend, DTYPES[dtype], weight) == 7


def test_router_bias_moves_the_choice(backend):
    """It is added to the logits, in any float dtype."""
    for dtype in (*DTYPES.values(), np.float64):
        bias = np.array([0, 1, 2, 3, 4, 5, 4, 3]).astype(dtype)
        assert chosen(backend, np.float32, np.zeros((8, 8), np.float32), bias) == 5


def test_out_may_be_given_and_may_be_x(backend):
    """The result is written where the caller says, even over the tokens."""
    made = make(backend)
    x = backend.asarray(made.arrays.x)
    expected = backend.asnumpy(made.layer(x))
    out = backend.asarray(np.full(made.arrays.x.shape, np.nan, np.float32))
    assert made.layer(x, out=out) is out
    assert (backend.asnumpy(out) == expected).all()
    assert made.layer(x, out=x) is x
    assert (backend.asnumpy(x) == expected).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_nothing_is_left_of_an_earlier_call(backend, dtype):
    """Batches of other sizes, some of NaN alone, do not change what a call returns."""
    made = make(backend, dtype)
    for num_tokens in (40, 7, 0, 1, 65, 40):
        tokens = made.tokens(num_tokens, num_tokens)
        made.layer(backend.asarray(np.full_like(made.tokens(0, 50), np.nan)))
        fresh = make(backend, dtype).layer(backend.asarray(tokens))
        y = made.layer(backend.asarray(tokens))
        assert y.shape == tokens.shape
        assert backend.asnumpy(y).tobytes() == backend.asnumpy(fresh).tobytes()
        assert not np.isnan(backend.asnumpy(y).astype(np.float32)).any()


def test_repr_names_the_parts(backend):
    """Enough to recognise a layer by."""
    text = repr(make(backend, "bfloat16", weight_on="input").layer)
    assert text.startswith("MoE(Experts(num_experts=6, hidden_size=72, intermediate_size=24, bfloat16, ")
    assert text.count("SharedExperts(num_shared=1, hidden_size=72, ") == 2
    assert text.endswith("top_k=2, scoring='softmax', weight_on='input')")


def test_workspace_bytes(backend):
    """Nothing on a CPU; on a GPU it grows with the tokens."""
    layer = make(backend).layer
    needed = [layer.workspace_bytes(num_tokens) for num_tokens in (0, 1, 2, 100, 5000, 2**20)]
    if backend.name == "cpu":
        assert needed == [0] * 6
    else:
        assert needed == sorted(needed)
        assert 0 < needed[1] < needed[3] < needed[4] < needed[5]


@pytest.mark.parametrize("one_stream", [True, False])
def test_threads_share_a_layer(backend, one_stream):
    """Two threads, each with tokens of its own, get the bits that they get alone."""
    made = make(backend, "bfloat16")
    batches = [made.tokens(seed, num_tokens) for seed, num_tokens in ((1, 30), (2, 47))]
    expected = [backend.asnumpy(made.layer(backend.asarray(tokens))).tobytes() for tokens in batches]
    streams = [nullcontext()] * 2
    if backend.name == "gpu":
        import cupy

        first = cupy.cuda.Stream(non_blocking=True)
        streams = [first, first if one_stream else cupy.cuda.Stream(non_blocking=True)]

    def work(i):
        with streams[i]:
            x = backend.asarray(batches[i])
            return [backend.asnumpy(made.layer(x)).tobytes() for _ in range(30)]

    with ThreadPoolExecutor(2) as pool:
        for got, wanted in zip(pool.map(work, range(2)), expected, strict=True):
            assert set(got) == {wanted}


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("first", [64, 1])
def test_later_calls_allocate_nothing(dtype, first):
    """After one call, of any size up to `max_tokens`, smaller and larger batches need no memory."""
    import cupy

    made = make(GPU, dtype, max_tokens=64)
    x, out = GPU.asarray(made.tokens(0, 64)), GPU.asarray(np.full((64, 72), np.nan, DTYPES[dtype]))
    pool = cupy.get_default_memory_pool()
    made.layer(x[:first], out=out[:first])
    gc.collect()  # or what an earlier test has left may be freed in between
    before = pool.used_bytes(), pool.total_bytes()
    for num_tokens in (64, 1, 2, 3, 5, 8, 13, 21, 34, 55, 64, 63, 40, 33, 32, 17, 16, 9, 4, 64):
        made.layer(x[:num_tokens], out=out[:num_tokens])
        assert (pool.used_bytes(), pool.total_bytes()) == before
    assert GPU.asnumpy(out).tobytes() == eager(made, made.tokens(0, 64)).tobytes()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("warm", [True, False])
def test_a_graph_replays_with_other_tokens(dtype, warm):
    """A captured call routes anew at each replay, and outlives the growth of the layer's memory."""
    import cupy

    made = make(GPU, dtype)
    batches = [made.tokens(seed, 40) for seed in range(4)]
    expected = [eager(made, tokens).tobytes() for tokens in batches]
    weight = made.router_weight.astype(np.float64).T
    routings = [cumoe.reference.route(x.astype(np.float64) @ weight, ROUTER).topk_ids for x in batches]
    assert not (routings[0] == routings[1]).all()

    stream = cupy.cuda.Stream(non_blocking=True)
    with stream:
        x, poison = GPU.asarray(batches[0]), GPU.asarray(np.full((40, 72), np.nan, DTYPES[dtype]))
        y = poison.copy()
        if warm:
            made.layer(x, out=y)
        stream.synchronize()
        stream.begin_capture()
        made.layer(x, out=y)
        graph = stream.end_capture()
        for tokens, wanted in zip(batches, expected, strict=True):
            x[...] = GPU.asarray(tokens)
            y[...] = poison
            graph.launch(stream)
            stream.synchronize()
            assert GPU.asnumpy(y).tobytes() == wanted
            made.layer(GPU.asarray(made.tokens(9, 300)))  # the block of the stream grows; the graph keeps its own


def foreign_layer(library, arrays, convert):
    """Make the same layer from NumPy arrays and from those that `convert` gives; return both."""
    layers = []
    for backend in (CPU, SimpleNamespace(asarray=convert)):
        _, _, experts, shared = arrays.build(backend)
        weight = np.random.default_rng(3).standard_normal((6, 72)).astype(np.float32)
        layers.append(cumoe.MoE(ROUTER, experts, shared, router_weight=backend.asarray(weight)))
    assert layers[1].kind.library == library.__name__
    return layers


@pytest.mark.parametrize("dtype", DTYPES)
def test_torch_tensors_in_and_out(monkeypatch, dtype):
    """Host tensors are computed in place: nothing is copied, and a tensor comes back."""
    torch = pytest.importorskip("torch")
    converted = []

    def tensor(array):
        converted.append(torch.from_numpy(array.astype(np.float32)).to(getattr(torch, array.dtype.name)))
        return converted[-1]

    arrays = random_layer(np.random.default_rng(0), dtype, num_tokens=20, shared_sizes=(16,), gated_shared=True)
    ours, theirs = foreign_layer(torch, arrays, tensor)
    addresses = {one.data_ptr() for one in converted}
    assert {theirs.experts.weights.w_gate_up.ctypes.data, theirs.experts.weights.w_down.ctypes.data} <= addresses
    x, expected = tensor(arrays.x), ours(arrays.x).astype(np.float32)

    results = []
    monkeypatch.setattr("cumoe.layer.module.give_back", lambda y, kind: give_back(results.append(y) or y, kind))
    y = theirs(x)
    assert (type(y), y.dtype) == (torch.Tensor, x.dtype)
    assert y.data_ptr() == results[0].ctypes.data
    assert (y.float().numpy() == expected).all()
    out = torch.full_like(x, torch.nan)
    assert theirs(x, out=out) is out
    assert (out.float().numpy() == expected).all()

    routing = cumoe.route(tensor(np.random.default_rng(1).standard_normal((20, 6)).astype(np.float32)), ROUTER)
    assert type(routing.topk_ids) is type(routing.topk_weights) is torch.Tensor
    y = cumoe.moe(x, routing, theirs.experts, theirs.shared)
    numpy_routing = cumoe.Routing(*(array.numpy() for array in routing))
    assert (y.float().numpy() == cumoe.moe(arrays.x, numpy_routing, ours.experts, ours.shared).astype(np.float32)).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_jax_arrays_in_and_out(jax, dtype):
    """They cannot be written, so they are no outputs."""
    arrays = random_layer(np.random.default_rng(0), dtype, num_tokens=20, shared_sizes=(16,), gated_shared=True)
    ours, theirs = foreign_layer(jax, arrays, jax.numpy.asarray)
    x = jax.numpy.asarray(arrays.x)
    y = theirs(x)
    assert isinstance(y, jax.Array) and y.dtype == x.dtype
    assert (np.asarray(y).astype(np.float32) == ours(arrays.x).astype(np.float32)).all()
    with pytest.raises(ValueError, match=r"^out: expected a writable array, got a read-only one$"):
        theirs(x, out=jax.numpy.zeros_like(x))
    assert (np.asarray(x) == arrays.x).all()
