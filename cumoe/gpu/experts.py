"""The expert projections on CuPy arrays: routed and shared experts in the same launches."""

from typing import Any, Literal

import numpy as np

from cumoe.data.groups import Groups
from cumoe.data.routing import Routing
from cumoe.data.weights import ExpertWeights, SharedExperts
from cumoe.door.arrays import cupy
from cumoe.gpu.compile import has_wgmma
from cumoe.gpu.config import SMALLEST_WGMMA_TILE, max_row_blocks
from cumoe.gpu.gate import shared_gate
from cumoe.gpu.grouped_gemm import Slots, run, run_both
from cumoe.gpu.stacks import ExpertStack, weight_order

Buffers = dict[str, tuple[tuple[int, ...], np.dtype]]

COUNTERS_BEGIN = 32
"""Where the counters of row blocks begin in "progress": see Progress in kernels/tiles_sm90.cuh."""

MIN_HIDDEN_SIZE = 64
"""Below it the down projection reads float32 hidden rows on float32 units: the errors of rounded hidden rows average
out over the results of a token, but over a few results they might not, and nothing that small needs tensor cores."""


def buffers(num_tokens: int, top_k: int, weights: ExpertWeights, shared: tuple[SharedExperts, ...]) -> Buffers:
    """Return name, shape and dtype of everything that the projections write.

    Hidden rows that tensor cores will read have the dtype of the weights and a pitch that is a multiple of 8, all
    others are float32. Expert rows are float32, so that the combine rounds once; where the Hopper kernels write them
    they have the dtype of the weights, which halves the memory that the combine reads.
    """
    float32, hidden_size = np.dtype(np.float32), weights.w_down.shape[1]
    shared_weights = [own for member in shared for own in member.weights]
    num_shared = len(shared_weights)
    on_hopper = has_wgmma(weights.w_down.device.id) and hidden_size % 8 == 0
    narrow = on_hopper and all(map(_on_tensor_cores, (weights, *shared_weights)))
    row_dtype = weights.w_down.dtype if narrow else float32
    wanted: Buffers = {
        "hidden": _hidden_buffer(num_tokens * top_k, weights),
        "rows": ((num_tokens * top_k, hidden_size), row_dtype),
        "shared_rows": ((num_shared, num_tokens, hidden_size), row_dtype),
        "shared_gates": ((num_shared, num_tokens), float32),
        "progress": ((_num_progress(num_tokens, top_k, weights, num_shared),), np.dtype(np.int32)),
    }
    for s, own in enumerate(shared_weights):
        wanted[f"shared_hidden_{s}"] = _hidden_buffer(num_tokens, own)
    return wanted


def _num_progress(num_tokens: int, top_k: int, weights: ExpertWeights, num_shared: int) -> int:
    """Return how many integers the one launch of both projections counts with, which the grouping clears."""
    routed = max_row_blocks(SMALLEST_WGMMA_TILE, num_tokens * top_k, weights.w_down.shape[0])
    return COUNTERS_BEGIN + routed + num_shared * max_row_blocks(SMALLEST_WGMMA_TILE, num_tokens, 1)


def _hidden_buffer(num_rows: int, weights: ExpertWeights) -> tuple[tuple[int, ...], np.dtype]:
    dtype = weights.w_down.dtype if _on_tensor_cores(weights) else np.dtype(np.float32)
    return (num_rows, -(-weights.intermediate_size // 8) * 8), dtype


def _on_tensor_cores(weights: ExpertWeights) -> bool:
    """Whether tensor cores compute the down projection."""
    return bool(weight_order(weights.w_down, "ungated")) and weights.w_down.shape[1] >= MIN_HIDDEN_SIZE


def forward(
    x: Any,
    routing: Routing,
    groups: Groups,
    weights: ExpertWeights,
    shared: tuple[SharedExperts, ...],
    weight_on: str,
    out: dict[str, Any],
    ids_known: Literal["early", "late"] = "late",
) -> tuple[Any, Any]:
    """Return (rows, shared_rows): weighted routed rows in sorted order, gated shared rows in token order.

    `ids_known`: see `Slots`.
    """
    num_tokens, top_k = routing.topk_ids.shape
    factors = routing.topk_weights

    def factor(place: str) -> Any:
        return factors if weight_on == place else None

    routed: dict[str, Any] = {
        "num_rows": num_tokens * top_k,
        "expert_offsets": groups.expert_offsets,
        "permutation": groups.permutation,
    }
    hidden = out["hidden"][:, : weights.intermediate_size]
    first = [
        _gate_up(
            x,
            weights,
            hidden,
            scale_in=factor("input"),
            scale_out=factor("activation"),
            slots_per_a_row=top_k,
            **routed,
        )
    ]
    second = [_down(hidden, weights, out["rows"], scale_out=factor("output"), **routed)]
    s = 0
    for member in shared:
        for i, own in enumerate(member.weights):
            hidden = out[f"shared_hidden_{s}"][:, : own.intermediate_size]
            gates = None
            if member.gate is not None:
                gates = out["shared_gates"][s]
                shared_gate(x, member.gate[i], gates)
            first.append(_gate_up(x, own, hidden, num_rows=num_tokens))
            second.append(_down(hidden, own, out["shared_rows"][s], num_rows=num_tokens, scale_out=gates))
            s += 1
    run_both(first, second, out["progress"], Slots(routing.topk_ids, routing.topk_weights, ids_known))
    return out["rows"], out["shared_rows"]


def grouped_gemm(
    a: Any, w: Any, groups: Groups, bias: Any, row_scale: Any, slots_per_a_row: int, dtype: np.dtype
) -> Any:
    """Return the grouped product, 0 in the rows without an expert; see `cumoe.grouped_gemm`."""
    c = cupy.zeros((groups.permutation.size, w.shape[1]), dtype)
    stack = ExpertStack(
        a,
        w,
        c,
        groups.permutation.size,
        bias=bias,
        expert_offsets=groups.expert_offsets,
        permutation=groups.permutation,
        scale_in=row_scale,
        slots_per_a_row=slots_per_a_row,
    )
    run_as(stack, dtype)
    return c


def project(x: Any, w: Any, bias: Any, out: Any) -> None:
    """Write ``x @ w^T + bias`` into `out`; a float32 `out` is never rounded to 16 bits."""
    run([ExpertStack(x, w[None], out, x.shape[0], bias=None if bias is None else bias[None])])


def run_as(stack: ExpertStack, dtype: np.dtype) -> None:
    """Run one stack whose result may have any of the three dtypes: kernels store float32 or the dtype of `a`."""
    if dtype in (np.float32, stack.a.dtype):
        run([stack])
        return
    wide = cupy.zeros(stack.c.shape, np.float32)
    run([ExpertStack(**{**vars(stack), "c": wide})])
    stack.c[...] = wide


def _gate_up(x: Any, weights: ExpertWeights, hidden: Any, **rows: Any) -> ExpertStack:
    return ExpertStack(
        x,
        weights.w_gate_up,
        hidden,
        bias=weights.b_gate_up,
        layout=weights.layout,
        activation=weights.activation,
        **rows,
    )


def _down(hidden: Any, weights: ExpertWeights, rows_out: Any, **rows: Any) -> ExpertStack:
    return ExpertStack(hidden, weights.w_down, rows_out, bias=weights.b_down, **rows)
