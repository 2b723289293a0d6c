"""The baselines of the benchmark compute the layer that they are compared with."""

import numpy as np
import pytest
from bench_problems import TINY_SHAPES, NumpySteps, difference, exact, problem_of
from support import DTYPES

from cumoe.bench import timer
from cumoe.bench.baselines import BASELINES, run_of
from cumoe.bench.cublas_loop import CublasLoop
from cumoe.bench.distributions import Distribution
from cumoe.bench.draw import Weights
from cumoe.bench.problem import Problem
from cumoe.bench.torch_grouped import TorchGrouped


@pytest.mark.parametrize("name", TINY_SHAPES)
@pytest.mark.parametrize("weight_on", ["input", "activation", "output"])
def test_baselines_compute_the_same(name, weight_on):
    """Each that says it can; with CuPy's kernels written out in NumPy."""
    problem = problem_of(TINY_SHAPES[name], 33, weight_on=weight_on)
    expected = exact(problem)
    assert difference(problem.run(), expected) < 5e-3
    served = {baseline: BASELINES[baseline].serves(problem) for baseline in BASELINES}
    assert served["replication"] == (name == "input" and weight_on == "input")
    assert served["cublas-loop"] == (name not in ("gate", "biases") and weight_on != "activation")
    if served["replication"]:
        run, _ = run_of("replication", problem)
        assert difference(run(), expected) < 2e-2
    if served["cublas-loop"]:
        assert difference(CublasLoop(problem, NumpySteps()).run(), expected) < 2e-2


@pytest.mark.parametrize("name", TINY_SHAPES)
@pytest.mark.parametrize("routing", ["uniform", "one-hot"])
def test_torch_computes_the_same(name, routing):
    """Also with experts that nobody goes to."""
    torch = pytest.importorskip("torch")
    problem = problem_of(TINY_SHAPES[name], 20, routing=routing)
    assert TorchGrouped.serves(problem) == (name != "biases")
    if name == "biases":
        assert run_of("torch", problem) is None
        return
    run, replay = run_of("torch", problem)
    assert replay == "torch graph"
    y = run()
    assert y.dtype == torch.bfloat16
    assert difference(y.float().numpy(), exact(problem)) < 2e-2


@pytest.mark.gpu
@pytest.mark.parametrize("name", TINY_SHAPES)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_baselines_compute_the_same_on_the_gpu(name, dtype):
    """The kernels of the loop, cuBLAS, torch."""
    cupy = pytest.importorskip("cupy")
    try:
        import cupy.cublas
    except ImportError:
        pytest.skip("no cuBLAS")
    shape = TINY_SHAPES[name]
    weights = Weights(cupy, shape, DTYPES[dtype])
    problem = Problem(cupy, shape, weights, 33, shape.weight_on, Distribution("uniform"))
    expected = cupy.asnumpy(problem.run()).astype(np.float64)
    timed = timer.Timer()
    for baseline in BASELINES:
        found = run_of(baseline, problem)
        if found is not None:
            run, replay = found
            y = run()
            y = y.float().cpu().numpy() if replay == "torch graph" else cupy.asnumpy(y)
            assert difference(y, expected) < 2e-2, baseline
            assert 0 < timed.us(run, replay) < 1e4
