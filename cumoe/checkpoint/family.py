"""What an entry of the table of families says."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from cumoe.checkpoint.config import Key
from cumoe.checkpoint.projections import LINEAR, PACKED, Projections
from cumoe.layer.moe import WeightOn

Value = Any  # a Key, a function of the Config, or the value itself


@dataclass(frozen=True)
class Family:
    """How one family of models writes its layers.

    Names are templates of `cumoe.checkpoint.names.Names`: below the block of the experts, or with ``../`` below the
    layer. Several are tried in order: releases of transformers and of the models differ.

    Parameters
    ----------
    routing : mapping
        Arguments of `cumoe.Router` besides arrays. num_groups of None or 1 is no groups, logit_softcap of 0 none.
    experts, shared : tuple of Projections
        Ways in which they are stored; `shared` is empty where a family has none.
    blocks : tuple of str
        Where the experts are, below the layer; may be empty: directly.
    router : tuple of str
        Router weight.
    router_bias, selection_bias, expert_scale, expert_table : tuple of str
        Other arrays of the router, all required but the table, which takes the place of a selection bias.
    router_scale : str
        A vector of (hidden_size,) that is multiplied into the router weight, with hidden_size ** -0.5.
    has_selection_bias, has_shared : Value
        Whether there are; numbers count as in Python, None and 0 are no.
    shared_gate : str
    shared_is_averaged : Value
        Whether the result is half the sum of routed and shared experts; "average" is yes.
    activation, shared_activation : mapping
        Arguments of `cumoe.Activation`. A limit of 0 or None is none. The shared one is the routed one by default.
    weight_on : {"output", "input", "activation"}
    intermediate_size : str
        Of config.json, for the routed experts.
    num_identity_experts : Value
    latent : pair of str
        Weights of the projections into and out of the latent space; required if the key has_latent says so.
    has_latent : Value
    output_bias, input_norm, output_norm : tuple of str
        Vectors around the experts.
    norm_eps : Value
    """

    routing: Mapping[str, Value]
    experts: tuple[Projections, ...] = (LINEAR, PACKED)
    shared: tuple[Projections, ...] = ()
    blocks: tuple[str, ...] = ("mlp",)
    router: tuple[str, ...] = ("gate.weight",)
    router_bias: tuple[str, ...] = ()
    selection_bias: tuple[str, ...] = ()
    expert_scale: tuple[str, ...] = ()
    expert_table: tuple[str, ...] = ()
    router_scale: str = ""
    has_selection_bias: Value = True
    has_shared: Value = True
    shared_gate: str = ""
    shared_is_averaged: Value = False
    activation: Mapping[str, Value] = field(default_factory=lambda: {"name": Key("hidden_act", "silu")})
    shared_activation: Mapping[str, Value] | None = None
    weight_on: WeightOn = "output"
    intermediate_size: str = "moe_intermediate_size"
    num_identity_experts: Value = 0
    latent: tuple[str, str] | None = None
    has_latent: Value = None
    output_bias: tuple[str, ...] = ()
    input_norm: tuple[str, ...] = ()
    output_norm: tuple[str, ...] = ()
    norm_eps: Value = None
