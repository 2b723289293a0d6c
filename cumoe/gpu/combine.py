"""Launching kernels/combine.cu."""

from typing import Any

from cumoe.door.arrays import cupy
from cumoe.gpu.compile import launch, num_multiprocessors
from cumoe.gpu.structs import Struct

THREADS = 256
VECTOR_BYTES = 16  # of a row, read by one thread at a time
BLOCKS_PER_SM = 16  # grid-stride blocks; enough to hide memory latency and to spread the last wave

LAUNCH = Struct(
    pointer=("rows", "inverse_permutation", "topk_weights", "shared_rows", "residual", "y"),
    int64=("num_tokens",),
    int32=("hidden_size", "top_k", "num_shared", "padding"),
)


def combine(
    rows: Any, inverse_permutation: Any, topk_weights: Any, shared_rows: Any, y: Any, residual: Any = None
) -> None:
    """Sum the rows of every token into `y` on the current stream; see `cumoe.combine`.

    All arrays are C-contiguous. Rows are float32, or have the dtype of `y`, as `residual` does.
    """
    if y.size == 0:
        return
    num_tokens, hidden_size = y.shape
    argument = LAUNCH(
        rows=rows,
        inverse_permutation=inverse_permutation,
        topk_weights=topk_weights,
        shared_rows=shared_rows,
        residual=residual,
        y=y,
        num_tokens=num_tokens,
        hidden_size=hidden_size,
        top_k=inverse_permutation.shape[1],
        num_shared=0 if shared_rows is None else shared_rows.shape[0],
        padding=0,
    )
    aligned = all(array is None or array.data.ptr % 16 == 0 for array in (rows, shared_rows, residual, y))
    vector = VECTOR_BYTES // rows.dtype.itemsize
    vector = vector if hidden_size % vector == 0 and aligned else 1
    blocks = -(-(y.size // vector) // THREADS)
    grid = min(blocks, BLOCKS_PER_SM * num_multiprocessors(cupy.cuda.runtime.getDevice()))
    launch(f"combine_{y.dtype.name}_{rows.dtype.name}_{vector}", grid, THREADS, argument, overlap=True)
