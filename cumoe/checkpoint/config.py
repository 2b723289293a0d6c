"""config.json: which family a checkpoint is of, and the values that its table entry asks for."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cumoe.checkpoint.files import read_json
from cumoe.door.checks import check_count, refuse

TEXT_PARTS = ("text_config", "language_config", "llm_config", "thinker_config")
"""Where a model of several modalities keeps the configuration of its language model."""

ALIASES = {
    "hidden_size": ("d_model",),
    "num_hidden_layers": ("n_layers", "num_layers"),
    "num_experts": ("num_local_experts", "n_routed_experts", "moe_num_experts"),
    "num_experts_per_tok": ("num_experts_per_token", "moe_topk", "moe_k", "moe_top_k", "top_k_experts"),
    "moe_intermediate_size": ("expert_ffn_hidden_size",),
    "hidden_act": ("hidden_activation", "activation_function", "mlp_hidden_act"),
    "norm_topk_prob": ("moe_renormalize",),
    "n_group": ("num_expert_group",),
    "n_shared_experts": ("num_shared_experts", "moe_num_shared_experts"),
    "routed_scaling_factor": ("moe_routed_scaling_factor", "router_scaling_factor", "route_scale"),
}
"""Other names under which configurations of some families, or of older releases, have the same value."""


@dataclass(frozen=True)
class Key:
    """A value of config.json: its name, and what the family's own configuration has where it is not written."""

    name: str
    default: Any = ...


class Config:
    """The values of one layer: a list with an item a layer stands for that item.

    Parameters
    ----------
    values : dict
        The configuration of the language model.
    layer : int
    """

    def __init__(self, values: dict[str, Any], layer: int) -> None:
        self._values, self.layer = values, layer

    def count(self, name: str) -> int | None:
        """Return a number of things, None if it is not written; raise TypeError or ValueError if it is no number."""
        value = self[Key(name, None)]
        return None if value is None else check_count(f"config.json: {name}", value, 1)

    def __getitem__(self, key: Key) -> Any:
        """Return a value, or its default; raise ValueError if it has neither or the list is too short."""
        for name in (key.name, *ALIASES.get(key.name, ())):
            if name in self._values:
                return self._of_this_layer(name, self._values[name])
        if key.default is ...:
            raise ValueError(refuse("config.json", f"a value {key.name!r}", "none"))
        return key.default

    def _of_this_layer(self, name: str, value: Any) -> Any:
        if not isinstance(value, list):
            return value
        if self.layer >= len(value):
            raise ValueError(refuse(f"config.json: {name}", f"an item for layer {self.layer}", f"{len(value)} items"))
        return value[self.layer]

    def resolve(self, value: Any) -> Any:
        """Return what an entry of the table stands for: a key's value, what a function of the config gives, itself."""
        if isinstance(value, Key):
            return self[value]
        if isinstance(value, dict):
            return {name: self.resolve(item) for name, item in value.items()}
        return value(self) if callable(value) else value


def read_config(folder: Path) -> tuple[str, dict[str, Any]]:
    """Return the model type of the language model in a checkpoint and its configuration.

    Raises
    ------
    FileNotFoundError
        If there is no config.json.
    ValueError
        If it is no configuration, or that of a quantised checkpoint.
    """
    values = read_json(folder / "config.json")
    model_type = values.get("model_type")
    while True:
        _refuse_quantised(values)
        inner = next((values[part] for part in TEXT_PARTS if isinstance(values.get(part), dict)), None)
        if not inner:
            break
        values = inner
        model_type = values.get("model_type") or model_type
    if not isinstance(model_type, str):
        raise ValueError(refuse("config.json", "a model_type", repr(model_type)))
    inner = values.get("ffn_config") or {}  # DBRX; its hidden_size is not the model's
    return model_type.removesuffix("_text"), {n: v for n, v in inner.items() if n != "hidden_size"} | values


def _refuse_quantised(values: dict[str, Any]) -> None:
    quantised = values.get("quantization_config") or values.get("compression_config")
    if quantised:
        method = quantised.get("quant_method", "unknown") if isinstance(quantised, dict) else quantised
        supported = "a checkpoint in float32, float16 or bfloat16"
        raise ValueError(refuse("config.json", supported, f"a quantised one: quant_method={method!r}"))
