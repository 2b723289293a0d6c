"""From the arrays of a layer to the layer."""

from typing import Any

import numpy as np

from cumoe.checkpoint.plan import LayerPlan
from cumoe.data.frame import Latent, RMSNorm
from cumoe.data.routing import Router
from cumoe.data.weights import Experts, SharedExperts
from cumoe.door.arrays import cupy
from cumoe.layer.module import MoE

_NORMS = ("input_norm", "output_norm")


def assemble(plan: LayerPlan, arrays: dict[str, Any], max_tokens: int) -> MoE:
    """Return the layer of a plan whose arrays have been read.

    Two things of a family are folded into arrays here, once: the scale of a router's input into its weight, in float32,
    and the mean of routed and shared experts into the routing scale and the gate, where 1/2 is exact.
    """
    family, config = plan.family, plan.config
    router, shared = dict(plan.router), None
    if plan.shared is not None:
        parts = _part(arrays, "shared")
        if plan.shared_is_averaged:
            router["scale"] = router.get("scale", 1.0) / 2
            down = parts["w_down"]
            xp = np if isinstance(down, np.ndarray) else cupy
            parts["gate"] = xp.zeros((1, plan.hidden_size), down.dtype)  # sigmoid(0) = 1/2
        shared = SharedExperts(**parts, activation=plan.shared_activation, layout=plan.shared.layout)
    weight = arrays["router_weight"]
    if "router_scale" in arrays:
        scale = arrays["router_scale"].astype(np.float32) * np.float32(plan.hidden_size**-0.5)
        weight = weight.astype(np.float32) * scale
    latent = _part(arrays, "latent")
    norms = {name: RMSNorm(arrays[name], config.resolve(family.norm_eps)) for name in _NORMS if name in arrays}
    return MoE(
        Router(**router, **_part(arrays, "router")),
        Experts(**_part(arrays, "experts"), activation=plan.activation, layout=plan.experts.layout),
        shared,
        weight_on=family.weight_on,
        router_weight=weight,
        router_bias=arrays.get("router_bias"),
        max_tokens=max_tokens,
        latent=Latent(**latent) if latent else None,
        num_identity_experts=plan.num_identity_experts,
        output_bias=arrays.get("output_bias"),
        input_norm=norms.get("input_norm"),
        output_norm=norms.get("output_norm"),
    )


def _part(arrays: dict[str, Any], part: str) -> dict[str, Any]:
    return {name.split(".")[1]: array for name, array in arrays.items() if name.startswith(part + ".")}
