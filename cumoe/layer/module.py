"""The layer as an object: a router, weights, and memory that is allocated once."""

from typing import Any

import numpy as np

from cumoe.cpu.experts import project as cpu_project
from cumoe.cpu.route import route as cpu_route
from cumoe.data.frame import Frame, Latent, RMSNorm, check_frame
from cumoe.data.routing import Router, admit_input_ids, check_logits, check_router, check_slots
from cumoe.door.arrays import Kind, admit_like, give_back, on_device
from cumoe.door.checks import FLOAT_DTYPES, check_count, check_dtype, check_shape, refuse
from cumoe.door.factors import admit_factors
from cumoe.door.output import output
from cumoe.door.streams import on_producers_stream
from cumoe.gpu.layer_router import LayerRouter
from cumoe.gpu.workspace import Workspace, total_bytes
from cumoe.layer.frame import frame_buffers, framed_forward, normalised
from cumoe.layer.moe import WeightOn, admit_tokens, check_weights


class MoE:
    """A Mixture-of-Experts layer ready to run.

    ::

        logits = x @ router_weight^T + router_bias       float32, never rounded to 16 bits
        y      = moe(x, route(logits, router), experts, shared, weight_on)

    and, with the parts that a few families have around the experts::

        u      = x / rms(x)                              input_norm; the router reads u, all experts v
        v      = u * input_norm.weight
        z      = moe(v, ...)                             the experts; latent: see `Latent`
        z      = z + v * (sum of w_j with id >= E) + output_bias
        y      = z / rms(z) * output_norm.weight

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
    input_norm : RMSNorm, optional
        Norm of the tokens that the layer does itself (Gemma-4). Its weight does not reach the router.
    latent : Latent, optional
        Projections around the routed experts, whose hidden_size is then ``latent.latent_size`` (Nemotron-H).
    num_identity_experts : int
        Experts behind the real ones, ids from num_experts on, whose output is their input (LongCat-Flash).
    output_bias : (hidden_size,) array, optional
        Added once (JetMoE). Any float dtype; converted to float32.
    output_norm : RMSNorm, optional
        Norm of the result (A.X-K1).

    Attributes
    ----------
    hidden_size : int
        Width of the tokens.

    Raises
    ------
    TypeError, ValueError
        As in `moe` and `route`; if the router or a part around the experts does not fit them; if there is a router_bias
        without a router_weight; if there are identity experts with the weight on the input or the activation.

    Notes
    -----
    On a GPU all memory but the output is one block for each stream that calls the layer, reused by every call and grown
    when a larger batch comes. Calls from several threads are safe. What a graph capture has seen of a call, its inputs
    and output as well as the layer's memory, lives as long as the layer does: keep the layer as long as its graphs.
    """

    @on_producers_stream
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
        input_norm: RMSNorm | None = None,
        latent: Latent | None = None,
        num_identity_experts: int = 0,
        output_bias: Any = None,
        output_norm: RMSNorm | None = None,
    ) -> None:
        if not isinstance(router, Router):
            raise TypeError(refuse("router", "a cumoe.Router", type(router).__name__))
        if latent is not None and not isinstance(latent, Latent):
            raise TypeError(refuse("latent", "a cumoe.Latent", type(latent).__name__))
        width = None if latent is None else latent.hidden_size
        self.experts, self.shared = check_weights(experts, shared, weight_on, width)
        self.hidden_size = width or self.experts.hidden_size
        self.router, self.weight_on = router, weight_on
        kind = self.experts.kind
        frame = Frame(input_norm, latent, num_identity_experts, output_bias, output_norm)
        self.frame = check_frame(frame, self.hidden_size, self.experts.dtype, kind)
        if latent is not None and latent.latent_size != self.experts.hidden_size:
            raise ValueError(
                refuse("latent", f"latent_size={self.experts.hidden_size}, like experts", latent.latent_size)
            )
        if num_identity_experts and (weight_on != "output" or latent is not None):
            raise ValueError(refuse("num_identity_experts", "weight_on='output' and no latent beside it", weight_on))
        self.num_choices = self.experts.num_experts + self.frame.num_identity_experts
        check_router(router, self.num_choices, kind, "experts")
        self.max_tokens = check_count("max_tokens", max_tokens, 0)
        axes = {"num_experts": self.num_choices, "hidden_size": self.hidden_size}
        self.router_weight: Any = None
        if router_weight is not None:
            weight = admit_like("router_weight", router_weight, kind, "experts")
            check_dtype("router_weight", weight, FLOAT_DTYPES)
            check_shape("router_weight", weight, axes)
            own = weight.dtype == self.experts.dtype
            self.router_weight = weight if own else weight.astype(np.float32, copy=False)
        axes = {"num_experts": self.num_choices}
        self.router_bias = admit_factors("router_bias", router_bias, axes, kind, "experts")
        if self.router_bias is not None and self.router_weight is None:
            raise ValueError(refuse("router_weight", "an array, since there is a router_bias", None))
        router_dtype = np.dtype(np.float32) if input_norm is not None else self.experts.dtype
        with on_device(kind):
            self._gpu_router = LayerRouter(router, self.router_weight, self.router_bias, router_dtype, self.num_choices)
        self._workspace = Workspace()
        self._reserved_bytes = self.workspace_bytes(self.max_tokens) if self.max_tokens else 0

    @on_producers_stream
    def __call__(self, x: Any, router_logits: Any = None, *, input_ids: Any = None, out: Any = None) -> Any:
        """Route the tokens and compute the layer.

        Parameters
        ----------
        x : (num_tokens, hidden_size) array
            In the dtype of the experts, of their library, on their device.
        router_logits : (num_tokens, num_experts) array, float32, float16 or bfloat16, optional
            In place of ``x @ router_weight^T + router_bias``. Identity experts count.
        input_ids : (num_tokens,) array of an int dtype
            For a router with an `expert_table`, and for no other. int32 is read in place.
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
        tokens, kind = admit_tokens(x, self.experts, self.hidden_size)
        num_tokens = tokens.shape[0]
        check_slots(num_tokens, self.router.top_k)
        logits = None
        if router_logits is not None:
            logits = admit_like("router_logits", router_logits, kind, "x")
            check_logits("router_logits", logits, kind, self.router)
            check_shape("router_logits", logits, {"num_tokens": num_tokens, "num_experts": self.num_choices})
        elif self.router_weight is None:
            raise ValueError(refuse("router_logits", "an array, since the layer has no router_weight", None))
        with on_device(kind):
            ids = admit_input_ids(input_ids, self.router, kind, "x", num_tokens)
            over = tokens if self.frame.has_end and kind.on_gpu else None  # else all is read before y is written
            y, result = output(out, tokens.shape, tokens.dtype, kind, "x", over=over)
            (self._forward_gpu if kind.on_gpu else self._forward_cpu)(tokens, logits, ids, y)
        return result if out is not None else give_back(y, kind)

    def _forward_cpu(self, tokens: Any, logits: Any, input_ids: Any, y: Any) -> None:
        router_x, expert_x = normalised(tokens, self.frame, {})
        if logits is None:
            logits = cpu_project(router_x.astype(np.float32, copy=False), self.router_weight, self.router_bias, None)
        routing = cpu_route(logits, self.router, input_ids)
        framed_forward(expert_x, routing, self.experts, self.shared, self.weight_on, self.frame, y, {})

    def _forward_gpu(self, tokens: Any, logits: Any, input_ids: Any, y: Any) -> None:
        with self._workspace.lock:
            buffers = self._workspace.arrays(self._buffers(tokens.shape[0]), self._reserved_bytes)
            self._workspace.hold_if_captured(tokens, logits, input_ids, y)
            router_x, expert_x = normalised(tokens, self.frame, buffers)
            routing, groups = self._gpu_router(router_x, logits, input_ids, self.experts.num_experts, buffers)
            framed_forward(expert_x, routing, self.experts, self.shared, self.weight_on, self.frame, y, buffers, groups)

    def _buffers(self, num_tokens: int) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
        top_k, frame = self.router.top_k, self.frame
        wanted = frame_buffers(num_tokens, top_k, self.hidden_size, self.experts, self.shared, frame)
        return wanted | self._gpu_router.buffers(num_tokens, self.experts.num_experts)

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
        around = [
            name
            for name, part in self.frame._asdict().items()
            if not (part is None or (isinstance(part, int) and part == 0))
        ]
        parts = ", ".join([*(repr(part) for part in (self.experts, *self.shared)), *around])
        return f"MoE({parts}, top_k={self.router.top_k}, scoring={self.router.scoring!r}, weight_on={self.weight_on!r})"
