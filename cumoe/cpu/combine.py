"""The combine on NumPy arrays: slot after slot, float32, one rounding."""

from collections.abc import Iterable

import numpy as np


@np.errstate(over="ignore", invalid="ignore")  # inf - inf is the caller's
def combine(
    rows: np.ndarray,
    inverse_permutation: np.ndarray,
    topk_weights: np.ndarray | None,
    shared_rows: Iterable[np.ndarray] | None,
    out: np.ndarray,
    residual: np.ndarray | None = None,
) -> None:
    """Write ``sum_j weight_j * rows[inverse_permutation[:, j]] + sum_s shared_rows[s] + residual`` into `out`."""
    total = np.zeros(out.shape, np.float32)
    for j in range(inverse_permutation.shape[1]):
        sorted_rows = inverse_permutation[:, j]
        tokens = np.flatnonzero(sorted_rows >= 0)  # a row that is not there must not be multiplied by 0: it may be NaN
        picked = rows[sorted_rows[tokens]]
        total[tokens] += picked if topk_weights is None else topk_weights[tokens, j, None] * picked
    for shared in shared_rows if shared_rows is not None else ():
        total += shared
    if residual is not None:
        total += residual.astype(np.float32, copy=False)
    out[...] = total.astype(out.dtype)
