"""What cumoe.testing offers others: it finds what is wrong and says where, and draws what it says it draws."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import BF16, GPU, gpu_is_there

import cumoe
from cumoe.testing import (
    PATTERNS,
    arrays,
    assert_close,
    assert_routing,
    layers,
    relative_error,
    router_logits,
    routings,
)
from cumoe.testing.strategies import DTYPES, MEMORY


def numbers(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape)


def failure(*arguments, **options):
    """Return what an assert says that has to fail."""
    with pytest.raises(AssertionError) as caught:
        assert_close(*arguments, **options)
    return str(caught.value)


def test_the_assert_says_where_and_by_how_much():
    """The error, the worst element, the rows."""
    expected = numbers(33, 64)
    got = expected.astype(np.float32)
    assert_close(got, expected)
    got[3, 17], got[9, 2] = 50, 40
    text = failure(got, expected, what="layer 4")
    error = relative_error(got, expected)
    assert text.startswith(
        f"layer 4 float32: relative error {error:.2e}, allowed 1e-05; worst at (3, 17): got 50, expected "
    )
    assert "2 of 2112 elements are off" in text
    assert text.endswith("in 2 of 33 rows: 3, 9")
    got[:] = 0
    assert failure(got, expected).endswith("in 33 of 33 rows: 0, 1, 2, 3, 4, 5, 6, 7, ...")


def test_tolerances():
    """Of the dtype that is said, or the array's own, or a number."""
    expected = numbers(8, 8)
    got = expected * (1 + 2e-3)
    assert_close(got, expected, BF16)
    assert_close(got.astype(BF16), expected)
    assert "allowed 1e-03" in failure(got, expected, np.float16)
    assert_close(got, expected, tolerance=3e-3)
    assert "allowed 1e-03" in failure(got, expected, tolerance=1e-3)
    with pytest.raises(KeyError):
        assert_close(got, expected)


def test_terms_that_cancel():
    """What is left of terms near 1 is compared with 1."""
    expected = numbers(4, 4) * 1e-6
    got = (expected + 1e-6).astype(np.float32)
    assert failure(got, expected)
    assert_close(got, expected, unit=1.0)
    assert relative_error(got, expected, unit=1.0) == pytest.approx(1e-6, rel=1e-3)
    assert failure(got + 1e-4, expected, unit=1.0)


def test_shapes_and_numbers_that_are_none():
    """Broadcasting and NaN hide nothing."""
    expected = numbers(4, 4).astype(np.float32)
    assert "shapes differ: got (1, 4), expected (4, 4)" in failure(expected[:1], expected)
    with pytest.raises(AssertionError, match="shapes differ"):
        relative_error(expected[:1], expected)
    got = expected.copy()
    got[1, 2] = np.nan
    assert "worst at (1, 2): got nan" in failure(got, expected)
    assert "inf" in failure(got, got)
    assert_close(got, got, nans="matching")
    assert "worst at (1, 2)" in failure(got, expected, nans="matching")
    got[0, 0] = np.inf
    other = got.copy()
    other[0, 0] = -np.inf
    assert_close(got, got, nans="matching")
    assert "worst at (0, 0)" in failure(other, got, nans="matching")
    with pytest.raises(ValueError, match="nans: expected"):
        assert_close(got, got, nans="ignored")
    with pytest.raises(TypeError, match="got: expected a NumPy array"):
        assert_close([1.0], expected, np.float32)


def test_zeros_and_nothing():
    """Equal arrays are equal, whatever they hold."""
    assert_close(np.zeros((3, 4), np.float32), np.zeros((3, 4)))
    assert_close(np.zeros((0, 4), np.float32), np.zeros((0, 4)))
    assert failure(np.ones((3, 4), np.float32), np.zeros((3, 4)))
    assert_close(np.full((3, 4), 2.0**-23, np.float16), np.zeros((3, 4)))  # a few subnormal steps


def test_arrays_of_other_libraries():
    """Torch tensors, bfloat16 among them."""
    torch = pytest.importorskip("torch")
    tensor = torch.randn(5, 6)
    assert_close(tensor, tensor.double(), np.float32)
    assert_close(tensor.bfloat16(), tensor, BF16)
    assert_routing(cumoe.route(tensor, cumoe.Router(2)), 6, top_k=2)


@pytest.mark.parametrize(
    ("ids", "weights", "said"),
    [
        ([[0, 1], [2, 2]], None, r"distinct experts, got \[2 2\] for token 1"),
        ([[0, 1], [2, 4]], None, r"ids from 0 to 3, got 4 at \(1, 1\)"),
        ([[0, -1], [2, 3]], None, r"ids from 0 to 3, got -1 at \(0, 1\)"),
        ([[0, 1], [2, 3]], [[1, 1], [np.nan, 1]], r"finite numbers, got nan at \(1, 0\)"),
        ([[0, 1], [2, 3]], [[1, 1]], r"expected shape \(2, 2\)"),
        ([[0.0, 1.0]], None, "expected integers"),
        ([0, 1], None, "2 dimensions"),
        ([[0], [1]], None, "2 experts a token, got 1"),
    ],
)
def test_routings_that_are_wrong(ids, weights, said):
    """Each is named."""
    ids = np.array(ids)
    weights = np.ones(ids.shape) if weights is None else np.array(weights)
    with pytest.raises(AssertionError, match=said):
        assert_routing((ids, weights), 4, top_k=2)


@given(st.data(), st.sampled_from(PATTERNS))
def test_drawn_routings(data, pattern):
    """Each pattern is what it is called."""
    routing = data.draw(routings(20, 6, patterns=(pattern,)))
    ids, top_k = routing.topk_ids, routing.topk_ids.shape[1]
    assert ids.dtype == np.int32 and routing.topk_weights.dtype == np.float32
    assert 1 <= top_k <= 4
    counts = np.bincount(ids[(ids >= 0) & (ids < 6)], minlength=6)
    if pattern in ("uniform", "balanced", "one_expert", "few_experts"):
        assert_routing(routing, 6)
    if pattern == "balanced":
        assert counts.max() - counts.min() <= 1
    if pattern == "one_expert":
        assert counts.max() == counts[5] == 20
    if pattern == "few_experts":
        assert np.count_nonzero(counts) == top_k
    if pattern == "with_holes":
        assert (ids < 0).any() or (ids == 6).any()
    if pattern == "repeated":
        assert (ids == ids[:, :1]).all()


@given(routings(st.integers(0, 3), st.integers(1, 3), top_k=st.integers(1, 9)))
def test_small_routings(routing):
    """top_k is never more than there are experts."""
    assert routing.topk_ids.shape[1] <= 3


@given(router_logits(), st.sampled_from(["softmax", "sigmoid"]))
def test_any_drawn_logits_can_be_routed(logits, scoring):
    """By the router of this package."""
    top_k = min(2, logits.shape[1])
    assert_routing(cumoe.route(logits, cumoe.Router(top_k, scoring=scoring)), logits.shape[1], top_k=top_k)


@given(st.data(), st.sampled_from(sorted(DTYPES)), st.sampled_from(MEMORY))
def test_drawn_arrays(data, dtype, memory):
    """As they lie in memory."""
    array = data.draw(arrays((5, 6), dtype, memory=(memory,)))
    assert array.shape == (5, 6) and array.dtype == DTYPES[dtype]
    size = array.dtype.itemsize
    wanted = {"contiguous": (6, 1), "strided": (12, 2), "transposed": (1, 5)}[memory]
    assert tuple(stride // size for stride in array.strides) == wanted
    assert 0.1 < array.astype(np.float64).std() < 3


@settings(max_examples=150)
@given(layers())
def test_drawn_layers_are_computed_right(layer):
    """Any of them, against the definition."""
    assert_close(layer.run(), layer.expected(), layer.x.dtype)


@given(layers(num_tokens=3, num_experts=5, hidden_size=8, intermediate_size=4, max_shared=0, dtypes=("float16",)))
def test_drawn_sizes(layer):
    """Numbers are taken as they are."""
    assert layer.x.shape == (3, 8) and layer.x.dtype == np.float16
    assert (layer.experts.num_experts, layer.experts.intermediate_size) == (5, 4)
    assert layer.shared == []


@pytest.mark.gpu
@settings(max_examples=100)
@given(st.data())
def test_drawn_layers_on_the_gpu(data):
    """The same layer on both sides."""
    if not gpu_is_there():
        pytest.skip("no CUDA device")
    import cupy

    layer = data.draw(layers(asarray=GPU.asarray))
    y = layer.run()
    x, ids, weights = (cupy.asnumpy(array) for array in (layer.x, *layer.routing))

    def host(holder, cls):
        own = holder.weights if cls is cumoe.Experts else holder.weights[0]
        parts = [None if a is None else cupy.asnumpy(a) for a in own[:4]]
        if cls is cumoe.Experts:
            return cls(*parts, own.activation, layout=own.layout)
        parts = [None if a is None else a[0] for a in parts]
        gate = None if holder.gate is None else cupy.asnumpy(holder.gate)[0]
        return cls(parts[0], parts[1], gate, parts[2], parts[3], own.activation, layout=own.layout)

    expected = cumoe.reference.moe(
        x,
        cumoe.Routing(ids, weights),
        host(layer.experts, cumoe.Experts),
        [host(member, cumoe.SharedExperts) for member in layer.shared],
        weight_on=layer.weight_on,
    )
    assert_close(y, expected, layer.x.dtype)
