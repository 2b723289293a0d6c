"""Expert stacks: the operands of a run of experts, which kernel serves them, and the struct of kernels/stacks.cuh."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from cumoe.data.activation import CLAMPS, NAMES, Activation
from cumoe.data.weights import Layout
from cumoe.gpu.compile import has_wgmma
from cumoe.gpu.config import SMALLEST_WGMMA_TILE, StackSizes, max_tiles
from cumoe.gpu.structs import Packed, Struct

PAIRINGS = ("ungated", "stacked", "interleaved")

STACK = Struct(
    pointer=("a", "w", "bias", "expert_offsets", "permutation", "scale_in", "scale_out", "c"),
    int64=("a_row_stride", "a_col_stride", "w_expert_stride", "w_row_stride", "w_col_stride", "c_row_stride"),
    int32=("num_experts", "num_rows", "weight_rows", "inner", "slots_per_a_row", "pairing", "activation", "clamp"),
    float32=("alpha", "limit", "up_offset"),
    int32_2=("padding",),
)

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
    layout: Layout = "ungated"
    activation: Activation = LINEAR

    @property
    def sizes(self) -> StackSizes:
        """The integers that decide about tiles."""
        num_experts, weight_rows, inner = self.w.shape
        return StackSizes(num_experts, self.num_rows, weight_rows, inner)

    @property
    def weight_bytes(self) -> int:
        """How many bytes of weights the rows meet at most."""
        num_experts, weight_rows, inner = self.w.shape
        return min(num_experts, self.num_rows) * weight_rows * inner * self.w.dtype.itemsize

    @property
    def kernel(self) -> tuple[str, ...]:
        """Return the engine of the kernel that serves this stack, and what besides the tile tells its kernels apart.

        Stacks of the same kernel fit into one launch.
        """
        order = weight_order(self.w, self.layout)
        stores_float32 = self.c.dtype == np.float32
        if not (order and self.a.dtype == self.w.dtype and rows_are_aligned(self.a)):
            return "simt", f"{self.a.dtype.name}_{self.w.dtype.name}", str(stores_float32)
        if not stores_float32 and self._suits_wgmma(order):
            return "wgmma", self.w.dtype.name, order
        return "mma", self.w.dtype.name, order, str(stores_float32)

    def _suits_wgmma(self, order: str) -> bool:
        """Whether the Hopper kernels serve: see grouped_gemm_wgmma.cuh for what they need."""
        features = self.w.shape[1] if self.layout == "ungated" else self.w.shape[1] // 2
        a_row, _ = strides(self.a)
        return (
            has_wgmma(self.w.device.id)
            and features % 8 == 0
            and rows_are_aligned(self.c)
            and _tma_can_walk(self.w)
            and _tma_can_walk(self.a)
            and self.a.shape[0] * a_row < 2**35  # offsets of rows are uint32, in units of 16 bytes
            and max_tiles(SMALLEST_WGMMA_TILE, (self.sizes,)) < 2**26  # tile numbers of 16 stacks fit into int32
        )

    @property
    def gathers(self) -> bool:
        """Whether the permutation names the rows of `a`; else they are neighbours."""
        return self.slots_per_a_row > 0 and self.permutation is not None

    def pack(self) -> Packed:
        """Return the C struct."""
        a_row, a_col = strides(self.a)
        w_expert, w_row, w_col = strides(self.w)
        num_experts, weight_rows, inner = self.w.shape
        act = self.activation
        return STACK(
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


def rows_are_aligned(a: Any) -> bool:
    """Whether the rows of a matrix of 16-bit numbers can be copied 16 bytes at a time."""
    row, col = strides(a)
    return a.data.ptr % 16 == 0 and col == 1 and row % 8 == 0
