"""The slow truth: every stage as the loop that defines it, in plain NumPy.

Tests compare the fast code with these functions; users may check their own pipelines with them. `dtype` is the
arithmetic, float64 unless float32 is asked for. Arrays are NumPy arrays of any float type; nothing is checked.
"""

from typing import Any

import numpy as np

from cumoe.data.frame import Latent, RMSNorm
from cumoe.data.groups import Groups
from cumoe.data.routing import Router, Routing
from cumoe.data.weights import Experts, ExpertWeights, SharedExperts, check_shared


def route(
    router_logits: np.ndarray, router: Router, dtype: Any = np.float64, *, input_ids: np.ndarray | None = None
) -> Routing:
    """Route token by token; the formula is in `cumoe.Router`. Weights have the given dtype."""
    num_tokens = router_logits.shape[0]
    ids = np.zeros((num_tokens, router.top_k), np.int32)
    weights = np.zeros((num_tokens, router.top_k), dtype)
    with np.errstate(all="ignore"):
        for t in range(num_tokens):
            logits = router_logits[t].astype(dtype)
            if router.logit_softcap is not None:
                logits = router.logit_softcap * np.tanh(logits / router.logit_softcap)
            ids[t] = _choose(logits, router) if input_ids is None else _look_up(input_ids[t], router, len(logits))
            weights[t] = _weigh(logits, ids[t], router)
    return Routing(ids, weights)


def _score(logits: np.ndarray, scoring: str) -> np.ndarray:
    if scoring == "softmax":
        exponentials = np.exp(logits - max((v for v in logits if v == v), default=-np.inf))
        return exponentials / exponentials.sum()
    return 1 / (1 + np.exp(-logits)) if scoring == "sigmoid" else np.sqrt(np.logaddexp(0, logits))


def _largest(scores: Any, count: int) -> list[int]:
    """Return the indices of the `count` largest scores: NaN below everything, ties to the lower index."""
    return sorted(range(len(scores)), key=lambda i: (scores[i] != scores[i], -scores[i], i))[:count]


def _choose(logits: np.ndarray, router: Router) -> list[int]:
    # Scores are monotone in the logits; ranking the logits spares the ties that rounded scores would bring.
    plain = router.selection_bias is None and router.num_groups == 1
    ranked = logits if plain or router.select_by == "logits" else _score(logits, router.scoring)
    if router.selection_bias is not None:
        ranked = ranked + router.selection_bias.astype(logits.dtype)
    if router.num_groups > 1:
        size = len(ranked) // router.num_groups
        groups = [ranked[g * size : (g + 1) * size] for g in range(router.num_groups)]
        wanted = 1 if router.group_score == "max" else min(2, size)
        group_scores = [sum(group[i] for i in _largest(group, wanted)) for group in groups]
        kept = _largest(group_scores, router.top_groups or 1)
        dropped = -np.inf if router.dropped_groups == "minus_inf" else 0.0
        ranked = np.array([v if e // size in kept else dropped for e, v in enumerate(ranked)])
    return _largest(ranked, router.top_k)


def _look_up(token_id: int, router: Router, num_experts: int) -> list[int]:
    if not 0 <= token_id < len(router.expert_table):
        return [-1] * router.top_k
    return [e if 0 <= e < num_experts else -1 for e in router.expert_table[token_id]]


def _mix(logits: np.ndarray, ids: np.ndarray, eps: float) -> np.ndarray:
    weights, left = [], set(range(len(logits)))
    for i in ids:
        near = [e for e in left if not (logits[i] - logits[e]) / max(abs(logits[e]), logits[i]) > 2 * eps]
        weights.append(1 / sum(np.exp(logits[e] - logits[i]) for e in near))
        left.remove(int(i))
    return np.array(weights)


def _weigh(logits: np.ndarray, ids: np.ndarray, router: Router) -> np.ndarray:
    if router.scoring == "sparse_mixer":
        weights = _mix(logits, ids, router.mixer_eps)
    else:
        with_none = np.append(logits, -np.inf)  # id -1, a slot without an expert, has a score of 0
        after = router.scoring == "softmax" and router.select_by == "logits"
        weights = _score(with_none[ids], "softmax") if after else _score(with_none, router.scoring)[ids]
    if router.renormalize:
        order = router.renormalize_order
        norm = (weights**order).sum() ** (1 / order)
        eps = router.renormalize_eps
        weights = weights / (norm + eps if router.renormalize_eps_mode == "add" else max(norm, eps))
    weights = weights * router.scale
    if router.expert_scale is not None:
        weights = weights * router.expert_scale[ids].astype(logits.dtype)
    return np.where(ids < 0, 0, weights)


def group(topk_ids: np.ndarray, num_experts: int) -> Groups:
    """Group by going through the slots once for every expert; the definition is in `cumoe.group`."""
    num_tokens, top_k = topk_ids.shape
    permutation: list[int] = []
    expert_offsets = [0]
    inverse = np.full((num_tokens, top_k), -1, np.int32)
    for e in range(num_experts):
        for t in range(num_tokens):
            for j in range(top_k):
                if topk_ids[t, j] == e:
                    inverse[t, j] = len(permutation)
                    permutation.append(t * top_k + j)
        expert_offsets.append(len(permutation))
    permutation += [slot for slot in range(num_tokens * top_k) if inverse.flat[slot] < 0]
    offsets = np.array(expert_offsets, np.int32)
    return Groups(np.array(permutation, np.int32), offsets, np.diff(offsets), inverse)


def grouped_gemm(
    x: np.ndarray,
    w: np.ndarray,
    groups: Groups,
    bias: np.ndarray | None = None,
    row_scale: np.ndarray | None = None,
    *,
    rows: str = "sorted",
    dtype: Any = np.float64,
) -> np.ndarray:
    """Multiply row by row; the definition is in `cumoe.grouped_gemm`."""
    top_k = groups.inverse_permutation.shape[1]
    w, x = w.astype(dtype), x.astype(dtype)
    y = np.zeros((groups.permutation.size, w.shape[1]), dtype)
    for e in range(len(groups.tokens_per_expert)):
        for r in range(groups.expert_offsets[e], groups.expert_offsets[e + 1]):
            slot = groups.permutation[r]
            y[r] = w[e] @ (x[slot // top_k] if rows == "tokens" else x[r])
            if row_scale is not None:
                y[r] *= row_scale.flat[slot]
            if bias is not None:
                y[r] += bias[e]
    return y


def combine(
    rows: np.ndarray,
    groups: Groups,
    topk_weights: np.ndarray | None = None,
    shared_rows: np.ndarray | None = None,
    dtype: Any = np.float64,
    *,
    residual: np.ndarray | None = None,
) -> np.ndarray:
    """Sum token by token; the definition is in `cumoe.combine`."""
    num_tokens, top_k = groups.inverse_permutation.shape
    y = np.zeros((num_tokens, rows.shape[1]), dtype)
    for t in range(num_tokens):
        for j in range(top_k):
            if groups.inverse_permutation[t, j] >= 0:
                weight = 1 if topk_weights is None else topk_weights[t, j].astype(dtype)
                y[t] += weight * rows[groups.inverse_permutation[t, j]].astype(dtype)
        for shared in shared_rows if shared_rows is not None else ():
            y[t] += shared[t].astype(dtype)
        if residual is not None:
            y[t] += residual[t].astype(dtype)
    return y


def moe(
    x: np.ndarray,
    routing: Routing,
    experts: Experts,
    shared: SharedExperts | list[SharedExperts] | None = None,
    *,
    weight_on: str = "output",
    latent: Latent | None = None,
    num_identity_experts: int = 0,
    output_bias: np.ndarray | None = None,
    output_norm: RMSNorm | None = None,
    residual: np.ndarray | None = None,
    dtype: Any = np.float64,
) -> np.ndarray:
    """Compute the layer by its definition, token after token and slot after slot; see `cumoe.moe` and `cumoe.MoE`."""
    x = x.astype(dtype)
    y = np.zeros(x.shape, dtype)
    routed_x = x if latent is None else _affine(x, latent.w_in, latent.b_in)
    routed = np.zeros(routed_x.shape, dtype)
    weights = experts.weights.map(lambda array: array.astype(dtype))
    with np.errstate(over="ignore", invalid="ignore"):
        for t in range(len(x)):
            for e, w in zip(routing.topk_ids[t], routing.topk_weights[t].astype(dtype), strict=True):
                if 0 <= e < experts.num_experts:
                    routed[t] += _expert(routed_x[t], weights, e, **{weight_on: w})
                elif 0 <= e < experts.num_experts + num_identity_experts:
                    y[t] += w * x[t]
        y += routed if latent is None else _affine(routed, latent.w_out, latent.b_out)
        for member in check_shared(shared, experts, x.shape[1]):
            for s, shared_weights in enumerate(member.weights):
                own = shared_weights.map(lambda array: array.astype(dtype))
                for t in range(len(x)):
                    gate = 1 if member.gate is None else 1 / (1 + np.exp(-(x[t] @ member.gate[s].astype(dtype))))
                    y[t] += gate * _expert(x[t], own, 0)
        if output_bias is not None:
            y += output_bias.astype(dtype)
        if output_norm is not None:
            y = over_rms(y, output_norm.eps) * output_norm.weight.astype(dtype)
        return y if residual is None else y + residual.astype(dtype)


def over_rms(x: np.ndarray, eps: float, dtype: Any = np.float64) -> np.ndarray:
    """Divide every token by the root of its mean square, as `cumoe.RMSNorm` does before its weight."""
    x = x.astype(dtype)
    return np.array([row / np.sqrt(sum(v * v for v in row) / len(row) + eps) for row in x]).reshape(x.shape)


def _affine(x: np.ndarray, w: np.ndarray, b: np.ndarray | None) -> np.ndarray:
    return x @ w.astype(x.dtype).T + (0 if b is None else b.astype(x.dtype))


def _expert(v: np.ndarray, weights: ExpertWeights, e: int, **factors: Any) -> np.ndarray:
    """Return ``output * Expert_e(input * v)``, with the factor `activation` on the activated hidden row."""
    on_input, on_activation, on_output = (factors.get(place, 1) for place in ("input", "activation", "output"))
    projected = weights.w_gate_up[e] @ (on_input * v) + (0 if weights.b_gate_up is None else weights.b_gate_up[e])
    hidden = on_activation * weights.activation.apply(*weights.split(projected))
    return on_output * (weights.w_down[e] @ hidden + (0 if weights.b_down is None else weights.b_down[e]))
