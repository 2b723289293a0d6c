"""Many tokens routed in registers: the bits of the kernel that routes any, whatever is odd about a token."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import GPU
from test_group import assert_same, sort
from test_route import assert_routing, on

import cumoe
from cumoe.gpu import group, route_and_count, route_and_group
from cumoe.gpu.route_and_count import keys_of_lane, serves, split

# Without a GPU: integers.


@given(st.one_of(st.integers(1, 5000), st.integers(1, 2**31 - 1)), st.sampled_from([4, 8, 16]))
def test_every_token_has_a_warp(num_tokens, keys):
    """Blocks cover the tokens, warps those of a block, and no row of counts is empty."""
    how = split(num_tokens, keys)
    assert (how.blocks - 1) * how.tokens_per_block < num_tokens <= how.blocks * how.tokens_per_block
    assert how.warps * how.tokens_per_warp >= how.tokens_per_block
    assert how.warps <= route_and_count.MAX_WARPS[keys]
    assert how.blocks <= route_and_group.max_rows(num_tokens)


@given(st.integers(4097, 2**31 - 1), st.integers(1, group.MAX_ROWS))
def test_every_row_is_placed(num_slots, rows):
    """By some block, and none is idle."""
    of_a_block = group.rows_per_block(num_slots, rows)
    blocks = -(-rows // of_a_block)
    assert 1 <= of_a_block <= rows
    assert (blocks - 1) * of_a_block < rows <= blocks * of_a_block


# On a GPU, and on the CPU through tests/test_cuda_on_cpu.py.

EVERY = {"router": 1}
"""Which of the routers are tried; tests/small_shapes.py leaves some out."""

SIZES = [(4, 1), (16, 1), (16, 16), (64, 6), (100, 8), (128, 8), (160, 6), (256, 8), (256, 32), (384, 9), (512, 10)]
"""(num_experts, top_k): lanes of 4, 8 and 16 experts, all of them or some; segments of 1 to 32 lanes."""


def buffers(num_tokens, top_k, num_experts):
    """Return poisoned arrays for one call."""
    import cupy

    wanted = group.buffers(num_tokens, top_k, num_experts)
    slots, row = (num_tokens, top_k), (route_and_group.max_rows(num_tokens), group.row_words(num_experts))
    wanted |= {"topk_ids": (slots, np.int32), "topk_weights": (slots, np.float32), "counts": (row, np.int32)}
    wanted["progress"] = (3001,), np.int32
    made = {name: cupy.empty(*spec) for name, spec in wanted.items()}
    for array in made.values():
        array.fill(-77)
    return made


def run(logits, router, bias=None, num_experts=None, out=None):
    """Route and sort NumPy logits of one or several parts; return NumPy (ids, weights, groups)."""
    num_tokens, num_choices = logits.shape[-2:]
    num_experts = num_choices if num_experts is None else num_experts
    out = buffers(num_tokens, router.top_k, num_experts) if out is None else out
    routing, groups = route_and_group.route_and_group(
        GPU.asarray(logits), on(GPU, router), GPU.asarray(bias), None, num_experts, out
    )
    assert not GPU.asnumpy(out["progress"]).any()
    return GPU.asnumpy(routing.topk_ids), GPU.asnumpy(routing.topk_weights), cumoe.Groups(*map(GPU.asnumpy, groups))


@pytest.fixture
def both(monkeypatch):
    """Return a function that runs both kernels and fails unless they agree in every bit; it returns what came out."""

    def compare(logits, router, **more):
        assert serves(GPU.asarray(logits), on(GPU, router), GPU.asarray(more.get("bias")))
        with monkeypatch.context() as patch:
            patch.setattr(route_and_group, "MANY_SLOTS", 0)
            ids, weights, groups = run(logits, router, **more)
            patch.setattr(route_and_count, "serves", lambda *arrays: False)
            expected_ids, expected_weights, expected_groups = run(logits, router, **more)
        np.testing.assert_array_equal(ids, expected_ids)
        np.testing.assert_array_equal(weights.view(np.int32), expected_weights.view(np.int32))
        assert_same(groups, expected_groups)
        assert_same(groups, sort(ids, more.get("num_experts") or logits.shape[-1]))
        return ids, weights

    return compare


def routers(num_experts, top_k, seed):
    """Return routers of every kind that the kernel serves."""
    rng = np.random.default_rng(seed)
    bias = rng.normal(0, 0.2, num_experts).astype(np.float32)
    plain = [
        cumoe.Router(top_k),
        cumoe.Router(top_k, renormalize=True),
        cumoe.Router(top_k, renormalize=True, renormalize_eps=1e-6, renormalize_order=2),
        cumoe.Router(top_k, select_by="logits", expert_scale=rng.uniform(0.5, 2, num_experts)),
        cumoe.Router(top_k, "sigmoid", renormalize=True, renormalize_eps=0.01, renormalize_eps_mode="clamp"),
        cumoe.Router(top_k, "sqrt_softplus", renormalize=True, scale=2.5),
        cumoe.Router(top_k, "sigmoid", selection_bias=bias, renormalize=True),
        cumoe.Router(top_k, "sigmoid", "logits", selection_bias=bias),
    ]
    keys = keys_of_lane(num_experts)
    for lanes in (1, 2, 4, 8):
        num_groups, rest = divmod(num_experts, keys * lanes)
        top_groups = -(-top_k // (keys * lanes))
        if rest or num_groups < 2 or top_groups > num_groups:
            continue
        groups = {"num_groups": num_groups, "top_groups": max(top_groups, num_groups // 2)}
        options = {"selection_bias": bias, "renormalize": True, "renormalize_eps": 1e-20}
        plain.append(cumoe.Router(top_k, "sigmoid", **options, **groups))
        plain.append(cumoe.Router(top_k, "sigmoid", group_score="max", **groups))
        plain.append(cumoe.Router(top_k, "softmax", "logits", **groups))
    return plain[:: EVERY["router"]]


@pytest.mark.gpu
@pytest.mark.parametrize(("num_experts", "top_k"), SIZES)
def test_the_same_bits_as_any_tokens(both, num_experts, top_k):
    """Ordinary tokens, all options."""
    logits = np.random.default_rng(num_experts).normal(0, 2, (19, num_experts)).astype(np.float32)
    for router in routers(num_experts, top_k, top_k):
        assert_routing(logits, router, *both(logits, router))


ODD = ["tied", "twins", "neighbours", "equal", "zeros", "nan", "negative_nan", "infinite", "one_lane", "subnormal"]


@pytest.mark.gpu
@pytest.mark.parametrize("odd", ODD)
@pytest.mark.parametrize(("num_experts", "top_k"), [(16, 2), (128, 8), (160, 6), (256, 8), (512, 10)])
def test_odd_tokens_between_others(both, num_experts, top_k, odd):
    """What comparing keys alone does not settle; the tokens beside them stay as they are."""
    rng = np.random.default_rng(num_experts)
    logits = rng.normal(0, 2, (23, num_experts)).astype(np.float32)
    rows = logits[::3]
    if odd == "tied":
        rows[:] = rng.integers(-3, 4, rows.shape)
    elif odd in ("twins", "neighbours"):  # of two lanes, of one
        rows[:, 1] = rows[:, 2 if odd == "neighbours" else -1] = rows.max(axis=1) + 1
    elif odd == "equal":
        rows[:] = 0.25
    elif odd == "zeros":
        rows[:] = np.where(rng.random(rows.shape) < 0.5, -0.0, 0.0)
        rows[::2] -= rng.integers(0, 2, rows[::2].shape)
    elif odd in ("nan", "negative_nan"):
        rows[rng.random(rows.shape) < 0.2] = np.copysign(np.nan, -1 if odd == "negative_nan" else 1)
        rows[0] = np.copysign(np.nan, -1 if odd == "negative_nan" else 1)
    elif odd == "infinite":
        rows[:] = rng.choice(np.array([np.inf, -np.inf, 1.0, 2.0], np.float32), rows.shape)
        rows[1, 1:] = -np.inf
    elif odd == "one_lane":
        rows[:, 8:16] += 20
    else:
        rows[:] = rng.integers(-9, 10, rows.shape) * np.float32(1e-45)
    for router in routers(num_experts, top_k, 5):
        both(logits, router)


@pytest.mark.gpu
@pytest.mark.parametrize("num_parts", [1, 2, 5, 14])
@pytest.mark.parametrize(("num_experts", "top_k"), [(64, 6), (256, 8), (384, 8)])
def test_parts_are_added_in_order(both, num_parts, num_experts, top_k):
    """As the router's GEMM leaves them, with a bias; odd tokens too."""
    rng = np.random.default_rng(num_parts)
    parts = rng.normal(0, 1, (num_parts, 11, num_experts)).astype(np.float32)
    parts[:, 4] = np.round(parts[:, 4])
    bias = rng.normal(0, 0.3, num_experts).astype(np.float32)
    for router in routers(num_experts, top_k, 1)[:8]:
        both(parts, router, bias=bias)
    both(parts, cumoe.Router(top_k, "sigmoid", renormalize=True), bias=bias, num_experts=num_experts - 3)


@pytest.mark.gpu
@pytest.mark.parametrize("num_tokens", [1, 7, 8, 9, 63, 65, 1023, 1024, 1025, 2049, 4095, 4097])
@pytest.mark.parametrize(("num_experts", "top_k"), [(16, 1), (12, 3)])
def test_tokens_at_every_corner(both, num_tokens, num_experts, top_k):
    """Around the tokens of a block, of all blocks, of a warp and of its batches."""
    logits = np.random.default_rng(num_tokens).normal(0, 2, (num_tokens, num_experts)).astype(np.float32)
    both(logits, cumoe.Router(top_k, "sigmoid"))


@pytest.mark.gpu
def test_rows_of_a_wider_array(both):
    """Whole vectors apart; what lies between is not read."""
    wide = np.full((40, 132), np.nan, np.float32)
    wide[:, :128] = np.random.default_rng(0).normal(0, 2, (40, 128))
    logits = GPU.asarray(wide)[:, :128]
    router = cumoe.Router(8, renormalize=True)
    assert serves(logits, router, None)
    assert not serves(GPU.asarray(wide)[:, :126], router, None)
    assert not serves(GPU.asarray(wide[:, :129].copy())[:, :128], router, None)
    assert not serves(GPU.asarray(wide)[:, 1:129], router, None)
    ids, _ = both(wide[:, :128].copy(), router)
    out = buffers(40, 8, 128)
    routing, _ = route_and_group.route_and_group(logits, router, None, None, 128, out)
    assert (GPU.asnumpy(routing.topk_ids) == ids).all()


@pytest.mark.gpu
def test_counts_need_no_clearing(monkeypatch):
    """The same memory for calls of several sizes, again and again."""
    monkeypatch.setattr(route_and_group, "MANY_SLOTS", 0)
    rng = np.random.default_rng(0)
    largest = buffers(1200, 2, 32)
    router = cumoe.Router(2)
    for num_tokens in (1200, 5, 700, 1200, 64, 1200):
        out = buffers(num_tokens, 2, 32) | {"counts": largest["counts"]}
        logits = rng.normal(0, 1, (num_tokens, 32)).astype(np.float32)
        ids, weights, groups = run(logits, router, out=out)
        assert_routing(logits, router, ids, weights)
        assert_same(groups, sort(ids, 32))
