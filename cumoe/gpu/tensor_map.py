"""Tensor maps: how TMA reads the weights, encoded once for each weight array by the CUDA driver."""

import ctypes
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from cumoe.data.weights import Layout
from cumoe.gpu.compile import rehearsal
from cumoe.gpu.config import TileConfig
from cumoe.gpu.driver import driver
from cumoe.gpu.operand import Operand
from cumoe.gpu.structs import Packed, Place

MAP_BYTES = 128
EIGHT = 8  # rows of gate or up that follow each other in a woven pair
RUN = 64  # rows of 128 bytes in a shared-memory box, and elements in one of them
BOXES = 64, 16  # rows of activations that come at a time

_ENCODED_DTYPES = {"float16": 6, "bfloat16": 9}  # CUtensorMapDataType
_NO_INTERLEAVE, _SWIZZLE_128B, _FILL_ZEROS = 0, 3, 0

LINES = {"rows": 3, "inner": 2}
"""CUtensorMapL2promotion of inner_major weights, by what the halves of a tile are. Where a stage has 128 bytes of every
weight row, the L2 is to fetch the 128 bytes beside them too (3: 256 bytes), else reading takes 2 per cent longer; where
it has all 256, to fetch what it is asked for (2: 128 bytes), else reading takes 2 to 4 per cent longer."""


def weight_map(w: Any, strides: tuple[int, ...], layout: Layout, order: str, config: TileConfig) -> bytes:
    """Return the 128 bytes of the map of a weight array.

    Parameters
    ----------
    w : (num_experts, weight_rows, inner) CuPy array, 16 bits
    strides : tuple of int
        Its strides in elements; those of axes of length 1 do not matter.
    layout : str
        "stacked" and "interleaved" pairs get an axis of length 2, which chooses gate or up; "ungated" one of length 1.
    order : {"inner_major", "row_major"}
        The map is (expert, half, row, inner) or (expert, half, inner, row).
    config : TileConfig
        Where its halves are "inner", pairs of inner_major weights become (expert, rows / 8, half, 8, inner): a box
        has eight gate and eight up rows in turn.

    Raises
    ------
    RuntimeError
        If the driver refuses; the text names the arguments.
    """
    if layout == "interleaved" and order == "row_major":
        layout = "ungated"  # neighbours stay neighbours; the kernel's epilogue pairs them
    num_experts, weight_rows, inner = w.shape
    expert_stride, row_stride, inner_stride = strides
    halves = 1 if layout == "ungated" else 2
    rows = weight_rows // halves
    between_halves = {"ungated": 8, "stacked": rows * row_stride, "interleaved": row_stride}[layout]
    if layout == "interleaved":
        row_stride *= 2
    lengths: tuple[int, ...]
    all_steps: tuple[int, ...]
    box: tuple[int, ...]
    if order == "row_major":
        lengths, all_steps, box = (rows, inner, halves), (inner_stride, between_halves), (RUN, RUN, 1)
    elif halves == 2 and config.halves == "inner":
        lengths, all_steps = (inner, EIGHT, 2, rows // EIGHT), (row_stride, between_halves, EIGHT * row_stride)
        box = (RUN, EIGHT, 2, config.half // 2 // EIGHT)
    else:
        lengths, all_steps, box = (inner, rows, halves), (row_stride, between_halves), (RUN, config.half, 1)
    lengths, all_steps, box = (*lengths, num_experts), (*all_steps, expert_stride), (*box, 1)
    # An axis of length 1 is never walked, but its stride has to be a positive multiple of 16 bytes all the same.
    steps = zip(all_steps, lengths[1:], strict=True)
    in_bytes = tuple(2 * (step if length > 1 else 8) for step, length in steps)
    lines = LINES[config.halves if order == "inner_major" else "rows"]
    return _encode(w.data.ptr, w.dtype.name, lengths, in_bytes, box, lines)


@dataclass(frozen=True)
class Form:
    """All of a tensor map but the address; called with one, it returns the 128 bytes."""

    dtype: str
    lengths: tuple[int, ...]
    steps: tuple[int, ...]  # in bytes
    box: tuple[int, ...]

    def __call__(self, address: int) -> bytes:
        """Return the map of what lies there."""
        return _encode(address, self.dtype, self.lengths, self.steps, self.box, LINES["rows"])


def row_map(a: Any, strides: tuple[int, ...], box_rows: int) -> Packed:
    """Return the 128 bytes of the map of activations (num_rows, inner), read in boxes of `box_rows` rows."""
    num_rows, inner = a.shape
    steps = (2 * max(strides[0], 8), 16, 16)
    form = Form(a.dtype.name, (inner, num_rows, 1, 1), steps, (RUN, box_rows, 1, 1))
    moves = isinstance(a, Operand) and a.source is not None
    return Packed(form(a.data.ptr), (Place(0, a.source, a.offset, form),) if moves else ())


def _encode(
    pointer: int, dtype: str, lengths: tuple[int, ...], steps: tuple[int, ...], box: tuple[int, ...], lines: int
) -> bytes:
    if rehearsal() is not None:
        return bytes(MAP_BYTES)
    return _encode_by_driver(pointer, dtype, lengths, steps, box, lines)


@lru_cache(maxsize=1024)
def _encode_by_driver(
    pointer: int, dtype: str, lengths: tuple[int, ...], steps: tuple[int, ...], box: tuple[int, ...], lines: int
) -> bytes:
    buffer = np.zeros(MAP_BYTES + 64, np.uint8)
    aligned = -buffer.ctypes.data % 64  # the driver wants the map at a multiple of 64
    status = driver().cuTensorMapEncodeTiled(
        ctypes.c_void_p(buffer.ctypes.data + aligned),
        _ENCODED_DTYPES[dtype],
        len(lengths),
        ctypes.c_void_p(pointer),
        *_numbers(lengths, steps, box),
        _NO_INTERLEAVE,
        _SWIZZLE_128B,
        lines,
        _FILL_ZEROS,
    )
    if status:
        raise RuntimeError(
            f"cumoe: cuTensorMapEncodeTiled returned {status} for {dtype} of {lengths}, steps {steps} bytes, box {box}"
        )
    return buffer[aligned : aligned + MAP_BYTES].tobytes()


@lru_cache(maxsize=1024)
def _numbers(lengths: tuple[int, ...], steps: tuple[int, ...], box: tuple[int, ...]) -> tuple[Any, ...]:
    """Return them as the driver takes them, and a step of one element along each axis."""
    uint64, uint32, rank = ctypes.c_uint64, ctypes.c_uint32, len(box)
    return (uint64 * rank)(*lengths), (uint64 * len(steps))(*steps), (uint32 * rank)(*box), (uint32 * rank)(*[1] * rank)
