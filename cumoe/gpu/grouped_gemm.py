"""Launching kernels/grouped_gemm_*: the products of expert stacks, one projection or both in one launch."""

import struct
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from cumoe.door.arrays import cupy
from cumoe.gpu.compile import launch, num_multiprocessors
from cumoe.gpu.config import TileConfig, grid_size, max_tiles, select_config, spread
from cumoe.gpu.stacks import STACK, ExpertStack, strides
from cumoe.gpu.structs import by_value
from cumoe.gpu.tensor_map import MAP_BYTES, row_map, weight_map

MAX_STACKS = 8
"""Of one product in a launch; the number is that of kernels/stacks.cuh."""

PORTABLE_TAIL = struct.Struct("=2i")  # num_stacks, c_is_float32
WGMMA_TAIL = struct.Struct("=Q4i")  # progress, num_stacks, num_products, num_stages, weave
WGMMA_BYTES = -(-(2 * MAX_STACKS * (3 * MAP_BYTES + STACK.itemsize) + WGMMA_TAIL.size) // 64) * 64


def run_both(first: Iterable[ExpertStack], second: Iterable[ExpertStack], progress: Any) -> None:
    """Launch both projections: stack s of `second` reads what stack s of `first` writes.

    The Hopper kernels compute both in one launch if they serve all stacks and these fit; else one projection comes
    after the other.

    Parameters
    ----------
    progress : (1 + max_row_blocks of every stack,) int32 CuPy array
        Zeros when the launch begins.
    """
    first, second = ([stack for stack in stacks if stack.num_rows > 0] for stacks in (first, second))
    kernels = {stack.kernel for stack in (*first, *second)}
    if len(kernels) == 1 and len(first) <= MAX_STACKS and (kernel := kernels.pop())[0] == "wgmma":
        _launch_wgmma(kernel, (first, second), progress.data.ptr)
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
    config = select_config(engine, sizes, _num_sms())
    name = f"grouped_gemm_{engine}_{variant[0]}"
    if engine == "mma":
        name += f"_{config.block_m}_{variant[1]}"
    packed = _pack(stacks, MAX_STACKS) + PORTABLE_TAIL.pack(len(stacks), stacks[0].c.dtype == np.float32)
    grid = grid_size(config, max_tiles(config, sizes), _num_sms())
    launch(name, grid, config.threads, by_value(packed), config.shared_bytes(sum(size.num_experts for size in sizes)))


def _launch_wgmma(kernel: tuple[str, ...], products: Sequence[Sequence[ExpertStack]], progress: int = 0) -> None:
    _, dtype, order = kernel
    sizes = [tuple(stack.sizes for stack in stacks) for stacks in products]
    num_sms = _num_sms()
    config = spread(select_config("wgmma", sizes[0], num_sms), sizes[0], num_sms)
    tiles = sum(max_tiles(config, some) for some in sizes)
    # Shared experts come first: the routed ones' smaller pieces even out the end.
    ordered = [stack for first, *others in products for stack in (*others, first)]
    packed = _maps(ordered, order, config) + _pack(ordered, 2 * MAX_STACKS)
    packed += WGMMA_TAIL.pack(progress, len(products[0]), len(products), config.stages, config.pairs == "woven")
    grid = grid_size(config, tiles, num_sms)
    launch(
        f"grouped_gemm_wgmma_{dtype}_{order}_{config.block_m}x{config.weight_rows}",
        grid,
        config.threads,
        by_value(packed.ljust(WGMMA_BYTES, b"\0")),
        config.shared_bytes(sum(size.num_experts for size in sizes[0])),
        # A small grid waits for the end of the previous kernel: it would crowd on the first SMs that fall free, and two
        # share a path to memory; else it spreads over all pairs.
        overlap=grid > num_sms // 2,
    )


def _maps(stacks: Sequence[ExpertStack], order: str, config: TileConfig) -> bytes:
    maps = [weight_map(stack.w, strides(stack.w), stack.layout, order, config) for stack in stacks]
    rows = [row_map(stack.a, strides(stack.a), box) for stack in stacks for box in (64, config.box_rows)]
    room = 2 * MAX_STACKS * MAP_BYTES
    return b"".join(maps).ljust(room, b"\0") + b"".join(rows).ljust(2 * room, b"\0")


def _pack(stacks: Sequence[ExpertStack], room: int) -> bytes:
    return b"".join(stack.pack() for stack in stacks).ljust(STACK.itemsize * room, b"\0")


def _num_sms() -> int:
    return num_multiprocessors(cupy.cuda.runtime.getDevice())
