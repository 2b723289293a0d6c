"""The layers that the demo knows: sizes of published models, cut down to what a machine holds."""

from dataclasses import dataclass, field, replace
from typing import Any

import cumoe
from cumoe.data.weights import Layout
from cumoe.layer.moe import WeightOn


@dataclass(frozen=True)
class Family:
    """One layer of a published model."""

    model: str
    hidden_size: int
    intermediate_size: int
    num_experts: int
    top_k: int
    routing: dict[str, Any] = field(default_factory=dict)  # arguments of cumoe.Router besides top_k and arrays
    selection_bias: bool = False
    router_bias: bool = False
    shared_size: int = 0  # intermediate size of the shared expert, 0 without one
    shared_gate: bool = False
    weight_on: WeightOn = "output"
    activation: str = "silu"
    layout: Layout = "stacked"
    biases: bool = False

    @property
    def is_replicable(self) -> bool:
        """Whether copied and rescaled tokens compute the same, with the shared expert as one more of the stack."""
        return self.weight_on == "input" and self.shared_size == self.intermediate_size and not self.shared_gate

    @property
    def num_weights(self) -> int:
        """Count the numbers in the projections of all experts."""
        return 3 * self.hidden_size * (self.num_experts * self.intermediate_size + self.shared_size)

    def multiplications(self, num_tokens: int) -> int:
        """Count those of the projections of `num_tokens` tokens."""
        return 3 * self.hidden_size * num_tokens * (self.top_k * self.intermediate_size + self.shared_size)

    def router(self, selection_bias: Any = None) -> cumoe.Router:
        """Return the router."""
        return cumoe.Router(self.top_k, selection_bias=selection_bias, **self.routing)

    def fitted(self, hidden_size: int, max_weights: int) -> "Family":
        """Return the layer at another width, with fewer and then narrower experts so as not to exceed `max_weights`."""

        def width(size: int) -> int:
            return max(8, round(size * hidden_size / self.hidden_size / 8) * 8) if size else 0

        family = replace(
            self,
            hidden_size=hidden_size,
            intermediate_size=width(self.intermediate_size),
            shared_size=width(self.shared_size),
        )
        while family.num_weights > max_weights:
            if family.can_halve_experts:
                family = replace(family, num_experts=family.num_experts // 2)
            elif family.intermediate_size > 8:
                narrow, narrow_shared = _half(family.intermediate_size), _half(family.shared_size)
                family = replace(family, intermediate_size=narrow, shared_size=narrow_shared)
            else:
                break
        return family

    @property
    def can_halve_experts(self) -> bool:
        """Whether half the experts still are a choice, in groups of equal length."""
        half, groups = self.num_experts // 2, self.routing.get("num_groups", 1)
        return self.num_experts % (2 * groups) == 0 and half >= 2 * self.top_k


def _half(size: int) -> int:
    return max(8, size // 16 * 8) if size else 0


FAMILIES = {
    "llama4": Family(
        "Llama-4 Scout, but 2 experts a token", 5120, 8192, 16, 2,
        {"scoring": "sigmoid", "select_by": "logits"}, shared_size=8192, weight_on="input",
    ),
    "mixtral": Family("Mixtral-8x7B", 4096, 14336, 8, 2, {"renormalize": True}),
    "qwen2_moe": Family("Qwen1.5-MoE-A2.7B", 2048, 1408, 60, 4, shared_size=5632, shared_gate=True),
    "deepseek_v3": Family(
        "DeepSeek-V3", 7168, 2048, 256, 8,
        {
            "scoring": "sigmoid", "renormalize": True, "renormalize_eps": 1e-20, "scale": 2.5,
            "num_groups": 8, "top_groups": 4,
        },
        selection_bias=True, shared_size=2048,
    ),
    "gpt_oss": Family(
        "gpt-oss-20b", 2880, 2880, 32, 4,
        {"select_by": "logits"}, router_bias=True, activation="gpt_oss", layout="interleaved", biases=True,
    ),
}  # fmt: skip
