"""What the benchmark says of one layer at one number of tokens."""

from typing import NamedTuple

from cumoe.bench.problem import Problem
from cumoe.bench.roofs import Roofs
from cumoe.bench.timer import Times


class Measured(NamedTuple):
    """The times that were taken of one problem."""

    ours: Times
    on_output: float | None  # us with weights on the output, where they are on the input
    baselines: dict[str, float | None]  # us; None where one cannot compute the layer, or memory was short
    clocks: dict[str, int]  # MHz after the last run, by "sm" and "memory"


class Case(NamedTuple):
    """One line of the benchmark; the columns of its CSV file begin with these."""

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
    us_20: float  # 20 % of the runs were faster
    us_80: float  # 80 % of the runs were faster
    binds: str  # the roof that the ceiling is: "product" or "read"
    routing: str
    most_tokens: int  # of an expert
    balancedness: float  # mean over most
    us_replication: float | None
    us_cublas_loop: float | None
    us_torch: float | None
    sm_mhz: int | None
    memory_mhz: int | None

    def row(self) -> list[str]:
        """Return the cells of a CSV file; the header is `_fields`."""
        cells = (f"{cell:.4f}" if isinstance(cell, float) else cell for cell in self)
        return ["" if cell is None else str(cell) for cell in cells]

    def line(self) -> str:
        """Return the line that is printed below `HEADER`."""
        numbers = f"{self.us:>9.1f}  {self.tflops:>7.1f}  {self.tb_per_s:>6.3f}  {self.ceiling_us:>9.1f}"
        also = "" if self.us_on_output is None else f"{self.us_on_output:.1f}"
        ratios = (self.us_replication, self.us_cublas_loop, self.us_torch)
        others = "".join(f"  {'' if us is None else f'{us / self.us:.2f}x':>7}" for us in ratios)
        line = f"{self.layer:<16}  {self.tokens:>6}  {self.experts_hit:>7}  {numbers}  {self.percent:>5.1f}"
        return f"{line} {self.binds:<7}  {also:>9}{others}".rstrip()


HEADER = (
    f"{'layer':<16}  {'tokens':>6}  {'experts':>7}  {'us':>9}  {'TFLOP/s':>7}  {'TB/s':>6}  {'ceiling':>9}  {'% of':>5}"
    f" {'roof':<7}  {'on output':>9}  {'copies':>7}  {'loop':>7}  {'torch':>7}"
)


def case_of(layer: str, problem: Problem, measured: Measured, roofs: Roofs, routing: str) -> Case:
    """Return the line of a measured problem."""
    shape, tokens = problem.shape, problem.num_tokens
    flops, num_bytes = shape.flops(tokens), shape.weight_bytes(problem.experts_hit)
    us, ceiling = measured.ours.us, roofs.ceiling(flops, num_bytes)
    return Case(
        layer,
        tokens,
        problem.x.dtype.name,
        problem.weight_on,
        problem.experts_hit,
        us,
        flops / us / 1e6,
        num_bytes / us / 1e6,
        ceiling,
        100 * ceiling / us,
        measured.on_output,
        measured.ours.us_20,
        measured.ours.us_80,
        roofs.binding(flops, num_bytes),
        routing,
        int(problem.tokens_per_expert.max()),
        problem.balancedness,
        measured.baselines.get("replication"),
        measured.baselines.get("cublas-loop"),
        measured.baselines.get("torch"),
        measured.clocks.get("sm"),
        measured.clocks.get("memory"),
    )
