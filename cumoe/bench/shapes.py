"""The layers that the benchmark knows: sizes of published models that are never cut down."""

from dataclasses import dataclass
from typing import Literal

from cumoe.data.weights import Layout
from cumoe.layer.moe import WeightOn

ITEMSIZE = 2  # bytes of a weight; the benchmark knows bfloat16 and float16


@dataclass(frozen=True)
class Shape:
    """One layer of a published model.

    Routing by groups of experts and selection biases are left out: with random logits they would change which experts
    are hit, not what is computed.
    """

    hidden_size: int
    intermediate_size: int
    num_experts: int
    top_k: int
    num_shared: int = 0
    shared_size: int = 0  # intermediate size of each shared expert
    weight_on: WeightOn = "output"
    scoring: Literal["softmax", "sigmoid"] = "softmax"
    shared_gate: bool = False  # a sigmoid gate on every shared expert
    activation: str = "silu"
    layout: Layout = "stacked"
    biases: bool = False

    @property
    def shared_width(self) -> int:
        """Width of the shared experts side by side."""
        return self.num_shared * self.shared_size

    @property
    def num_matrices(self) -> int:
        """Matrices of hidden_size x intermediate_size that an expert has: gate, up and down, or up and down."""
        return 2 if self.layout == "ungated" else 3

    @property
    def is_replicable(self) -> bool:
        """Whether copied and rescaled tokens compute the same, with the shared expert as one more of the stack."""
        one = self.num_shared == 1 and self.shared_size == self.intermediate_size
        return one and self.weight_on == "input" and not self.shared_gate

    def flops(self, num_tokens: int) -> int:
        """Count the floating-point operations of the projections, two for each weight that a token meets."""
        width = self.top_k * self.intermediate_size + self.shared_width
        return 2 * self.num_matrices * self.hidden_size * num_tokens * width

    def weight_bytes(self, experts_hit: int) -> int:
        """Count the bytes of the weights of so many routed experts and of all shared ones, without biases."""
        width = experts_hit * self.intermediate_size + self.shared_width
        return ITEMSIZE * self.num_matrices * self.hidden_size * width


SHAPES = {
    "Mixtral-8x7B": Shape(4096, 14336, 8, 2),
    "Qwen3-30B-A3B": Shape(2048, 768, 128, 8),
    "Qwen3-Next-80B": Shape(2048, 512, 512, 10, 1, 512, shared_gate=True),
    "DeepSeek-V3": Shape(7168, 2048, 256, 8, 1, 2048, scoring="sigmoid"),
    "DeepSeek-V2-Lite": Shape(2048, 1408, 64, 6, 2, 1408),
    "Qwen2-57B-A14B": Shape(3584, 2560, 64, 8, 1, 20480, shared_gate=True),
    "Llama-4-Scout": Shape(5120, 8192, 16, 1, 1, 8192, "input", "sigmoid"),
    "Llama-4-Maverick": Shape(5120, 8192, 128, 1, 1, 8192, "input", "sigmoid"),
    "gpt-oss-120b": Shape(2880, 2880, 128, 4, activation="gpt_oss", layout="interleaved", biases=True),
    "GLM-4.5-Air": Shape(4096, 1408, 128, 8, 1, 1408, scoring="sigmoid"),
    "Nemotron-3-Nano": Shape(2688, 1856, 128, 6, 1, 3712, scoring="sigmoid", activation="relu2", layout="ungated"),
}

NUM_TOKENS = (1, 8, 64, 512, 4096, 16384)
"""What is measured unless something else is asked for; the sizes go up to 65536."""
