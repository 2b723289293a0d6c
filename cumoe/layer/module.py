"""The layer as an object: a router, weights, and memory that is allocated once."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from cumoe.cpu.experts import project as cpu_project
from cumoe.cpu.route import route as cpu_route
from cumoe.data.frame import Frame, Latent, RMSNorm, check_frame
from cumoe.data.routing import Router, admit_input_ids, check_logits, check_router, check_slots
from cumoe.door.arrays import Kind, admit_like, cupy, give_back, on_device
from cumoe.door.checks import FLOAT_DTYPES, check_count, check_dtype, check_shape, refuse
from cumoe.door.factors import admit_factors
from cumoe.door.output import admit_residual, output
from cumoe.door.streams import on_producers_stream
from cumoe.gpu.captures import kept_if_captured
from cumoe.gpu.config import Gpu
from cumoe.gpu.layer_router import LayerRouter
from cumoe.gpu.operand import Operand
from cumoe.gpu.tape import Tape
from cumoe.gpu.workspace import Workspace, total_bytes
from cumoe.layer.capture import Captured
from cumoe.layer.frame import frame_buffers, framed_forward, normalised
from cumoe.layer.moe import WeightOn, admit_tokens, check_weights
from cumoe.layer.plan import Plan, Roofs, plan
from cumoe.layer.replay import VECTOR_BYTES, Arrays, key_of, replayed

ARGUMENTS = ("x", "router_logits", "input_ids", "residual", "y")


class MoE:
    """A Mixture-of-Experts layer ready to run.

    ::

        logits = x @ router_weight^T + router_bias       float32, never rounded to 16 bits
        y      = moe(x, route(logits, router), experts, shared, weight_on) + residual

    and, with the parts that a few families have around the experts::

        u      = x / rms(x)                              input_norm; the router reads u, all experts v
        v      = u * input_norm.weight
        z      = moe(v, ...)                             the experts; latent: see `Latent`
        z      = z + v * (sum of w_j with id >= E) + output_bias
        y      = z / rms(z) * output_norm.weight + residual

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

    Host time: the first call of a kind (shape, strides, dtype and alignment of its arrays, and which of them there
    are) decides about kernels and packs their arguments; later ones, of the last 64 kinds on a stream, only put the
    addresses of their arrays in. `capture` goes further and replays a CUDA graph.

    Batch invariance: on a GPU the bits of a token's row do not depend on the other tokens of the batch, nor on how many
    there are, whichever kernels that chooses: every sum of a row runs in one order. It holds among calls whose arrays
    lie alike; those whose addresses and strides are multiples of 16 bytes run on other units than those whose are not.
    On the CPU the matrix products are BLAS's, which promises nothing of the kind. Every run gives the same bits.
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
        self.device_id = int(kind.device.partition(":")[2]) if kind.on_gpu else -1
        self._prepare_router()
        self._workspace = Workspace(self.workspace_bytes(self.max_tokens) if self.max_tokens else 0)

    def _prepare_router(self) -> None:
        dtype = np.dtype(np.float32) if self.frame.input_norm is not None else self.experts.dtype
        with on_device(self.kind):
            self._gpu_router = LayerRouter(self.router, self.router_weight, self.router_bias, dtype, self.num_choices)

    def __setattr__(self, name: str, value: Any) -> None:
        """Set an attribute; what was prepared from the old ones or recorded with them is made anew."""
        object.__setattr__(self, name, value)
        if not name.startswith("_") and "_workspace" in vars(self):
            self._prepare_router()
            self._workspace.forget_tapes()

    @on_producers_stream
    def __call__(
        self, x: Any, router_logits: Any = None, *, input_ids: Any = None, residual: Any = None, out: Any = None
    ) -> Any:
        """Route the tokens and compute the layer.

        Parameters
        ----------
        x : (num_tokens, hidden_size) array
            In the dtype of the experts, of their library, on their device.
        router_logits : (num_tokens, num_experts) array, float32, float16 or bfloat16, optional
            In place of ``x @ router_weight^T + router_bias``. Identity experts count.
        input_ids : (num_tokens,) array of an int dtype
            For a router with an `expert_table`, and for no other. int32 is read in place.
        residual : (num_tokens, hidden_size) array, optional
            As in `moe`: added in float32, after the output_norm if there is one.
        out : (num_tokens, hidden_size) array, optional
            As in `moe`.

        Returns
        -------
        (num_tokens, hidden_size) array

        Raises
        ------
        TypeError, ValueError
            As in `moe` and `route`; ValueError also if there is neither a router_weight nor router_logits, or if `out`
            shares a part of the memory of `x` on a GPU and the layer has identity experts.
        """
        if self.kind.library == "cupy":
            arrays = (x, router_logits, input_ids, residual)
            y = replayed(self._workspace, self.device_id, arrays, out, reads_x_late=self._reads_x_late)
            if y is not None:
                return y
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
        with on_device(kind), kept_if_captured(self._workspace.held, kind, x, router_logits, input_ids, residual, out):
            ids = admit_input_ids(input_ids, self.router, kind, "x", num_tokens)
            over = tokens if kind.on_gpu and self._reads_x_late else None
            y, result = output(out, tokens.shape, tokens.dtype, kind, "x", over=over)
            added = admit_residual(residual, y, kind, "x")
            if kind.on_gpu:
                self.forward_gpu(self._workspace, (tokens, logits, ids, added), y, y_is_new=out is None)
            else:
                self._forward_cpu(tokens, logits, ids, added, y)
        return result if out is not None else give_back(y, kind)

    def _forward_cpu(self, tokens: Any, logits: Any, input_ids: Any, residual: Any, y: Any) -> None:
        router_x, expert_x = normalised(tokens, self.frame, {})
        if logits is None:
            logits = cpu_project(router_x.astype(np.float32, copy=False), self.router_weight, self.router_bias, None)
        routing = cpu_route(logits, self.router, input_ids)
        framed_forward(expert_x, routing, self.experts, self.shared, self.weight_on, self.frame, y, {}, None, residual)

    def forward_gpu(self, workspace: Workspace, arrays: Arrays, y: Any, *, y_is_new: bool) -> None:
        """Compute into `y` from admitted CuPy arrays on the current stream; record how, or repeat what was recorded."""
        if y.shape[0] == 0:
            return
        key, addresses = key_of(arrays, None if y_is_new and y.data.ptr % VECTOR_BYTES == 0 else y)
        addresses = (*addresses[:-1], y.data.ptr)
        stream = cupy.cuda.get_current_stream().ptr
        with workspace.lock:
            workspace.hold_if_captured(stream, *arrays, y)
            block = workspace.block(self.device_id, stream)
            tape = None if block is None else block.tape(key)
            if tape is not None:
                tape.play(addresses)
                return
            wanted = self.buffers(y.shape[0])
            block = workspace.grown(self.device_id, stream, total_bytes(wanted))
            buffers = block.arrays(wanted)
            tape = Tape(buffers, **dict(zip(ARGUMENTS, addresses, strict=True)))
            operands = {
                name: None if array is None else Operand(array, name)
                for name, array in zip(ARGUMENTS, (*arrays, y), strict=True)
            }
            with tape.recording():
                self.launch_all(**operands, buffers={name: Operand(array) for name, array in buffers.items()})
            if tape.allocated_bytes == 0:
                block.keep(key, tape)

    def launch_all(
        self, x: Any, router_logits: Any, input_ids: Any, residual: Any, y: Any, buffers: dict[str, Any]
    ) -> None:
        """Launch the whole forward, on operands or stand-ins; in this order, and nothing besides."""
        router_x, expert_x = normalised(x, self.frame, buffers)
        routing, groups = self._gpu_router(router_x, router_logits, input_ids, self.experts.num_experts, buffers)
        framed_forward(
            expert_x, routing, self.experts, self.shared, self.weight_on, self.frame, y, buffers, groups, residual
        )

    @property
    def _reads_x_late(self) -> bool:
        """Whether x is read while the result is written."""
        return self.frame.num_identity_experts > 0 and self.frame.input_norm is None

    def buffers(self, num_tokens: int) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
        """Return name, shape and dtype of all that a forward writes besides its output, on a GPU."""
        top_k, frame = self.router.top_k, self.frame
        wanted = frame_buffers(num_tokens, top_k, self.hidden_size, self.experts, self.shared, frame)
        return wanted | self._gpu_router.buffers(num_tokens, self.experts.num_experts)

    def capture(self, num_tokens: int, inputs: Sequence[str] = ()) -> Captured:
        """Return the forward of `num_tokens` tokens as a CUDA graph on buffers of its own.

        Parameters
        ----------
        num_tokens : int
            At least 1, with num_tokens * top_k below 2^31.
        inputs : sequence of {"router_logits", "input_ids", "residual"}
            What a replay reads besides the tokens. router_logits where the layer has no router_weight, and input_ids
            where the router has an expert_table, are there unasked.

        Returns
        -------
        Captured
            Fill its `x`, call it, read its `y`.

        Raises
        ------
        TypeError
            If `num_tokens` is no int or `inputs` no sequence of words.
        ValueError
            If the layer is on the CPU, `num_tokens` is out of range, a word is unknown, or there is no expert_table for
            the input_ids.
        RuntimeError
            If the kernels could not be compiled on this machine; the text says why.

        Notes
        -----
        Runs the layer once, on a stream of its own, and waits for it. Takes `workspace_bytes` and the buffers.

        Examples
        --------
        ::

            decode = layer.capture(8)
            decode.x[...] = tokens
            y = decode()
        """
        return Captured(self, num_tokens, inputs)

    def plan(self, num_tokens: int, gpu: Gpu | None = None, roofs: Roofs | None = None) -> Plan:
        """Return what a call on `num_tokens` tokens launches, and what that costs at best; print it.

        Parameters
        ----------
        num_tokens : int
            At least 1, with num_tokens * top_k below 2^31.
        gpu : cumoe.gpu.config.Gpu, optional
            The layer's own by default; an H200 for a layer on the CPU, whose arrays are taken to be aligned.
        roofs : cumoe.layer.plan.Roofs, optional
            Rates of the GPU; by default 785 TFLOP/s and 4.51 TB/s, as measured on an H200.

        Returns
        -------
        Plan
            Its text is a report: a line a launch with kernel, grid and block, tile (token rows x weight rows), work
            units (tiles at most, for any routing), waves, blocks an SM, dynamic shared memory, bytes and FLOPs, and
            the time at the nearer of the two roofs. Bytes count every operand of a launch once, of routed weights
            those of the experts that are hit if every token chooses uniformly.

        Raises
        ------
        TypeError, ValueError
            If `num_tokens` is no int or out of range.

        Notes
        -----
        Runs the layer's own launch code without launching; takes about a millisecond.
        """
        return plan(self, num_tokens, gpu, roofs)

    def workspace_bytes(self, num_tokens: int) -> int:
        """Return the bytes of GPU memory that a call on `num_tokens` tokens needs besides its output; 0 on a CPU."""
        check_count("num_tokens", num_tokens, 0)
        return total_bytes(self.buffers(num_tokens)) if self.experts.kind.on_gpu else 0

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
