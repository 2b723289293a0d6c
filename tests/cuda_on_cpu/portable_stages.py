"""Routing and grouping at the sizes where kernels turn a corner: warps and blocks.

Run by tests/test_cuda_on_cpu.py with plugin.py, never by itself: `cupy` is the fake one here.
"""

import numpy as np
import pytest
from support import DTYPES, GPU
from test_group import assert_same, sort
from test_group import run as run_group
from test_route import SCORINGS, assert_routing
from test_route import run as run_route

import cumoe

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_experts", [1, 2, 31, 32, 33, 63, 65, 127, 257, 512, 1000, 1023, 1024])
def test_routes_among_any_number_of_experts(dtype, num_experts):
    """Every scoring, with and without a bias, up to 32 choices; five tokens are two blocks, the second not full."""
    rng = np.random.default_rng(num_experts)
    logits = rng.normal(0, 2, (5, num_experts)).astype(DTYPES[dtype])
    bias = rng.normal(0, 0.2, num_experts).astype(np.float32)
    for top_k in {min(top_k, num_experts) for top_k in (1, 7, 32)}:
        for scoring in SCORINGS:
            for selection_bias in (None, bias):
                router = cumoe.Router(top_k, scoring, renormalize=True, selection_bias=selection_bias)
                assert_routing(logits, router, *run_route(GPU, logits, router))


@pytest.mark.parametrize("num_groups", [2, 3, 8, 32, 33, 128])
@pytest.mark.parametrize("group_score", ["max", "sum_top2"])
@pytest.mark.parametrize("dropped_groups", ["minus_inf", "zero"])
def test_routes_among_groups(num_groups, group_score, dropped_groups):
    """Fewer groups than lanes and more; groups of one expert and of several."""
    rng = np.random.default_rng(num_groups)
    for size in (1, 4):
        logits = rng.normal(0, 2, (6, num_groups * size)).astype(np.float32)
        router = cumoe.Router(
            min(size, 3), "sigmoid", num_groups=num_groups, top_groups=max(1, num_groups // 2),
            group_score=group_score, dropped_groups=dropped_groups,
        )  # fmt: skip
        assert_routing(logits, router, *run_route(GPU, logits, router))


@pytest.mark.parametrize("num_slots", [1, 31, 32, 33, 255, 256, 257, 1023, 1024, 1025, 4095, 4096, 4097, 9000])
@pytest.mark.parametrize("num_experts", [1, 31, 255, 256, 1023, 1024])
def test_groups_at_every_corner(num_slots, num_experts):
    """The small block, the large block, several blocks; ids below, above and far out of range."""
    rng = np.random.default_rng(num_slots)
    ids = rng.integers(-2, num_experts + 2, (num_slots, 1)).astype(np.int32)
    ids[rng.random(ids.shape) < 0.01] = np.iinfo(np.int32).min
    ids[rng.random(ids.shape) < 0.01] = np.iinfo(np.int32).max
    assert_same(run_group(GPU, GPU.asarray(ids), num_experts), sort(ids, num_experts))
