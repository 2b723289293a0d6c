"""Launching kernels/route.cu."""

from typing import Any

import numpy as np

from cumoe.data.routing import Router, Routing
from cumoe.door.arrays import cupy
from cumoe.gpu.compile import launch
from cumoe.gpu.stacks import strides

WARPS = 4
SCORINGS = ("softmax", "sigmoid", "sqrt_softplus")

LAUNCH = np.dtype(
    [(name, "u8") for name in ("logits", "selection_bias", "expert_scale", "topk_ids", "topk_weights")]
    + [(name, "i8") for name in ("row_stride", "col_stride")]
    + [(name, "i4") for name in ("num_tokens", "num_experts", "top_k", "scoring", "select_by", "num_groups")]
    + [(name, "i4") for name in ("top_groups", "group_score", "renormalize", "epsilon_mode")]
    + [(name, "f4") for name in ("dropped_value", "epsilon", "scale", "softcap")]
    + [("words", "i4"), ("padding", "i4")]
)


def route(logits: Any, router: Router, out: Routing | None = None) -> Routing:
    """Choose and weigh on the current stream; the formula is in `cumoe.Router`."""
    num_tokens, num_experts = logits.shape
    shape = (num_tokens, router.top_k)
    if out is None:
        out = Routing(cupy.empty(shape, np.int32), cupy.empty(shape, np.float32))
    if num_tokens == 0:
        return out
    argument = np.zeros(1, LAUNCH)
    pointers = {
        "logits": logits,
        "selection_bias": router.selection_bias,
        "expert_scale": router.expert_scale,
        "topk_ids": out.topk_ids,
        "topk_weights": out.topk_weights,
    }
    for name, array in pointers.items():
        argument[name] = 0 if array is None else array.data.ptr
    argument["row_stride"], argument["col_stride"] = strides(logits)
    argument["num_tokens"], argument["num_experts"], argument["top_k"] = num_tokens, num_experts, router.top_k
    argument["scoring"] = SCORINGS.index(router.scoring)
    argument["select_by"] = router.select_by == "logits"
    argument["num_groups"], argument["top_groups"] = router.num_groups, router.top_groups or 1
    argument["group_score"] = router.group_score == "sum_top2"
    argument["renormalize"] = router.renormalize_order if router.renormalize else 0
    argument["epsilon_mode"] = router.renormalize_eps_mode == "clamp"
    argument["dropped_value"] = -np.inf if router.dropped_groups == "minus_inf" else 0.0
    argument["epsilon"], argument["scale"] = router.renormalize_eps, router.scale
    argument["softcap"] = router.logit_softcap or 0.0
    argument["words"] = words = max(router.top_k, router.num_groups)
    shared_bytes = WARPS * (num_experts + words) * 4
    launch(f"route_{logits.dtype.name}", -(-num_tokens // WARPS), WARPS * 32, argument, shared_bytes)
    return out
