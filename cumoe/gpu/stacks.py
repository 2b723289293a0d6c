"""Packing expert stacks for a grouped GEMM launch; the layout is that of kernels/stacks.cuh."""

import struct
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from cumoe.data.activation import CLAMPS, NAMES, Activation
from cumoe.door.arrays import cupy
from cumoe.gpu.compile import launch, num_multiprocessors
from cumoe.gpu.config import THREADS, StackSizes, grid_size, select_config
from cumoe.gpu.structs import Struct, by_value

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

LINEAR = Activation("identity")


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
    layout: str = "ungated"
    activation: Activation = LINEAR

    @property
    def sizes(self) -> StackSizes:
        """The integers that decide about tiles."""
        return StackSizes(self.w.shape[0], self.num_rows, self.w.shape[1], self.layout == "stacked")

    @property
    def kernel(self) -> tuple[str, str, str]:
        """Return (engine, dtypes, weight order) of the kernel that serves this stack."""
        order = weight_order(self.w, self.layout)
        if order and self.a.dtype == self.w.dtype and _rows_are_aligned(self.a):
            return "mma", self.w.dtype.name, order
        return "simt", f"{self.a.dtype.name}_{self.w.dtype.name}", ""

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


def _rows_are_aligned(a: Any) -> bool:
    row, col = strides(a)
    return a.data.ptr % 16 == 0 and col == 1 and row % 8 == 0


def run(stacks: Iterable[ExpertStack]) -> None:
    """Launch the grouped GEMM of all stacks: a launch for each kernel that is needed, and every `MAX_STACKS` stacks."""
    launches: dict[tuple[str, str, str, bool], list[ExpertStack]] = {}
    for stack in stacks:
        if stack.num_rows > 0:
            launches.setdefault((*stack.kernel, stack.c.dtype == np.float32), []).append(stack)
    for key, members in launches.items():
        for first in range(0, len(members), MAX_STACKS):
            _launch(*key, members[first : first + MAX_STACKS])


def _launch(engine: str, dtypes: str, order: str, stores_float32: bool, stacks: list[ExpertStack]) -> None:
    sizes = tuple(stack.sizes for stack in stacks)
    config = select_config(engine, sizes)
    packed = b"".join(stack.pack() for stack in stacks).ljust(STACK.itemsize * MAX_STACKS, b"\0")
    argument = by_value(packed + struct.pack("=2i", len(stacks), stores_float32))
    name = f"grouped_gemm_{engine}_{dtypes}" + (f"_{config.block_m}_{order}" if engine == "mma" else "")
    grid = grid_size(config, sizes, num_multiprocessors(cupy.cuda.runtime.getDevice()))
    launch(name, grid, THREADS, argument, config.shared_bytes(sum(size.num_experts for size in sizes)))
