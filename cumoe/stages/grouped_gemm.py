"""Stage 3, the building block: one product an expert over the sorted rows."""

from typing import Any, Literal

from cumoe.cpu.experts import grouped_gemm as cpu_grouped_gemm
from cumoe.data.groups import Groups, check_groups
from cumoe.door.arrays import admit, admit_like, give_back, on_device
from cumoe.door.checks import (
    FLOAT_DTYPES,
    as_float_dtype,
    check_count,
    check_dtype,
    check_rank,
    check_same_dtype,
    check_shape,
    check_word,
)
from cumoe.door.factors import admit_factors
from cumoe.door.streams import on_producers_stream
from cumoe.gpu.captures import kept_by_results
from cumoe.gpu.experts import grouped_gemm as gpu_grouped_gemm


@on_producers_stream
def grouped_gemm(
    x: Any,
    w: Any,
    groups: Groups,
    bias: Any = None,
    row_scale: Any = None,
    *,
    rows: Literal["sorted", "tokens"] = "sorted",
    dtype: Any = None,
) -> Any:
    """Multiply the rows of every expert by that expert's matrix.

    ::

        y[r] = row_scale[slot] * (a_r @ w[e]^T) + bias[e]        for expert_offsets[e] <= r < expert_offsets[e + 1]
        slot = permutation[r]
        a_r  = x[r]                     rows="sorted"
        a_r  = x[slot // top_k]         rows="tokens": gathered while it is read, never copied

    Parameters
    ----------
    x : (num_tokens * top_k, K) or (num_tokens, K) array, float32, float16 or bfloat16
        The second with ``rows="tokens"``. Any strides.
    w : (num_experts, N, K) array, like `x`
        Any strides; a transposed ``(num_experts, K, N)`` array is passed as ``w.swapaxes(1, 2)``.
    groups : Groups
    bias : (num_experts, N) array, optional
        Any float dtype; converted to float32.
    row_scale : (num_tokens, top_k) array, optional
        Factor of each slot, on the float32 accumulator and before the bias; any float dtype, converted to float32.
    rows : {"sorted", "tokens"}
    dtype : dtype, optional
        Of the result: float32, float16 or bfloat16; the dtype of `x` by default.

    Returns
    -------
    (num_tokens * top_k, N) array
        In sorted order, of the library that `x` came from. Rows of slots without an expert, the last ones, are 0.

    Raises
    ------
    TypeError
        If something is no array, has another dtype, or differs from `x` in library or device.
    ValueError
        If a shape does not fit or a word is unknown.

    See Also
    --------
    group, combine : the stages around.

    Notes
    -----
    Accumulation in float32. GPU: one launch and a fill with zeros on the current stream, no host synchronisation,
    can be captured, and then the result keeps all memory that the graph uses; a row has the same bits whatever other
    rows there are. 16-bit arrays whose strides and bases are multiples of 16 bytes run on tensor cores, all others on
    float32 units.
    """
    check_word("rows", rows, ("sorted", "tokens"))
    a, kind = admit("x", x)
    with on_device(kind), kept_by_results(kind, x, w, groups, bias, row_scale) as keep:
        check_dtype("x", a, FLOAT_DTYPES)
        check_rank("x", a, ("rows", "K"))
        weights = admit_like("w", w, kind, "x")
        check_rank("w", weights, ("num_experts", "N", "K"))
        check_same_dtype("w", weights, a.dtype, "x")
        num_experts, width, inner = weights.shape
        for axis, size in (("num_experts", num_experts), ("N", width), ("K", inner)):
            check_count(f"{axis} of w", size, 1)
        groups = check_groups(groups, kind, "x")
        check_shape("expert_offsets", groups.expert_offsets, {"num_experts + 1": num_experts + 1})
        num_tokens, top_k = groups.inverse_permutation.shape
        num_rows = num_tokens if rows == "tokens" else num_tokens * top_k
        check_shape("x", a, {"num_tokens" if rows == "tokens" else "num_tokens * top_k": num_rows, "K": inner})
        bias = admit_factors("bias", bias, {"num_experts": num_experts, "N": width}, kind, "x")
        scale = admit_factors("row_scale", row_scale, {"num_tokens": num_tokens, "top_k": top_k}, kind, "x")
        result_dtype = as_float_dtype("dtype", dtype, a.dtype)
        slots_per_a_row = top_k if rows == "tokens" else 0
        engine = gpu_grouped_gemm if kind.on_gpu else cpu_grouped_gemm
        result = engine(a, weights, groups, bias, scale, slots_per_a_row, result_dtype)
    return give_back(keep(result), kind)
