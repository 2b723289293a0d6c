"""What ``weight_on="input"`` and `shared` replace: a copy of the tokens for every weight.

Engines that can only weigh the output, or whose experts all have one token list, compute a Llama-4 layer so::

    (a, D)  ->  ((top_k + 1) a, D)     the tokens times their first weight, their second, ..., and as they are
    experts ->  experts + shared       the shared expert becomes id num_experts of the stack
    one call with one expert a row and weight 1, then the top_k + 1 blocks are added up

With top_k = 1 the tokens grow from (a, D) to (2a, D).
"""

from typing import Any

import numpy as np

import cumoe


def replicate(x: Any, routing: cumoe.Routing, stacked: cumoe.Experts, xp: Any) -> Any:
    """Compute the layer from copied and rescaled tokens.

    Parameters
    ----------
    x : (num_tokens, hidden_size) array
    routing : Routing
        Ids below ``stacked.num_experts - 1``.
    stacked : Experts
        The routed experts and, behind them, the shared one.
    xp : module
        NumPy or CuPy, where the arrays live.

    Returns
    -------
    (num_tokens, hidden_size) array
        In the dtype of `x`, in which the copies, the rows and the sums are rounded too.
    """
    num_tokens, hidden_size = x.shape
    top_k = routing.topk_ids.shape[1]
    weights = routing.topk_weights.astype(x.dtype)
    copies = xp.empty((top_k + 1, num_tokens, hidden_size), x.dtype)
    ids = xp.full((top_k + 1, num_tokens), stacked.num_experts - 1, np.int32)
    for j in range(top_k):
        xp.multiply(x, weights[:, j, None], out=copies[j])
        ids[j] = routing.topk_ids[:, j]
    copies[top_k] = x
    ones = xp.ones((ids.size, 1), np.float32)
    rows = cumoe.moe(copies.reshape(-1, hidden_size), (ids.reshape(-1, 1), ones), stacked)
    blocks = rows.reshape(top_k + 1, num_tokens, hidden_size)
    total = blocks[0]
    for block in blocks[1:]:
        total += block
    return total
