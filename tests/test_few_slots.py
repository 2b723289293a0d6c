"""Layers of at most 32 slots, which the Hopper kernel sorts by itself: the same bits as from sorted slots."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import GPU, assert_close, gpu_is_there, random_layer

import cumoe
from cumoe.gpu import config, grouped_gemm
from cumoe.gpu.compile import has_wgmma

MAX_ROWS = config.SMALLEST_WGMMA_TILE.block_m
NUM_EXPERTS = config.FEW_SLOTS  # with fewer, an expert would have more than one row on average, and another tile serve


def on_hopper(test):
    """Mark a test of the Hopper kernels."""
    there = gpu_is_there() and has_wgmma(0)
    return pytest.mark.gpu(pytest.mark.skipif(not there, reason="no GPU that the Hopper kernels serve")(test))


def runs_of(num_rows):
    """Return how many runs of rows an expert has."""
    return -(-num_rows // MAX_ROWS)


def sort(ids, num_experts):
    """Return a lane's row, count and earlier row blocks for every slot: a twin of few_slots_sm90.cuh."""
    key = np.where((ids >= 0) & (ids < num_experts), ids.astype(np.int64), 2**32 - 1)
    lanes = []
    for slot, expert in enumerate(key):
        rank = int(np.sum(key[:slot] == expert))
        is_first = rank == 0 and expert < num_experts
        smaller = key < expert
        earlier = sum(runs_of(int(np.sum(key == other))) for other in np.unique(key[smaller]))
        lanes.append((rank + int(np.sum(smaller)), int(np.sum(key == expert)) if is_first else 0, earlier))
    return lanes


@given(st.lists(st.integers(-1, 9), min_size=1, max_size=config.FEW_SLOTS))
def test_rows_are_those_of_the_grouping(ids):
    """By expert, then by slot; every row block of an expert is found once, where counting all experts finds it."""
    num_experts = 8
    ids = np.array(ids, np.int32)
    lanes = sort(ids, num_experts)
    groups = cumoe.group(ids[:, None], num_experts)
    has_expert = groups.inverse_permutation[:, 0] >= 0
    assert [row for (row, *_), has in zip(lanes, has_expert, strict=True) if has] == list(
        groups.inverse_permutation[has_expert, 0]
    )
    row_blocks = [runs_of(count) for count in groups.tokens_per_expert]
    wanted = [
        (expert, groups.expert_offsets[expert], groups.tokens_per_expert[expert])
        for expert, blocks in enumerate(row_blocks)
        for _ in range(blocks)
    ]
    found = []
    for row_block in range(sum(row_blocks)):
        holders = [s for s, (_, count, earlier) in enumerate(lanes) if 0 <= row_block - earlier < runs_of(count)]
        assert len(holders) == 1
        found.append((ids[holders[0]], lanes[holders[0]][0], lanes[holders[0]][1]))
    assert found == wanted


def run(monkeypatch, layer, few_slots, **options):
    """Return a layer's result, and whether a kernel of few slots computed it."""
    launched, launch = [], grouped_gemm.launch

    def recorded(kernel, *arguments, **others):
        launched.append(kernel)
        launch(kernel, *arguments, **others)

    with monkeypatch.context() as patch:
        patch.setattr(config, "FEW_SLOTS", few_slots)
        patch.setattr(grouped_gemm, "launch", recorded)
        return layer.run(GPU, **options), [name.endswith(f"_{config.SMALLEST_WGMMA_TILE.name}") for name in launched]


def few_rows(num_experts):
    """Return ids of few tokens, by a name."""
    rng = np.random.default_rng(3)
    return {
        "one slot": np.array([[2]]),
        "a token": rng.permutation(num_experts)[:8][None],
        "4 tokens": np.stack([rng.permutation(num_experts)[:8] for _ in range(4)]),
        "an expert has all": np.full((32, 1), num_experts - 1),
        "an expert has 17": np.r_[np.full(17, 1), np.arange(15)][:, None],
        "an expert twice": np.array([[3, 3, 0, 3], [0, 3, 1, 1]]),
        "holes": np.array([[-1, 5, num_experts, 2**31 - 1], [5, -(2**31), 0, -7]]),
        "none": np.full((3, 4), -1),
    }


@on_hopper
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("weight_on", ["input", "activation", "output"])
@pytest.mark.parametrize("name", few_rows(NUM_EXPERTS))
@pytest.mark.parametrize("shared", ["no shared", "two shared", "gated shared"])
def test_few_slots_change_no_bit(monkeypatch, dtype, weight_on, name, shared):
    """Whoever sorts them."""
    ids = few_rows(NUM_EXPERTS)[name].astype(np.int32)
    rng = np.random.default_rng(5)
    layer = random_layer(
        rng, dtype, num_tokens=ids.shape[0], hidden_size=136, intermediate_size=200, num_experts=NUM_EXPERTS,
        top_k=ids.shape[1], biases=True, weight_on=weight_on,
        shared_sizes={"no shared": (), "two shared": (40, 264), "gated shared": (72,)}[shared],
        gated_shared=shared == "gated shared",
    )  # fmt: skip
    layer = replace(layer, topk_ids=ids)
    y, few = run(monkeypatch, layer, config.FEW_SLOTS)
    z, many = run(monkeypatch, layer, 0)
    wide = shared == "two shared" and ids.shape[0] > MAX_ROWS  # it wants a larger tile
    assert (few, many) == ([not wide], [False])
    assert y.tobytes() == z.tobytes()
    assert_close(y, layer.expected(), dtype)


@on_hopper
@pytest.mark.parametrize(("slots", "is_few"), [(32, True), (33, False)])
def test_how_many_are_few(monkeypatch, slots, is_few):
    """One more goes the other way."""
    layer = random_layer(
        np.random.default_rng(0), "bfloat16", num_tokens=slots, hidden_size=64, top_k=1, num_experts=40
    )
    y, few = run(monkeypatch, layer, config.FEW_SLOTS)
    assert few == [is_few]
    assert_close(y, layer.expected(), "bfloat16")


@on_hopper
def test_slots_that_have_just_been_written():
    """Ids and weights from a kernel right before: of the caller, then of the layer's own router."""
    import cupy

    num_tokens, top_k, num_experts, rounds = 4, 8, 64, 40
    rng = np.random.default_rng(9)
    layer = random_layer(
        rng,
        "bfloat16",
        num_tokens=num_tokens,
        hidden_size=512,
        intermediate_size=256,
        num_experts=num_experts,
        top_k=top_k,
    )
    x, _, experts, _ = layer.build(GPU)
    order = np.stack(
        [np.stack([rng.permutation(num_experts)[:top_k] for _ in range(num_tokens)]) for _ in range(rounds)]
    )
    ids, weights = cupy.asarray(order.astype(np.int32)), cupy.asarray(rng.random(order.shape, np.float32))
    wanted = []
    for r in range(rounds):
        wanted.append(cumoe.moe(x, cumoe.Routing(ids[r], weights[r]), experts))
        cupy.cuda.Device().synchronize()
    own_ids, own_weights = cupy.full_like(ids[0], -1), cupy.full_like(weights[0], np.nan)
    found = []
    for r in range(rounds):
        cupy.copyto(own_ids, ids[r])
        cupy.copyto(own_weights, weights[r])
        found.append(cumoe.moe(x, cumoe.Routing(own_ids, own_weights), experts))
    assert all((y.view(np.uint16) == z.view(np.uint16)).all() for y, z in zip(found, wanted, strict=True))
    whole = cumoe.MoE(cumoe.Router(top_k), experts)
    logits = cupy.asarray(rng.standard_normal((rounds, num_tokens, num_experts), np.float32))
    together = [whole(x, logits[r]) for r in range(rounds)]
    for r in range(rounds):
        apart = cumoe.moe(x, cumoe.route(logits[r], whole.router), experts)
        assert (together[r].view(np.uint16) == apart.view(np.uint16)).all()


@on_hopper
def test_a_graph_reads_the_ids_of_each_replay():
    """Nothing of the routing is kept from the capture."""
    import cupy

    rng = np.random.default_rng(11)
    layer = random_layer(rng, "bfloat16", num_tokens=2, hidden_size=256, intermediate_size=128, num_experts=16, top_k=4)
    x, _, experts, _ = layer.build(GPU)
    whole = cumoe.MoE(cumoe.Router(4), experts)
    replay = whole.capture(2, inputs=("router_logits",))
    for _ in range(5):
        logits = cupy.asarray(rng.standard_normal((2, 16), np.float32))
        replay.x[...] = x
        replay.router_logits[...] = logits
        y = replay().copy()
        assert (y.view(np.uint16) == whole(x, logits).view(np.uint16)).all()
        z = cumoe.moe(x, cumoe.route(logits, whole.router), experts)
        assert (y.view(np.uint16) == z.view(np.uint16)).all()
