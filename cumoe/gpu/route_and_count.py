"""Launching kernels/route_and_count.cu: many tokens chosen and weighed in registers, their choices counted."""

from typing import Any, NamedTuple

import numpy as np

from cumoe.data.routing import Router
from cumoe.gpu import group, route
from cumoe.gpu.compile import launch
from cumoe.gpu.stacks import strides
from cumoe.gpu.structs import Packed, Struct, joined

MAX_WARPS = {4: 32, 8: 32, 16: 24}
"""Of a block, by the experts of a lane, for which kernels are compiled: 16 of them leave registers for no more."""
VECTOR_BYTES = 16
LIST = 4  # keys that a lane keeps in order, as in kernels/route_lanes.cuh
MIN_TOKENS_PER_BLOCK = 8
"""Few tokens have fewer rows of counts rather than emptier blocks."""

TAIL = Struct(
    int32=(
        *("segment", "lanes_per_group", "by_sigmoids", "whole_softmax"),
        *("tokens_per_block", "tokens_per_warp", "words_per_warp", "padding"),
    )
)


class Split(NamedTuple):
    """How the tokens are spread."""

    warps: int  # of a block
    tokens_per_block: int
    tokens_per_warp: int
    blocks: int  # and rows of counts


def split(num_tokens: int, keys: int) -> Split:
    """Return how the tokens are spread: over all blocks that may have a row of counts, then over their warps."""
    tokens_per_block = max(-(-num_tokens // group.MAX_ROWS), MIN_TOKENS_PER_BLOCK)
    warps = min(tokens_per_block, MAX_WARPS[keys])
    blocks = -(-num_tokens // tokens_per_block)
    return Split(warps, tokens_per_block, -(-tokens_per_block // warps), blocks)


def keys_of_lane(num_experts: int) -> int:
    """Return how many experts a lane has, of up to 512."""
    return next(keys for keys in MAX_WARPS if 32 * keys >= num_experts)


def serves(logits: Any, router: Router, router_bias: Any) -> bool:
    """Whether the kernel can route by these logits; kernels/route_and_group.cu does by any."""
    num_experts = logits.shape[-1]
    if num_experts > 32 * max(MAX_WARPS) or router.top_k > 32 or logits.dtype != np.float32:
        return False
    if router.expert_table is not None or router.logit_softcap is not None or router.scoring == "sparse_mixer":
        return False
    if route.ranks_apart(router):
        if router.select_by == "scores" and router.scoring != "sigmoid":
            return False
        if not _groups_fit(router, num_experts):
            return False
    *outer, col = strides(logits)
    whole = num_experts % 4 == 0 and all(stride % 4 == 0 for stride in outer) and (col == 1 or num_experts == 1)
    arrays = [array for array in (logits, router_bias, router.selection_bias) if array is not None]
    return whole and all(array.data.ptr % VECTOR_BYTES == 0 for array in arrays)


def _groups_fit(router: Router, num_experts: int) -> bool:
    """Whether each group is 1, 2, 4 ... whole lanes."""
    if router.num_groups == 1:
        return True
    lanes, rest = divmod(num_experts // router.num_groups, keys_of_lane(num_experts))
    return rest == 0 and lanes & (lanes - 1) == 0 and router.dropped_groups == "minus_inf"


def words_per_warp(router: Router, num_choices: int) -> int:
    """Return the words of shared memory of a warp: its lists, or what route.cuh needs for an odd token."""
    keys_or_list = max(keys_of_lane(num_choices), LIST + 1)  # a list has an end
    list_words = 32 * (keys_or_list + 1)  # behind them stand the choices' places
    return max(list_words, route.words_per_warp(router, num_choices, with_keys=route.ranks_apart(router)))


def shared_bytes(how: Split, router: Router, num_choices: int, num_experts: int) -> int:
    """Return the shared memory of a block: a row of counts, and what its warps need."""
    return 4 * (group.row_words(num_experts) + how.warps * words_per_warp(router, num_choices))


def route_and_count(routed: Packed, grouping: Packed, router: Router, how: Split, num_choices: int, size: int) -> None:
    """Launch; `group.place` follows.

    Parameters
    ----------
    routed, grouping : Packed
        The structs of kernels/router.cuh and kernels/group.cuh, with a row of counts a block.
    num_choices : int
        Width of the logits.
    size : int
        Shared memory of a block.
    """
    keys = keys_of_lane(num_choices)
    apart = route.ranks_apart(router)
    exact_ratio = router.renormalize and router.renormalize_eps == 0
    tail = TAIL(
        segment=1 << (router.top_k - 1).bit_length(),
        lanes_per_group=num_choices // router.num_groups // keys,
        by_sigmoids=int(apart and router.select_by == "scores"),
        whole_softmax=int(router.scoring == "softmax" and router.select_by == "scores" and not exact_ratio),
        tokens_per_block=how.tokens_per_block,
        tokens_per_warp=how.tokens_per_warp,
        words_per_warp=words_per_warp(router, num_choices),
        padding=0,
    )
    name = f"route_and_count_{keys}" + ("_whole" if num_choices == 32 * keys else "")
    launch(name, how.blocks, how.warps * 32, joined((routed, grouping, tail)), size, overlap=True)
