"""Launching kernels/router_gemm.cu: router logits in parts of the hidden dimension, the same bits in every batch."""

from typing import Any, NamedTuple

import numpy as np

from cumoe.door.arrays import cupy
from cumoe.gpu.compile import current_device, launch, num_multiprocessors
from cumoe.gpu.stacks import rows_are_aligned, strides
from cumoe.gpu.structs import Struct

CHUNK = 512
"""Hidden positions that are summed from zero; the sums of chunks are added in order."""

MAX_FEW_BLOCKS = 8
"""Up to so many blocks an SM the small tile serves: more would read the tokens too often."""

LAUNCH = Struct(
    pointer=("x", "w", "logits", "blocks_done"),
    int64=("x_row_stride", "w_plane_stride", "w_row_stride"),
    int32=("num_tokens", "num_experts", "hidden_size", "num_planes", "num_parts", "padding"),
)


class Tile(NamedTuple):
    """A tile of the kernel."""

    name: str
    experts: int
    tokens: int
    warps: int
    stages: int

    @property
    def shared_bytes(self) -> int:
        """Bytes of all stages."""
        return self.stages * (self.experts + self.tokens) * 128


FEW, SLIM, MANY = Tile("few", 32, 16, 2, 8), Tile("slim", 32, 64, 4, 6), Tile("many", 128, 128, 8, 3)


def tile_for(num_tokens: int, num_experts: int, hidden_size: int, num_sms: int) -> Tile:
    """Return the tile for logits of this size; they have the same bits with any."""
    blocks = num_tiles(FEW, num_tokens, num_experts) * -(-hidden_size // CHUNK)
    if blocks <= MAX_FEW_BLOCKS * num_sms:
        return FEW
    return SLIM if num_experts <= SLIM.experts else MANY


def num_tiles(tile: Tile, num_tokens: int, num_experts: int) -> int:
    """Return the tiles of one part."""
    return -(-num_tokens // tile.tokens) * -(-num_experts // tile.experts)


def num_parts(tile: Tile, num_tokens: int, num_experts: int, hidden_size: int, num_sms: int) -> int:
    """Return how many parts the logits come in: one a chunk, unless there are tiles for every SM without that."""
    return 1 if num_tiles(tile, num_tokens, num_experts) >= num_sms else -(-hidden_size // CHUNK)


def planes_of(router_weight: Any, dtype: np.dtype) -> Any:
    """Return the weights as the kernel reads them, (num_planes, num_experts, hidden_size), or None if it cannot.

    Weights in the 16-bit `dtype` of the tokens are one plane, a view. Float32 weights beside bfloat16 tokens are split
    into three bfloat16 planes; that takes a trip to the host.
    """
    _, hidden_size = router_weight.shape
    if dtype.itemsize != 2 or hidden_size % 8:
        return None
    if router_weight.dtype == dtype:
        return router_weight[None] if rows_are_aligned(router_weight) else None
    if dtype.name != "bfloat16" or router_weight.dtype != np.float32:
        return None
    return cupy.asarray(split(cupy.asnumpy(router_weight), dtype))


def split(weights: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Return three bfloat16 planes whose sum are the float32 weights: 8 bits of the significand each, cut off.

    Exact for weights from 2^-110 upward; below, bits under 2^-133 are lost.
    """
    planes, rest = np.empty((3, *weights.shape), dtype), np.ascontiguousarray(weights)
    for plane in planes:
        finite = np.isfinite(rest)
        top = np.where(finite, (rest.view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32), rest)
        with np.errstate(invalid="ignore"):  # NaN stays NaN
            plane[...] = top
        rest = np.subtract(rest, top, out=np.zeros_like(rest), where=finite)
    return planes


def router_gemm(x: Any, planes: Any, logits: Any, blocks_done: Any) -> bool:
    """Write the parts of ``x @ w^T``, and a 0 into `blocks_done`; return False if the rows of `x` are not aligned.

    Parameters
    ----------
    x : (num_tokens, hidden_size) CuPy array, bfloat16 or float16
    planes : (num_planes, num_experts, hidden_size) CuPy array of the same dtype
    logits : (num_parts, num_tokens, num_experts) float32 CuPy array
    blocks_done : (1,) int32 CuPy array
    """
    if planes is None or x.dtype != planes.dtype or not rows_are_aligned(x):
        return False
    num_tokens, hidden_size = x.shape
    if num_tokens == 0:
        return True
    num_planes, num_experts, _ = planes.shape
    plane_stride, row_stride, _ = strides(planes)
    tile = tile_for(num_tokens, num_experts, hidden_size, num_multiprocessors(current_device()))
    argument = LAUNCH(
        x=x,
        w=planes,
        logits=logits,
        blocks_done=blocks_done,
        x_row_stride=strides(x)[0],
        w_plane_stride=plane_stride,
        w_row_stride=row_stride,
        num_tokens=num_tokens,
        num_experts=num_experts,
        hidden_size=hidden_size,
        num_planes=num_planes,
        num_parts=logits.shape[0],
        padding=0,
    )
    grid = num_tiles(tile, num_tokens, num_experts) * logits.shape[0]
    name = f"router_gemm_{x.dtype.name}_{tile.name}"
    launch(name, grid, tile.warps * 32, argument, tile.shared_bytes, overlap=True)
    return True


def logits_shape(num_tokens: int, num_experts: int, hidden_size: int, device_id: int) -> tuple[int, int, int]:
    """Return the shape of the logits in parts."""
    size, num_sms = (num_tokens, num_experts, hidden_size), num_multiprocessors(device_id)
    return num_parts(tile_for(*size, num_sms), *size, num_sms), num_tokens, num_experts
