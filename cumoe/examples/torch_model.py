"""Let cumoe compute the expert blocks of a Hugging Face model, in place: needs torch and transformers.

    python -m cumoe.examples.torch_model

Weights and tokens are handed over through DLPack: nothing is copied, in either direction.
"""

import torch
from transformers import MixtralConfig, MixtralForCausalLM
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

import cumoe


def replace_forward(block: MixtralSparseMoeBlock) -> None:
    """Make cumoe compute this block from now on; no gradient goes through it."""
    layer = cumoe.MoE(
        cumoe.Router(block.top_k, renormalize=True),
        cumoe.Experts(block.experts.gate_up_proj.detach(), block.experts.down_proj.detach()),
        router_weight=block.gate.weight.detach(),
    )

    def forward(hidden_states: torch.Tensor) -> torch.Tensor:
        return layer(hidden_states.view(-1, hidden_states.shape[-1])).view_as(hidden_states)

    block.forward = forward


def main() -> None:
    """Compare a small random model with itself."""
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    config = MixtralConfig(
        vocab_size=128, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=8, num_experts_per_tok=2,
    )  # fmt: skip
    model = MixtralForCausalLM(config).eval().to(device)
    ids = torch.randint(config.vocab_size, (2, 21), device=device)
    with torch.inference_mode():
        expected = model(ids).logits
        blocks = [module for module in model.modules() if isinstance(module, MixtralSparseMoeBlock)]
        for block in blocks:
            replace_forward(block)
        logits = model(ids).logits
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)
    print(f"{len(blocks)} blocks replaced on {device}; largest difference {(logits - expected).abs().max():.1e}")


if __name__ == "__main__":
    main()
