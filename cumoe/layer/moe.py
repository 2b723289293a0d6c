"""The layer as a function: group, experts, combine."""

from typing import Any, Literal

import numpy as np

from cumoe.cpu import experts as cpu_experts
from cumoe.cpu.combine import combine as cpu_combine
from cumoe.cpu.group import group as cpu_group
from cumoe.data.groups import Groups
from cumoe.data.routing import GPU_MAX_EXPERTS, Routing, admit_routing
from cumoe.data.weights import Experts, SharedExperts, check_shared
from cumoe.door.arrays import Kind, admit, check_kind, cupy, give_back, on_device
from cumoe.door.checks import check_count, check_dtype, check_rank, check_shape, check_word, refuse
from cumoe.door.output import admit_residual, output
from cumoe.door.streams import on_producers_stream
from cumoe.gpu import experts as gpu_experts
from cumoe.gpu.captures import kept_if_captured
from cumoe.gpu.combine import combine as gpu_combine
from cumoe.gpu.group import group as gpu_group
from cumoe.gpu.workspace import layer_buffers

WEIGHT_ON = ("input", "activation", "output")
WeightOn = Literal["input", "activation", "output"]


@on_producers_stream
def moe(
    x: Any,
    routing: Any,
    experts: Experts,
    shared: Any = None,
    *,
    weight_on: WeightOn = "output",
    residual: Any = None,
    out: Any = None,
) -> Any:
    r"""Compute a Mixture-of-Experts layer from tokens and their routing.

    ::

        y[t] = sum_j out_scale * Expert_e(in_scale * x[t])  +  sum_s sigmoid(x[t] . gate_s) * Shared_s(x[t])
               + residual[t]
        e, w = topk_ids[t, j], topk_weights[t, j]

        weight_on="input"        in_scale = w, out_scale = 1             Llama-4, for any top_k
        weight_on="activation"   w multiplies the activated hidden row, before the down projection
        weight_on="output"       in_scale = 1, out_scale = w             everyone else

    No token is copied or rescaled in memory: ``(w x) W + b = w (x W) + b``, so a weight on the input is a factor of the
    first projection's float32 accumulator. The shared experts see the tokens as they are.

    Parameters
    ----------
    x : (num_tokens, hidden_size) array, float32, float16 or bfloat16
        Any strides. NumPy: computed on the CPU. CuPy: on the current stream. Other DLPack exporters are viewed: those
        of torch on torch's current stream, others on CuPy's.
    routing : Routing or pair (topk_ids, topk_weights)
        From `route`, or the caller's own. Ids outside ``[0, num_experts)`` are slots without an expert and contribute
        nothing; an expert named twice counts twice.
    experts : Experts
        In the dtype of `x`.
    shared : SharedExperts or a sequence of them, optional
    weight_on : {"input", "activation", "output"}
    residual : (num_tokens, hidden_size) array, optional
        In the dtype of `x`, added to the float32 sum before its one rounding; may be `x` or `out`. Copied first where
        it is not C-contiguous on a GPU.
    out : (num_tokens, hidden_size) array, optional
        Where to write, in the dtype of `x`; may be `x` or `residual` itself. C-contiguous on a GPU.

    Returns
    -------
    (num_tokens, hidden_size) array
        In the dtype and of the library of `x`; `out` itself if it was given.

    Raises
    ------
    TypeError
        If something is no array or not of its class, dtypes differ, or arrays differ in library or device.
    ValueError
        If a shape does not fit, a word is unknown, num_tokens * top_k >= 2^31, or num_experts > 1024 on a GPU; if `out`
        cannot be written, holds an element twice, or on a GPU shares a part of the memory of `residual`; if an array on
        a GPU is not aligned to its elements.
    RuntimeError
        If arrays are on a GPU whose kernels could not be compiled; the text says why.

    See Also
    --------
    MoE : the layer as an object that routes, and keeps its memory.

    Notes
    -----
    Accumulation, factors and combine are float32. The hidden row between the projections is float32 on the CPU; on a
    GPU it has the dtype of `x` where tensor cores read it (hidden_size of 64 or more, arrays aligned to 16 bytes), else
    it is float32 too. The rows that the combine adds up are float32; where the Hopper kernels write them, and
    intermediate_size and hidden_size are multiples of 8, they have the dtype of `x`. Same bits on every run; on a GPU
    a row also has the same bits in every batch, whichever kernel the batch's size chooses: see `MoE`.

    Memory beyond inputs and output, on a GPU: num_tokens * (top_k * I + sum_s I_s) numbers of hidden rows,
    num_tokens * (top_k + num_shared) * hidden_size numbers of result rows, and 2 * num_tokens * top_k int32; no copy of
    a token. They come from CuPy's pool at each call; `MoE` keeps them. What a graph capture has seen, inputs and output
    too, lives as long as `experts`. Four launches up to 1024 slots, five above, one more for each gated shared expert
    and where arrays differ in alignment; no host synchronisation. On sm_90 and later a kernel may begin before the one
    ahead of it on the stream has ended; it waits for its results by itself.
    """
    experts, members = check_weights(experts, shared, weight_on)
    tokens, kind = admit_tokens(x, experts)
    with on_device(kind), kept_if_captured(experts.captured, kind, x, routing, members, residual, out):
        routing = admit_routing(routing, kind, "x", tokens.shape[0])
        y, result = output(out, tokens.shape, tokens.dtype, kind, "x")
        added = admit_residual(residual, y, kind, "x")
        buffers = {}
        if kind.on_gpu:
            num_tokens, top_k = routing.topk_ids.shape
            wanted = layer_buffers(num_tokens, top_k, experts.weights, members)
            buffers = {name: cupy.empty(*spec) for name, spec in wanted.items()}
        forward(tokens, routing, experts, members, weight_on, y, buffers, None, added)
    return result if out is not None else give_back(y, kind)


def check_weights(
    experts: Any, shared: Any, weight_on: Any, hidden_size: int | None = None
) -> tuple[Experts, tuple[SharedExperts, ...]]:
    """Return checked experts and shared experts; tokens have the experts' hidden_size, or one of their own."""
    if not isinstance(experts, Experts):
        raise TypeError(refuse("experts", "a cumoe.Experts", type(experts).__name__))
    check_word("weight_on", weight_on, WEIGHT_ON)
    if experts.kind.on_gpu:
        check_count("num_experts", experts.num_experts, 1, GPU_MAX_EXPERTS, of=" on a GPU")
    return experts, check_shared(shared, experts, hidden_size)


def admit_tokens(x: Any, experts: Experts, hidden_size: int | None = None) -> tuple[Any, Kind]:
    """View the tokens; raise unless they fit the experts, or have the given hidden_size."""
    tokens, kind = admit("x", x)
    check_kind("x", kind, experts.kind, "experts")
    check_dtype("x", tokens, (experts.dtype,))
    check_rank("x", tokens, ("num_tokens", "hidden_size"))
    check_shape("x", tokens, {"num_tokens": tokens.shape[0], "hidden_size": hidden_size or experts.hidden_size})
    return tokens, kind


def forward(
    x: Any,
    routing: Routing,
    experts: Experts,
    shared: tuple[SharedExperts, ...],
    weight_on: str,
    y: Any,
    buffers: dict[str, Any],
    groups: Groups | None = None,
    residual: Any = None,
) -> None:
    """Run the checked stages after routing, into `y`; on a GPU `buffers` holds everything else that is written.

    `groups` are those of the routing, where a kernel has sorted the slots already.
    """
    weights = experts.weights
    if isinstance(x, np.ndarray):
        groups = cpu_group(routing.topk_ids, experts.num_experts)
        rows = cpu_experts.routed_rows(x, routing, groups, weights, weight_on)
        cpu_combine(rows, groups.inverse_permutation, None, cpu_experts.shared_rows(x, shared), y, residual)
        return
    ids_known: Literal["early", "late"] = "late"
    if groups is None:
        groups = gpu_group(routing.topk_ids, experts.num_experts, buffers)
        ids_known = "early"
    rows, shared_rows = gpu_experts.forward(x, routing, groups, weights, shared, weight_on, buffers, ids_known)
    gpu_combine(rows, groups.inverse_permutation, None, shared_rows, y, residual)
