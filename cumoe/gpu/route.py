"""Launching kernels/route.cu."""

import math
from typing import Any

import numpy as np

from cumoe.data.routing import SCORINGS, Router, Routing
from cumoe.door.arrays import cupy
from cumoe.gpu.compile import launch
from cumoe.gpu.stacks import strides
from cumoe.gpu.structs import Packed, Struct

WARPS = 4
LOGITS_TYPES = ("float32", "bfloat16", "float16")

LAUNCH = Struct(
    pointer=(
        *("logits", "router_bias", "selection_bias", "expert_scale", "expert_table", "input_ids"),
        *("topk_ids", "topk_weights"),
    ),
    int64=("part_stride", "row_stride", "col_stride"),
    int32=(
        *("num_parts", "num_tokens", "num_experts", "top_k", "scoring", "select_by"),
        *("num_groups", "top_groups", "group_score", "renormalize", "epsilon_mode"),
    ),
    float32=("dropped_value", "epsilon", "scale", "softcap", "mixer_eps"),
    int32_2=("vocab_size", "words_per_warp", "logits_type", "padding"),
)


def route(logits: Any, router: Router, out: Routing | None = None, input_ids: Any = None) -> Routing:
    """Choose and weigh on the current stream; the formula is in `cumoe.Router`. `input_ids` are contiguous int32."""
    num_tokens, num_experts = logits.shape
    if out is None:
        shape = (num_tokens, router.top_k)
        out = Routing(cupy.empty(shape, np.int32), cupy.empty(shape, np.float32))
    if num_tokens == 0:
        return out
    argument = pack(logits, router, out, input_ids)
    shared_bytes = WARPS * 4 * words_per_warp(router, num_experts)
    launch(
        f"route_{keys_of_lane(num_experts)}", -(-num_tokens // WARPS), WARPS * 32, argument, shared_bytes, overlap=True
    )
    return out


def keys_of_lane(num_experts: int) -> int:
    """Return how many experts a lane ranks: kernels are compiled for 8, 16 and 32."""
    return next(keys for keys in (8, 16, 32) if 32 * keys >= num_experts)


def words_per_warp(router: Router, num_experts: int, *, with_keys: bool = True) -> int:
    """Return the words of shared memory of a warp: see Row in kernels/route.cuh."""
    words = max(router.top_k, router.num_groups) + router.top_k + num_experts
    return 4 * (-(-words // 4) + with_keys * -(-num_experts // 4))


def ranks_apart(router: Router) -> bool:
    """Whether experts are ranked by something else than their logits."""
    return router.selection_bias is not None or router.num_groups > 1


def pack(logits: Any, router: Router, out: Routing, input_ids: Any = None, router_bias: Any = None) -> Packed:
    """Return the struct of kernels/route.cuh.

    Parameters
    ----------
    logits : ([num_parts,] num_tokens, num_experts) CuPy array
        Parts are added up, `router_bias` (float32) last.
    """
    num_parts, part_stride = (1, 0) if logits.ndim == 2 else (logits.shape[0], strides(logits)[0])
    num_tokens, num_experts = logits.shape[-2:]
    row_stride, col_stride = strides(logits)[-2:]
    return LAUNCH(
        logits=logits,
        router_bias=router_bias,
        selection_bias=router.selection_bias,
        expert_scale=router.expert_scale,
        expert_table=router.expert_table,
        input_ids=input_ids,
        topk_ids=out.topk_ids,
        topk_weights=out.topk_weights,
        part_stride=part_stride,
        row_stride=row_stride,
        col_stride=col_stride,
        num_parts=num_parts,
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
        vocab_size=0 if router.expert_table is None else router.expert_table.shape[0],
        words_per_warp=words_per_warp(router, num_experts),
        logits_type=LOGITS_TYPES.index(logits.dtype.name),
        padding=0,
    )
