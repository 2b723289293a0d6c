"""The table of families: how each routes, what its experts are, and under which names a checkpoint has them.

A family is one entry of `FAMILIES`, under the model_type of its config.json. A `Key` in an entry is read from
config.json, with the default that the family's own configuration class has.
"""

from dataclasses import replace
from typing import Any

from cumoe.checkpoint.config import Config, Key
from cumoe.checkpoint.family import Family
from cumoe.checkpoint.projections import (
    FC,
    LINEAR,
    PACKED,
    PACKED_COLUMNS,
    PACKED_LINEAR,
    PACKED_WITH_ROOM,
    ROWS,
    STACKED,
    UNGATED,
    UNGATED_COLUMNS,
    UNGATED_PACKED,
    W123,
    Projections,
    mlp,
)
from cumoe.checkpoint.routings import (
    deepseek_v4_scoring,
    grouped_sigmoid,
    is_normalised,
    norm_order,
    only_by_groups,
    sigmoid_with_bias,
    softmax,
    softmax_of_chosen,
    top_k,
)

NORM_EPS = Key("rms_norm_eps", 1e-6)


def _dbrx_activation(config: Config) -> str:
    return str((config[Key("ffn_act_fn", None)] or {}).get("name", "silu"))


GPT_OSS = {
    "name": "silu", "alpha": Key("swiglu_alpha", 1.702), "limit": Key("swiglu_limit", 7.0), "up_offset": 1.0,
}  # fmt: skip
BY_CONFIG = {"name": Key("hidden_act", "silu")}
LIMITED = BY_CONFIG | {"limit": Key("swiglu_limit", 10.0)}
LIMITED_SILU = LIMITED | {"name": "silu"}  # whatever hidden_act says

SHARED = mlp("shared_experts")
BIAS = ("gate.e_score_correction_bias",)

QWEN3_MOE = Family(softmax(8, Key("norm_topk_prob", False)))
QWEN2_MOE = Family(
    softmax(4, Key("norm_topk_prob", False)), shared=(mlp("shared_expert"),), shared_gate="shared_expert_gate.weight"
)
MIXTRAL = Family(
    softmax(2, True), (W123, PACKED), blocks=("block_sparse_moe", "mlp"), intermediate_size="intermediate_size"
)
DEEPSEEK_V3 = Family(
    grouped_sigmoid(8, 8, 4, True, 2.5), shared=(SHARED,), has_shared=Key("n_shared_experts", 1), selection_bias=BIAS
)
GRANITE = Family(
    softmax_of_chosen(2),
    (PACKED_LINEAR, PACKED),
    blocks=("block_sparse_moe",),
    router=("router.layer.weight", "router.weight"),
    intermediate_size="intermediate_size",
)
GRANITE_SHARED = replace(
    GRANITE,
    shared=(Projections("../shared_mlp.input_linear.weight", "../shared_mlp.output_linear.weight"),),
    has_shared=Key("shared_intermediate_size", 0),
)
GPT_OSS_FAMILY = Family(
    softmax_of_chosen(4),
    (replace(PACKED_COLUMNS, layout="interleaved"),),
    router=("router.weight",),
    router_bias=("router.bias",),
    activation=GPT_OSS,
    intermediate_size="intermediate_size",
)

STEP3 = Family(
    sigmoid_with_bias(8, scale=Key("moe_router_scaling_factor", 1.0)),
    (STACKED, PACKED),
    blocks=("moe", "mlp"),
    selection_bias=("router_bias", *BIAS),
    shared=(mlp("../share_expert"), SHARED),
    activation={"name": Key("hidden_act", "silu"), "limit": Key("swiglu_limits", None), "clamp": "after"},
    shared_activation={
        "name": Key("hidden_act", "silu"),
        "limit": Key("swiglu_limits_shared", None),
        "clamp": "after",
    },
)


def _deepseek_v3_like(*routing: Any, **fields: Any) -> Family:
    return replace(DEEPSEEK_V3, routing=grouped_sigmoid(*routing), **fields)


FAMILIES: dict[str, Family] = {
    "afmoe": Family(
        sigmoid_with_bias(6, 1e-20, scale=Key("route_scale", 1.0)),
        router=("router.gate.weight",), selection_bias=("expert_bias",), shared=(SHARED,),
    ),
    "aria": Family(
        {"top_k": top_k(2), "select_by": "logits"},
        (FC, PACKED_COLUMNS), router=("router.weight",), shared=(SHARED,), intermediate_size="intermediate_size",
        activation={"name": "silu"}, shared_activation=BY_CONFIG,
    ),
    "axk1": _deepseek_v3_like(
        8, 8, 4, True, 2.5, output_norm=("../post_mlp_layernorm.weight", "post_mlp_layernorm.weight"), norm_eps=NORM_EPS
    ),
    "axk2": replace(DEEPSEEK_V3, routing=grouped_sigmoid(8, None, None, True, 2.5, dropped_groups="zero")),
    "bailing_hybrid": _deepseek_v3_like(8, 8, 4, True, 2.5, selection_bias=("gate.expert_bias", *BIAS)),
    "cohere2_moe": Family(
        {
            "top_k": top_k(2), "scoring": Key("expert_selection_fn", "softmax"), "select_by": "logits",
            "renormalize": Key("norm_topk_prob", True),
        },
        shared=(SHARED,), has_shared=Key("num_shared_experts", 0),
        shared_is_averaged=Key("shared_expert_combination_strategy", "average"),
        intermediate_size="intermediate_size",
    ),
    "dbrx": Family(
        {"top_k": top_k(1), "renormalize": is_normalised, "renormalize_order": norm_order},
        (ROWS,), blocks=("ffn",), router=("router.layer.weight",),
        activation={"name": _dbrx_activation}, intermediate_size="ffn_hidden_size",
    ),
    "deepseek_v2": Family(
        {
            "top_k": top_k(None), "scale": Key("routed_scaling_factor", 1.0), "group_score": "max",
            "num_groups": only_by_groups(Key("n_group", None)),
            "top_groups": only_by_groups(Key("topk_group", None)), "dropped_groups": "zero",
        },
        shared=(SHARED,), has_shared=Key("n_shared_experts", 2),
    ),
    "deepseek_v3": DEEPSEEK_V3,
    "deepseek_v32": DEEPSEEK_V3,
    "deepseek_v4": Family(
        {
            "top_k": top_k(6), "scoring": deepseek_v4_scoring, "renormalize": True, "renormalize_eps": 1e-20,
            "scale": Key("routed_scaling_factor", 1.5),
        },
        (W123, PACKED), blocks=("ffn", "mlp"), selection_bias=("gate.bias", *BIAS), expert_table=("gate.tid2eid",),
        shared=(mlp("shared_experts", "w3", "w2", "w1"), SHARED), activation=LIMITED,
    ),
    "dots1": _deepseek_v3_like(None, 1, 1, False, 1.0),
    "ernie4_5_moe": Family(
        {
            "top_k": top_k(6), "renormalize": True, "renormalize_eps": Key("moe_norm_min", 1e-12),
            "renormalize_eps_mode": "clamp",
        },
        selection_bias=("moe_statics.e_score_correction_bias", "gate.moe_statics.e_score_correction_bias"),
        shared=(SHARED,), has_shared=Key("moe_num_shared_experts", 2),
    ),
    "exaone_moe": _deepseek_v3_like(8, 1, 1, True, 2.5, selection_bias=("e_score_correction_bias", *BIAS)),
    "flex_olmo": replace(
        QWEN3_MOE, routing=softmax(5, Key("norm_topk_prob", False)), intermediate_size="intermediate_size"
    ),
    "gemma4": Family(
        softmax(None, True), (PACKED, LINEAR), blocks=("",), router=("router.proj.weight",),
        router_scale="router.scale", expert_scale=("router.per_expert_scale",),
        input_norm=("../pre_feedforward_layernorm_2.weight",), norm_eps=NORM_EPS,
        activation={"name": Key("hidden_activation", "gelu_pytorch_tanh")},
    ),
    "glm4_moe": _deepseek_v3_like(8, 1, 1, True, 1.0),
    "glm4_moe_lite": _deepseek_v3_like(4, 1, 1, True, 1.8),
    "glm4v_moe": _deepseek_v3_like(8, 1, 1, True, 1.0),
    "glm5_next": _deepseek_v3_like(8, 1, 1, True, 2.5, activation=LIMITED_SILU, shared_activation=LIMITED),
    "glm_moe_dsa": _deepseek_v3_like(8, 1, 1, True, 2.5),
    "gpt_oss": GPT_OSS_FAMILY,
    "granitemoe": GRANITE,
    "granitemoe_swa": GRANITE_SHARED,
    "granitemoehybrid": replace(GRANITE_SHARED, has_shared=Key("shared_intermediate_size", 1024)),
    "granitemoeshared": GRANITE_SHARED,
    "hunyuan_v1_moe": Family(
        {"top_k": top_k(1), "renormalize": True},
        router=("gate.wg.weight",), shared=(mlp("shared_mlp"),), intermediate_size="intermediate_size",
    ),
    "hy_v3": Family(
        sigmoid_with_bias(8, 1e-20, scale=Key("router_scaling_factor", 2.826)),
        router=("router.gate.weight", "gate.weight"), selection_bias=("expert_bias", "e_score_correction_bias"),
        shared=(mlp("shared_mlp"), SHARED),
    ),
    "hy_v4": _deepseek_v3_like(
        8, 1, 1, True, 2.827, shared=(mlp("shared_experts", gate="linear_gate"), SHARED), activation=LIMITED_SILU,
        shared_activation=BY_CONFIG,
    ),
    "jamba": Family(
        softmax(2, False), blocks=("feed_forward",), router=("router.weight",), intermediate_size="intermediate_size"
    ),
    "jetmoe": Family(
        softmax_of_chosen(2), (PACKED_LINEAR,), router=("router.layer.weight",), output_bias=("bias",),
        activation={"name": Key("activation_function", "silu")}, intermediate_size="intermediate_size",
    ),
    "kimi_k2": DEEPSEEK_V3,
    "kimi_linear": _deepseek_v3_like(
        8, 1, 1, True, 2.446, experts=(W123, LINEAR, PACKED), blocks=("block_sparse_moe", "mlp"),
    ),
    "laguna": Family(
        sigmoid_with_bias(
            8, scale=Key("moe_routed_scaling_factor", 1.0), logit_softcap=Key("moe_router_logit_softcapping", 0.0)
        ),
        selection_bias=("experts.e_score_correction_bias", *BIAS), shared=(mlp("shared_expert"), SHARED),
    ),
    "lfm2_moe": Family(
        {
            "top_k": top_k(4), "scoring": "sigmoid", "renormalize": Key("norm_topk_prob", True),
            "renormalize_eps": 1e-6, "scale": Key("routed_scaling_factor", 1.0),
        },
        (W123, PACKED), blocks=("feed_forward",), selection_bias=("expert_bias",),
        has_selection_bias=Key("use_expert_bias", True), activation={"name": "silu"},
    ),
    "llama4": Family(
        {"top_k": top_k(1), "scoring": "sigmoid", "select_by": "logits"}, (PACKED_COLUMNS,), blocks=("feed_forward",),
        router=("router.weight",), shared=(mlp("shared_expert"),), weight_on="input",
        intermediate_size="intermediate_size",
    ),
    "longcat_flash": Family(
        {"top_k": top_k(12), "scale": Key("routed_scaling_factor", 6.0)}, (LINEAR, PACKED_WITH_ROOM),
        router=("router.classifier.weight",), selection_bias=("router.e_score_correction_bias",),
        num_identity_experts=Key("zero_expert_num", 256), intermediate_size="expert_ffn_hidden_size",
    ),
    "mellum": replace(QWEN3_MOE, routing=softmax(8, Key("norm_topk_prob", True))),
    "mimo_v2_flash": _deepseek_v3_like(8, 1, 1, True, 1.0, shared=()),
    "minimax": MIXTRAL,
    "minimax_m2": replace(
        MIXTRAL, routing=sigmoid_with_bias(8), selection_bias=("e_score_correction_bias", *BIAS),
    ),
    "minimax_m3_vl": Family(
        sigmoid_with_bias(4, scale=Key("routed_scaling_factor", 2.0)),
        (W123, PACKED), blocks=("block_sparse_moe", "mlp"), selection_bias=("e_score_correction_bias", *BIAS),
        shared=(SHARED, Projections("shared_experts.gate_up_proj.weight", "shared_experts.down_proj.weight")),
        activation=GPT_OSS, intermediate_size="intermediate_size",
    ),
    "mistral4": Family(
        {
            "top_k": top_k(4), "renormalize": Key("norm_topk_prob", True), "renormalize_eps": 1e-20,
            "num_groups": Key("n_group", 1), "top_groups": Key("topk_group", 1), "dropped_groups": "zero",
            "scale": Key("routed_scaling_factor", 1.0),
        },
        (PACKED, LINEAR), shared=(SHARED,),
    ),
    "mixtral": MIXTRAL,
    "nemotron_h": _deepseek_v3_like(
        2, 1, 1, True, 1.0, experts=(UNGATED, UNGATED_PACKED, UNGATED_COLUMNS), blocks=("mixer",),
        shared=(Projections("shared_experts.up_proj.weight", "shared_experts.down_proj.weight", layout="ungated"),),
        activation={"name": Key("mlp_hidden_act", "relu2")}, has_latent=Key("moe_latent_size", None),
        latent=("fc1_latent_proj.weight", "fc2_latent_proj.weight"),
    ),
    "olmoe": replace(QWEN3_MOE, intermediate_size="intermediate_size"),
    "openai_privacy_filter": replace(GPT_OSS_FAMILY, experts=(PACKED_COLUMNS,)),
    "phimoe": replace(
        MIXTRAL,
        routing={"top_k": 2, "scoring": "sparse_mixer", "mixer_eps": Key("router_jitter_noise", 0.01)},
        router=("gate.weight", "router.weight"),
    ),
    "qwen2_moe": QWEN2_MOE,
    "qwen3_5_moe": replace(QWEN2_MOE, routing=softmax(8, True)),
    "qwen3_moe": QWEN3_MOE,
    "qwen3_next": replace(QWEN2_MOE, routing=softmax(10, Key("norm_topk_prob", True))),
    "qwen3_omni_moe": replace(QWEN3_MOE, routing=softmax(8, Key("norm_topk_prob", True))),
    "qwen3_vl_moe": replace(QWEN3_MOE, routing=softmax(4, True), experts=(PACKED, PACKED_COLUMNS, LINEAR)),
    "qwen4_exp": replace(QWEN2_MOE, routing=softmax(10, Key("norm_topk_prob", True))),
    "solar_open": _deepseek_v3_like(8, 1, 1, True, 1.0),
    "step3p5": STEP3,
    "step3p7": STEP3,
}  # fmt: skip
"""By model_type; that of a text part without its ending ``_text``."""
