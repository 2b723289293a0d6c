"""Launching kernels/group.cu: the slots of all tokens sorted by expert."""

from typing import Any

import numpy as np

from cumoe.data.groups import Groups
from cumoe.door.arrays import cupy
from cumoe.gpu.compile import current_device, launch, max_shared_bytes
from cumoe.gpu.structs import Packed, Struct

WARPS = 32
FEW_WARPS = 8
"""A smaller block where one is enough: there is less to clear and to add up. It also serves where the counters of the
larger one do not fit into shared memory: sm_86, sm_89 and sm_120 with more than 744 experts."""
MAX_RANKED = 64
"""Up to so many slots are compared with each other; the number is that of kernels/group.cuh."""
ONE_BLOCK_SLOTS = 4096
"""Up to here one block counts and places in one launch."""
MAX_BLOCKS = 128
"""Every block reads the counts of all others: more blocks would read more than they place."""

LAUNCH = Struct(
    pointer=(
        "topk_ids",
        "permutation",
        "inverse_permutation",
        "expert_offsets",
        "tokens_per_expert",
        "counts",
        "progress",
    ),
    int32=("num_slots", "num_experts", "slots_per_block", "num_progress"),
)


def num_blocks(num_slots: int) -> int:
    """Return how many blocks share the slots."""
    return 1 if num_slots <= ONE_BLOCK_SLOTS else min(MAX_BLOCKS, -(-num_slots // 1024))


def num_warps(num_slots: int, num_experts: int, max_bytes: int) -> int:
    """Return how many warps a block has on a GPU that gives it at most `max_bytes` of shared memory."""
    return FEW_WARPS if num_slots <= ONE_BLOCK_SLOTS or shared_bytes(WARPS, num_experts) > max_bytes else WARPS


def shared_bytes(warps: int, num_experts: int) -> int:
    """Return the shared memory of a block: a histogram for every warp and two rows, or the slots that it ranks."""
    return 4 * max((warps + 2) * (num_experts + 1), MAX_RANKED)


def buffers(num_tokens: int, top_k: int, num_experts: int) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
    """Return name, shape and dtype of everything that grouping writes."""
    int32 = np.dtype(np.int32)
    return {
        "permutation": ((num_tokens * top_k,), int32),
        "expert_offsets": ((num_experts + 1,), int32),
        "tokens_per_expert": ((num_experts,), int32),
        "inverse_permutation": ((num_tokens, top_k), int32),
        "counts": ((num_blocks(num_tokens * top_k), num_experts + 1), int32),
    }


def group(ids: Any, num_experts: int, out: dict[str, Any] | None = None) -> Groups:
    """Sort the slots on the current stream, into the arrays `out` if they are given; clears `out["progress"]` too."""
    num_tokens, top_k = ids.shape
    num_slots = num_tokens * top_k
    if out is None:
        out = {name: cupy.empty(*spec) for name, spec in buffers(num_tokens, top_k, num_experts).items()}
    groups = Groups(*(out[name] for name in Groups._fields))
    if num_slots == 0:
        groups.expert_offsets.fill(0)
        groups.tokens_per_expert.fill(0)
        return groups
    blocks = num_blocks(num_slots)
    warps = num_warps(num_slots, num_experts, max_shared_bytes(current_device()))
    threads = warps * 32
    packed = pack(ids, num_experts, out, slots_per_block=-(-num_slots // (blocks * threads)) * threads)
    if blocks > 1:
        _launch("group_count", blocks, warps, packed, num_experts)
    _launch("group_place", blocks, warps, packed, num_experts)
    return groups


def place(packed: Packed, blocks: int, warps: int, num_experts: int) -> None:
    """Launch what follows once every block of the same number has published its counts."""
    _launch("group_place", blocks, warps, packed, num_experts)


def pack(ids: Any, num_experts: int, out: dict[str, Any], slots_per_block: int) -> Packed:
    """Return the struct of kernels/group.cuh."""
    return LAUNCH(
        topk_ids=ids,
        **{name: out[name] for name in Groups._fields},
        counts=out["counts"],
        progress=out.get("progress"),
        num_slots=ids.size,
        num_experts=num_experts,
        slots_per_block=slots_per_block,
        num_progress=out["progress"].size if "progress" in out else 0,
    )


def _launch(name: str, blocks: int, warps: int, packed: Packed, num_experts: int) -> None:
    few = "_few" if warps == FEW_WARPS else ""
    launch(name + few, blocks, warps * 32, packed, shared_bytes(warps, num_experts), overlap=True)
