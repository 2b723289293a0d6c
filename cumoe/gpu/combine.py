"""Launching kernels/combine.cu."""

from typing import Any

import numpy as np

from cumoe.door.arrays import cupy
from cumoe.gpu.compile import launch, num_multiprocessors

THREADS = 256
BLOCKS_PER_SM = 16  # grid-stride blocks; enough to hide memory latency and to spread the last wave

LAUNCH = np.dtype(
    [(name, "u8") for name in ("rows", "inverse_permutation", "topk_weights", "shared_rows", "y")]
    + [("num_tokens", "i8")]
    + [(name, "i4") for name in ("hidden_size", "top_k", "num_shared", "padding")]
)


def combine(rows: Any, inverse_permutation: Any, topk_weights: Any, shared_rows: Any, y: Any) -> None:
    """Sum the rows of every token into `y` on the current stream; see `cumoe.combine`."""
    if y.size == 0:
        return
    rows = cupy.ascontiguousarray(rows)
    shared_rows = None if shared_rows is None else cupy.ascontiguousarray(shared_rows)
    argument = np.zeros(1, LAUNCH)
    arrays = (rows, inverse_permutation, topk_weights, shared_rows, y)
    for name, array in zip(LAUNCH.names[:5], arrays, strict=True):  # type: ignore[index]
        argument[name] = 0 if array is None else array.data.ptr
    num_tokens, hidden_size = y.shape
    argument["num_tokens"], argument["hidden_size"] = num_tokens, hidden_size
    argument["top_k"] = inverse_permutation.shape[1]
    argument["num_shared"] = 0 if shared_rows is None else shared_rows.shape[0]
    aligned = all(array is None or array.data.ptr % 16 == 0 for array in (rows, shared_rows, y))
    vector = 4 if hidden_size % 4 == 0 and aligned else 1
    blocks = -(-(y.size // vector) // THREADS)
    grid = min(blocks, BLOCKS_PER_SM * num_multiprocessors(cupy.cuda.runtime.getDevice()))
    launch(f"combine_{y.dtype.name}_{vector}", grid, THREADS, argument)
