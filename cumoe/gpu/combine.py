"""Launching kernels/combine.cu."""

from typing import Any

from cumoe.gpu.compile import current_device, launch, num_multiprocessors
from cumoe.gpu.structs import Struct

THREADS = 256
VECTOR_BYTES = 16  # of a row, read by one thread at a time
FEW_ROWS = 2  # of a token, for which there are kernels of their own
BLOCKS_PER_SM, BLOCKS_PER_SM_OF_FEW = 3, 4  # as many as are resident on Hopper, so that all end together

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
    num_shared = 0 if shared_rows is None else shared_rows.shape[0]
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
        num_shared=num_shared,
        padding=0,
    )
    aligned = all(array is None or array.data.ptr % 16 == 0 for array in (rows, shared_rows, residual, y))
    vector = VECTOR_BYTES // rows.dtype.itemsize
    vector = vector if hidden_size % vector == 0 and aligned else 1
    blocks = -(-(y.size // vector) // THREADS)
    few = inverse_permutation.shape[1] + num_shared <= FEW_ROWS
    per_sm = BLOCKS_PER_SM_OF_FEW if few else BLOCKS_PER_SM
    name = f"combine_{y.dtype.name}_{rows.dtype.name}_{vector}{'_few' if few else ''}"
    launch(name, min(blocks, per_sm * num_multiprocessors(current_device())), THREADS, argument, overlap=True)
