"""Routing on NumPy arrays: float32, vectorised over the tokens."""

import numpy as np

from cumoe.data.routing import Router, Routing

FAR_BELOW_ZERO = np.float32(-40)
"""Below it sigmoid(l) = e^l and sqrt(softplus(l)) = e^(l/2) to the last bit of float32."""


def route(logits: np.ndarray, router: Router, input_ids: np.ndarray | None = None) -> Routing:
    """Choose and weigh; the formula is in `Router`."""
    logits = logits.astype(np.float32)
    if router.logit_softcap is not None:
        cap = np.float32(router.logit_softcap)
        logits = cap * np.tanh(logits / cap)
    with np.errstate(invalid="ignore", over="ignore", divide="ignore", under="ignore"):
        if input_ids is not None:
            ids, there = _look_up(input_ids, router.expert_table, logits.shape[1])
        else:
            ids, there = _choose(logits, router), None
        weights = _weights(logits, ids, router, there) * np.float32(router.scale)
        if router.expert_scale is not None:
            weights = weights * router.expert_scale[ids]
    if there is not None:
        ids, weights = np.where(there, ids, -1), np.where(there, weights, np.float32(0))
    return Routing(ids.astype(np.int32), weights.astype(np.float32))


def _choose(logits: np.ndarray, router: Router) -> np.ndarray:
    # Every score grows with its logit: where nothing is added the logit ranks without ties made by rounding.
    monotone = router.selection_bias is None and router.num_groups == 1
    ranked = logits if monotone or router.select_by == "logits" else _scores(logits, router)
    if router.selection_bias is not None:
        ranked = ranked + router.selection_bias
    if router.num_groups > 1:
        ranked = _drop_groups(ranked, router)
    return best(ranked, router.top_k)


def _look_up(input_ids: np.ndarray, table: np.ndarray, num_experts: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the experts of the token ids, and which of them exist; 0 stands for those that do not."""
    known = (input_ids >= 0) & (input_ids < len(table))
    ids = np.full((len(input_ids), table.shape[1]), -1, np.int32)
    ids[known] = table[input_ids[known]]
    there = (ids >= 0) & (ids < num_experts)
    return np.where(there, ids, 0), there


def best(scores: np.ndarray, count: int) -> np.ndarray:
    """Return the indices of the `count` largest of each row: ties to the lower index, NaN last."""
    return np.argsort(-scores, axis=1, kind="stable")[:, :count]


def _softmax(logits: np.ndarray) -> np.ndarray:
    shifted = np.exp(logits - np.fmax.reduce(logits, axis=1, keepdims=True, initial=-np.inf))
    return shifted / shifted.sum(axis=1, keepdims=True)


def _scores(logits: np.ndarray, router: Router) -> np.ndarray:
    if router.scoring == "softmax":
        return _softmax(logits)
    if router.scoring == "sigmoid":
        return np.float32(1) / (np.float32(1) + np.exp(-logits))
    root = np.sqrt(np.where(logits > 20, logits, np.log1p(np.exp(np.minimum(logits, 20)))))
    return np.where(logits < -20, np.exp(np.float32(0.5) * logits), root)  # the root first, or e^l underflows


def _drop_groups(ranked: np.ndarray, router: Router) -> np.ndarray:
    num_tokens, num_experts = ranked.shape
    grouped = ranked.reshape(num_tokens, router.num_groups, num_experts // router.num_groups)
    descending = -np.sort(-grouped, axis=2)
    if router.group_score == "max" or grouped.shape[2] == 1:
        group_scores = descending[:, :, 0]
    else:
        group_scores = descending[:, :, 0] + descending[:, :, 1]
    keep = np.zeros((num_tokens, router.num_groups), bool)
    np.put_along_axis(keep, best(group_scores, router.top_groups or 1), True, axis=1)
    dropped = np.float32(-np.inf if router.dropped_groups == "minus_inf" else 0)
    return np.where(keep[:, :, None], grouped, dropped).reshape(ranked.shape)


def _sparse_mixer(logits: np.ndarray, ids: np.ndarray, eps: float) -> np.ndarray:
    rows, left = np.arange(len(ids)), np.ones(logits.shape, bool)
    weights = np.empty(ids.shape, np.float32)
    for j in range(ids.shape[1]):
        own = logits[rows, ids[:, j], None]
        far = (own - logits) / np.maximum(np.abs(logits), own) > np.float32(2 * eps)
        weights[:, j] = 1 / np.where(left & ~far, np.exp(logits - own), np.float32(0)).sum(axis=1)
        left[rows, ids[:, j]] = False
    return weights


def _weights(logits: np.ndarray, ids: np.ndarray, router: Router, there: np.ndarray | None) -> np.ndarray:
    if router.scoring == "sparse_mixer":
        return _sparse_mixer(logits, ids, router.mixer_eps)
    chosen = np.take_along_axis(logits, ids, axis=1)
    if there is not None:
        chosen = np.where(there, chosen, np.float32(-np.inf))  # a slot without an expert has score 0
    exact_ratio = router.renormalize and router.renormalize_eps == 0
    if router.scoring == "softmax" and (router.select_by == "logits" or exact_ratio):
        weights = _softmax(chosen)
    elif router.scoring == "softmax":
        weights = np.take_along_axis(_softmax(logits), ids, axis=1)
        weights = weights if there is None else np.where(there, weights, np.float32(0))
    else:
        weights = _scores(chosen, router)
        if exact_ratio:
            top = np.fmax.reduce(chosen, axis=1, keepdims=True, initial=-np.inf)
            power = np.float32(1 if router.scoring == "sigmoid" else 0.5)
            weights = np.where(top < FAR_BELOW_ZERO, np.exp(power * (chosen - top)), weights)
    if not router.renormalize:
        return weights
    if router.renormalize_order == 2:
        norm = np.sqrt((weights * weights).sum(axis=1, keepdims=True))
    else:
        norm = weights.sum(axis=1, keepdims=True)
    eps = np.float32(router.renormalize_eps)
    return weights / (norm + eps if router.renormalize_eps_mode == "add" else np.maximum(norm, eps))
