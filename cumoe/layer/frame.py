"""Running a layer whose experts have something around them."""

from typing import Any

import numpy as np

from cumoe.cpu import ends as cpu_ends
from cumoe.cpu.experts import project, shared_rows
from cumoe.data.frame import Frame
from cumoe.data.groups import Groups
from cumoe.data.routing import Routing
from cumoe.data.weights import Experts, SharedExperts
from cumoe.gpu import ends as gpu_ends
from cumoe.gpu import experts as gpu_experts
from cumoe.gpu.workspace import layer_buffers
from cumoe.layer.moe import forward

Buffers = dict[str, tuple[tuple[int, ...], np.dtype]]
SHARED = "shared experts beside a latent: "


def frame_buffers(
    num_tokens: int, top_k: int, hidden_size: int, experts: Experts, shared: tuple[SharedExperts, ...], frame: Frame
) -> Buffers:
    """Return name, shape and dtype of all that a forward writes besides its output and its router's, on a GPU."""
    float32, dtype = np.dtype(np.float32), experts.dtype
    wide = ((num_tokens, hidden_size), float32)
    beside = shared if frame.latent is None else ()
    wanted: Buffers = layer_buffers(num_tokens, top_k, experts.weights, beside)
    if frame.input_norm is not None:
        wanted |= {"router_x": wide, "expert_x": ((num_tokens, hidden_size), dtype)}
    if frame.has_end:
        num_totals = 1
        if frame.latent is not None:
            num_totals += sum(member.num_shared for member in shared)
            for name in ("latent_x", "latent_y"):
                wanted[name] = ((num_tokens, frame.latent.latent_size), dtype)
            if shared:
                apart = gpu_experts.buffers(num_tokens, 0, shared[0].weights[0], shared)
                wanted |= {SHARED + name: spec for name, spec in apart.items() if name != "shared_rows"}
        else:  # rows have the dtype of what the combine writes, here the float32 total
            wanted |= {name: (wanted[name][0], float32) for name in ("rows", "shared_rows")}
        wanted["totals"] = ((num_totals, *wide[0]), float32)
    return wanted


def normalised(x: Any, frame: Frame, buffers: dict[str, Any]) -> tuple[Any, Any]:
    """Return what the router reads and what the experts read."""
    norm = frame.input_norm
    if norm is None:
        return x, x
    if isinstance(x, np.ndarray):
        plain = cpu_ends.over_rms(x, norm.eps)
        return plain, plain * norm.weight
    gpu_ends.rms_norm(x, norm, buffers["router_x"], buffers["expert_x"])
    return buffers["router_x"], buffers["expert_x"]


def framed_forward(
    x: Any,
    routing: Routing,
    experts: Experts,
    shared: tuple[SharedExperts, ...],
    weight_on: str,
    frame: Frame,
    y: Any,
    buffers: dict[str, Any],
    groups: Groups | None = None,
    residual: Any = None,
) -> None:
    """Run the stages after routing on `x`, as the experts read it, into `y`; on a GPU `groups` are there already."""
    if not frame.has_end:
        forward(x, routing, experts, shared, weight_on, y, buffers, groups, residual)
    elif isinstance(x, np.ndarray):
        total = np.empty(x.shape, np.float32)
        if frame.latent is None:
            forward(x, routing, experts, shared, weight_on, total, {})
        else:
            total = _latent_on_cpu(x, routing, experts, shared, weight_on, frame)
        cpu_ends.finish(total, x, routing, experts.num_experts, frame, y, residual)
    else:
        totals = buffers["totals"]
        if frame.latent is None:
            forward(x, routing, experts, shared, weight_on, totals[0], buffers, groups)
        else:
            _latent_on_gpu(x, routing, experts, shared, weight_on, frame, buffers, groups)
        gpu_ends.finish(totals, x, routing, experts.num_experts, frame, y, residual)


def _latent_on_cpu(
    x: Any, routing: Routing, experts: Experts, shared: tuple[SharedExperts, ...], weight_on: str, frame: Frame
) -> np.ndarray:
    latent = frame.latent
    assert latent is not None
    tokens = project(x.astype(np.float32, copy=False), latent.w_in, latent.b_in, None)
    routed = np.empty_like(tokens)
    forward(tokens, routing, experts, (), weight_on, routed, {})
    total = project(routed, latent.w_out, latent.b_out, None)
    for rows in shared_rows(x, shared):
        total += rows
    return total


def _latent_on_gpu(
    x: Any,
    routing: Routing,
    experts: Experts,
    shared: tuple[SharedExperts, ...],
    weight_on: str,
    frame: Frame,
    buffers: dict[str, Any],
    groups: Groups | None,
) -> None:
    """Write the routed experts' part into totals[0] and that of each shared expert behind it."""
    latent, totals = frame.latent, buffers["totals"]
    assert latent is not None
    gpu_experts.project(x, latent.w_in, latent.b_in, buffers["latent_x"])
    forward(buffers["latent_x"], routing, experts, (), weight_on, buffers["latent_y"], buffers, groups)
    gpu_experts.project(buffers["latent_y"], latent.w_out, latent.b_out, totals[0])
    if shared:  # they read x, not the latent tokens: a forward of their own, without a single routed slot
        apart = {name.removeprefix(SHARED): array for name, array in buffers.items() if name.startswith(SHARED)}
        apart["shared_rows"] = totals[1:]
        no_slots = Routing(routing.topk_ids[:, :0], routing.topk_weights[:, :0])
        nothing = Groups(None, None, None, None)
        gpu_experts.forward(x, no_slots, nothing, shared[0].weights[0], shared, weight_on, apart)
