"""The expert projections on NumPy arrays: one BLAS call an expert and projection, float32 throughout."""

from collections.abc import Iterator

import numpy as np

from cumoe.data.groups import Groups
from cumoe.data.routing import Routing
from cumoe.data.weights import ExpertWeights, SharedExperts


def expert_rows(groups: Groups) -> Iterator[tuple[int, slice, np.ndarray]]:
    """Yield (expert, its sorted rows, their slots) for every expert that has rows."""
    offsets = groups.expert_offsets
    for expert in np.flatnonzero(groups.tokens_per_expert):
        rows = slice(offsets[expert], offsets[expert + 1])
        yield int(expert), rows, groups.permutation[rows]


@np.errstate(over="ignore", invalid="ignore")
def project(a: np.ndarray, w: np.ndarray, bias: np.ndarray | None, scale_in: np.ndarray | None) -> np.ndarray:
    """Return ``scale_in * (a @ w^T) + bias`` in float32."""
    out = a @ w.astype(np.float32, copy=False).T
    if scale_in is not None:
        out *= scale_in[:, None]
    if bias is not None:
        out += bias
    return out


@np.errstate(over="ignore", invalid="ignore")  # inf and NaN in the input are the caller's, and stay
def feed_forward(
    x: np.ndarray, weights: ExpertWeights, expert: int, weight_on: str = "", factors: np.ndarray | None = None
) -> np.ndarray:
    """Return the rows of one expert for float32 tokens `x`, with `factors` (a row each) placed by `weight_on`."""

    def factor(place: str) -> np.ndarray | None:
        return factors if weight_on == place else None

    def bias(stack: np.ndarray | None) -> np.ndarray | None:
        return None if stack is None else stack[expert]

    projected = project(x, weights.w_gate_up[expert], bias(weights.b_gate_up), factor("input"))
    hidden = weights.activation.apply(*weights.split(projected))
    if weight_on == "activation" and factors is not None:
        hidden = hidden * factors[:, None]
    rows = project(hidden, weights.w_down[expert], bias(weights.b_down), None)
    if weight_on == "output" and factors is not None:
        rows *= factors[:, None]
    return rows


def routed_rows(x: np.ndarray, routing: Routing, groups: Groups, weights: ExpertWeights, weight_on: str) -> np.ndarray:
    """Return (num_tokens * top_k, hidden_size) float32 rows in sorted order; rows without an expert are not written."""
    top_k = routing.topk_ids.shape[1]
    factors = routing.topk_weights.ravel()
    rows = np.empty((routing.topk_ids.size, x.shape[1]), np.float32)
    for expert, span, slots in expert_rows(groups):
        tokens = x[slots // top_k].astype(np.float32)
        rows[span] = feed_forward(tokens, weights, expert, weight_on, factors[slots])
    return rows


def shared_rows(x: np.ndarray, shared: tuple[SharedExperts, ...]) -> Iterator[np.ndarray]:
    """Yield the (num_tokens, hidden_size) float32 rows of every shared expert, its gate applied."""
    tokens = x.astype(np.float32) if shared else x
    for member in shared:
        for s, weights in enumerate(member.weights):
            rows = feed_forward(tokens, weights, 0)
            if member.gate is not None:
                with np.errstate(over="ignore", invalid="ignore"):
                    rows *= (1 / (1 + np.exp(-(tokens @ member.gate[s].astype(np.float32)))))[:, None]
            yield rows


def grouped_gemm(
    a: np.ndarray,
    w: np.ndarray,
    groups: Groups,
    bias: np.ndarray | None,
    row_scale: np.ndarray | None,
    slots_per_a_row: int,
    dtype: np.dtype,
) -> np.ndarray:
    """Return the grouped product, 0 in the rows without an expert; see `cumoe.grouped_gemm`."""
    out = np.zeros((groups.permutation.size, w.shape[1]), dtype)
    for expert, span, slots in expert_rows(groups):
        rows = a[slots // slots_per_a_row] if slots_per_a_row else a[span]
        scale = None if row_scale is None else row_scale.ravel()[slots]
        product = project(rows.astype(np.float32), w[expert], None if bias is None else bias[expert], scale)
        out[span] = product.astype(out.dtype)
    return out
