"""How families route: arguments of `cumoe.Router`, with the defaults of their configurations where they differ."""

from collections.abc import Callable, Mapping
from typing import Any

from cumoe.checkpoint.config import Config, Key
from cumoe.checkpoint.family import Value
from cumoe.door.checks import refuse


def top_k(default: Any = ...) -> Key:
    """Return the key of the number of experts a token."""
    return Key("num_experts_per_tok", default)


def grouped_sigmoid(
    k: int | None, groups: int | None, kept: int | None, renormalize: bool, scale: float, **options: Any
) -> dict[str, Value]:
    """Return the routing of DeepSeek-V3 with the defaults of a relative."""
    return {
        "top_k": top_k(k),
        "scoring": "sigmoid",
        "renormalize": Key("norm_topk_prob", renormalize),
        "renormalize_eps": 1e-20,
        "num_groups": Key("n_group", groups),
        "top_groups": Key("topk_group", kept),
        "scale": Key("routed_scaling_factor", scale),
        **options,
    }


def sigmoid_with_bias(k: Any, eps: float = 0.0, **options: Any) -> dict[str, Value]:
    """Return the routing of MiniMax-M2 and others: renormalised sigmoids, no groups."""
    return {"top_k": top_k(k), "scoring": "sigmoid", "renormalize": True, "renormalize_eps": eps, **options}


def softmax(k: Any, renormalize: Value) -> dict[str, Value]:
    """Return the routing of Mixtral and Qwen: the softmax over all experts."""
    return {"top_k": top_k(k), "renormalize": renormalize}


def softmax_of_chosen(k: Any) -> dict[str, Value]:
    """Return the routing of gpt-oss and Granite: the softmax over the chosen logits."""
    return {"top_k": top_k(k), "select_by": "logits"}


def _word(config: Config, key: Key, words: Mapping[str, Any]) -> Any:
    value = config[key]
    if value not in words:
        raise ValueError(refuse(f"config.json: {key.name}", " or ".join(map(repr, words)), repr(value)))
    return words[value]


def only_by_groups(key: Key) -> Callable[[Config], Any]:
    """Return a key of the groups of DeepSeek-V2, which has them with one of its two methods only."""

    def value(config: Config) -> Any:
        by_groups = _word(config, Key("topk_method", "greedy"), {"greedy": False, "group_limited_greedy": True})
        return config[key] if by_groups else None

    return value


def deepseek_v4_scoring(config: Config) -> str:
    """Return the word of `Router` for scoring_func."""
    known = {"sqrtsoftplus": "sqrt_softplus", "sigmoid": "sigmoid", "softmax": "softmax"}
    return str(_word(config, Key("scoring_func", "sqrtsoftplus"), known))


def norm_order(config: Config) -> Any:
    """Return the order of the norm that DBRX divides weights by; 1 where it does not."""
    order = config[Key("moe_normalize_expert_weights", 1.0)] or 1
    return int(order) if order == int(order) else order  # JSON has 1.0; Router refuses what is neither 1 nor 2


def is_normalised(config: Config) -> bool:
    """Return whether DBRX divides weights by their norm."""
    return config[Key("moe_normalize_expert_weights", 1.0)] is not None
