"""What a layer is compared with, where it can be had: other ways to compute the same on the same GPU."""

import importlib.util
from collections.abc import Callable
from typing import Any, NamedTuple

from cumoe.bench.cublas_loop import CublasLoop
from cumoe.bench.problem import Problem
from cumoe.bench.replication import replicate
from cumoe.bench.timer import Replay, Run
from cumoe.bench.torch_grouped import TorchGrouped


class Baseline(NamedTuple):
    """One of them."""

    serves: Callable[[Problem], bool]
    prepare: Callable[[Problem], Run]
    replay: Replay
    what: str


def _replication(problem: Problem) -> Run:
    stacked = problem.weights.stacked
    assert stacked is not None
    return lambda: replicate(problem.x, problem.routing, stacked, problem.xp)


def _is_replicable(problem: Problem) -> bool:
    return problem.weights.stacked is not None and problem.weight_on == "input"


def _has_torch(problem: Problem) -> bool:
    return importlib.util.find_spec("torch") is not None and TorchGrouped.serves(problem)


BASELINES: dict[str, Baseline] = {
    "replication": Baseline(
        _is_replicable, _replication, "graph", "tokens copied from (a, D) to ((k + 1) a, D), on the kernels of cumoe"
    ),
    "cublas-loop": Baseline(
        CublasLoop.serves, lambda problem: CublasLoop(problem).run, "launches", "two cuBLAS products an expert, in turn"
    ),
    "torch": Baseline(
        _has_torch, lambda problem: TorchGrouped(problem).run, "torch graph", "torch._grouped_mm with sorted tokens"
    ),
}


def out_of_memory(error: BaseException) -> bool:
    """Return whether an error says that memory was short; torch has an exception of its own for it."""
    return isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"


def run_of(name: str, problem: Problem) -> tuple[Any, Replay] | None:
    """Return what to time and how it is repeated, or None where the baseline cannot compute this layer."""
    baseline = BASELINES[name]
    return (baseline.prepare(problem), baseline.replay) if baseline.serves(problem) else None
