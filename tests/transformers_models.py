"""Tiny models of transformers with random weights, saved as their authors save them: the oracle of the loader.

`MODELS` names a class, a configuration, the layer that is compared and where its experts are. A configuration keeps
what decides about routing away from its defaults, so that a value that is not read shows. Sizes are just large enough
for tensor cores to read the experts in bfloat16 on a GPU.
"""

from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import numpy as np

BASE = {
    "vocab_size": 32, "hidden_size": 72, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2,
    "head_dim": 36, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
DEEPSEEK = {
    "moe_intermediate_size": 24, "intermediate_size": 32, "n_routed_experts": 8, "num_experts_per_tok": 3,
    "n_group": 4, "topk_group": 2, "n_shared_experts": 2, "first_k_dense_replace": 1, "routed_scaling_factor": 1.7,
    "norm_topk_prob": True,
}  # fmt: skip
MLA = {
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 12,
    "v_head_dim": 36,
    "head_dim": 8,
}
INDEXER = {"index_n_heads": 2, "index_head_dim": 8, "index_topk": 4}
QWEN = {"moe_intermediate_size": 24, "intermediate_size": 32, "num_experts": 8, "num_experts_per_tok": 3}
QWEN_SHARED = QWEN | {"shared_expert_intermediate_size": 16}
LINEAR_ATTENTION = {
    "linear_num_key_heads": 2, "linear_num_value_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    "linear_conv_kernel_dim": 2,
}  # fmt: skip
LOCAL = {"intermediate_size": 24, "num_local_experts": 6, "num_experts_per_tok": 3}
VISION = {
    "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "depth": 1,
    "num_heads": 2, "out_hidden_size": 72, "image_size": 28, "patch_size": 14,
}  # fmt: skip
AUDIO = {
    "d_model": 16,
    "encoder_layers": 1,
    "encoder_attention_heads": 2,
    "encoder_ffn_dim": 16,
    "num_hidden_layers": 1,
}


@dataclass(frozen=True)
class Model:
    """A model to build: its class or model_type, configuration, and the path of the compared block."""

    config: dict[str, Any]
    block: str = "mlp"
    layer: int = 1
    model_type: str = ""  # of the configuration; empty: the name of the entry
    cls: str = ""  # of the model; empty: the one for causal language models
    text_type: str = ""  # of a model of several modalities, to whose language model `config` then belongs
    shared_block: str = ""  # what the decoder layer adds to the block
    base: dict[str, Any] = field(default_factory=lambda: BASE)


MODELS = {
    "llama4": Model(
        LOCAL | {"num_experts_per_tok": 2, "intermediate_size_mlp": 32, "interleave_moe_layer_step": 2}, "feed_forward",
        model_type="llama4_text",
    ),
    "mixtral": Model(LOCAL),
    "minimax": Model(LOCAL),
    "minimax_m2": Model(LOCAL),
    "qwen2_moe": Model(QWEN_SHARED | {"norm_topk_prob": True}),
    "qwen3_moe": Model(QWEN | {"norm_topk_prob": True}),
    "qwen3_next": Model(QWEN_SHARED | LINEAR_ATTENTION | {"norm_topk_prob": False}),
    "qwen3_5_moe": Model(QWEN_SHARED | LINEAR_ATTENTION, model_type="qwen3_5_moe_text"),
    "olmoe": Model({"intermediate_size": 24, "num_experts": 8, "num_experts_per_tok": 3, "norm_topk_prob": True}),
    "flex_olmo": Model({"intermediate_size": 24, "num_experts": 8, "num_experts_per_tok": 3}),
    "deepseek_v2": Model(DEEPSEEK | MLA | {"topk_method": "group_limited_greedy"}),
    "deepseek_v3": Model(DEEPSEEK | MLA | {"norm_topk_prob": False}),
    "deepseek_v32": Model(DEEPSEEK | MLA | INDEXER),
    "glm4_moe": Model(DEEPSEEK),
    "dots1": Model(DEEPSEEK),
    "kimi_linear": Model(
        {
            "moe_intermediate_size": 24, "intermediate_size": 32, "num_experts": 8, "num_experts_per_token": 3,
            "num_expert_group": 4, "topk_group": 2, "num_shared_experts": 1, "routed_scaling_factor": 1.7,
        } | MLA,
    ),
    "mimo_v2_flash": Model(DEEPSEEK),
    "solar_open": Model(DEEPSEEK),
    "glm4_moe_lite": Model(DEEPSEEK | MLA),
    "glm_moe_dsa": Model(DEEPSEEK | MLA | INDEXER),
    "exaone_moe": Model(
        DEEPSEEK
        | {"num_experts": 8, "num_shared_experts": 2, "sliding_window": 4, "layer_types": ["full_attention"] * 2}
    ),
    "axk1": Model(DEEPSEEK | MLA),
    "axk2": Model(DEEPSEEK | MLA | INDEXER),
    "mistral4": Model(
        DEEPSEEK | MLA | {"first_k_dense_replace": 0, "norm_topk_prob": False}, cls="Mistral4ForCausalLM"
    ),
    "mistral3+mistral4": Model(
        DEEPSEEK | MLA | {"first_k_dense_replace": 0}, model_type="mistral3", text_type="mistral4",
        cls="Mistral3ForConditionalGeneration",
    ),
    "llama4+vision": Model(
        LOCAL | {"num_experts_per_tok": 2, "intermediate_size_mlp": 32, "interleave_moe_layer_step": 2}, "feed_forward",
        model_type="llama4", cls="Llama4ForConditionalGeneration", text_type="llama4_text",
    ),
    "qwen3_5_moe+vision": Model(
        QWEN_SHARED | LINEAR_ATTENTION, model_type="qwen3_5_moe", cls="Qwen3_5MoeForConditionalGeneration",
        text_type="qwen3_5_moe_text",
    ),
    "qwen3_vl_moe": Model(QWEN, cls="Qwen3VLMoeForConditionalGeneration", text_type="qwen3_vl_moe_text"),
    "qwen4_exp": Model(
        QWEN_SHARED | LINEAR_ATTENTION | INDEXER | {"ngram_vocab_size_base": 64}, model_type="qwen4_exp_text",
    ),
    "glm4v_moe": Model(DEEPSEEK, cls="Glm4vMoeForConditionalGeneration", text_type="glm4v_moe_text"),
    "glm5_next": Model(
        DEEPSEEK | MLA | INDEXER | {
            "swiglu_limit": 0.8, "index_topk": 16, "qk_rope_head_dim": 0, "mlp_layer_types": ["dense", "sparse"],
            "layer_types": ["indexed_attention"] * 2, "hidden_act": "gelu",
        },
        cls="Glm5NextForConditionalGeneration", text_type="glm5_next_text",
    ),
    "step3p7": Model(
        LOCAL | {
            "n_routed_experts": 6, "mlp_layer_types": ["dense", "sparse"], "moe_intermediate_size": 24,
            "share_expert_dim": 16, "moe_router_scaling_factor": 1.7,
            "swiglu_limits": [0.0, 0.8], "swiglu_limits_shared": [0.0, 0.6],
        },
        cls="Step3p7ForConditionalGeneration", text_type="step3p5",
    ),
    "aria+vision": Model(
        {"intermediate_size": 24, "moe_num_experts": 6, "moe_topk": 3, "moe_num_shared_experts": 2},
        model_type="aria", cls="AriaForConditionalGeneration", text_type="aria_text",
    ),
    "gemma4+vision": Model(
        {
            "enable_moe_block": True, "num_experts": 6, "top_k_experts": 3, "moe_intermediate_size": 24,
            "intermediate_size": 32, "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 32,
        },
        "", model_type="gemma4", cls="Gemma4ForConditionalGeneration", text_type="gemma4_text",
    ),
    "minimax_m3+vision": Model(
        LOCAL | {"shared_intermediate_size": 16, "dense_intermediate_size": 32, "routed_scaling_factor": 1.7},
        model_type="minimax_m3_vl", cls="MiniMaxM3SparseForConditionalGeneration", text_type="minimax_m3_vl_text",
    ),
    "qwen3_omni_moe": Model(
        QWEN | {"norm_topk_prob": False}, model_type="qwen3_omni_moe_thinker", text_type="qwen3_omni_moe_text",
        cls="Qwen3OmniMoeThinkerForConditionalGeneration",
    ),
    "deepseek_v4_hash": Model(
        DEEPSEEK | {
            "mlp_layer_types": ["hash_moe", "moe"], "layer_types": ["sliding_attention"] * 2, "swiglu_limit": 0.8,
            "n_shared_experts": 1, "q_lora_rank": 16, "qk_rope_head_dim": 8, "o_lora_rank": 8, "o_groups": 2,
        },
        layer=0, model_type="deepseek_v4",
    ),
    "gpt_oss": Model(LOCAL),
    "gpt_oss_limited": Model(LOCAL | {"swiglu_limit": 0.8, "swiglu_alpha": 1.3}, model_type="gpt_oss"),
    "granitemoe": Model(LOCAL, "block_sparse_moe"),
    "granitemoeshared": Model(LOCAL | {"shared_intermediate_size": 16}, "block_sparse_moe", shared_block="shared_mlp"),
    "granitemoehybrid": Model(
        LOCAL
        | {"shared_intermediate_size": 16, "layer_types": ["attention"] * 2, "mamba_n_heads": 4, "mamba_d_head": 36},
        "block_sparse_moe", shared_block="shared_mlp",
    ),
    "ernie4_5_moe": Model({
        "moe_intermediate_size": 24, "intermediate_size": 32, "moe_num_experts": 6, "moe_k": 3, "moe_norm_min": 0.4,
        "moe_num_shared_experts": 2, "moe_layer_start_index": 1, "moe_layer_end_index": 1,
    }),
    "hunyuan_v1_moe": Model({"intermediate_size": 24, "num_experts": 6, "moe_topk": 3}),
    "phimoe": Model(LOCAL | {"router_jitter_noise": 0.3}),
    "jamba": Model(
        {
            "intermediate_size": 24, "num_experts": 6, "num_experts_per_tok": 3, "use_mamba_kernels": False,
            "expert_layer_period": 2, "expert_layer_offset": 1, "attn_layer_period": 2, "attn_layer_offset": 0,
        },
        "feed_forward",
    ),
    "dbrx": Model(
        {
            "d_model": 72, "n_heads": 2, "n_layers": 2, "max_seq_len": 64, "vocab_size": 32,
            "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4}, "ffn_config": {
                "hidden_size": 72, "ffn_hidden_size": 24, "moe_num_experts": 6, "moe_top_k": 3,
                "moe_normalize_expert_weights": 2.0,
            },
        },
        "ffn", base={},
    ),
    "jetmoe": Model(LOCAL | {"kv_channels": 36}),
    "lfm2_moe": Model(
        QWEN | {"num_dense_layers": 1, "routed_scaling_factor": 1.7, "layer_types": ["full_attention"] * 2},
        "feed_forward",
    ),
    "afmoe": Model(QWEN | {"num_dense_layers": 1, "num_shared_experts": 2, "route_scale": 1.7}),
    "aria": Model(
        {
            "intermediate_size": 24, "moe_num_experts": 6, "moe_topk": 3, "moe_num_shared_experts": 2,
            "hidden_act": "gelu",
        },
        model_type="aria_text",
    ),
    "cohere2_moe": Model({
        "intermediate_size": 24, "num_experts": 6, "num_experts_per_tok": 3, "num_shared_experts": 2,
        "expert_selection_fn": "sigmoid", "norm_topk_prob": True,
    }),
    "cohere2_moe_softmax_sum": Model(
        {
            "intermediate_size": 24, "num_experts": 6, "num_experts_per_tok": 3, "num_shared_experts": 2,
            "shared_expert_combination_strategy": "sum",
        },
        model_type="cohere2_moe",
    ),
    "deepseek_v4": Model(
        DEEPSEEK | {
            "mlp_layer_types": ["hash_moe", "moe"], "layer_types": ["sliding_attention"] * 2, "swiglu_limit": 0.8,
            "n_shared_experts": 1, "q_lora_rank": 16, "qk_rope_head_dim": 8, "o_lora_rank": 8, "o_groups": 2,
        },
    ),
    "longcat_flash": Model(MLA | {
        "ffn_hidden_size": 32, "expert_ffn_hidden_size": 24, "n_routed_experts": 6, "zero_expert_num": 3, "moe_topk": 4,
        "routed_scaling_factor": 1.7, "num_hidden_layers": 4,
    }),
    "nemotron_h": Model(
        {
            "layers_block_type": ["attention", "moe"], "moe_intermediate_size": 24, "n_routed_experts": 8,
            "moe_shared_expert_intermediate_size": 32, "num_experts_per_tok": 3, "n_group": 4, "topk_group": 2,
            "routed_scaling_factor": 1.7, "mamba_num_heads": 2, "mamba_head_dim": 8,
        },
        "mixer",
    ),
    "nemotron_h_latent": Model(
        {
            "layers_block_type": ["attention", "moe"], "moe_intermediate_size": 24, "n_routed_experts": 8,
            "moe_shared_expert_intermediate_size": 32, "num_experts_per_tok": 3, "n_group": 1, "topk_group": 1,
            "moe_latent_size": 64, "mamba_num_heads": 2, "mamba_head_dim": 8,
        },
        "mixer", model_type="nemotron_h",
    ),
    "gemma4": Model(
        {
            "enable_moe_block": True, "num_experts": 6, "top_k_experts": 3, "moe_intermediate_size": 24,
            "intermediate_size": 32, "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 32,
        },
        "", model_type="gemma4_text",
    ),
    "hy_v3": Model(QWEN | {"num_shared_experts": 2, "router_scaling_factor": 1.7}),
    "hy_v4": Model(DEEPSEEK | MLA | INDEXER | {"swiglu_limit": 0.8, "hidden_act": "gelu"}),
    "laguna": Model(QWEN_SHARED | {"moe_routed_scaling_factor": 1.7, "moe_router_logit_softcapping": 2.0}),
    "deepseek_v2_greedy": Model(DEEPSEEK | MLA | {"topk_method": "greedy"}, model_type="deepseek_v2"),
    "ernie4_5_moe_noshared": Model(
        {
            "moe_intermediate_size": 24, "intermediate_size": 32, "moe_num_experts": 6, "moe_k": 3,
            "moe_num_shared_experts": 0, "moe_layer_start_index": 1, "moe_layer_end_index": 1,
        },
        model_type="ernie4_5_moe",
    ),
    "lfm2_moe_nobias": Model(
        QWEN | {
            "num_dense_layers": 1, "use_expert_bias": False, "norm_topk_prob": False,
            "layer_types": ["full_attention"] * 2,
        },
        "feed_forward", model_type="lfm2_moe",
    ),
    "qwen3_moe_nonorm": Model(QWEN | {"norm_topk_prob": False}, model_type="qwen3_moe"),
    "dots1_norm": Model(DEEPSEEK | {"norm_topk_prob": False, "n_group": 1, "topk_group": 1}, model_type="dots1"),
    "cohere2_moe_noshared": Model(
        {"intermediate_size": 24, "num_experts": 6, "num_experts_per_tok": 3, "num_shared_experts": 0},
        model_type="cohere2_moe",
    ),
    "aria_bias": Model(
        {"intermediate_size": 24, "moe_num_experts": 6, "moe_topk": 3, "moe_num_shared_experts": 2, "mlp_bias": True},
        model_type="aria_text",
    ),
    "mixtral_gelu": Model(LOCAL | {"hidden_act": "gelu"}, model_type="mixtral"),
    "mellum": Model(QWEN | {"norm_topk_prob": False}),
    "openai_privacy_filter": Model(LOCAL | {"swiglu_limit": 0.8}, cls="OpenAIPrivacyFilterForTokenClassification"),
    "minimax_m3_vl": Model(
        LOCAL | {
            "swiglu_limit": 0.8, "shared_intermediate_size": 16, "dense_intermediate_size": 32,
            "routed_scaling_factor": 1.7,
        },
        model_type="minimax_m3_vl_text",
    ),
    "bailing_hybrid": Model(DEEPSEEK | MLA | {"num_experts": 8}),
    "granitemoe_swa": Model(LOCAL | {"shared_intermediate_size": 16}, "block_sparse_moe", shared_block="shared_mlp"),
}  # fmt: skip


def build(model: Model, name: str, seed: int = 0) -> Any:
    """Return the model with random float32 weights that bfloat16 holds, in eval mode."""
    import torch
    import transformers
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    torch.manual_seed(seed)
    values: dict[str, Any] = model.base | model.config
    if model.text_type:
        text = CONFIG_MAPPING[model.text_type](**values)
        values = {"text_config": text, "vision_config": VISION, "audio_config": AUDIO}
    config = CONFIG_MAPPING[model.model_type or name](**values)
    cls = getattr(transformers, model.cls or "AutoModelForCausalLM")
    built = (cls._from_config if model.cls else cls.from_config)(config, dtype=torch.float32)
    with suppress(Exception):
        built.set_experts_implementation("eager")
    with torch.no_grad():
        for tensor_name, tensor in (*built.named_parameters(), *built.named_buffers()):
            if tensor.is_floating_point():
                scale = 0.3 if tensor.ndim < 2 or "bias" in tensor_name else tensor.shape[-1] ** -0.5 * 1.5
                drawn = torch.randn(tensor.shape) * scale + (1.0 if "norm" in tensor_name else 0.0)
                tensor.copy_(drawn.bfloat16().float())
            elif "tid2eid" in tensor_name:
                experts = built.config.n_routed_experts
                tensor.copy_(torch.stack([torch.randperm(experts)[: tensor.shape[1]] for _ in range(len(tensor))]))
    return built.eval()


def block_of(built: Any, model: Model) -> tuple[Any, Any]:
    """Return (decoder layer, its block of experts)."""
    decoder = built
    for part in ("model", "transformer", "backbone", "language_model", "model"):
        decoder = getattr(decoder, part, decoder)
    layer = (decoder.layers if hasattr(decoder, "layers") else decoder.blocks)[model.layer]
    return layer, getattr(layer, model.block) if model.block else layer


def expected(built: Any, model: Model, x: np.ndarray, input_ids: np.ndarray | None = None) -> np.ndarray:
    """Return what the module computes in float64 for (num_tokens, hidden_size) tokens."""
    import torch

    layer, block = block_of(built.double(), model)
    tokens = torch.from_numpy(x.astype(np.float64))[None]
    with torch.no_grad():
        if not model.block:  # gemma4: router and experts each read a norm of the residual
            flat = tokens[0]
            _, weights, ids = layer.router(flat)
            return layer.experts(layer.pre_feedforward_layernorm_2(flat), ids, weights).numpy()
        more = () if input_ids is None else (torch.from_numpy(input_ids)[None],)
        y = block(tokens, *more)
        y = y[0] if isinstance(y, tuple) else y
        if model.shared_block:
            y = y + getattr(layer, model.shared_block)(tokens)
        return y.reshape(x.shape).numpy()
