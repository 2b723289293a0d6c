"""What a layer is made of, decided and checked before a weight is read."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cumoe.checkpoint.config import Config
from cumoe.checkpoint.family import Family, Value
from cumoe.checkpoint.files import Tensor
from cumoe.checkpoint.names import Names
from cumoe.checkpoint.projections import Plan, Projections, check_float, choose, plan_tensor
from cumoe.data.activation import Activation
from cumoe.data.routing import Router
from cumoe.door.checks import ID_DTYPES, check_count, one_of, refuse

ACTIVATIONS: Mapping[str, dict[str, Any]] = {
    "silu": {"name": "silu"}, "swish": {"name": "silu"}, "gelu": {"name": "gelu"},
    "gelu_pytorch_tanh": {"name": "gelu_tanh"}, "gelu_new": {"name": "gelu_tanh"}, "gelu_fast": {"name": "gelu_tanh"},
    "quick_gelu": {"name": "silu", "alpha": 1.702}, "relu": {"name": "relu"}, "relu2": {"name": "relu2"},
    "linear": {"name": "identity"},
}  # fmt: skip
"""Names of activations in configurations, as arguments of `Activation`."""


@dataclass(frozen=True)
class LayerPlan:
    """One layer: the arrays to read, and everything that config.json says about it."""

    family_name: str
    family: Family
    config: Config
    hidden_size: int
    num_experts: int
    num_identity_experts: int
    router: dict[str, Any]  # arguments of Router that are no arrays
    experts: Projections
    shared: Projections | None
    activation: Activation
    shared_activation: Activation
    shared_is_averaged: bool
    arrays: dict[str, Plan]  # by part and argument: "experts.w_down", "router.selection_bias", "router_weight"


def plan_layer(family_name: str, family: Family, config: Config, names: Names) -> LayerPlan:
    """Return the plan of one layer.

    Raises
    ------
    FileNotFoundError, ImportError, TypeError, ValueError
        As `cumoe.load` does.
    """
    identity = check_count("num_identity_experts", config.resolve(family.num_identity_experts) or 0, 0)
    if names.quantised():
        raise ValueError(
            refuse("checkpoint", "weights in float32, float16 or bfloat16", f"quantised: {names.quantised()}")
        )
    router_weight = names.tensor(names.first(family.router))
    num_choices, hidden_size = _router_sizes(router_weight, config, identity)
    num_experts = num_choices - identity
    planner = _Planner(family, config, names, hidden_size, num_choices)
    planner.vector("router_weight", router_weight, (num_choices, hidden_size))
    planner.router_arrays()
    latent_size = planner.latent()
    experts, arrays = choose(family.experts, names, num_experts, latent_size or hidden_size)
    planner.add("experts", arrays)
    planner.check_width(arrays["w_down"])
    shared = planner.shared()
    planner.frame()
    planner.check_dtypes()
    arguments = _router_arguments(family, config)
    planner.check_table(arguments["top_k"])
    Router(**arguments).check_experts(num_choices, "the checkpoint")  # before anything is read
    activation = _activation(config, family.activation)
    own = family.shared_activation
    averaged = config.resolve(family.shared_is_averaged)
    if averaged not in (True, False, "average", "sum"):
        raise ValueError(refuse("config.json: shared experts", "'sum' or 'average'", repr(averaged)))
    return LayerPlan(
        family_name,
        family,
        config,
        hidden_size,
        num_experts,
        identity,
        arguments,
        experts,
        shared,
        activation,
        activation if own is None else _activation(config, own),
        shared is not None and averaged in (True, "average"),
        planner.arrays,
    )


def _router_sizes(weight: Tensor, config: Config, identity: int) -> tuple[int, int]:
    """Return the numbers of choices and of hidden features: those of config.json, or of the tensor without them."""
    if len(weight.shape) != 2:
        raise ValueError(refuse(weight.name, "shape (num_experts, hidden_size)", weight.shape))
    num_experts, hidden_size = config.count("num_experts"), config.count("hidden_size")
    wanted = (
        weight.shape[0] if num_experts is None else num_experts + identity,
        weight.shape[1] if hidden_size is None else hidden_size,
    )
    if weight.shape != wanted:
        raise ValueError(refuse(weight.name, f"shape (num_experts, hidden_size) = {wanted}", weight.shape))
    check_count("num_experts of the checkpoint", wanted[0] - identity, 1)
    return wanted


def _router_arguments(family: Family, config: Config) -> dict[str, Any]:
    """Return the arguments of Router, those that stand for nothing left out."""
    arguments: dict[str, Any] = config.resolve(dict(family.routing))
    if arguments.get("num_groups") in (None, 1):
        arguments = {name: value for name, value in arguments.items() if name not in ("num_groups", "top_groups")}
    if not arguments.get("logit_softcap"):
        arguments.pop("logit_softcap", None)
    arguments["renormalize"] = bool(arguments.get("renormalize", False))
    check_count("config.json: experts a token", arguments["top_k"], 1)
    return arguments


def _activation(config: Config, entry: Mapping[str, Value]) -> Activation:
    arguments = config.resolve(dict(entry))
    if arguments["name"] not in ACTIVATIONS:
        raise ValueError(refuse("config.json: activation", one_of(sorted(ACTIVATIONS)), repr(arguments["name"])))
    arguments["limit"] = arguments.get("limit") or None
    return Activation(**arguments | ACTIVATIONS[arguments["name"]])


class _Planner:
    """Collects the arrays of a layer."""

    def __init__(self, family: Family, config: Config, names: Names, hidden_size: int, num_choices: int) -> None:
        self.family, self.config, self.names = family, config, names
        self.hidden_size, self.num_choices = hidden_size, num_choices
        self.arrays: dict[str, Plan] = {}

    def add(self, part: str, arrays: dict[str, Plan]) -> None:
        """Add the arrays of a part."""
        self.arrays |= {f"{part}.{name}": plan for name, plan in arrays.items()}

    def vector(self, name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
        """Add an array that is one tensor; a leading axis of 1 does not count."""
        check_float(tensor)
        if tensor.shape not in (shape, (1, *shape)):
            raise ValueError(refuse(tensor.name, f"shape {shape}", tensor.shape))
        self.arrays[name] = plan_tensor(tensor, shape)

    def router_arrays(self) -> None:
        """Add the vectors of the router."""
        family, names, choices = self.family, self.names, (self.num_choices,)
        for name in ("router_bias", "expert_scale"):
            templates = getattr(family, name)
            if templates:
                part = name if name == "router_bias" else "router.expert_scale"
                self.vector(part, names.tensor(names.first(templates)), choices)
        table = next((template for template in family.expert_table if names.has(template)), None)
        if table is not None:
            tensor = names.tensor(table)
            if tensor.dtype not in ID_DTYPES:
                raise TypeError(refuse(tensor.name, "a dtype of whole numbers", tensor.dtype_name))
            self.arrays["router.expert_table"] = plan_tensor(tensor, tensor.shape)
        elif family.selection_bias and self.config.resolve(family.has_selection_bias):
            self.vector("router.selection_bias", names.tensor(names.first(family.selection_bias)), choices)
        if family.router_scale:
            self.vector("router_scale", names.tensor(family.router_scale), (self.hidden_size,))

    def check_table(self, top_k: int) -> None:
        """Raise ValueError unless a table of experts has `top_k` of them for every token id."""
        table = self.arrays.get("router.expert_table")
        if table is not None and (len(table.shape) != 2 or table.shape[1] != top_k):
            raise ValueError(refuse(table.copies[0].tensor.name, f"shape (vocab_size, top_k={top_k})", table.shape))

    def latent(self) -> int:
        """Add the projections around the experts; return the width between them, 0 without any."""
        size = self.config.resolve(self.family.has_latent)
        if not size:
            return 0
        assert self.family.latent is not None
        shapes = ((size, self.hidden_size), (self.hidden_size, size))
        for name, template, shape in zip(("in", "out"), self.family.latent, shapes, strict=True):
            self.vector(f"latent.w_{name}", self.names.tensor(template), shape)
            bias = template.removesuffix("weight") + "bias"
            if self.names.has(bias):
                self.vector(f"latent.b_{name}", self.names.tensor(bias), shape[:1])
        return int(size)

    def check_width(self, down: Plan) -> None:
        """Raise ValueError where config.json says another intermediate size than the tensors have."""
        width = self.config.count(self.family.intermediate_size)
        found = down.viewed_shape[2]
        if width is not None and width != found:
            name = down.copies[0].tensor.name
            raise ValueError(refuse(name, f"{self.family.intermediate_size}={width}, as config.json says", found))

    def shared(self) -> Projections | None:
        """Add the shared experts; return how they are stored, None without any."""
        family = self.family
        if not family.shared or not self.config.resolve(family.has_shared):
            return None
        way, arrays = choose(family.shared, self.names, 1, self.hidden_size)
        self.add("shared", arrays)
        if family.shared_gate:
            self.vector("shared.gate", self.names.tensor(family.shared_gate), (1, self.hidden_size))
        return way

    def frame(self) -> None:
        """Add the vectors around the experts."""
        for name in ("output_bias", "input_norm", "output_norm"):
            templates = getattr(self.family, name)
            if templates:
                self.vector(name, self.names.tensor(self.names.first(templates)), (self.hidden_size,))

    def check_dtypes(self) -> None:
        """Raise TypeError unless all that is multiplied with tokens, but the router, has one dtype."""
        dtype = self.arrays["experts.w_down"].dtype
        for name in ("shared.w_down", "shared.gate", "latent.w_in", "latent.w_out"):
            plan = self.arrays.get(name)
            if plan is not None and plan.dtype != dtype:
                tensor = plan.copies[0].tensor
                raise TypeError(refuse(tensor.name, f"dtype {dtype.name}, like the experts", tensor.dtype_name))
