"""The norm before the experts and the last sum behind them, on NumPy arrays."""

import numpy as np

from cumoe.data.frame import Frame
from cumoe.data.routing import Routing


@np.errstate(over="ignore", invalid="ignore")
def over_rms(x: np.ndarray, eps: float) -> np.ndarray:
    """Return x / sqrt(mean(x^2) + eps) in float32."""
    wide = x.astype(np.float32, copy=False)
    return wide / np.sqrt((wide * wide).mean(axis=1, keepdims=True) + np.float32(eps))


@np.errstate(over="ignore", invalid="ignore")
def finish(
    total: np.ndarray,
    x: np.ndarray,
    routing: Routing,
    num_experts: int,
    frame: Frame,
    y: np.ndarray,
    residual: np.ndarray | None = None,
) -> None:
    """Add what the frame adds to the float32 sum of the experts, and the residual, into `y`."""
    if frame.num_identity_experts:
        weights = np.where(routing.topk_ids >= num_experts, routing.topk_weights, np.float32(0)).sum(axis=1)
        rows = np.flatnonzero(weights)  # others must not be multiplied by 0: they may hold NaN
        total[rows] += weights[rows, None] * x[rows].astype(np.float32)
    if frame.output_bias is not None:
        total += frame.output_bias
    if frame.output_norm is not None:
        total = over_rms(total, frame.output_norm.eps) * frame.output_norm.weight
    if residual is not None:
        total += residual.astype(np.float32, copy=False)
    y[...] = total.astype(y.dtype)
