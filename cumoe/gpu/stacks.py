"""Packing expert stacks for a grouped GEMM launch; the layout is that of kernels/stacks.cuh."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from cumoe.data.activation import CLAMPS, NAMES, Activation
from cumoe.door.arrays import cupy
from cumoe.gpu.compile import launch, num_multiprocessors
from cumoe.gpu.config import THREADS, StackSizes, grid_size, select_config

MAX_STACKS = 8
PAIRINGS = ("ungated", "stacked", "interleaved")

_POINTERS = ("a", "w", "bias", "expert_offsets", "permutation", "scale_in", "scale_out", "c")
_STRIDES = ("a_row_stride", "a_col_stride", "w_expert_stride", "w_row_stride", "w_col_stride", "c_row_stride")
_SIZES = ("num_experts", "num_rows", "weight_rows", "inner", "slots_per_a_row", "pairing")
_STACK = np.dtype(
    [(name, "u8") for name in _POINTERS]
    + [(name, "i8") for name in _STRIDES]
    + [(name, "i4") for name in _SIZES]
    + [("activation", "i4"), ("clamp", "i4"), ("alpha", "f4"), ("limit", "f4"), ("up_offset", "f4"), ("padding", "i4")]
)
LAUNCH = np.dtype([("stacks", _STACK, (MAX_STACKS,)), ("num_stacks", "i4"), ("c_is_float32", "i4")])

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
        if self.a.dtype == self.w.dtype and self.w.dtype.itemsize == 2 and _rows_are_aligned(self.a):
            expert, row, col = strides(self.w)
            aligned = self.w.data.ptr % 16 == 0 and expert % 8 == 0
            if aligned and col == 1 and row % 8 == 0:
                return "mma", self.w.dtype.name, "inner_major"
            halves_are_aligned = self.layout != "stacked" or self.w.shape[1] % 16 == 0
            if aligned and row == 1 and col % 8 == 0 and halves_are_aligned:
                return "mma", self.w.dtype.name, "row_major"
        return "simt", f"{self.a.dtype.name}_{self.w.dtype.name}", ""

    def pack(self, record: Any) -> None:
        """Write this stack into a record of the launch struct."""
        for name in _POINTERS:
            array = getattr(self, name)
            record[name] = 0 if array is None else array.data.ptr
        record["a_row_stride"], record["a_col_stride"] = strides(self.a)
        record["w_expert_stride"], record["w_row_stride"], record["w_col_stride"] = strides(self.w)
        record["c_row_stride"] = strides(self.c)[0]
        record["num_experts"], record["weight_rows"], record["inner"] = self.w.shape
        record["num_rows"], record["slots_per_a_row"] = self.num_rows, self.slots_per_a_row
        record["pairing"] = PAIRINGS.index(self.layout)
        act = self.activation
        record["activation"] = NAMES.index(act.name)
        record["clamp"] = 0 if act.limit is None else 1 + CLAMPS.index(act.clamp)
        record["alpha"], record["limit"], record["up_offset"] = act.alpha, act.limit or 0.0, act.up_offset


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
    """Launch the grouped GEMM of all stacks: one launch for each kernel that is needed, up to `MAX_STACKS` stacks each."""
    by_kernel: dict[tuple[str, str, str], list[ExpertStack]] = {}
    for stack in stacks:
        if stack.num_rows > 0:
            by_kernel.setdefault(stack.kernel, []).append(stack)
    for key, members in by_kernel.items():
        for first in range(0, len(members), MAX_STACKS):
            _launch(*key, members[first : first + MAX_STACKS])


def _launch(engine: str, dtypes: str, order: str, stacks: list[ExpertStack]) -> None:
    sizes = tuple(stack.sizes for stack in stacks)
    config = select_config(engine, sizes)
    argument = np.zeros(1, LAUNCH)
    argument["num_stacks"] = len(stacks)
    argument["c_is_float32"] = stacks[0].c.dtype == np.float32
    for record, stack in zip(argument["stacks"][0], stacks, strict=False):
        stack.pack(record)
    name = f"grouped_gemm_{engine}_{dtypes}" + (f"_{config.block_m}_{order}" if engine == "mma" else "")
    grid = grid_size(config, sizes, num_multiprocessors(cupy.cuda.runtime.getDevice()))
    launch(name, grid, THREADS, argument, config.shared_bytes(sum(size.num_experts for size in sizes)))
