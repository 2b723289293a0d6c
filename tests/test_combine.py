"""The combine against its definition, and the four stages put together by hand."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import DTYPES, GPU, assert_close, random_layer

import cumoe
from cumoe.gpu.combine import combine as gpu_combine


def one_signed(rng, *shape):
    """Draw float32 numbers near 1 whose sign depends on the column alone, so that sums never cancel."""
    return (rng.uniform(0.5, 1.5, shape) * rng.choice([-1, 1], shape[-1])).astype(np.float32)


def draw(rng, *, num_tokens, top_k, num_experts, hidden_size, num_shared=None, weights=None, with_holes=False):
    """Return NumPy (rows, ids, topk_weights, shared_rows); rows of slots without an expert are NaN."""
    ids = rng.integers(0, num_experts, (num_tokens, top_k)).astype(np.int32)
    if with_holes:
        ids[rng.random(ids.shape) < 1 / 3] = -1
    rows = one_signed(rng, ids.size, hidden_size)
    rows[int((ids >= 0).sum()) :] = np.nan
    sign = np.sign(rows[0]) if ids.size and not np.isnan(rows[0]).any() else 1
    topk_weights = None if weights is None else rng.uniform(0.1, 1, ids.shape).astype(weights)
    shared = None if num_shared is None else np.abs(one_signed(rng, num_shared, num_tokens, hidden_size)) * sign
    return rows, ids, topk_weights, None if shared is None else shared.astype(np.float32)


def run(backend, problem, num_experts, **options):
    """Combine on `backend`; return a NumPy array."""
    rows, ids, topk_weights, shared_rows = map(backend.asarray, problem)
    return backend.asnumpy(cumoe.combine(rows, cumoe.group(ids, num_experts), topk_weights, shared_rows, **options))


def expected(problem, num_experts):
    """Combine by definition, in float64."""
    rows, ids, topk_weights, shared_rows = problem
    return cumoe.reference.combine(rows, cumoe.reference.group(ids, num_experts), topk_weights, shared_rows)


@settings(max_examples=200)
@given(
    options=st.fixed_dictionaries(
        {
            "num_tokens": st.sampled_from([0, 1, 2, 7, 33, 130]),
            "top_k": st.integers(1, 9),
            "num_experts": st.sampled_from([1, 2, 8, 33]),
            "hidden_size": st.sampled_from([1, 3, 4, 8, 72, 131, 1028]),
            "num_shared": st.sampled_from([None, 0, 1, 2, 5]),
            "weights": st.sampled_from([None, *DTYPES.values(), np.float64]),
            "with_holes": st.booleans(),
        }
    ),
    dtype=st.sampled_from(sorted(DTYPES)),
    with_residual=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)
def test_combine_equals_its_definition(backend, options, dtype, with_residual, seed):
    """Any shape, with and without weights, shared rows and residual, in any dtype; rows without an expert are NaN."""
    rng = np.random.default_rng(seed)
    problem, residual = draw(rng, **options), None
    if with_residual:
        residual = rng.standard_normal((options["num_tokens"], options["hidden_size"])).astype(DTYPES[dtype])
    num_experts = options["num_experts"]
    y = run(backend, problem, num_experts, dtype=DTYPES[dtype], residual=backend.asarray(residual))
    assert y.dtype == DTYPES[dtype]
    rows, ids, topk_weights, shared_rows = problem
    groups = cumoe.reference.group(ids, num_experts)
    wanted = cumoe.reference.combine(rows, groups, topk_weights, shared_rows, residual=residual)
    size = np.abs(cumoe.reference.combine(rows, groups, topk_weights, shared_rows)) + (
        0 if residual is None else np.abs(residual.astype(np.float64))
    )
    assert_close(y - wanted + size, size, np.float32 if dtype == "float32" else dtype)  # a residual may cancel the sum


@pytest.mark.parametrize("hidden_size", [1, 3, 4, 131])
def test_normal_numbers(backend, hidden_size):
    """Signs of their own for every number; float32 is the default."""
    rng = np.random.default_rng(hidden_size)
    sizes = {"num_tokens": 50, "top_k": 4, "num_experts": 5, "hidden_size": hidden_size, "num_shared": 2}
    problem = draw(rng, weights=np.float32, **sizes)
    problem[0][:] = rng.standard_normal(problem[0].shape)
    problem[3][:] = rng.standard_normal(problem[3].shape)
    y = run(backend, problem, 5)
    assert y.dtype == np.float32
    assert_close(y, expected(problem, 5), np.float32)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_token_without_experts_gets_the_shared_rows_alone(backend, dtype):
    """Zero without any: nothing is left from the memory before."""
    problem = draw(np.random.default_rng(0), num_tokens=6, top_k=2, num_experts=3, hidden_size=5, num_shared=1)
    problem[1][::2] = (-1, 3)
    for shared, wanted in ((problem[3], problem[3][0, ::2]), (None, np.zeros((3, 5)))):
        out = backend.asarray(np.full((6, 5), np.nan, DTYPES[dtype]))
        y = run(backend, (np.nan_to_num(problem[0]), *problem[1:3], shared), 3, dtype=DTYPES[dtype], out=out)
        assert_close(y[::2], wanted, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_sums_are_float32_and_rounded_once(backend, dtype):
    """Summed in float16, 2048 + 1 + 1 would stay 2048; in bfloat16, 2048 + 1 + 1 + 7 would."""
    rows, ids = np.array([[2048], [1], [1]], np.float32), np.array([[0, 1, 2]], np.int32)
    for shared, total in ((None, 2050), (np.full((1, 1, 1), 7, np.float32), 2057)):
        y = run(backend, (rows, ids, None, shared), 3, dtype=DTYPES[dtype])
        assert y == DTYPES[dtype].type(total)
    # The sum alone would be rounded to 2048 in both, and the residual be lost or be all that is left.
    for residual, total in ((3, 2053), (-2048, 2)):
        added = backend.asarray(np.full((1, 1), residual, DTYPES[dtype]))
        y = run(backend, (rows, ids, None, None), 3, dtype=DTYPES[dtype], residual=added)
        assert y == DTYPES[dtype].type(total)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("hidden_size", [8, 9])
def test_the_result_may_be_written_over_the_residual(backend, dtype, hidden_size):
    """And the residual may have any strides; a result over a part of it is refused on a GPU and right on the CPU."""
    problem = draw(
        np.random.default_rng(5), num_tokens=6, top_k=2, num_experts=3, hidden_size=hidden_size, num_shared=1
    )
    rows, ids, _, shared_rows = map(backend.asarray, problem)
    groups = cumoe.group(ids, 3)
    wide = np.random.default_rng(6).standard_normal((20, hidden_size)).astype(DTYPES[dtype])
    device = backend.asarray(wide)
    options = {"dtype": DTYPES[dtype]}
    wanted = backend.asnumpy(cumoe.combine(rows, groups, None, shared_rows, residual=device[:6], **options))
    strided = backend.asarray(np.repeat(wide[:6], 2, axis=0))[::2]
    y = cumoe.combine(rows, groups, None, shared_rows, residual=strided, **options)
    assert backend.asnumpy(y).tobytes() == wanted.tobytes()
    if backend.name == "gpu":
        with pytest.raises(
            ValueError, match=r"^out: expected residual itself or memory apart from it, got an overlapping array$"
        ):
            cumoe.combine(rows, groups, None, shared_rows, residual=device[:6], out=device[1:7], **options)
    else:
        shifted = device.copy()
        cumoe.combine(rows, groups, None, shared_rows, residual=shifted[:6], out=shifted[1:7], **options)
        assert shifted[1:7].tobytes() == wanted.tobytes()
    out = device[:6]
    assert cumoe.combine(rows, groups, None, shared_rows, residual=out, out=out, **options) is out
    assert backend.asnumpy(out).tobytes() == wanted.tobytes()


def test_out_is_written_and_returned(backend):
    """Every element is overwritten, NaN or not."""
    problem = draw(np.random.default_rng(1), num_tokens=9, top_k=2, num_experts=4, hidden_size=12, num_shared=1)
    rows, ids, _, shared_rows = map(backend.asarray, problem)
    groups = cumoe.group(ids, 4)
    out = backend.asarray(np.full((9, 12), np.nan, np.float32))
    assert cumoe.combine(rows, groups, None, shared_rows, out=out) is out
    assert_close(backend.asnumpy(out), expected(problem, 4), np.float32)


def test_arguments_may_be_any_view(backend):
    """What lies between the elements is not read: it is NaN."""
    problem = draw(
        np.random.default_rng(2), num_tokens=9, top_k=2, num_experts=4, hidden_size=8, num_shared=2, weights=np.float32
    )

    def spread(array):
        wide = np.full([2 * size for size in array.shape], np.nan, array.dtype)
        wide[tuple([slice(None, None, 2)] * array.ndim)] = array
        return backend.asarray(wide)[tuple([slice(None, None, 2)] * array.ndim)]

    rows, topk_weights, shared_rows = (spread(problem[i]) for i in (0, 2, 3))
    y = cumoe.combine(rows, cumoe.group(backend.asarray(problem[1]), 4), topk_weights, shared_rows)
    assert_close(backend.asnumpy(y), expected(problem, 4), np.float32)


def test_same_bits_every_time(backend):
    """Sums run in slot order, so they do not vary."""
    problem = draw(
        np.random.default_rng(3), num_tokens=300, top_k=8, num_experts=33, hidden_size=131, weights=np.float32
    )
    first = run(backend, problem, 33)
    assert all(run(backend, problem, 33).tobytes() == first.tobytes() for _ in range(9))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["stacked", "interleaved", "ungated"])
@pytest.mark.parametrize("biases", [False, True])
def test_four_stages_make_a_layer(backend, dtype, layout, biases):
    """route, group, grouped_gemm, an activation in NumPy, grouped_gemm and combine equal moe."""
    rng = np.random.default_rng(4)
    layer = random_layer(rng, dtype, num_tokens=40, layout=layout, biases=biases, activation="gelu_tanh")
    x, _, experts, _ = layer.build(backend)
    logits = backend.asarray(rng.standard_normal((40, 6)).astype(np.float32))
    routing = cumoe.route(logits, cumoe.Router(2, renormalize=True))

    parts = {name: backend.asarray(layer.experts.get(name)) for name in ("w_gate_up", "w_down", "b_gate_up", "b_down")}
    groups = cumoe.group(routing.topk_ids, 6)
    projected = cumoe.grouped_gemm(x, parts["w_gate_up"], groups, parts["b_gate_up"], rows="tokens", dtype=np.float32)
    halves = experts.weights.split(backend.asnumpy(projected))
    hidden = backend.asarray(experts.weights.activation.apply(*halves).astype(DTYPES[dtype]))
    rows = cumoe.grouped_gemm(hidden, parts["w_down"], groups, parts["b_down"], dtype=np.float32)
    y = cumoe.combine(rows, groups, routing.topk_weights, dtype=DTYPES[dtype])

    whole = cumoe.moe(x, routing, experts, weight_on="output")
    assert_close(backend.asnumpy(y), backend.asnumpy(whole).astype(np.float64), dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("hidden_size", [1, 8, 67, 1032])
@pytest.mark.parametrize(("top_k", "num_shared"), [(3, 2), (2, 0), (1, 1)])
def test_narrow_rows(dtype, hidden_size, top_k, num_shared):
    """Rows in the dtype of the result, as the Hopper kernels write them, many and few; by 16 bytes or one number."""
    rng = np.random.default_rng(hidden_size)
    rows = rng.standard_normal((10 * top_k, hidden_size)).astype(DTYPES[dtype])
    shared = rng.standard_normal((num_shared, 10, hidden_size)).astype(DTYPES[dtype])
    weights = rng.random((10, top_k), np.float32)
    inverse = rng.permutation(10 * top_k).astype(np.int32).reshape(10, top_k)
    inverse[3] = -1
    y = GPU.asarray(np.full((10, hidden_size), np.nan, DTYPES[dtype]))
    gpu_combine(*map(GPU.asarray, (rows, inverse, weights, shared)), y)
    factors = np.where(inverse < 0, 0, weights).astype(np.float64)
    definition = (factors[:, :, None] * rows.astype(np.float64)[inverse]).sum(axis=1) + shared.astype(np.float64).sum(0)
    assert_close(GPU.asnumpy(y), definition, dtype)
