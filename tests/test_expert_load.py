"""The load of the experts and the losses that even it out, against the loops that define them."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import DTYPES

import cumoe


def routed(rng, num_tokens, num_experts, top_k, scoring="softmax"):
    """Return logits and the routing that follows from them."""
    logits = (3 * rng.standard_normal((num_tokens, num_experts))).astype(np.float32)
    return logits, cumoe.route(logits, cumoe.Router(top_k, scoring=scoring))


def on(backend, routing):
    return cumoe.Routing(*map(backend.asarray, routing))


def by_loops(ids, num_experts, logits, scoring):
    """Return the five values, counted one by one."""
    num_tokens = len(ids)
    counts = [int((ids == e).sum()) for e in range(num_experts)]
    total = sum(counts)
    entropy = -sum(n / total * math.log(n / total) for n in counts if n)
    aux, squares = [0.0] * num_experts, 0.0
    for row in logits.astype(np.float64):
        scores = np.exp(row) if scoring == "softmax" else 1 / (1 + np.exp(-row))
        for e in range(num_experts):
            aux[e] += scores[e] / scores.sum() / num_tokens
        squares += math.log(np.exp(row).sum()) ** 2
    loss = num_experts * sum(n / num_tokens * p for n, p in zip(counts, aux, strict=True))
    return counts, total / num_experts / max(counts), entropy, loss, squares / num_tokens


@pytest.mark.parametrize("scoring", ["softmax", "sigmoid"])
@pytest.mark.parametrize("sizes", [(37, 8, 2), (1, 3, 3), (300, 60, 4)])
def test_definition(backend, sizes, scoring):
    """Counts exactly, numbers to float32."""
    logits, routing = routed(np.random.default_rng(0), *sizes, scoring=scoring)
    load = cumoe.expert_load(on(backend, routing), sizes[1], backend.asarray(logits), scoring=scoring)
    counts, *expected = by_loops(routing.topk_ids, sizes[1], logits, scoring)
    assert backend.asnumpy(load.tokens_per_expert).tolist() == counts
    for value, wanted in zip(load[1:], expected, strict=True):
        assert value.dtype == np.float32
        assert value.shape == ()
        assert float(value) == pytest.approx(wanted, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
def test_logits_of_any_dtype(backend, dtype):
    """The rounded logits are what counts, in float32."""
    logits, routing = routed(np.random.default_rng(1), 50, 8, 2)
    rounded = logits.astype(DTYPES[dtype])
    load = cumoe.expert_load(on(backend, routing), 8, backend.asarray(rounded))
    expected = by_loops(routing.topk_ids, 8, rounded.astype(np.float32), "softmax")
    assert float(load.z_loss) == pytest.approx(expected[4], rel=1e-5)


def test_even_and_one_hot(backend):
    """The ends of every range."""
    ids = np.arange(24, dtype=np.int32).reshape(12, 2) % 8
    even = on(backend, (ids, np.ones(ids.shape, np.float32)))
    load = cumoe.expert_load(even, 8, backend.asarray(np.zeros((12, 8), np.float32)))
    assert float(load.balancedness) == 1
    assert float(load.entropy) == pytest.approx(math.log(8))
    assert float(load.aux_loss) == pytest.approx(2)
    assert float(load.z_loss) == pytest.approx(math.log(8) ** 2)
    one = on(backend, (np.full((12, 1), 3, np.int32), np.ones((12, 1), np.float32)))
    load = cumoe.expert_load(one, 8)
    assert float(load.balancedness) == pytest.approx(1 / 8)
    assert float(load.entropy) == 0
    assert load.aux_loss is None and load.z_loss is None


def test_nothing_to_measure(backend):
    """No tokens, or no slot with an expert, count as even; slots without an expert are nobody's."""
    none = on(backend, (np.zeros((0, 2), np.int32), np.zeros((0, 2), np.float32)))
    load = cumoe.expert_load(none, 4, backend.asarray(np.zeros((0, 4), np.float32)))
    assert [float(value) for value in load[1:]] == [1, 0, 0, 0]
    ids = np.array([[-1, 4], [-1, 7]], np.int32)
    load = cumoe.expert_load(on(backend, (ids, np.ones(ids.shape, np.float32))), 4)
    assert [float(value) for value in load[1:3]] == [1, 0]
    ids[0, 0] = 2
    load = cumoe.expert_load(on(backend, (ids, np.ones(ids.shape, np.float32))), 4)
    assert backend.asnumpy(load.tokens_per_expert).tolist() == [0, 0, 1, 0]
    assert float(load.balancedness) == 0.25


def test_logits_that_are_not_finite(backend):
    """NaN goes through; an expert that is masked with -inf has probability 0; large logits do not overflow."""
    logits, routing = routed(np.random.default_rng(2), 6, 4, 1)
    huge = cumoe.expert_load(on(backend, routing), 4, backend.asarray(logits + 1000))
    assert float(huge.z_loss) == pytest.approx(1000**2, rel=0.02)
    logits[:, 0] = -np.inf
    routing = cumoe.route(logits, cumoe.Router(1))
    expected = by_loops(routing.topk_ids, 4, logits, "softmax")
    load = cumoe.expert_load(on(backend, routing), 4, backend.asarray(logits))
    assert float(load.aux_loss) == pytest.approx(expected[3], rel=1e-5)
    logits[2, 1] = np.nan
    load = cumoe.expert_load(on(backend, routing), 4, backend.asarray(logits))
    assert math.isnan(float(load.aux_loss)) and math.isnan(float(load.z_loss))


@given(st.integers(0, 60), st.integers(1, 9), st.data())
def test_ranges(num_tokens, num_experts, data):
    """Whatever the ids are."""
    top_k = data.draw(st.integers(1, 4))
    flat = data.draw(st.lists(st.integers(-1, num_experts), min_size=num_tokens * top_k, max_size=num_tokens * top_k))
    ids = np.array(flat, np.int32).reshape(num_tokens, top_k)
    load = cumoe.expert_load((ids, np.ones(ids.shape, np.float32)), num_experts)
    assert 1 / num_experts - 1e-6 <= float(load.balancedness) <= 1
    assert 0 <= float(load.entropy) <= math.log(num_experts) + 1e-6
    assert int(load.tokens_per_expert.sum()) == ((ids >= 0) & (ids < num_experts)).sum()


def test_torch_gets_tensors():
    """Counts and numbers of the library that the routing came from."""
    torch = pytest.importorskip("torch")
    logits = torch.randn(20, 8)
    load = cumoe.expert_load(cumoe.route(logits, cumoe.Router(2)), 8, logits)
    assert all(isinstance(value, torch.Tensor) for value in load)


@pytest.mark.parametrize("top_k", [1, 2, 6])
def test_transformers_computes_the_same_loss(top_k):
    """The function that Mixtral's module adds to the loss of training, for one layer."""
    torch = pytest.importorskip("torch")
    mixtral = pytest.importorskip("transformers.models.mixtral.modeling_mixtral")
    logits, routing = routed(np.random.default_rng(top_k), 200, 8, top_k)
    expected = mixtral.load_balancing_loss_func((torch.from_numpy(logits),), 8, top_k)
    assert float(cumoe.expert_load(routing, 8, logits).aux_loss) == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.gpu
def test_a_gpu_is_not_waited_for():
    """A capture refuses whatever waits for the host."""
    cupy = pytest.importorskip("cupy")
    if not cupy.cuda.is_available():
        pytest.skip("no CUDA device")
    logits, routing = routed(np.random.default_rng(0), 64, 8, 2)
    routing, logits = cumoe.Routing(*map(cupy.asarray, routing)), cupy.asarray(logits)
    cumoe.expert_load(routing, 8, logits)  # compiles
    stream = cupy.cuda.Stream(non_blocking=True)
    with stream:
        stream.begin_capture()
        load = cumoe.expert_load(routing, 8, logits)
        graph = stream.end_capture()
        graph.launch(stream)
        stream.synchronize()
    assert 0 < float(load.balancedness) <= 1
