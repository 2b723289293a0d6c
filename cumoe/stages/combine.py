"""Stage 4: from expert rows back to tokens."""

from typing import Any

import numpy as np

from cumoe.cpu.combine import combine as cpu_combine
from cumoe.data.groups import check_groups
from cumoe.door.arrays import admit, admit_like, cupy, give_back, on_device
from cumoe.door.checks import as_float_dtype, check_dtype, check_rank, check_shape
from cumoe.door.factors import admit_factors
from cumoe.door.output import admit_residual, output
from cumoe.door.streams import on_producers_stream
from cumoe.gpu.captures import kept_by_results, kept_for_good
from cumoe.gpu.combine import combine as gpu_combine


@on_producers_stream
def combine(
    rows: Any,
    groups: Any,
    topk_weights: Any = None,
    shared_rows: Any = None,
    *,
    residual: Any = None,
    dtype: Any = None,
    out: Any = None,
) -> Any:
    """Sum the rows of every token, in slot order.

    ::

        y[t] = sum_j topk_weights[t, j] * rows[inverse_permutation[t, j]]  +  sum_s shared_rows[s, t]  +  residual[t]

    Parameters
    ----------
    rows : (num_tokens * top_k, hidden_size) array, float32
        In sorted order, as `grouped_gemm` writes them. Rows of slots without an expert are never read.
    groups : Groups
    topk_weights : (num_tokens, top_k) array, optional
        Any float dtype, converted to float32. Without them the rows are taken to carry their weights.
    shared_rows : (num_shared, num_tokens, hidden_size) array, float32, optional
        Added unweighted.
    residual : (num_tokens, hidden_size) array, optional
        In the dtype of the result, added to the sum before it is rounded; may be `out`. Copied first where it is not
        C-contiguous on a GPU.
    dtype : dtype, optional
        Of the result: float32 (default), float16 or bfloat16.
    out : (num_tokens, hidden_size) array, optional
        Where to write; on a GPU C-contiguous, and sharing no memory with what is read.

    Returns
    -------
    (num_tokens, hidden_size) array
        Of the library that `rows` came from; `out` itself if it was given.

    Raises
    ------
    TypeError
        If something is no array, has another dtype, or differs from `rows` in library or device.
    ValueError
        If a shape does not fit, or `out` cannot be written, holds an element twice, or on a GPU shares memory with what
        is read, or a part of it with `residual`.

    See Also
    --------
    group, grouped_gemm : the stages before.

    Notes
    -----
    Sums are float32 in the order of the formula and rounded once. GPU: one launch on the current stream, no host
    synchronisation, can be captured; reads (top_k + num_shared) * num_tokens rows and the residual, writes num_tokens.
    In a capture the result keeps all memory that the graph uses; with `out` it is kept until the process ends.
    """
    sorted_rows, kind = admit("rows", rows)
    used = rows, groups, topk_weights, shared_rows, residual, out
    with on_device(kind), (kept_by_results if out is None else kept_for_good)(kind, *used) as keep:
        check_rank("rows", sorted_rows, ("num_tokens * top_k", "hidden_size"))
        check_dtype("rows", sorted_rows, (np.dtype(np.float32),))
        groups = check_groups(groups, kind, "rows")
        num_tokens, top_k = groups.inverse_permutation.shape
        hidden_size = sorted_rows.shape[1]
        check_shape("rows", sorted_rows, {"num_tokens * top_k": num_tokens * top_k, "hidden_size": hidden_size})
        axes = {"num_tokens": num_tokens, "top_k": top_k}
        weights = admit_factors("topk_weights", topk_weights, axes, kind, "rows")
        shared = None
        if shared_rows is not None:
            shared = admit_like("shared_rows", shared_rows, kind, "rows")
            check_rank("shared_rows", shared, ("num_shared", "num_tokens", "hidden_size"))
            check_dtype("shared_rows", shared, (np.dtype(np.float32),))
            check_shape(
                "shared_rows", shared, {"num_shared": len(shared), "num_tokens": num_tokens, "hidden_size": hidden_size}
            )
        result_dtype, shape = as_float_dtype("dtype", dtype, np.float32), (num_tokens, hidden_size)
        apart = {"rows": sorted_rows, "shared_rows": shared, "topk_weights": weights}
        y, result = output(out, shape, result_dtype, kind, "rows", **apart)
        added = admit_residual(residual, y, kind, "rows")
        if kind.on_gpu:
            sorted_rows = cupy.ascontiguousarray(sorted_rows)
            shared = None if shared is None else cupy.ascontiguousarray(shared)
        engine = gpu_combine if kind.on_gpu else cpu_combine
        engine(sorted_rows, groups.inverse_permutation, weights, shared, y, added)
    return result if out is not None else give_back(keep(y), kind)
