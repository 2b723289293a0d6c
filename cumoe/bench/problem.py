"""One layer with its tokens and their routing, ready to be run."""

from typing import Any

import numpy as np

import cumoe
from cumoe.bench.distributions import Distribution
from cumoe.bench.draw import Weights, fill
from cumoe.bench.shapes import Shape
from cumoe.layer.moe import WeightOn


class Problem:
    """A layer at a number of tokens; arrays are NumPy's or CuPy's, as `xp` says."""

    def __init__(
        self, xp: Any, shape: Shape, weights: Weights, num_tokens: int, weight_on: WeightOn, distribution: Distribution
    ) -> None:
        self.xp, self.shape, self.weights, self.weight_on = xp, shape, weights, weight_on
        dtype = weights.experts.dtype
        self.x = fill(xp, xp.empty((num_tokens, shape.hidden_size), dtype), 4, 1.0)
        self.y = xp.empty_like(self.x)
        self.routing = distribution.routing(xp, shape, num_tokens)
        self.groups = cumoe.group(self.routing.topk_ids, shape.num_experts)
        to_host = np.asarray if xp is np else xp.asnumpy
        self.tokens_per_expert: np.ndarray = to_host(self.groups.tokens_per_expert)

    @property
    def num_tokens(self) -> int:
        """Number of tokens."""
        return int(self.x.shape[0])

    @property
    def experts_hit(self) -> int:
        """How many routed experts have a token."""
        return int(np.count_nonzero(self.tokens_per_expert))

    @property
    def balancedness(self) -> float:
        """Mean over largest number of tokens of an expert."""
        return float(self.tokens_per_expert.mean() / max(self.tokens_per_expert.max(), 1))

    def run(self, weight_on: WeightOn | None = None) -> Any:
        """Compute the layer, into the same memory every time."""
        where = weight_on or self.weight_on
        return cumoe.moe(self.x, self.routing, self.weights.experts, self.weights.shared, weight_on=where, out=self.y)
