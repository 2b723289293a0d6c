"""The layers that the benchmark knows, sizes of published models that are never cut down, and what it says of one."""

from dataclasses import dataclass
from typing import Literal, NamedTuple

from cumoe.layer.moe import WeightOn

ITEMSIZE = 2  # bytes of a weight; the benchmark knows bfloat16 and float16


@dataclass(frozen=True)
class Shape:
    """One layer of a published model."""

    hidden_size: int
    intermediate_size: int
    num_experts: int
    top_k: int
    num_shared: int = 0
    shared_size: int = 0  # intermediate size of each shared expert
    weight_on: WeightOn = "output"

    @property
    def shared_width(self) -> int:
        """Width of the shared experts side by side."""
        return self.num_shared * self.shared_size

    @property
    def scoring(self) -> Literal["softmax", "sigmoid"]:
        """How the benchmark routes: sigmoid beside shared experts, else softmax."""
        return "sigmoid" if self.shared_width else "softmax"

    def flops(self, num_tokens: int) -> int:
        """Count the floating-point operations of the three projections, two for each weight that a token meets."""
        return 2 * 3 * self.hidden_size * num_tokens * (self.top_k * self.intermediate_size + self.shared_width)

    def weight_bytes(self, experts_hit: int) -> int:
        """Count the bytes of the weights of so many routed experts and of all shared ones."""
        return ITEMSIZE * 3 * self.hidden_size * (experts_hit * self.intermediate_size + self.shared_width)


SHAPES = {
    "Mixtral-8x7B": Shape(4096, 14336, 8, 2),
    "Qwen3-30B-A3B": Shape(2048, 768, 128, 8),
    "DeepSeek-V3": Shape(7168, 2048, 256, 8, 1, 2048),
    "DeepSeek-V2-Lite": Shape(2048, 1408, 64, 6, 2, 1408),
    "Qwen2-57B-A14B": Shape(3584, 2560, 64, 8, 1, 20480),
    "Llama-4-Scout": Shape(5120, 8192, 16, 1, 1, 8192, "input"),
    "Llama-4-Maverick": Shape(5120, 8192, 128, 1, 1, 8192, "input"),
}

NUM_TOKENS = (1, 8, 64, 512, 4096, 16384)


class Roofs(NamedTuple):
    """What the GPU reached in this process."""

    product: float  # operations a second of a matrix product through cuBLAS
    copy: float  # bytes a second, read and written
    read: float  # bytes a second, read alone

    def ceiling(self, flops: int, num_bytes: int) -> float:
        """Return the least us for so many operations and so many bytes read, whichever takes longer."""
        return 1e6 * max(flops / self.product, num_bytes / self.read)


class Case(NamedTuple):
    """One line of the benchmark."""

    layer: str
    tokens: int
    dtype: str
    weight_on: str
    experts_hit: int
    us: float
    tflops: float
    tb_per_s: float  # of distinct weights
    ceiling_us: float
    percent: float  # of the ceiling
    us_on_output: float | None  # with weights on the output, where they are on the input

    def row(self) -> list[str]:
        """Return the cells of a CSV file; the header is `_fields`."""
        cells = (f"{cell:.4f}" if isinstance(cell, float) else cell for cell in self)
        return ["" if cell is None else str(cell) for cell in cells]

    def line(self) -> str:
        """Return the line that is printed below `HEADER`."""
        numbers = f"{self.us:>9.1f}  {self.tflops:>7.1f}  {self.tb_per_s:>6.3f}  {self.ceiling_us:>9.1f}"
        also = "" if self.us_on_output is None else f"  {self.us_on_output:>9.1f}"
        return f"{self.layer:<16}  {self.tokens:>6}  {self.experts_hit:>7}  {numbers}  {self.percent:>5.1f}{also}"


HEADER = (
    f"{'layer':<16}  {'tokens':>6}  {'experts':>7}  {'us':>9}  {'TFLOP/s':>7}  {'TB/s':>6}  {'ceiling':>9}  {'%':>5}"
    f"  {'on output':>9}"
)


def case(
    layer: str, shape: Shape, tokens: int, options: tuple[str, str], hit: int, times: tuple[float, float | None],
    roofs: Roofs,
) -> Case:  # fmt: skip
    """Return the line of a measured layer; `options` are dtype and weight_on, `times` us there and on the output."""
    flops, num_bytes = shape.flops(tokens), shape.weight_bytes(hit)
    us, on_output = times
    ceiling = roofs.ceiling(flops, num_bytes)
    rates = flops / us / 1e6, num_bytes / us / 1e6
    return Case(layer, tokens, *options, hit, us, *rates, ceiling, 100 * ceiling / us, on_output)
