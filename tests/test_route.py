"""Routing against its definition: which experts, in which order, with what weights.

Where float32 rounding can exchange two experts, ids are compared by what they are ranked with: the j-th chosen value
must be the j-th best one within that rounding. Values further apart than that thus force equal ids.
"""

import dataclasses

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import DTYPES

import cumoe

ROUNDING = 2e-6
"""Relative float32 error of a ranked value: a score, a bias and a sum of two."""

BIASES = {"none": None, "small": (0.0, 0.2), "negative": (-5.0, 0.5), "large": (12.0, 0.5)}
SCORINGS = ("softmax", "sigmoid", "sqrt_softplus")


def score(logits, scoring):
    """Return the scores of float64 logits, row by row."""
    if scoring == "softmax":
        exponentials = np.exp(logits - logits.max(axis=1, keepdims=True))
        return exponentials / exponentials.sum(axis=1, keepdims=True)
    return 1 / (1 + np.exp(-logits)) if scoring == "sigmoid" else np.sqrt(np.logaddexp(0, logits))


def ranked_values(logits, router):
    """Return what experts are ranked with, in float64, and the rows whose groups are not nearly tied."""
    ranked = logits.astype(np.float64)
    if router.logit_softcap is not None:
        ranked = router.logit_softcap * np.tanh(ranked / router.logit_softcap)
    if router.select_by == "scores" and (router.selection_bias is not None or router.num_groups > 1):
        ranked = score(ranked, router.scoring)
    if router.selection_bias is not None:
        ranked = ranked + router.selection_bias
    clear = np.ones(len(ranked), bool)
    if router.num_groups > 1:
        size = ranked.shape[1] // router.num_groups
        best_first = -np.sort(-ranked.reshape(len(ranked), router.num_groups, size), axis=2)
        group_scores = best_first[:, :, : 1 if router.group_score == "max" else 2].sum(axis=2)
        order = np.argsort(-group_scores, axis=1, kind="stable")
        descending = np.take_along_axis(group_scores, order, axis=1)
        if router.top_groups < router.num_groups:
            gap = descending[:, router.top_groups - 1] - descending[:, router.top_groups]
            clear = gap > 2 * ROUNDING * np.abs(ranked).max(axis=1)
        kept = np.zeros(group_scores.shape, bool)
        np.put_along_axis(kept, order[:, : router.top_groups], True, axis=1)
        dropped = -np.inf if router.dropped_groups == "minus_inf" else 0.0
        ranked = np.where(np.repeat(kept, size, axis=1), ranked, dropped)
    return ranked, clear


def on(backend, router):
    """Return the router with its arrays on `backend`."""
    arrays = {name: backend.asarray(getattr(router, name)) for name in ("selection_bias", "expert_scale")}
    return dataclasses.replace(router, **arrays)


def run(backend, logits, router):
    """Route NumPy logits on `backend`; return NumPy ids and weights."""
    routing = cumoe.route(backend.asarray(logits), on(backend, router))
    return backend.asnumpy(routing.topk_ids), backend.asnumpy(routing.topk_weights)


def assert_weights(got, expected):
    """Fail unless every weight has a relative error below 1e-5."""
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-37)


def assert_distinct(ids, num_experts):
    """Fail unless every row names different experts that exist."""
    assert ((ids >= 0) & (ids < num_experts)).all()
    assert (np.diff(np.sort(ids, axis=1), axis=1) > 0).all()


def assert_routing(logits, router, got_ids, got_weights):
    """Fail unless ids and weights are those of the definition, up to near ties between ranked values."""
    expected = cumoe.reference.route(logits, router)
    assert (got_ids.dtype, got_weights.dtype) == (np.int32, np.float32)
    assert got_ids.shape == got_weights.shape == expected.topk_ids.shape
    assert_distinct(got_ids, logits.shape[1])
    ranked, clear = ranked_values(logits, router)
    got, best = (np.take_along_axis(ranked, ids, axis=1)[clear] for ids in (got_ids, expected.topk_ids))
    rounded = router.select_by == "scores" and (router.selection_bias is not None or router.num_groups > 1)
    rounded = rounded or router.selection_bias is not None or router.logit_softcap is not None
    tolerance = (ROUNDING if rounded else 0) * np.abs(np.where(np.isinf(ranked), 0, ranked)).max(axis=1, initial=0)
    assert (np.abs(got - best) <= tolerance[clear, None]).all()
    same = (got_ids == expected.topk_ids).all(axis=1)
    if not rounded:
        assert same[clear].all()
    assert_weights(got_weights[same], expected.topk_weights[same])


@st.composite
def problems(draw):
    """Draw (logits, router)."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    num_experts = draw(st.one_of(st.sampled_from([1, 2, 8, 33, 60, 96, 256, 384, 1000, 1024]), st.integers(1, 1024)))
    num_groups = draw(st.sampled_from([g for g in range(1, num_experts + 1) if num_experts % g == 0]))
    top_groups = draw(st.integers(1, num_groups))
    kept = num_experts // num_groups * top_groups
    base = BIASES[draw(st.sampled_from(sorted(BIASES)))]
    router = cumoe.Router(
        draw(st.one_of(st.integers(1, min(kept, 10)), st.just(kept))),
        draw(st.sampled_from(SCORINGS)),
        draw(st.sampled_from(["scores", "logits"])),
        renormalize=draw(st.booleans()),
        renormalize_eps=draw(st.sampled_from([0.0, 1e-20, 1e-6, 1e-2, 3.0])),
        renormalize_eps_mode=draw(st.sampled_from(["add", "clamp"])),
        renormalize_order=draw(st.sampled_from([1, 2])),
        num_groups=num_groups,
        top_groups=top_groups,
        group_score=draw(st.sampled_from(["sum_top2", "max"])),
        dropped_groups=draw(st.sampled_from(["minus_inf", "zero"])),
        selection_bias=None if base is None else rng.normal(*base, num_experts).astype(np.float32),
        scale=draw(st.sampled_from([1.0, 2.5, 16.0, -1.0])),
        logit_softcap=draw(st.sampled_from([None, None, 2.0, 12.0])),
        expert_scale=draw(st.sampled_from([None, rng.uniform(0.5, 2, num_experts)])),
    )
    shape = (draw(st.integers(0, 9)), num_experts)
    pattern = draw(st.sampled_from(["narrow", "normal", "wide", "separated", "tied"]))
    if pattern == "separated":
        logits = rng.permuted(np.broadcast_to(np.linspace(-4, 4, num_experts), shape), axis=1)
    elif pattern == "tied":
        logits = rng.integers(-2, 3, shape)
    else:
        logits = rng.normal(0, {"narrow": 0.05, "normal": 1, "wide": 8}[pattern], shape)
    return logits.astype(DTYPES[draw(st.sampled_from(sorted(DTYPES)))]), router


@settings(max_examples=300)
@given(problem=problems())
def test_route_equals_its_definition(backend, problem):
    """Any number of tokens and experts, any option, any dtype."""
    logits, router = problem
    assert_routing(logits, router, *run(backend, logits, router))


@pytest.mark.parametrize("view", ["rows", "columns", "backward", "transposed"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_logits_may_be_any_view(backend, dtype, view):
    """What lies between the logits is not read: it is NaN."""
    logits = np.random.default_rng(0).normal(size=(11, 37)).astype(DTYPES[dtype])
    wide = np.full((22, 111), np.nan, DTYPES[dtype])
    wide[::2, ::3] = logits
    if view == "rows":
        strided = backend.asarray(np.ascontiguousarray(wide[:, ::3]))[::2]
    elif view == "columns":
        strided = backend.asarray(wide)[::2, ::3]
    elif view == "backward":
        strided = backend.asarray(np.ascontiguousarray(logits[::-1, ::-1]))[::-1, ::-1]
    else:
        strided = backend.asarray(np.ascontiguousarray(logits.T)).T
    router = cumoe.Router(5, "sigmoid", selection_bias=np.linspace(0, 1, 37), renormalize=True)
    routing = cumoe.route(strided, on(backend, router))
    assert_routing(logits, router, backend.asnumpy(routing.topk_ids), backend.asnumpy(routing.topk_weights))


def test_many_tokens(backend):
    """More rows than one grid dimension of a simple launch holds: every repeated row is routed alike."""
    few = np.random.default_rng(1).normal(size=(257, 5)).astype(np.float32)
    router = cumoe.Router(2, renormalize=True)
    expected_ids, expected_weights = run(backend, few, router)
    ids, weights = run(backend, np.tile(few, (300, 1)), router)
    assert (ids == np.tile(expected_ids, (300, 1))).all()
    assert_weights(weights, np.tile(expected_weights, (300, 1)))


@pytest.mark.parametrize("select_by", ["scores", "logits"])
@pytest.mark.parametrize("scoring", SCORINGS)
def test_ties_go_to_the_lower_id(backend, scoring, select_by):
    """Among equals, with and without an equal bias, in groups that tie as well."""
    logits = np.random.default_rng(2).integers(-3, 4, (20, 257)).astype(np.float32)
    stable = np.argsort(-logits, axis=1, kind="stable")
    for bias in (None, np.full(257, 0.5, np.float32)):
        for top_k in (1, 9, 257):
            ids, _ = run(backend, logits, cumoe.Router(top_k, scoring, select_by, selection_bias=bias))
            assert (ids == stable[:, :top_k]).all()
    equal = cumoe.Router(5, scoring, select_by, num_groups=6, top_groups=2, selection_bias=np.full(24, 0.5, np.float32))
    ids, _ = run(backend, np.full((3, 24), 0.25, np.float32), equal)
    assert (ids == np.arange(5)).all()


def test_zero_has_no_sign(backend):
    """-0.0 ties with 0.0."""
    logits = np.array([[-0.0, 0.0, -0.0, 0.0], [0.0, -0.0, -0.0, 0.0]], np.float32)
    ids, _ = run(backend, logits, cumoe.Router(4))
    assert (ids == np.arange(4)).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_subnormal_logits_keep_their_order(backend, dtype):
    """The smallest numbers there are still differ."""
    dtype = DTYPES[dtype]
    levels = np.random.default_rng(3).permuted(np.tile(np.arange(-8, 9), (6, 1)), axis=1)
    logits = (levels * np.float64(ml_dtypes.finfo(dtype).smallest_subnormal)).astype(dtype)
    assert len(np.unique(logits.astype(np.float64))) == levels.shape[1]
    ids, _ = run(backend, logits, cumoe.Router(17))
    assert (ids == np.argsort(-levels, axis=1)).all()


@pytest.mark.parametrize("scoring", SCORINGS)
@pytest.mark.parametrize("bias", [None, np.linspace(-1, 1, 12)])
@pytest.mark.parametrize("num_groups", [1, 4, 12])
@pytest.mark.parametrize("top_k", [1, 5, 12])
def test_rows_that_are_no_numbers_get_distinct_experts(backend, scoring, bias, num_groups, top_k):
    """NaN and infinities, alone and mixed, never repeat an expert and never name one that does not exist."""
    rows = [np.full(12, value) for value in (np.nan, np.inf, -np.inf)]
    rows += [np.resize(mix, 12) for mix in ([np.nan, 1], [np.nan, -np.inf, 2], [np.inf, np.nan, -np.inf], [np.inf, 0])]
    router = cumoe.Router(
        top_k, scoring, num_groups=num_groups, top_groups=num_groups if top_k > 1 else 1, selection_bias=bias
    )
    ids, weights = run(backend, np.array(rows, np.float32), router)
    assert_distinct(ids, 12)
    assert np.isnan(weights[0]).all()


@pytest.mark.parametrize("scoring", SCORINGS)
def test_nan_ranks_below_everything(backend, scoring):
    """As long as there are numbers, even -inf, no NaN is chosen."""
    logits = np.array([[np.nan, -np.inf, np.nan, 3, -5, np.nan]], np.float32)
    ids, _ = run(backend, logits, cumoe.Router(6, scoring))
    assert (ids == [[3, 4, 1, 0, 2, 5]]).all()


@pytest.mark.parametrize("renormalize", [False, True])
def test_the_bias_never_reaches_a_weight(backend, renormalize):
    """With a bias about 12 and scores about 1e-8, `biased score - bias` would be 0."""
    rng = np.random.default_rng(4)
    logits = rng.uniform(-19, -17, (8, 16)).astype(np.float32)
    bias = (12 + rng.permutation(16) / 4).astype(np.float32)
    ids, weights = run(backend, logits, cumoe.Router(4, "sigmoid", renormalize=renormalize, selection_bias=bias))
    assert (ids == np.argsort(-bias)[:4]).all()
    scores = 1 / (1 + np.exp(-np.take_along_axis(logits, ids, axis=1).astype(np.float64)))
    assert_weights(weights, scores / scores.sum(axis=1, keepdims=True) if renormalize else scores)


@pytest.mark.parametrize("scoring", SCORINGS)
@pytest.mark.parametrize("level", [-50.0, -200.0, -3e38, 200.0])
def test_equal_scores_share_equally_however_small(backend, scoring, level):
    """Renormalising without eps is no 0 / 0 where every score underflows."""
    for order in (1, 2):
        router = cumoe.Router(4, scoring, renormalize=True, renormalize_order=order)
        _, weights = run(backend, np.full((3, 10), level, np.float32), router)
        assert_weights(weights, 4 ** (-1 / order))


@pytest.mark.parametrize("eps", [0.0, 1e-20])
@pytest.mark.parametrize(
    ("scoring", "lowest"), [("softmax", -300), ("sigmoid", -86), ("sqrt_softplus", -86), ("sqrt_softplus", -170)]
)
def test_small_scores_keep_their_ratios(backend, scoring, lowest, eps):
    """Down to where float32 ends, which for sqrt(softplus) is near -174: sqrt(softplus(-100)) is still 2e-22."""
    logits = lowest + np.array([[0, 1, 2.5, 1.5], [3, 0, 44, 46], [50, 0, 40, 0.5]], np.float32)
    for renormalize in (False, True):
        router = cumoe.Router(3, scoring, renormalize=renormalize, renormalize_eps=eps)
        assert_routing(logits, router, *run(backend, logits, router))


def test_dropped_groups_and_negative_values(backend):
    """With a bias of -5 dropped experts are never chosen at -inf, and win at zero."""
    logits = np.random.default_rng(5).normal(size=(30, 12)).astype(np.float32)
    options = {"num_groups": 4, "top_groups": 2, "selection_bias": np.full(12, -5, np.float32)}
    best_two = -np.sort(-1 / (1 + np.exp(-logits.astype(np.float64))).reshape(30, 4, 3), axis=2)[:, :, :2].sum(axis=2)
    kept = np.argsort(-best_two, axis=1)[:, :2]
    ids, _ = run(backend, logits, cumoe.Router(4, "sigmoid", dropped_groups="minus_inf", **options))
    assert (ids[:, :, None] // 3 == kept[:, None]).any(axis=2).all()
    ids, _ = run(backend, logits, cumoe.Router(4, "sigmoid", dropped_groups="zero", **options))
    assert not (ids[:, :, None] // 3 == kept[:, None]).any()
    assert (np.diff(ids, axis=1) > 0).all()  # zeros tie: the lower ids win


def test_softmax_by_logits_is_the_softmax_of_the_chosen(backend):
    """gpt-oss and Granite."""
    logits = np.random.default_rng(6).normal(0, 3, (9, 33)).astype(np.float32)
    ids, weights = run(backend, logits, cumoe.Router(4, select_by="logits"))
    assert (ids == np.argsort(-logits, axis=1)[:, :4]).all()
    assert_weights(weights, score(np.take_along_axis(logits, ids, axis=1).astype(np.float64), "softmax"))
    assert_weights(weights.sum(axis=1), 1)


def test_sigmoid_by_logits(backend):
    """Llama-4, for two experts: the sigmoid of each chosen logit, not renormalised."""
    logits = np.array([[0.5, -1, 2, 1], [-3, -2, -1, -4]], np.float32)
    ids, weights = run(backend, logits, cumoe.Router(2, "sigmoid", "logits"))
    assert (ids == [[2, 3], [2, 1]]).all()
    assert_weights(weights, 1 / (1 + np.exp([[-2.0, -1], [1, 2]])))


def test_numbers_may_be_numpy_scalars(backend):
    """Counts and scales read from an array serve as Python numbers do."""
    logits = np.random.default_rng(0).standard_normal((5, 8), np.float32)
    router = cumoe.Router(
        np.int64(2), num_groups=np.int32(4), top_groups=np.int16(2), renormalize=np.bool_(True),
        renormalize_eps=np.float32(0.5), scale=np.float64(2.5), logit_softcap=np.float32(3),
    )  # fmt: skip
    assert_routing(logits, router, *run(backend, logits, router))


def test_vectors_of_the_router_may_be_strided(backend):
    """Every second and the reversed elements of longer arrays; kernels read such vectors without strides."""
    rng = np.random.default_rng(0)
    logits, bias, scale = (rng.standard_normal(shape, np.float32) for shape in ((9, 8), 16, 8))
    on_backend = cumoe.Router(
        3, "sigmoid", selection_bias=backend.asarray(bias)[::2], expert_scale=backend.asarray(scale)[::-1]
    )
    assert on_backend.selection_bias.flags.c_contiguous and on_backend.expert_scale.flags.c_contiguous
    routing = cumoe.route(backend.asarray(logits), on_backend)
    router = cumoe.Router(3, "sigmoid", selection_bias=bias[::2].copy(), expert_scale=scale[::-1].copy())
    assert_routing(logits, router, backend.asnumpy(routing.topk_ids), backend.asnumpy(routing.topk_weights))


@pytest.mark.parametrize("eps", [0.01, 0.1, 0.4])
@pytest.mark.parametrize("num_experts", [2, 16, 65])
def test_sparse_mixer_weighs_among_near_rivals(backend, num_experts, eps):
    """As defined; most weights are exactly 1, and a wide band leaves some that are not."""
    logits = np.random.default_rng(num_experts).standard_normal((200, num_experts)).astype(np.float32)
    router = cumoe.Router(2, "sparse_mixer", mixer_eps=eps, scale=1.5)
    ids, weights = run(backend, logits, router)
    expected = cumoe.reference.route(logits, router)
    np.testing.assert_array_equal(ids, expected.topk_ids)
    # A rival at the edge of the band may fall on either side of it in float32.
    near = np.isclose(weights, expected.topk_weights, rtol=1e-5).all(axis=1)
    assert near.mean() > 0.99
    if num_experts == 16:
        assert (weights > 1.499).any()
        assert (weights < 1.49).any()


def test_sparse_mixer_of_equal_and_odd_logits(backend):
    """All zero is one band; infinities and NaN give NaN, not a crash."""
    logits = np.zeros((3, 4), np.float32)
    logits[1, 2] = np.nan
    logits[2, 0] = -np.inf
    ids, weights = run(backend, logits, cumoe.Router(2, "sparse_mixer"))
    assert_distinct(ids, 4)
    np.testing.assert_array_equal(ids[0], [0, 1])
    np.testing.assert_allclose(weights[0], [1 / 4, 1 / 3], rtol=1e-6)


@pytest.mark.parametrize("scoring", SCORINGS)
@pytest.mark.parametrize("options", [
    {}, {"renormalize": True, "renormalize_eps": 1e-20, "scale": 1.5}, {"renormalize": True}, {"select_by": "logits"},
])  # fmt: skip
def test_experts_by_token_id(backend, scoring, options):
    """The table says which; the logits say with what weight; what names no expert has id -1 and weight 0."""
    rng = np.random.default_rng(3)
    table = np.argsort(rng.random((50, 12)), axis=1)[:, :3]
    table[7] = 2, -1, 12
    logits = rng.standard_normal((40, 12)).astype(np.float32)
    token_ids = rng.integers(0, 50, 40)
    token_ids[:4] = 7, 7, -1, 50
    scale = rng.random(12).astype(np.float32)
    plain = cumoe.Router(3, scoring, expert_table=table, expert_scale=scale, **options)
    router = dataclasses.replace(
        plain, expert_table=backend.asarray(plain.expert_table), expert_scale=backend.asarray(scale)
    )
    routing = cumoe.route(backend.asarray(logits), router, backend.asarray(token_ids))
    expected = cumoe.reference.route(logits, plain, input_ids=token_ids)
    ids, weights = backend.asnumpy(routing.topk_ids), backend.asnumpy(routing.topk_weights)
    np.testing.assert_array_equal(ids, expected.topk_ids)
    assert (ids[:2] == [2, -1, -1]).all() and (ids[2:4] == -1).all()
    there = ids >= 0
    assert_weights(weights[there], expected.topk_weights[there])
    np.testing.assert_array_equal(weights[~there], 0)


@pytest.mark.parametrize(("options", "error", "message"), [
    ({"scoring": "sparse_mixer", "renormalize": True}, ValueError, "sparse_mixer.*: expected neither renormalize"),
    ({"scoring": "sparse_mixer", "selection_bias": np.ones(4)}, ValueError, "sparse_mixer.*: expected neither sel"),
    ({"scoring": "sparse_mixer", "num_groups": 2, "top_groups": 1}, ValueError, "expected neither selection_bias nor"),
    ({"mixer_eps": -0.1}, ValueError, "mixer_eps: expected a number of at least 0"),
    ({"expert_table": np.zeros((5, 3), int)}, ValueError, r"expert_table: expected shape \(vocab_size=5, top_k=2\)"),
    ({"expert_table": np.zeros((5, 2))}, TypeError, "expert_table: expected dtype int8"),
    ({"expert_table": np.zeros(5, int)}, ValueError, "expert_table: expected 2 dimensions"),
    ({"expert_table": np.zeros((5, 2), int), "selection_bias": np.ones(4)}, ValueError, "expert_table: .* neither"),
])  # fmt: skip
def test_options_that_exclude_each_other(options, error, message):
    with pytest.raises(error, match=message):
        cumoe.Router(2, **options)


def test_token_ids_come_with_a_table_and_only_then():
    logits, ids = np.zeros((3, 4), np.float32), np.zeros(3, int)
    table = cumoe.Router(2, expert_table=np.zeros((5, 2), int))
    with pytest.raises(ValueError, match="input_ids: expected an array, got None"):
        cumoe.route(logits, table)
    with pytest.raises(ValueError, match="input_ids: expected None, since the router has no expert_table"):
        cumoe.route(logits, cumoe.Router(2), ids)
    with pytest.raises(ValueError, match=r"input_ids: expected shape \(num_tokens=3\)"):
        cumoe.route(logits, table, ids[:2])
    with pytest.raises(TypeError, match="input_ids: expected dtype int8"):
        cumoe.route(logits, table, ids.astype(float))
