"""The layer as an object: a router, weights, and memory that is allocated once."""

from typing import Any

import numpy as np

from cumoe.cpu.experts import project as cpu_project
from cumoe.cpu.route import route as cpu_route
from cumoe.data.routing import Router, Routing, check_logits, check_router, check_slots
from cumoe.door.arrays import Kind, admit_like, give_back, on_device
from cumoe.door.checks import FLOAT_DTYPES, check_count, check_dtype, check_shape, refuse
from cumoe.door.factors import admit_factors
from cumoe.door.output import output
from cumoe.gpu.experts import router_logits as gpu_router_logits
from cumoe.gpu.route import route as gpu_route
from cumoe.gpu.workspace import Workspace, layer_buffers, total_bytes
from cumoe.layer.moe import WeightOn, admit_tokens, check_weights, forward


class MoE:
    """A Mixture-of-Experts layer ready to run.

    ::

        logits = x @ router_weight^T + router_bias       float32, never rounded to 16 bits
        y      = moe(x, route(logits, router), experts, shared, weight_on)

    Parameters
    ----------
    router : Router
    experts : Experts
    shared : SharedExperts or a sequence of them, optional
    weight_on : {"input", "activation", "output"}
        See `moe`.
    router_weight : (num_experts, hidden_size) array, float32, float16 or bfloat16, optional
        Without it every call brings its own logits. Kept as it is where it has the dtype of the experts, else
        converted to float32.
    router_bias : (num_experts,) array, optional
        Any float dtype; converted to float32.
    max_tokens : int
        Memory for that many tokens is reserved at the first call on a stream, so that later calls allocate nothing.

    Raises
    ------
    TypeError, ValueError
        As in `moe` and `route`; if the router does not fit the experts; if there is a router_bias without a
        router_weight.

    Notes
    -----
    On a GPU all memory but the output is one block for each stream that calls the layer, reused by every call and grown
    when a larger batch comes. Calls from several threads are safe. In a graph capture the layer's memory outlives the
    graph as long as the layer does.
    """

    def __init__(
        self,
        router: Router,
        experts: Any,
        shared: Any = None,
        *,
        weight_on: WeightOn = "output",
        router_weight: Any = None,
        router_bias: Any = None,
        max_tokens: int = 0,
    ) -> None:
        if not isinstance(router, Router):
            raise TypeError(refuse("router", "a cumoe.Router", type(router).__name__))
        self.experts, self.shared = check_weights(experts, shared, weight_on)
        self.router, self.weight_on = router, weight_on
        kind = self.experts.kind
        check_router(router, self.experts.num_experts, kind, "experts")
        self.max_tokens = check_count("max_tokens", max_tokens, 0)
        axes = {"num_experts": self.experts.num_experts, "hidden_size": self.experts.hidden_size}
        self.router_weight: Any = None
        if router_weight is not None:
            weight = admit_like("router_weight", router_weight, kind, "experts")
            check_dtype("router_weight", weight, FLOAT_DTYPES)
            check_shape("router_weight", weight, axes)
            own = weight.dtype == self.experts.dtype
            self.router_weight = weight if own else weight.astype(np.float32, copy=False)
        axes = {"num_experts": self.experts.num_experts}
        self.router_bias = admit_factors("router_bias", router_bias, axes, kind, "experts")
        if self.router_bias is not None and self.router_weight is None:
            raise ValueError(refuse("router_weight", "an array, since there is a router_bias", None))
        self._workspace = Workspace()
        self._reserved_bytes = self.workspace_bytes(self.max_tokens) if self.max_tokens else 0

    def __call__(self, x: Any, router_logits: Any = None, *, out: Any = None) -> Any:
        """Route the tokens and compute the layer.

        Parameters
        ----------
        x : (num_tokens, hidden_size) array
            In the dtype of the experts, of their library, on their device.
        router_logits : (num_tokens, num_experts) array, float32, float16 or bfloat16, optional
            In place of ``x @ router_weight^T + router_bias``.
        out : (num_tokens, hidden_size) array, optional
            As in `moe`.

        Returns
        -------
        (num_tokens, hidden_size) array

        Raises
        ------
        TypeError, ValueError
            As in `moe` and `route`; ValueError also if there is neither a router_weight nor router_logits.
        """
        tokens, kind = admit_tokens(x, self.experts)
        num_tokens = tokens.shape[0]
        check_slots(num_tokens, self.router.top_k)
        logits = None
        if router_logits is not None:
            logits = admit_like("router_logits", router_logits, kind, "x")
            check_logits("router_logits", logits, kind, self.router)
            check_shape("router_logits", logits, {"num_tokens": num_tokens, "num_experts": self.experts.num_experts})
        elif self.router_weight is None:
            raise ValueError(refuse("router_logits", "an array, since the layer has no router_weight", None))
        with on_device(kind):
            y, result = output(out, tokens.shape, tokens.dtype, kind, "x")
            (self._forward_gpu if kind.on_gpu else self._forward_cpu)(tokens, logits, y)
        return result if out is not None else give_back(y, kind)

    def _forward_cpu(self, tokens: Any, logits: Any, y: Any) -> None:
        if logits is None:
            logits = cpu_project(tokens.astype(np.float32, copy=False), self.router_weight, self.router_bias, None)
        forward(tokens, cpu_route(logits, self.router), self.experts, self.shared, self.weight_on, y, {})

    def _forward_gpu(self, tokens: Any, logits: Any, y: Any) -> None:
        with self._workspace.lock:
            buffers = self._workspace.arrays(self._buffers(tokens.shape[0]), self._reserved_bytes)
            if logits is None:
                logits = buffers["router_logits"]
                gpu_router_logits(tokens, self.router_weight, self.router_bias, logits)
            routing = Routing(buffers["topk_ids"], buffers["topk_weights"])
            gpu_route(logits, self.router, routing)
            forward(tokens, routing, self.experts, self.shared, self.weight_on, y, buffers)

    def _buffers(self, num_tokens: int) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
        return layer_buffers(num_tokens, self.router.top_k, self.experts.weights, self.shared, routed_here=True)

    def workspace_bytes(self, num_tokens: int) -> int:
        """Return the bytes of GPU memory that a call on `num_tokens` tokens needs besides its output; 0 on a CPU."""
        check_count("num_tokens", num_tokens, 0)
        return total_bytes(self._buffers(num_tokens)) if self.experts.kind.on_gpu else 0

    @property
    def kind(self) -> Kind:
        """Library and device that the layer serves."""
        return self.experts.kind

    def __repr__(self) -> str:
        """Return the parts."""
        parts = ", ".join(repr(part) for part in (self.experts, *self.shared))
        return f"MoE({parts}, top_k={self.router.top_k}, scoring={self.router.scoring!r}, weight_on={self.weight_on!r})"
