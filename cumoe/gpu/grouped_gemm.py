"""Launching kernels/grouped_gemm_*: the products of expert stacks, one projection or both in one launch."""

from collections.abc import Iterable, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from cumoe.gpu.compile import current_device, launch, num_multiprocessors
from cumoe.gpu.config import PASSING_BYTES, TileConfig, alternates, grid_size, max_tiles, select_config
from cumoe.gpu.group import ONE_BLOCK_SLOTS
from cumoe.gpu.stacks import STACK, ExpertStack, strides
from cumoe.gpu.structs import Packed, Struct, joined
from cumoe.gpu.tensor_map import BOXES, MAP_BYTES, row_map, weight_map

MAX_STACKS = 8
"""Of one product in a launch; the number is that of kernels/stacks.cuh."""

PORTABLE_TAIL = Struct(int32=("num_stacks", "c_is_float32"))
WGMMA_TAIL = Struct(
    pointer=("progress", "topk_ids", "topk_weights"),
    int32=(
        *("num_stacks", "num_products", "num_stages", "alternate"),
        *("pass_through", "num_slots", "ids_are_early"),
    ),
)
WGMMA_BYTES = -(-(2 * MAX_STACKS * (3 * MAP_BYTES + STACK.itemsize) + WGMMA_TAIL.itemsize) // 64) * 64


class Slots(NamedTuple):
    """The routing of a launch of both projections; the routed experts are those of the first stack."""

    topk_ids: Any  # (num_tokens, top_k) C-contiguous int32
    topk_weights: Any  # (num_tokens, top_k) C-contiguous float32
    known: Literal["early", "late"]
    """Whether both were there before the previous kernel on the stream began, or only when it has ended."""


class Work(NamedTuple):
    """What a launch computes."""

    config: TileConfig
    tiles: int  # at most, for any routing
    stacks: tuple[ExpertStack, ...]


def run_both(first: Iterable[ExpertStack], second: Iterable[ExpertStack], progress: Any, slots: Slots) -> None:
    """Launch both projections: stack s of `second` reads what stack s of `first` writes.

    The Hopper kernels compute both in one launch if they serve all stacks and these fit; else one projection comes
    after the other.

    Parameters
    ----------
    progress : (1 + max_row_blocks of every stack,) int32 CuPy array
        Zeros when the launch begins.
    slots : Slots
        What the Hopper kernels need not wait for where there are few.
    """
    first, second = ([stack for stack in stacks if stack.num_rows > 0] for stacks in (first, second))
    kernels = {stack.kernel for stack in (*first, *second)}
    if len(kernels) == 1 and len(first) <= MAX_STACKS and (kernel := kernels.pop())[0] == "wgmma":
        _launch_wgmma(kernel, (first, second), progress, slots)
    else:
        run(first)
        run(second)


def run(stacks: Iterable[ExpertStack]) -> None:
    """Launch one product of all stacks: a launch for each kernel that is needed, and every `MAX_STACKS` stacks."""
    launches: dict[tuple[str, ...], list[ExpertStack]] = {}
    for stack in stacks:
        if stack.num_rows > 0:
            launches.setdefault(stack.kernel, []).append(stack)
    for kernel, members in launches.items():
        for begin in range(0, len(members), MAX_STACKS):
            some = members[begin : begin + MAX_STACKS]
            if kernel[0] == "wgmma":
                _launch_wgmma(kernel, (some,))
            else:
                _launch_portable(kernel, some)


def _launch_portable(kernel: tuple[str, ...], stacks: Sequence[ExpertStack]) -> None:
    engine, *variant = kernel
    sizes = tuple(stack.sizes for stack in stacks)
    config = select_config(engine, (sizes,))
    name = f"grouped_gemm_{engine}_{variant[0]}"
    if engine == "mma":
        name += f"_{config.block_m}_{variant[1]}"
    tail = PORTABLE_TAIL(num_stacks=len(stacks), c_is_float32=stacks[0].c.dtype == np.float32)
    packed = joined((_pack(stacks, MAX_STACKS), tail))
    work = Work(config, max_tiles(config, sizes), tuple(stacks))
    grid = grid_size(config, work.tiles, _num_sms())
    shared_bytes = config.shared_bytes(sum(size.num_experts for size in sizes))
    launch(name, grid, config.threads, packed, shared_bytes, work=work)


def _launch_wgmma(
    kernel: tuple[str, ...],
    products: Sequence[Sequence[ExpertStack]],
    progress: Any = None,
    slots: Slots | None = None,
) -> None:
    _, dtype, order = kernel
    sizes = [tuple(stack.sizes for stack in stacks) for stacks in products]
    num_sms = _num_sms()
    # Of more slots a block would spend longer on counting them than on waiting for the two kernels that sort them.
    told = slots if slots is not None and slots.topk_ids.size <= ONE_BLOCK_SLOTS else None
    num_slots = 0 if told is None else told.topk_ids.size
    config = select_config("wgmma", sizes, num_slots)
    tiles = sum(max_tiles(config, some) for some in sizes)
    # Shared experts come first, or in turn: the routed ones' smaller pieces even out the end.
    ordered = [stack for first, *others in products for stack in (*others, first)]
    tail = WGMMA_TAIL(
        progress=progress,
        topk_ids=None if told is None else told.topk_ids,
        topk_weights=None if told is None else told.topk_weights,
        num_stacks=len(products[0]),
        num_products=len(products),
        num_stages=config.stages,
        alternate=len(products) == 2 and alternates(config, sizes[0]),
        pass_through=sum(stack.weight_bytes for stack in ordered) <= PASSING_BYTES,
        num_slots=num_slots,
        ids_are_early=told is not None and told.known == "early",
    )
    packed = joined((_maps(ordered, order, config), _pack(ordered, 2 * MAX_STACKS), tail))
    grid = grid_size(config, tiles, num_sms)
    launch(
        f"grouped_gemm_wgmma_{dtype}_{order}_{config.name}",
        grid,
        config.threads,
        packed.padded(WGMMA_BYTES),
        config.shared_bytes(sum(size.num_experts for size in sizes[0])),
        # A small grid waits for the end of the previous kernel: it would crowd on the first SMs that fall free, and two
        # share a path to memory; else it spreads over all pairs.
        overlap=grid > num_sms // 2,
        work=Work(config, tiles, tuple(ordered)),
    )


def _maps(stacks: Sequence[ExpertStack], order: str, config: TileConfig) -> Packed:
    weights = [Packed(weight_map(stack.w, strides(stack.w), stack.layout, order, config)) for stack in stacks]
    rows = [_row_maps(stack, config) for stack in stacks]
    room = 2 * MAX_STACKS * MAP_BYTES
    return joined((joined(weights).padded(room), joined(rows).padded(2 * room)))


def _row_maps(stack: ExpertStack, config: TileConfig) -> Packed:
    """Return the maps of the rows in large and small boxes, which nobody reads where rows come one by one."""
    if stack.gathers or config.halves == "inner":
        return Packed(b"").padded(2 * MAP_BYTES)
    return joined(row_map(stack.a, strides(stack.a), box) for box in BOXES)


def _pack(stacks: Sequence[ExpertStack], room: int) -> Packed:
    return joined(stack.pack() for stack in stacks).padded(STACK.itemsize * room)


def _num_sms() -> int:
    return num_multiprocessors(current_device())
