"""Packing expert stacks for a grouped GEMM launch; the layout is that of kernels/stacks.cuh."""

import struct
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from cumoe.data.activation import CLAMPS, NAMES, Activation
from cumoe.data.weights import Layout
from cumoe.door.arrays import cupy
from cumoe.gpu.compile import has_wgmma, launch, num_multiprocessors
from cumoe.gpu.config import ALONE_TILES, CONFIGS, StackSizes, TileConfig, grid_size, max_tiles, select_config
from cumoe.gpu.structs import Struct, by_value
from cumoe.gpu.tensor_map import MAP_BYTES, row_map, weight_map

MAX_STACKS = 8
PAIRINGS = ("ungated", "stacked", "interleaved")

STACK = Struct(
    pointer=("a", "w", "bias", "expert_offsets", "permutation", "scale_in", "scale_out", "c"),
    int64=("a_row_stride", "a_col_stride", "w_expert_stride", "w_row_stride", "w_col_stride", "c_row_stride"),
    int32=("num_experts", "num_rows", "weight_rows", "inner", "slots_per_a_row", "pairing", "activation", "clamp"),
    float32=("alpha", "limit", "up_offset"),
    int32_2=("padding",),
)
LAUNCH_BYTES = STACK.itemsize * MAX_STACKS + 8
WGMMA_TAIL = struct.Struct("=Q2i")  # next_position, num_stages, weights_first
WGMMA_LAUNCH_BYTES = -(-(3 * MAP_BYTES * MAX_STACKS + LAUNCH_BYTES + WGMMA_TAIL.size) // 64) * 64

LINEAR = Activation("identity")
SMALLEST_WGMMA_TILE = next(config for config in CONFIGS if config.engine == "wgmma")


@dataclass(frozen=True)
class ExpertStack:
    """Operands of a run of experts; the fields are explained in kernels/stacks.cuh."""

    a: Any
    w: Any
    c: Any
    num_rows: int
    bias: Any = None
    expert_offsets: Any = None
    permutation: Any = None
    scale_in: Any = None
    scale_out: Any = None
    slots_per_a_row: int = 0
    layout: Layout = "ungated"
    activation: Activation = LINEAR

    @property
    def sizes(self) -> StackSizes:
        """The integers that decide about tiles."""
        return StackSizes(self.w.shape[0], self.num_rows, self.w.shape[1], self.layout == "stacked")

    @property
    def kernel(self) -> tuple[str, ...]:
        """Return the engine of the kernel that serves this stack, and what besides the tile tells its kernels apart."""
        order = weight_order(self.w, self.layout)
        stores_float32 = self.c.dtype == np.float32
        if not (order and self.a.dtype == self.w.dtype and _rows_are_aligned(self.a)):
            return "simt", f"{self.a.dtype.name}_{self.w.dtype.name}", str(stores_float32)
        if not stores_float32 and self._suits_wgmma(order):
            paired = self.layout == "stacked" or (self.layout == "interleaved" and order == "inner_major")
            return "wgmma", self.w.dtype.name, order, "paired" if paired else "single"
        return "mma", self.w.dtype.name, order, str(stores_float32)

    def _suits_wgmma(self, order: str) -> bool:
        """Whether the Hopper kernels serve: see grouped_gemm_wgmma.cuh for what they need."""
        features = self.w.shape[1] if self.layout == "ungated" else self.w.shape[1] // 2
        a_row, _ = strides(self.a)
        return (
            has_wgmma(self.w.device.id)
            and features % 8 == 0
            and _rows_are_aligned(self.c)
            and _tma_can_walk(self.w)
            and _tma_can_walk(self.a)
            and self.a.shape[0] * a_row < 2**35  # offsets of rows are uint32, in units of 16 bytes
            and max_tiles(SMALLEST_WGMMA_TILE, (self.sizes,)) < 2**27  # tile numbers of 8 stacks fit into int32
        )

    def pack(self) -> bytes:
        """Return the bytes of the C struct."""
        a_row, a_col = strides(self.a)
        w_expert, w_row, w_col = strides(self.w)
        num_experts, weight_rows, inner = self.w.shape
        act = self.activation
        return STACK.pack(
            a=self.a,
            w=self.w,
            bias=self.bias,
            expert_offsets=self.expert_offsets,
            permutation=self.permutation,
            scale_in=self.scale_in,
            scale_out=self.scale_out,
            c=self.c,
            a_row_stride=a_row,
            a_col_stride=a_col,
            w_expert_stride=w_expert,
            w_row_stride=w_row,
            w_col_stride=w_col,
            c_row_stride=strides(self.c)[0],
            num_experts=num_experts,
            num_rows=self.num_rows,
            weight_rows=weight_rows,
            inner=inner,
            slots_per_a_row=self.slots_per_a_row,
            pairing=PAIRINGS.index(self.layout),
            activation=NAMES.index(act.name),
            clamp=0 if act.limit is None else 1 + CLAMPS.index(act.clamp),
            alpha=act.alpha,
            limit=act.limit or 0.0,
            up_offset=act.up_offset,
            padding=0,
        )


def weight_order(w: Any, layout: str) -> str:
    """Return the order of axes in which tensor cores can read the weights, or "": see grouped_gemm_mma.cuh."""
    expert, row, col = strides(w)
    if w.dtype.itemsize != 2 or w.data.ptr % 16 or expert % 8:
        return ""
    if col == 1 and row % 8 == 0:
        return "inner_major"
    halves_are_aligned = layout != "stacked" or w.shape[1] % 16 == 0
    return "row_major" if row == 1 and col % 8 == 0 and halves_are_aligned else ""


def strides(array: Any) -> tuple[int, ...]:
    """Return the strides in elements; those of axes of length 1, which are never walked, as 0 (1 for the last axis)."""
    itemsize, last = array.dtype.itemsize, array.ndim - 1
    return tuple(
        (stride // itemsize if size > 1 else int(axis == last))
        for axis, (stride, size) in enumerate(zip(array.strides, array.shape, strict=True))
    )


def _tma_can_walk(array: Any) -> bool:
    """Whether no axis runs backwards or repeats, and rows do not overlap."""
    steps = sorted((stride, size) for stride, size in zip(strides(array), array.shape, strict=True) if size > 1)
    return all(stride >= (steps[0][1] if i else 1) for i, (stride, _) in enumerate(steps))


def _rows_are_aligned(a: Any) -> bool:
    row, col = strides(a)
    return a.data.ptr % 16 == 0 and col == 1 and row % 8 == 0


def run(stacks: Iterable[ExpertStack], *, weights_first: bool = False, next_position: Any = None) -> None:
    """Launch the grouped GEMM of all stacks: a launch for each kernel that is needed, and every `MAX_STACKS` stacks.

    `weights_first` says that the offsets, permutations and scales are older than the previous launch on the stream, so
    that weights may be read before its end.
    """
    launches: dict[tuple[str, ...], list[ExpertStack]] = {}
    for stack in stacks:
        if stack.num_rows > 0:
            launches.setdefault(stack.kernel, []).append(stack)
    # Only one launch can count its tiles there: the next one would not find it at zero.
    alone = len(launches) == 1 and all(len(members) <= MAX_STACKS for members in launches.values())
    counter = next_position.data.ptr if next_position is not None and alone else None
    for (engine, *variant), members in launches.items():
        for first in range(0, len(members), MAX_STACKS):
            _launch(engine, variant, members[first : first + MAX_STACKS], weights_first, counter)


def _launch(
    engine: str, variant: list[str], stacks: list[ExpertStack], weights_first: bool, next_position: int | None
) -> None:
    sizes = tuple(stack.sizes for stack in stacks)
    num_sms = num_multiprocessors(cupy.cuda.runtime.getDevice())
    config = select_config(engine, sizes)
    if engine == "wgmma" and max_tiles(config, sizes) <= ALONE_TILES * num_sms:
        config = config.alone()
    packed = b"".join(stack.pack() for stack in stacks).ljust(STACK.itemsize * MAX_STACKS, b"\0")
    packed += struct.pack("=2i", len(stacks), stacks[0].c.dtype == np.float32)
    if engine == "wgmma":
        dtype, order, pairing = variant
        name = f"grouped_gemm_wgmma_{dtype}_{order}_{config.block_m}x{2 * config.half}_{pairing}"
        packed = _maps(stacks, order, config) + packed
        packed += WGMMA_TAIL.pack(next_position or 0, config.stages, weights_first)
        packed = packed.ljust(WGMMA_LAUNCH_BYTES, b"\0")
    elif engine == "mma":
        dtype, order, _ = variant
        name = f"grouped_gemm_mma_{dtype}_{config.block_m}_{order}"
    else:
        name = f"grouped_gemm_simt_{variant[0]}"
    grid = grid_size(config, sizes, num_sms)
    shared_bytes = config.shared_bytes(sum(size.num_experts for size in sizes))
    # A small grid waits for the end of the previous kernel: it would crowd on the first SMs that fall free, and two
    # share a path to memory; else it spreads over all pairs (Mixtral-8x7B, 1 token: 220 against 244 us).
    overlap = engine == "wgmma" and grid > num_sms // 2
    launch(name, grid, config.threads, by_value(packed), shared_bytes, overlap=overlap)


def _maps(stacks: list[ExpertStack], order: str, config: TileConfig) -> bytes:
    maps = [weight_map(stack.w, strides(stack.w), stack.layout, order, config.half) for stack in stacks]
    rows = [row_map(stack.a, strides(stack.a), box) for stack in stacks for box in (64, 16)]
    return b"".join(maps).ljust(MAP_BYTES * MAX_STACKS, b"\0") + b"".join(rows).ljust(2 * MAP_BYTES * MAX_STACKS, b"\0")
