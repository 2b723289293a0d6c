"""The router of a layer on a GPU: logits in parts of the hidden dimension, then choice and order in one kernel."""

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import BF16, DTYPES, GPU
from test_group import assert_same, sort
from test_route import SCORINGS, assert_routing, on

import cumoe
from cumoe.gpu import group, route, router_gemm
from cumoe.gpu.layer_router import LayerRouter
from cumoe.gpu.route_and_group import LAST_BLOCK_SLOTS, PLACE, PUBLISH, max_rows, split
from cumoe.gpu.router_gemm import CHUNK, FEW, MANY, SLIM
from cumoe.gpu.router_gemm import split as split_planes

SMALL_SHARED_BYTES, LARGE_SHARED_BYTES = 99 << 10, 227 << 10  # sm_86 and sm_120; sm_90


# Without a GPU: integers and planes.


@given(st.integers(1, 2**20), st.integers(1, 1024), st.integers(1, 8192), st.sampled_from([1, 108, 132]))
def test_logits_come_whole_or_in_chunks(num_tokens, num_experts, hidden_size, num_sms):
    """Every SM has a tile, or every chunk a part of its own; nothing between, or the order of the sum would change."""
    size = num_tokens, num_experts, hidden_size
    tile = router_gemm.tile_for(*size, num_sms)
    parts = router_gemm.num_parts(tile, *size, num_sms)
    assert parts in (1, -(-hidden_size // CHUNK))
    assert parts == -(-hidden_size // CHUNK) or router_gemm.num_tiles(tile, num_tokens, num_experts) >= num_sms
    assert (tile is FEW) == (-(-num_tokens // 16) * -(-num_experts // 32) * -(-hidden_size // CHUNK) <= 8 * num_sms)
    assert (tile is SLIM) == (tile is not FEW and num_experts <= 32)


@given(
    num_tokens=st.one_of(st.integers(1, 200), st.integers(1, 2**24)),
    top_k=st.integers(1, 32),
    num_experts=st.integers(1, 1024),
    apart=st.booleans(),
    alone=st.booleans(),
    max_bytes=st.sampled_from([SMALL_SHARED_BYTES, LARGE_SHARED_BYTES]),
)
def test_every_token_is_routed_once(num_tokens, top_k, num_experts, apart, alone, max_bytes):
    """Blocks cover the tokens, the last one has some, memory and counts suffice, and who sorts has few slots."""
    words = max(top_k, 1) + num_experts * (2 if apart else 1)
    how = split(num_tokens, top_k, words, max_bytes, alone=alone)
    of_a_block = how.tokens_per_block
    assert (how.blocks - 1) * of_a_block < num_tokens <= how.blocks * of_a_block
    assert how.blocks <= max_rows(num_tokens) <= group.MAX_ROWS
    assert how.shared_bytes(words, num_experts) <= max_bytes
    if how.then == PLACE:
        assert num_tokens * top_k <= LAST_BLOCK_SLOTS
        assert alone or how.blocks == 1
    else:
        assert how.then == PUBLISH


def test_planes_add_up_to_the_weights():
    """Exactly, bit by bit of the significand; what is not finite stays so and poisons no other plane."""
    rng = np.random.default_rng(0)
    bits = rng.integers(0, 2**32, 100_000, np.uint32)
    weights = bits.view(np.float32)
    weights = weights[np.isfinite(weights) & (np.abs(weights) >= 2.0**-110)]
    planes = split_planes(weights, BF16)
    assert planes.shape == (3, weights.size)
    total = sum(plane.astype(np.float64) for plane in planes)
    assert (total == weights).all()
    odd = np.array([np.inf, -np.inf, np.nan, 0.0, -0.0, 3.4028235e38, 1e-42], np.float32)
    odd = np.append(odd, np.uint32(0x7F800001).view(np.float32))  # a NaN whose upper half reads as infinity
    first, *others = split_planes(odd, BF16).astype(np.float32)
    assert (first[:2] == odd[:2]).all()
    assert np.isnan(first[[2, 7]]).all()
    assert np.isfinite(others).all()
    assert abs(first[6] + others[0][6] + others[1][6] - odd[6]) < 2.0**-133


# On a GPU, and on the CPU through tests/test_cuda_on_cpu.py.


def run(x, weight, router, *, bias=None, logits=None, num_experts=None, dtype=None):
    """Run the router on NumPy arrays, in poisoned memory; return NumPy (topk_ids, topk_weights, groups, logits)."""
    import cupy

    on_gpu = {name: GPU.asarray(array) for name, array in (("x", x), ("weight", weight), ("bias", bias))}
    num_choices = (weight if logits is None else logits.T).shape[0]
    num_experts = num_choices if num_experts is None else num_experts
    made = LayerRouter(on(GPU, router), on_gpu["weight"], on_gpu["bias"], dtype or x.dtype, num_choices)
    buffers = group.buffers(len(x), router.top_k, num_experts) | made.buffers(len(x), num_experts)
    buffers["progress"] = (3001,), np.dtype(np.int32)
    out = {name: cupy.empty(*spec) for name, spec in buffers.items()}
    for array in out.values():
        array.fill(-77)
    routing, groups = made(on_gpu["x"], GPU.asarray(logits), None, num_experts, out)
    assert not GPU.asnumpy(out["progress"]).any()
    parts = None if logits is not None else GPU.asnumpy(out["router_logits"])
    arrays = (GPU.asnumpy(routing.topk_ids), GPU.asnumpy(routing.topk_weights))
    return *arrays, cumoe.Groups(*map(GPU.asnumpy, groups)), parts


def added_up(parts):
    """Add parts in order, in float32."""
    total = parts[0].copy()
    for part in parts[1:]:
        total += part
    return total


def tokens_and_weight(seed, num_tokens, num_experts, hidden_size, dtype, weight_dtype):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((num_tokens, hidden_size)).astype(DTYPES[dtype])
    return x, (rng.standard_normal((num_experts, hidden_size)) / hidden_size**0.5).astype(DTYPES[weight_dtype])


def assert_product(logits, x, weight):
    """Fail unless the logits have float32 accuracy, beside sums whose terms do not cancel."""
    x, weight = x.astype(np.float64), weight.astype(np.float64)
    assert np.linalg.norm(logits - x @ weight.T) <= 1e-6 * np.linalg.norm(np.abs(x) @ np.abs(weight).T)


@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "weight_dtype"), [("bfloat16",) * 2, ("float16",) * 2, ("bfloat16", "float32")])
@pytest.mark.parametrize(
    ("num_tokens", "num_experts", "hidden_size"),
    [(1, 1, 8), (1, 1, 1600), (15, 33, 64), (17, 40, 72), (3, 5, 504), (16, 32, 512), (2, 31, 520), (9, 70, 1600),
     (259, 130, 72), (257, 9, 1032)],
)  # fmt: skip
@pytest.mark.parametrize("tile", [FEW, SLIM, MANY], ids=lambda tile: tile.name)
def test_logits_against_float64(monkeypatch, dtype, weight_dtype, num_tokens, num_experts, hidden_size, tile):
    """Float32 accuracy: nothing is rounded to 16 bits, float32 weights included."""
    monkeypatch.setattr(router_gemm, "tile_for", lambda *size: tile)
    x, weight = tokens_and_weight(hidden_size, num_tokens, num_experts, hidden_size, dtype, weight_dtype)
    *_, parts = run(x, weight, cumoe.Router(1))
    assert (parts != -77).all()
    assert_product(added_up(parts), x, weight)


@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "weight_dtype"), [("bfloat16",) * 2, ("bfloat16", "float32")])
def test_a_logit_has_the_same_bits_in_every_batch(monkeypatch, dtype, weight_dtype):
    """All tiles, whole or in chunks, any tokens beside it."""
    x, weight = tokens_and_weight(7, 150, 140, 1104, dtype, weight_dtype)

    def logits(begin, end, tile, chunks):
        monkeypatch.setattr(router_gemm, "tile_for", lambda *size: tile)
        monkeypatch.setattr(router_gemm, "num_parts", lambda *size: chunks)
        *_, parts = run(x[begin:end], weight, cumoe.Router(1))
        assert len(parts) == chunks
        return added_up(parts)

    whole = logits(0, 150, MANY, 1)
    for begin, end, tile, chunks in (
        (0, 150, FEW, 1), (0, 150, FEW, 3), (0, 150, MANY, 3), (0, 1, FEW, 3), (5, 21, FEW, 1), (100, 150, MANY, 3),
        (0, 150, SLIM, 1), (3, 90, SLIM, 3),
    ):  # fmt: skip
        assert logits(begin, end, tile, chunks).tobytes() == whole[begin:end].tobytes()


@pytest.mark.gpu
def test_router_weights_of_any_layout():
    """Float32 tokens, odd sizes, strided rows and weights go another way, to the same numbers."""
    for dtype, hidden_size, step in (("float32", 96, 1), ("bfloat16", 97, 1), ("float16", 96, 2)):
        x, weight = tokens_and_weight(hidden_size, 20, 9, step * hidden_size, dtype, dtype)
        x, weight = x[:, ::step], weight[:, ::step]
        router = cumoe.Router(2)
        ids, weights, groups, parts = run(x, weight, router)
        assert_product(parts[0], x, weight)
        assert_routing(parts[0], router, ids, weights)
        assert_same(groups, sort(ids, 9))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_tokens", [1, 9, 130])
@pytest.mark.parametrize(("num_experts", "num_identity"), [(1, 0), (31, 2), (256, 0), (300, 0), (1000, 24)])
def test_chosen_and_sorted_in_one_kernel(dtype, num_tokens, num_experts, num_identity):
    """Logits of the caller: one block up to the tokens of its warps, then blocks that publish their counts."""
    rng = np.random.default_rng(num_tokens + num_experts)
    num_choices = num_experts + num_identity
    logits = rng.normal(0, 2, (num_tokens, num_choices)).astype(DTYPES[dtype])
    x = np.zeros((num_tokens, 8), DTYPES[dtype])
    bias = rng.normal(0, 0.2, num_choices).astype(np.float32)
    for scoring, selection_bias in zip(SCORINGS, (None, bias, None), strict=True):
        router = cumoe.Router(min(8, num_choices), scoring, renormalize=True, selection_bias=selection_bias)
        ids, weights, groups, _ = run(x, None, router, logits=logits, num_experts=num_experts)
        assert_routing(logits, router, ids, weights)
        assert_same(groups, sort(ids, num_experts))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("num_experts", [40, 300, 520])
def test_more_slots_than_one_block_sorts(num_experts, dtype):
    """Every block publishes its counts; in registers where that is possible, else with 8, 16 and 32 experts a lane."""
    logits = np.random.default_rng(num_experts).normal(0, 2, (521, num_experts)).astype(DTYPES[dtype])
    router = cumoe.Router(8, "sigmoid")
    ids, weights, groups, _ = run(np.zeros((521, 8), np.float32), None, router, logits=logits)
    assert_routing(logits, router, ids, weights)
    assert_same(groups, sort(ids, num_experts))


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("num_tokens", "num_experts"), [(1, 24), (1, 256), (9, 256), (33, 24), (200, 24), (512, 24), (513, 24)]
)
def test_router_of_a_layer(num_tokens, num_experts):
    """Logits in parts with a bias, groups of experts; the block that ends last sorts up to 4096 slots, else all do."""
    x, weight = tokens_and_weight(num_tokens, num_tokens, num_experts, 1032, "bfloat16", "bfloat16")
    rng = np.random.default_rng(num_experts)
    bias, selection_bias = rng.normal(0, 0.3, (2, num_experts)).astype(np.float32)
    router = cumoe.Router(
        8, "sigmoid", renormalize=True, renormalize_eps=1e-20, scale=2.5, num_groups=8, top_groups=4,
        selection_bias=selection_bias,
    )  # fmt: skip
    for _ in range(2):
        ids, weights, groups, parts = run(x, weight, router, bias=bias)
        assert_routing(added_up(parts) + bias, router, ids, weights)
        assert_same(groups, sort(ids, num_experts))


@pytest.mark.gpu
def test_words_of_a_warp_are_enough_for_every_choice():
    """All experts chosen, all groups kept: what the kernel writes to shared memory fits."""
    logits = np.random.default_rng(0).normal(0, 1, (40, 96)).astype(ml_dtypes.bfloat16)
    for num_groups in (1, 3, 96):
        router = cumoe.Router(96, "sigmoid", num_groups=num_groups, top_groups=num_groups)
        assert route.words_per_warp(router, 96) == 4 * 96 == route.words_per_warp(router, 96, with_keys=False) + 96
        ids, weights, groups, _ = run(np.zeros((40, 8), BF16), None, router, logits=logits)
        assert_routing(logits, router, ids, weights)
        assert_same(groups, sort(ids, 96))


@pytest.mark.gpu
@pytest.mark.parametrize("num_experts", [1, 7, 96, 256, 260])
@pytest.mark.parametrize("kind", ["plain", "bias", "groups", "groups of softmax", "mixer"])
def test_a_token_alone_is_routed_as_among_others(num_experts, kind):
    """By a whole block or by a warp: the same bits, also of equal logits, zeros of both signs and what is no number."""
    rng = np.random.default_rng(num_experts)
    rows = rng.normal(0, 2, (8, num_experts)).astype(np.float32)
    rows[1] = 1
    rows[2] = rng.integers(-1, 2, num_experts)
    rows[3] = rng.choice(np.array([0.0, -0.0, 1.0], np.float32), num_experts)
    rows[4] = rng.choice(np.array([np.nan, np.inf, -np.inf, 0.5], np.float32), num_experts)
    rows[5] = np.nan
    num_groups = next(groups for groups in (10, 8, 7, 1) if num_experts % groups == 0)
    router = {
        "plain": cumoe.Router(min(8, num_experts), renormalize=True),
        "bias": cumoe.Router(num_experts if num_experts < 100 else 32, "sigmoid", selection_bias=np.round(rows[0])),
        "groups": cumoe.Router(
            1 if num_groups == num_experts else min(5, num_experts), "sigmoid", num_groups=num_groups,
            top_groups=max(1, num_groups - 2), group_score="max",
        ),
        "groups of softmax": cumoe.Router(1, num_groups=num_groups, top_groups=1, selection_bias=np.round(rows[0])),
        "mixer": cumoe.Router(min(2, num_experts), "sparse_mixer"),
    }[kind]  # fmt: skip
    x = np.zeros((8, 8), np.float32)
    ids, weights, *_ = run(x, None, router, logits=rows)
    for token in range(8):
        one = slice(token, token + 1)
        own_ids, own_weights, groups, _ = run(x[one], None, router, logits=rows[one])
        assert own_ids.tobytes() == ids[one].tobytes(), token
        assert own_weights.tobytes() == weights[one].tobytes(), token
        assert_same(groups, sort(own_ids, num_experts))
