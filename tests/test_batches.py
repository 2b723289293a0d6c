"""A token's row has the same bits in every batch, across all sizes at which other kernels or grids are chosen."""

from functools import lru_cache

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import DTYPES, GPU, random_layer

import cumoe
from cumoe.gpu import config, group, route_and_group

pytestmark = pytest.mark.gpu

HIDDEN, EXPERTS, TOP_K = 1096, 6, 2
"""Three chunks of the router, the last one ragged; few experts, so that few tokens reach the largest tile."""

LARGEST = 2500


def thresholds():
    """Return the numbers of tokens around which something else is chosen."""
    rows = [*(limit for _, limit in config.WGMMA_MEAN_ROWS), *(c.block_m for c in config.CONFIGS if c.engine == "mma")]
    tokens = {mean * EXPERTS // TOP_K for mean in rows}  # by the mean rows of an expert
    tokens |= {tile.block_m for tile in config.CONFIGS}  # by the rows of a shared expert
    tokens |= {
        group.MAX_RANKED // TOP_K,
        group.ONE_BLOCK_SLOTS // TOP_K,
        route_and_group.LAST_BLOCK_SLOTS // TOP_K,
        route_and_group.MANY_SLOTS // TOP_K,
        group.MAX_ROWS,
        1,
        8,
        32,
    }
    return sorted({t + d for t in tokens for d in (-1, 0, 1) if 1 <= t + d < LARGEST})


@lru_cache(maxsize=1)
def whole(dtype, shared_size):
    """Return (layer, its tokens on the GPU, the bits of their rows in one batch)."""
    rng = np.random.default_rng(3)
    arrays = random_layer(
        rng, dtype, num_tokens=LARGEST, hidden_size=HIDDEN, intermediate_size=136, num_experts=EXPERTS, top_k=TOP_K,
        shared_sizes=(shared_size,), gated_shared=True, biases=True,
    )  # fmt: skip
    x, _, experts, shared = arrays.build(GPU)
    weight = (rng.standard_normal((EXPERTS, HIDDEN)) * HIDDEN**-0.5).astype(DTYPES[dtype])
    bias = rng.standard_normal(EXPERTS).astype(np.float32)
    router = cumoe.Router(TOP_K, renormalize=True)
    layer = cumoe.MoE(
        router, experts, shared, router_weight=GPU.asarray(weight), router_bias=GPU.asarray(bias), max_tokens=LARGEST
    )
    y = GPU.asnumpy(layer(x))
    assert not np.isnan(y.astype(np.float32)).any()
    return layer, x, y


def check(layer, x, y, begin, end):
    """Fail unless those tokens alone get the rows that they have in the whole batch, called and repeated."""
    for _ in range(2):
        part = GPU.asnumpy(layer(x[begin:end]))
        different = (part.view(np.uint8) != y[begin:end].view(np.uint8)).reshape(end - begin, -1).any(1)
        assert not different.any(), f"{end - begin} tokens from {begin}: rows {np.flatnonzero(different)[:10]} differ"


@pytest.mark.parametrize("shared_size", [40, 1200], ids=["narrow", "wide"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_do_not_depend_on_the_size_of_the_batch(dtype, shared_size):
    """At every threshold, one token less and one more; a wide shared expert moves them."""
    layer, x, y = whole(dtype, shared_size)
    for num_tokens in thresholds():
        check(layer, x, y, 0, num_tokens)


@pytest.mark.parametrize("dtype", DTYPES)
@settings(max_examples=60)
@given(begin=st.integers(0, LARGEST - 1), num_tokens=st.integers(1, LARGEST))
def test_rows_do_not_depend_on_the_batch(dtype, begin, num_tokens):
    """Any run of tokens."""
    check(*whole(dtype, 40), begin, min(LARGEST, begin + num_tokens))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_captured_token_has_the_bits_that_it_has_in_a_batch(dtype):
    """The graph of one token, too."""
    layer, x, y = whole(dtype, 40)
    captured = layer.capture(1)
    for token in (0, 7, LARGEST - 1):
        captured.x[...] = x[token : token + 1]
        assert GPU.asnumpy(captured()).tobytes() == y[token : token + 1].tobytes()
