"""How evenly a routing spreads the tokens over the experts, and the losses that training adds to even it out."""

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from cumoe.cpu.group import group as cpu_group
from cumoe.data.routing import GPU_MAX_EXPERTS, admit_routing
from cumoe.door.arrays import admit, admit_like, cupy, give_back, on_device
from cumoe.door.checks import FLOAT_DTYPES, check_count, check_dtype, check_rank, check_shape, check_word, refuse
from cumoe.gpu.captures import kept_by_results
from cumoe.gpu.group import group as gpu_group

SCORINGS = ("softmax", "sigmoid")


class ExpertLoad(NamedTuple):
    """What `expert_load` found; numbers are arrays without dimensions, so that nothing has waited for a GPU."""

    tokens_per_expert: Any  # (num_experts,) int32
    balancedness: Any  # float32: mean over largest of tokens_per_expert, in [1 / num_experts, 1]; 1 is even
    entropy: Any  # float32: of the experts' shares of the slots, in nats, in [0, log num_experts]
    aux_loss: Any  # float32, or None without logits; top_k where load and scores are even
    z_loss: Any  # float32, or None without logits


def expert_load(
    routing: Any,
    num_experts: int,
    router_logits: Any = None,
    *,
    scoring: Literal["softmax", "sigmoid"] = "softmax",
) -> ExpertLoad:
    r"""Measure how evenly the tokens go to the experts.

    ::

        n_e          = slots whose expert is e,  n = sum of n_e,  T = num_tokens,  E = num_experts
        balancedness = (n / E) / max n_e
        entropy      = - sum_e (n_e / n) log(n_e / n)
        aux_loss     = E sum_e (n_e / T) P_e         P_e = mean over tokens of softmax(l_t)_e
                                                           or of sigmoid(l_te) / sum_i sigmoid(l_ti)
        z_loss       = mean over tokens of (log sum_e exp l_te)^2

    Parameters
    ----------
    routing : Routing or pair (topk_ids, topk_weights)
        Ids outside ``[0, num_experts)`` are slots without an expert: no n_e counts them.
    num_experts : int
    router_logits : (num_tokens, num_experts) array, float32, float16 or bfloat16, optional
        What the losses are computed from.
    scoring : {"softmax", "sigmoid"}
        Which P_e: "sigmoid" for routers of the DeepSeek-V3 family.

    Returns
    -------
    ExpertLoad
        Arrays of the library of `routing`. Without slots the load counts as even: balancedness 1, entropy and losses 0.

    Raises
    ------
    TypeError
        If something is no array, of another dtype, or the arrays differ in library or device.
    ValueError
        If a shape does not fit, the word is unknown, num_experts < 1, or num_experts > 1024 on a GPU.

    Notes
    -----
    Neither loss is scaled by a coefficient, and neither has a gradient. With top_k = 1 aux_loss is equation 4 of Switch
    Transformers (arXiv 2101.03961) without its alpha, after GShard (arXiv 2006.16668); with more it is what Mixtral's
    module in transformers computes for one layer, and top_k times what Megatron-Core reports. z_loss is equation 5 of
    ST-MoE (arXiv 2202.08906). Scores are float32, sums over tokens float64; padding tokens count unless their ids are
    -1 and their logits are left out.

    GPU: on the current stream, nothing on the host waits; a grouping and some elementwise kernels, which CuPy compiles
    when they are first used. The same bits on every run. In a capture each result keeps all memory that the graph uses.
    """
    if not isinstance(routing, Sequence) or len(routing) != 2:
        raise TypeError(refuse("routing", "a cumoe.Routing or a pair (topk_ids, topk_weights)", type(routing).__name__))
    ids, kind = admit("topk_ids", routing[0])
    with on_device(kind), kept_by_results(kind, *routing, router_logits) as keep:
        check_rank("topk_ids", ids, ("num_tokens", "top_k"))
        num_tokens = ids.shape[0]
        topk_ids = admit_routing(routing, kind, "topk_ids", num_tokens).topk_ids
        num_experts = check_count("num_experts", num_experts, 1)
        if kind.on_gpu:
            check_count("num_experts", num_experts, 1, GPU_MAX_EXPERTS, of=" on a GPU")
        check_word("scoring", scoring, SCORINGS)
        logits = None
        if router_logits is not None:
            logits = admit_like("router_logits", router_logits, kind, "topk_ids")
            check_dtype("router_logits", logits, FLOAT_DTYPES)
            check_shape("router_logits", logits, {"num_tokens": num_tokens, "num_experts": num_experts})
        xp, group = (cupy, gpu_group) if kind.on_gpu else (np, cpu_group)
        counts = group(topk_ids, num_experts).tokens_per_expert
        measures = [*_evenness(xp, counts), None, None]
        if logits is not None:
            measures[2:] = _losses(xp, counts, logits, scoring)
        measures = [None if value is None else xp.asarray(value, np.float32) for value in measures]
    return ExpertLoad(*(None if value is None else give_back(keep(value), kind) for value in (counts, *measures)))


def _evenness(xp: Any, counts: Any) -> tuple[Any, Any]:
    """Return balancedness and entropy."""
    counts = counts.astype(np.float64)
    total, largest = counts.sum(), counts.max()
    balancedness = xp.where(largest > 0, total / counts.size / xp.maximum(largest, 1), 1.0)
    shares = counts / xp.maximum(total, 1)
    entropy = -(shares * xp.log(xp.where(shares > 0, shares, 1.0))).sum()
    return balancedness, xp.maximum(entropy, 0.0)  # -0.0 where one expert has all


def _losses(xp: Any, counts: Any, logits: Any, scoring: str) -> tuple[Any, Any]:
    """Return the load-balancing loss and the z loss; no tokens cost nothing."""
    num_tokens, num_experts = logits.shape
    if num_tokens == 0:
        return xp.zeros(()), xp.zeros(())
    logits = logits.astype(np.float32)
    with np.errstate(invalid="ignore", over="ignore"):  # logits that are not finite make losses that are not
        largest = logits.max(axis=1, keepdims=True)
        shifted = xp.exp(logits - largest)
        sums = shifted.sum(axis=1, keepdims=True)
        log_sums = (xp.log(sums) + largest).astype(np.float64)
        if scoring == "sigmoid":
            shifted = 1 / (1 + xp.exp(-logits))
            sums = shifted.sum(axis=1, keepdims=True)
        means = (shifted / sums).mean(axis=0, dtype=np.float64)
        return num_experts * (counts * means).sum() / num_tokens, (log_sums * log_sums).mean()
