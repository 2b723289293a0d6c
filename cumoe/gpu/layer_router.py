"""The router of a layer on a GPU: from tokens to routing and groups, with weights that are prepared once."""

from typing import Any

import numpy as np

from cumoe.data.groups import Groups
from cumoe.data.routing import Router, Routing
from cumoe.gpu import group, route_and_group, router_gemm
from cumoe.gpu.experts import Buffers, project


class LayerRouter:
    """Logits, choice and order of the slots.

    Parameters
    ----------
    router_weight, router_bias : CuPy arrays, or None
        As `cumoe.MoE` keeps them; arrays of another library, which are never used here, are ignored.
    dtype : dtype of what the router reads
    num_choices : int
        Width of the logits: experts and identity experts.
    """

    def __init__(self, router: Router, router_weight: Any, router_bias: Any, dtype: np.dtype, num_choices: int) -> None:
        self.router, self.weight, self.bias, self.num_choices = router, router_weight, router_bias, num_choices
        on_gpu = router_weight is not None and not isinstance(router_weight, np.ndarray)
        self.planes = router_gemm.planes_of(router_weight, dtype) if on_gpu else None

    def buffers(self, num_tokens: int, num_experts: int) -> Buffers:
        """Return name, shape and dtype of everything that the router writes, on a GPU."""
        int32, float32, slots = np.dtype(np.int32), np.dtype(np.float32), (num_tokens, self.router.top_k)
        wanted: Buffers = {
            "topk_ids": (slots, int32),
            "topk_weights": (slots, float32),
            "counts": ((route_and_group.max_rows(num_tokens), group.row_words(num_experts)), int32),
            "blocks_done": ((1,), int32),
        }
        if self.weight is not None:
            shape = (1, num_tokens, self.num_choices)
            if self.planes is not None:
                device = self.weight.device.id
                shape = router_gemm.logits_shape(num_tokens, self.num_choices, self.weight.shape[1], device)
            wanted["router_logits"] = (shape, float32)
        return wanted

    def __call__(
        self, x: Any, logits: Any, input_ids: Any, num_experts: int, buffers: dict[str, Any]
    ) -> tuple[Routing, Groups]:
        """Launch the router on the current stream; `logits` of the caller take the place of the product."""
        if logits is not None:
            return route_and_group.route_and_group(logits, self.router, None, input_ids, num_experts, buffers)
        logits, blocks_done = buffers["router_logits"], buffers["blocks_done"]
        if not router_gemm.router_gemm(x, self.planes, logits, blocks_done):
            logits, blocks_done = logits[0], None
            project(x, self.weight, None, logits)
        return route_and_group.route_and_group(
            logits, self.router, self.bias, input_ids, num_experts, buffers, blocks_done
        )
