"""Choose, weigh and sort: route_and_group.cu alone for few slots, route_and_count.cu and group.cu for many."""

from typing import Any, NamedTuple

from cumoe.data.groups import Groups
from cumoe.data.routing import Router, Routing
from cumoe.gpu import group, route, route_and_count
from cumoe.gpu.compile import current_device, launch, max_shared_bytes
from cumoe.gpu.structs import Struct, joined

PLACE, PUBLISH = 0, 1

MANY_WARPS, FEW_WARPS = 32, 8
"""Of a block. The smaller one where a block sorts, and where shared memory is short."""

MANY_SLOTS = 1024
"""Above, two launches are quicker where route_and_count.cu can be the first of them."""

LAST_BLOCK_SLOTS = 4096
"""Up to so many slots the last block sorts, where it cannot."""

TAIL = Struct(pointer=("blocks_done",), int32=("tokens_per_block", "then"))


class Split(NamedTuple):
    """How the tokens are spread."""

    warps: int  # of a block
    tokens_per_block: int
    blocks: int
    then: int  # PLACE: the last block sorts all slots; PUBLISH: group_place follows

    def shared_bytes(self, words_per_warp: int, num_experts: int) -> int:
        """Return the shared memory of a block, which routes first and counts or sorts then."""
        routing = 4 * min(self.warps, self.tokens_per_block) * words_per_warp
        counting = 4 * group.row_words(num_experts)
        return max(routing, group.bytes_to_place_all(num_experts) if self.then == PLACE else counting)


def split(num_tokens: int, top_k: int, words_per_warp: int, max_bytes: int, *, alone: bool) -> Split:
    """Return how the tokens are spread, from integers alone.

    Parameters
    ----------
    words_per_warp : int
        Shared memory of a warp that routes.
    max_bytes : int
        Shared memory of a block.
    alone : bool
        Whether a counter says which block comes last; without one only a single block can sort.
    """
    few = num_tokens * top_k <= LAST_BLOCK_SLOTS
    warps = FEW_WARPS if few else MANY_WARPS
    tokens_per_block = -(-num_tokens // group.MAX_ROWS)
    if few and not alone and num_tokens <= warps:
        tokens_per_block = num_tokens  # one block, which needs no second launch
    if 4 * min(warps, tokens_per_block) * words_per_warp > max_bytes:
        warps = FEW_WARPS
    blocks = -(-num_tokens // tokens_per_block)
    return Split(warps, tokens_per_block, blocks, PLACE if few and (alone or blocks == 1) else PUBLISH)


def max_rows(num_tokens: int) -> int:
    """Return an upper bound of the rows of counts."""
    return min(group.MAX_ROWS, num_tokens)


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
    num_choices, max_bytes = logits.shape[-1], max_shared_bytes(current_device())
    words = route.words_per_warp(router, num_choices)
    how = split(num_tokens, top_k, words, max_bytes, alone=blocks_done is not None)
    routed = route.pack(logits, router, routing, input_ids, router_bias)
    many = how.then == PUBLISH or num_tokens * top_k > MANY_SLOTS
    if many and route_and_count.serves(logits, router, router_bias):
        lanes = route_and_count.split(num_tokens, route_and_count.keys_of_lane(num_choices))
        size = route_and_count.shared_bytes(lanes, router, num_choices, num_experts)
        if size <= max_bytes:
            grouping = group.pack(routing.topk_ids, num_experts, out, lanes.tokens_per_block * top_k, lanes.blocks)
            route_and_count.route_and_count(routed, grouping, router, lanes, num_choices, size)
            group.place(grouping, num_tokens * top_k, num_experts, lanes.blocks)
            return routing, groups
    tokens_per_row, rows = (num_tokens, 1) if how.then == PLACE else (how.tokens_per_block, how.blocks)
    grouping = group.pack(routing.topk_ids, num_experts, out, tokens_per_row * top_k, rows)
    tail = TAIL(blocks_done=blocks_done, tokens_per_block=how.tokens_per_block, then=how.then)
    name = f"route_and_group_{route.keys_of_lane(num_choices)}" + ("_few" if how.warps == FEW_WARPS else "")
    size = how.shared_bytes(words, num_experts)
    launch(name, how.blocks, how.warps * 32, joined((routed, grouping, tail)), size, overlap=True)
    if how.then == PUBLISH:
        group.place(grouping, num_tokens * top_k, num_experts, rows)
    return routing, groups
