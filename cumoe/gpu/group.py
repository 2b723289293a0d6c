"""Launching kernels/group.cu: the slots of all tokens sorted by expert."""

from typing import Any

import numpy as np

from cumoe.data.groups import Groups
from cumoe.door.arrays import cupy
from cumoe.gpu.compile import launch
from cumoe.gpu.structs import Packed, Struct

COUNTING_WARPS, PLACING_WARPS, ALL_WARPS = 32, 16, 8
"""Of a block that counts a row, of one that places some rows, of the only one: there is less to clear and to add up."""
MAX_RANKED = 64
"""Up to so many slots are compared with each other; the number is that of kernels/group.cuh."""
ONE_BLOCK_SLOTS = 1024
"""Up to here one block counts and places in one launch; above, two launches are quicker."""
MAX_ROWS = 128
"""Of the matrix of counts: every block that places reads all of it."""
MIN_PLACED = 512
"""Slots of a block that places: fewer are not worth the reading of all counts."""

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
    int32=("num_slots", "num_experts", "slots_per_row", "num_progress", "num_rows", "rows_per_block"),
)


def num_rows(num_slots: int) -> int:
    """Return how many rows the matrix of counts has; 1 where one block places all slots."""
    return 1 if num_slots <= ONE_BLOCK_SLOTS else min(MAX_ROWS, -(-num_slots // 1024))


def rows_per_block(num_slots: int, rows: int) -> int:
    """Return how many rows of counts a block places."""
    return -(-rows // -(-num_slots // MIN_PLACED))


def row_words(num_experts: int) -> int:
    """Return the length of a row of counts: a bin an expert, one for slots without, whole vectors."""
    return -(-(num_experts + 1) // 4) * 4


def bytes_to_place(num_experts: int) -> int:
    """Return the shared memory of a block that places rows: a histogram a warp, and two rows."""
    return 4 * (PLACING_WARPS * (num_experts + 1) + 2 * row_words(num_experts))


def bytes_to_place_all(num_experts: int) -> int:
    """Return the shared memory of a block that places all slots: a histogram a warp, or the slots that it ranks."""
    return 4 * max(ALL_WARPS * (num_experts + 1), MAX_RANKED)


def buffers(num_tokens: int, top_k: int, num_experts: int) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
    """Return name, shape and dtype of everything that grouping writes."""
    int32 = np.dtype(np.int32)
    return {
        "permutation": ((num_tokens * top_k,), int32),
        "expert_offsets": ((num_experts + 1,), int32),
        "tokens_per_expert": ((num_experts,), int32),
        "inverse_permutation": ((num_tokens, top_k), int32),
        "counts": ((num_rows(num_tokens * top_k), row_words(num_experts)), int32),
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
    rows = num_rows(num_slots)
    if rows == 1:
        packed = pack(ids, num_experts, out, num_slots, rows)
        size = bytes_to_place_all(num_experts)
        launch("group_place_all", 1, ALL_WARPS * 32, packed, size, overlap=True)
        return groups
    threads = COUNTING_WARPS * 32
    packed = pack(ids, num_experts, out, -(-num_slots // (rows * threads)) * threads, rows)
    launch("group_count", rows, threads, packed, 4 * row_words(num_experts), overlap=True)
    place(packed, num_slots, num_experts, rows)
    return groups


def place(packed: Packed, num_slots: int, num_experts: int, rows: int) -> None:
    """Launch what follows once every row of counts is published."""
    blocks = -(-rows // rows_per_block(num_slots, rows))
    launch("group_place", blocks, PLACING_WARPS * 32, packed, bytes_to_place(num_experts), overlap=True)


def pack(ids: Any, num_experts: int, out: dict[str, Any], slots_per_row: int, rows: int) -> Packed:
    """Return the struct of kernels/group.cuh."""
    return LAUNCH(
        topk_ids=ids,
        **{name: out[name] for name in Groups._fields},
        counts=out["counts"],
        progress=out.get("progress"),
        num_slots=ids.size,
        num_experts=num_experts,
        slots_per_row=slots_per_row,
        num_progress=out["progress"].size if "progress" in out else 0,
        num_rows=rows,
        rows_per_block=rows_per_block(ids.size, rows),
    )
