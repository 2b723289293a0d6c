"""Launching kernels/ends.cu: the norm before the experts, and the last sum behind them."""

from typing import Any

from cumoe.data.frame import Frame, RMSNorm
from cumoe.data.routing import Routing
from cumoe.gpu.compile import launch
from cumoe.gpu.stacks import strides
from cumoe.gpu.structs import Struct

WARPS = 8

NORM_LAUNCH = Struct(
    pointer=("x", "weight", "plain", "scaled"),
    int64=("x_row_stride", "x_col_stride"),
    int32=("num_tokens", "hidden_size"),
    float32=("eps",),
    int32_2=("padding",),
)
FINISH_LAUNCH = Struct(
    pointer=("totals", "x", "topk_ids", "topk_weights", "bias", "norm", "residual", "y"),
    int64=("x_row_stride", "x_col_stride"),
    int32=("num_totals", "num_tokens", "hidden_size", "top_k", "num_experts", "num_identity_experts"),
    float32=("eps",),
    int32_2=("padding",),
)


def rms_norm(x: Any, norm: RMSNorm, plain: Any, scaled: Any) -> None:
    """Write x / rms(x) into the float32 array `plain`, and that times the weight into `scaled`."""
    num_tokens, hidden_size = x.shape
    if num_tokens == 0:
        return
    row_stride, col_stride = strides(x)
    argument = NORM_LAUNCH(
        x=x,
        weight=norm.weight,
        plain=plain,
        scaled=scaled,
        x_row_stride=row_stride,
        x_col_stride=col_stride,
        num_tokens=num_tokens,
        hidden_size=hidden_size,
        eps=norm.eps,
        padding=0,
    )
    launch(f"ends_rms_norm_{x.dtype.name}", -(-num_tokens // WARPS), WARPS * 32, argument, overlap=True)


def finish(totals: Any, x: Any, routing: Routing, num_experts: int, frame: Frame, y: Any, residual: Any = None) -> None:
    """Add up the float32 `totals` (n, num_tokens, hidden_size), what the frame adds and the residual, into `y`."""
    num_tokens, hidden_size = y.shape
    if num_tokens == 0:
        return
    row_stride, col_stride = strides(x)
    norm = frame.output_norm
    argument = FINISH_LAUNCH(
        totals=totals,
        x=x,
        topk_ids=routing.topk_ids,
        topk_weights=routing.topk_weights,
        bias=frame.output_bias,
        norm=None if norm is None else norm.weight,
        residual=residual,
        y=y,
        x_row_stride=row_stride,
        x_col_stride=col_stride,
        num_totals=totals.shape[0],
        num_tokens=num_tokens,
        hidden_size=hidden_size,
        top_k=routing.topk_ids.shape[1],
        num_experts=num_experts,
        num_identity_experts=frame.num_identity_experts,
        eps=0.0 if norm is None else norm.eps,
        padding=0,
    )
    launch(f"ends_finish_{y.dtype.name}", -(-num_tokens // WARPS), WARPS * 32, argument, overlap=True)
