"""Launching kernels/route.cu."""

import math
from typing import Any

import numpy as np

from cumoe.data.routing import SCORINGS, Router, Routing
from cumoe.door.arrays import cupy
from cumoe.gpu.compile import launch
from cumoe.gpu.stacks import strides
from cumoe.gpu.structs import Struct

WARPS = 4

LAUNCH = Struct(
    pointer=(
        *("logits", "selection_bias", "expert_scale", "expert_table", "input_ids"),
        *("topk_ids", "topk_weights"),
    ),
    int64=("row_stride", "col_stride"),
    int32=(
        *("num_tokens", "num_experts", "top_k", "scoring", "select_by"),
        *("num_groups", "top_groups", "group_score", "renormalize", "epsilon_mode"),
    ),
    float32=("dropped_value", "epsilon", "scale", "softcap", "mixer_eps"),
    int32_2=("words", "vocab_size", "padding"),
)


def route(logits: Any, router: Router, out: Routing | None = None, input_ids: Any = None) -> Routing:
    """Choose and weigh on the current stream; the formula is in `cumoe.Router`. `input_ids` are contiguous int32."""
    num_tokens, num_experts = logits.shape
    shape = (num_tokens, router.top_k)
    if out is None:
        out = Routing(cupy.empty(shape, np.int32), cupy.empty(shape, np.float32))
    if num_tokens == 0:
        return out
    row_stride, col_stride = strides(logits)
    words = max(router.top_k, router.num_groups)
    argument = LAUNCH(
        logits=logits,
        selection_bias=router.selection_bias,
        expert_scale=router.expert_scale,
        expert_table=router.expert_table,
        input_ids=input_ids,
        topk_ids=out.topk_ids,
        topk_weights=out.topk_weights,
        row_stride=row_stride,
        col_stride=col_stride,
        num_tokens=num_tokens,
        num_experts=num_experts,
        top_k=router.top_k,
        scoring=SCORINGS.index(router.scoring),
        select_by=int(router.select_by == "logits"),
        num_groups=router.num_groups,
        top_groups=router.top_groups or 1,
        group_score=int(router.group_score == "sum_top2"),
        renormalize=router.renormalize_order if router.renormalize else 0,
        epsilon_mode=int(router.renormalize_eps_mode == "clamp"),
        dropped_value=-math.inf if router.dropped_groups == "minus_inf" else 0.0,
        epsilon=router.renormalize_eps,
        scale=router.scale,
        softcap=router.logit_softcap or 0.0,
        mixer_eps=router.mixer_eps,
        words=words,
        vocab_size=0 if router.expert_table is None else router.expert_table.shape[0],
        padding=0,
    )
    shared_bytes = WARPS * (num_experts + words) * 4
    launch(f"route_{logits.dtype.name}", -(-num_tokens // WARPS), WARPS * 32, argument, shared_bytes)
    return out
