"""The whole layer against its definition, on both backends."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import DTYPES, assert_close, random_layer

import cumoe

SIZES = st.sampled_from([1, 7, 8, 16, 33, 64, 72, 96, 131, 136])
LAYERS = st.fixed_dictionaries(
    {
        "num_tokens": st.sampled_from([0, 1, 2, 7, 17, 33, 65, 129]),
        "hidden_size": SIZES,
        "intermediate_size": SIZES,
        "num_experts": st.sampled_from([1, 2, 5, 8, 33]),
        "shared_sizes": st.lists(SIZES, max_size=3),
        "gated_shared": st.booleans(),
        "layout": st.sampled_from(["stacked", "interleaved", "ungated"]),
        "activation": st.sampled_from(
            [
                "silu", "gelu", "gelu_tanh", "relu", "relu2", "identity", "gpt_oss",
                cumoe.Activation("silu", limit=0.5), cumoe.Activation("silu", limit=0.3, clamp="after"),
            ]
        ),
        "biases": st.booleans(),
        "transposed": st.booleans(),
        "weight_on": st.sampled_from(["input", "activation", "output"]),
        "routing": st.sampled_from(["uniform", "one_expert", "with_holes", "repeated"]),
    }
)  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
@given(options=LAYERS, top_k=st.integers(1, 8), seed=st.integers(0, 2**32 - 1))
def test_layer_equals_its_definition(backend, dtype, options, top_k, seed):
    """Any shape, layout, activation, placement and routing."""
    layer = random_layer(np.random.default_rng(seed), dtype, top_k=min(top_k, options["num_experts"]), **options)
    assert_close(layer.run(backend), layer.expected(), dtype, unit=0.01)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_tokens", [3, 40, 300])
@pytest.mark.parametrize("transposed", [False, True])
def test_tiles_of_every_height(backend, dtype, num_tokens, transposed):
    """Mean rows an expert below 16, below 64 and above; several tiles in each direction."""
    layer = random_layer(
        np.random.default_rng(num_tokens), dtype, num_tokens=num_tokens, hidden_size=200, intermediate_size=136,
        num_experts=3, top_k=2, shared_sizes=(72, 264), gated_shared=True, transposed=transposed, biases=True,
    )  # fmt: skip
    assert_close(layer.run(backend), layer.expected(), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_many_shared_experts(backend, dtype):
    """More stacks than one launch takes."""
    layer = random_layer(np.random.default_rng(0), dtype, shared_sizes=tuple(range(8, 8 + 11)))
    assert_close(layer.run(backend), layer.expected(), dtype)


def test_equal_shared_experts_may_come_as_one_array(backend):
    """A 3-D SharedExperts is the sum of its members."""
    layer = random_layer(np.random.default_rng(1), "float32", shared_sizes=(16, 16), gated_shared=True, biases=True)
    x, routing, experts, shared = layer.build(backend)
    names = ("w_gate_up", "w_down", "gate", "b_gate_up", "b_down")
    stack = {name: backend.asarray(np.stack([parts[name] for parts in layer.shared])) for name in names}
    together = cumoe.moe(x, routing, experts, cumoe.SharedExperts(**stack))
    assert (backend.asnumpy(together) == backend.asnumpy(cumoe.moe(x, routing, experts, shared))).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_tokens", [5, 200])
def test_same_bits_every_time_and_in_every_batch(backend, dtype, num_tokens):
    """Ten runs agree bit for bit; on the GPU a token's row also does not depend on its batch."""
    layer = random_layer(
        np.random.default_rng(2),
        dtype,
        num_tokens=num_tokens,
        hidden_size=136,
        intermediate_size=72,
        shared_sizes=(40,),
    )
    first = layer.run(backend)
    for _ in range(9):
        assert layer.run(backend).tobytes() == first.tobytes()
    if backend.name == "gpu":
        layer.x, layer.topk_ids, layer.topk_weights = layer.x[:3], layer.topk_ids[:3], layer.topk_weights[:3]
        assert layer.run(backend).tobytes() == first[:3].tobytes()


def test_out_may_be_given_and_may_be_x(backend):
    """The result is written where the caller says, even over the tokens."""
    layer = random_layer(np.random.default_rng(3), "float32", shared_sizes=(16,))
    x, routing, experts, shared = layer.build(backend)
    expected = backend.asnumpy(cumoe.moe(x, routing, experts, shared))
    poisoned = backend.asarray(np.full(layer.x.shape, np.nan, np.float32))
    assert cumoe.moe(x, routing, experts, shared, out=poisoned) is poisoned
    assert (backend.asnumpy(poisoned) == expected).all()
    assert cumoe.moe(x, routing, experts, shared, out=x) is x
    assert (backend.asnumpy(x) == expected).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_tokens", [1, 40])
def test_a_residual_is_added_before_the_rounding(backend, dtype, num_tokens):
    """By definition; x may be the residual, and the result may be written over it."""
    layer = random_layer(np.random.default_rng(9), dtype, num_tokens=num_tokens, shared_sizes=(16,), biases=True)
    x, routing, experts, shared = layer.build(backend)
    residual = np.random.default_rng(10).standard_normal(layer.x.shape).astype(layer.x.dtype)
    for added in (residual, layer.x):
        device = x if added is layer.x else backend.asarray(added)
        y = backend.asnumpy(cumoe.moe(x, routing, experts, shared, residual=device))
        assert_close(y, layer.expected() + added.astype(np.float64), dtype)
    assert cumoe.moe(x, routing, experts, shared, residual=x, out=x) is x
    assert backend.asnumpy(x).tobytes() == y.tobytes()


@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_stays_with_the_rows_that_select_it(backend, dtype):
    """A NaN token spoils its own row; a NaN expert only the rows that selected it."""
    layer = random_layer(
        np.random.default_rng(4), dtype, num_tokens=40, hidden_size=72, intermediate_size=40, num_experts=5, top_k=2
    )
    layer.x[7] = np.nan
    for name in ("w_gate_up", "w_down"):
        layer.experts[name][3] = np.nan
    spoiled = (layer.topk_ids == 3).any(1)
    spoiled[7] = True
    assert spoiled.any() and not spoiled.all()
    assert (np.isnan(layer.run(backend).astype(np.float32)).any(1) == spoiled).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_strided_and_negative_tokens(backend, dtype):
    """Tokens may be any view."""
    layer = random_layer(np.random.default_rng(5), dtype, num_tokens=20, hidden_size=24, intermediate_size=16)
    x, routing, experts, shared = layer.build(backend)
    wide = backend.asarray(np.repeat(np.repeat(layer.x, 2, axis=0), 3, axis=1))
    plain = backend.asnumpy(cumoe.moe(x, routing, experts, shared)).astype(np.float64)
    assert_close(backend.asnumpy(cumoe.moe(wide[::2, ::3], routing, experts, shared)), plain, dtype)
    backward = cumoe.Routing(routing.topk_ids[::-1], routing.topk_weights[::-1])
    assert_close(backend.asnumpy(cumoe.moe(x[::-1], backward, experts, shared)), plain[::-1], dtype)


# What the three placements of a weight mean, fixed by algebra.


def placed(backend, weights, weight_on, **options):
    """Return a fixed layer's output with the given routing weights and placement."""
    layer = random_layer(np.random.default_rng(6), "float32", weight_on=weight_on, **options)
    layer.topk_weights = np.broadcast_to(np.float32(weights), layer.topk_weights.shape).copy()
    return layer.run(backend)


def test_weight_one_is_the_same_everywhere(backend):
    """With w = 1 the three placements agree."""
    one = placed(backend, 1.0, "output", biases=True)
    for place in ("input", "activation"):
        assert_close(placed(backend, 1.0, place, biases=True), one, np.float32)


@pytest.mark.parametrize(
    ("activation", "layout", "power"), [("relu", "stacked", 2), ("relu2", "ungated", 2), ("identity", "ungated", 1)]
)
def test_input_weight_on_homogeneous_activations(backend, activation, layout, power):
    """phi(w g) (w u) = w^2 phi(g) u for a gated relu; likewise relu2; the identity is linear."""
    options = {"activation": activation, "layout": layout}
    assert_close(placed(backend, 0.7, "input", **options), placed(backend, 0.7**power, "output", **options), np.float32)


def test_placements_differ_as_they_must(backend):
    """Activation equals output without a down bias, and not with one; input differs from both under silu."""
    assert_close(placed(backend, 0.5, "activation"), placed(backend, 0.5, "output"), np.float32)
    pairs = itertools.combinations(
        [placed(backend, 0.5, place, biases=True) for place in ("input", "activation", "output")], 2
    )
    for one, other in pairs:
        assert np.linalg.norm(one - other) > 0.05 * np.linalg.norm(one)


def test_shared_experts_never_see_routing_weights(backend):
    """What the shared experts add does not depend on placement, weights or the router's scale."""
    layer = random_layer(np.random.default_rng(7), "float32", shared_sizes=(16, 40), gated_shared=True)
    contributions = []
    for place, factor in itertools.product(("input", "activation", "output"), (1.0, 2.5)):
        layer.weight_on = place
        scaled = random_layer(
            np.random.default_rng(7), "float32", shared_sizes=(16, 40), gated_shared=True, weight_on=place
        )
        scaled.topk_weights = layer.topk_weights * np.float32(factor)
        with_shared = scaled.run(backend)
        scaled.shared = []
        contributions.append(with_shared - scaled.run(backend))
    for contribution in contributions[1:]:
        assert_close(contribution, contributions[0], np.float32)


def test_slots_without_an_expert_split_a_layer(backend):
    """Expert-parallel halves with foreign ids add up to the whole (float32 sums in another order)."""
    layer = random_layer(np.random.default_rng(8), "float32", num_experts=6, top_k=3)
    ids, whole = layer.topk_ids, layer.run(backend)
    halves = []
    for keep in (ids < 3, ids >= 3):
        layer.topk_ids = np.where(keep, ids, -1)
        halves.append(layer.run(backend))
    assert_close(halves[0] + halves[1], whole, np.float32)
