"""Launching kernels/route_and_group.cu: choose, weigh and sort in one launch up to 4096 slots, in two above."""

from typing import Any, NamedTuple

from cumoe.data.groups import Groups
from cumoe.data.routing import Router, Routing
from cumoe.gpu import group, route
from cumoe.gpu.compile import current_device, launch, max_shared_bytes
from cumoe.gpu.structs import Struct, joined

PLACE, PUBLISH = 0, 1

TAIL = Struct(pointer=("blocks_done",), int32=("tokens_per_block", "then"))


class Split(NamedTuple):
    """How the tokens are spread."""

    warps: int  # of a block: 32, or 8 where one block sorts and where shared memory is short
    tokens_per_block: int
    blocks: int
    then: int  # PLACE: the last block sorts all slots; PUBLISH: group_place follows

    def shared_bytes(self, words_per_warp: int, num_experts: int) -> int:
        """Return the shared memory of a block, which routes first and counts then."""
        routing_warps = min(self.warps, self.tokens_per_block)
        return max(4 * routing_warps * words_per_warp, group.shared_bytes(self.warps, num_experts))


def split(num_tokens: int, top_k: int, words_per_warp: int, num_experts: int, max_bytes: int, *, alone: bool) -> Split:
    """Return how the tokens are spread, from integers alone.

    Parameters
    ----------
    words_per_warp, num_experts : int
        Shared memory of a warp that routes, and the experts that are sorted by.
    max_bytes : int
        Shared memory of a block.
    alone : bool
        Whether a counter says which block comes last; without one only a single block can sort.
    """
    num_slots = num_tokens * top_k
    warps = group.num_warps(num_slots, num_experts, max_bytes)
    tokens_per_block = -(-num_tokens // group.MAX_BLOCKS)
    if not alone and num_tokens <= warps and num_slots <= group.ONE_BLOCK_SLOTS:
        tokens_per_block = num_tokens  # one block, which needs no second launch
    if 4 * min(warps, tokens_per_block) * words_per_warp > max_bytes:
        warps = group.FEW_WARPS
    blocks = -(-num_tokens // tokens_per_block)
    fits_one = num_slots <= group.ONE_BLOCK_SLOTS and (alone or blocks == 1)
    return Split(warps, tokens_per_block, blocks, PLACE if fits_one else PUBLISH)


def max_blocks(num_tokens: int) -> int:
    """Return an upper bound of the blocks."""
    return min(group.MAX_BLOCKS, num_tokens)


def route_and_group(
    logits: Any,
    router: Router,
    router_bias: Any,
    input_ids: Any,
    num_experts: int,
    out: dict[str, Any],
    blocks_done: Any = None,
) -> tuple[Routing, Groups]:
    """Route and sort on the current stream, into the arrays `out`; clears ``out["progress"]`` too.

    Parameters
    ----------
    logits : ([num_parts,] num_tokens, num_choices) CuPy array
    num_experts : int
        Experts that are sorted by: choices from this number on have no rows.
    blocks_done : (1,) int32 CuPy array, optional
        0 when the launch begins, and again when it has ended.
    """
    routing = Routing(out["topk_ids"], out["topk_weights"])
    groups = Groups(*(out[name] for name in Groups._fields))
    num_tokens, top_k = routing.topk_ids.shape
    if num_tokens == 0:
        return routing, group.group(routing.topk_ids, num_experts, out)
    words = route.words_per_warp(router, logits.shape[-1])
    max_bytes = max_shared_bytes(current_device())
    how = split(num_tokens, top_k, words, num_experts, max_bytes, alone=blocks_done is not None)
    slots_per_block = (num_tokens if how.then == PLACE else how.tokens_per_block) * top_k
    grouping = group.pack(routing.topk_ids, num_experts, out, slots_per_block)
    routed = route.pack(logits, router, routing, input_ids, router_bias)
    tail = TAIL(blocks_done=blocks_done, tokens_per_block=how.tokens_per_block, then=how.then)
    name = f"route_and_group_{route.keys_of_lane(logits.shape[-1])}" + ("_few" if how.warps == group.FEW_WARPS else "")
    size = how.shared_bytes(words, num_experts)
    launch(name, how.blocks, how.warps * 32, joined((routed, grouping, tail)), size, overlap=True)
    if how.then == PUBLISH:
        group.place(grouping, how.blocks, how.warps, num_experts)
    return routing, groups
