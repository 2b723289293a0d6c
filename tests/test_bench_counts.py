"""What the benchmark counts: weights and operations of the layers, roofs, quantiles, the cells of a row."""

import numpy as np
import pytest
from bench_problems import ROOFS, TINY, TINY_SHAPES, problem_of
from support import BF16

from cumoe.bench.case import HEADER, Case, Measured, case_of
from cumoe.bench.draw import Weights
from cumoe.bench.shapes import NUM_TOKENS, SHAPES
from cumoe.bench.timer import Times, times_of


@pytest.mark.parametrize(
    ("name", "billions"),  # of routed and shared weights: a layer's share of what the model is named after
    [
        ("Mixtral-8x7B", 1.409),
        ("Qwen3-30B-A3B", 0.604),
        ("Qwen3-Next-80B", 1.614),
        ("DeepSeek-V3", 11.319),
        ("DeepSeek-V2-Lite", 0.571),
        ("Qwen2-57B-A14B", 1.982),
        ("Llama-4-Scout", 2.139),
        ("Llama-4-Maverick", 16.232),
        ("gpt-oss-120b", 3.185),
        ("GLM-4.5-Air", 2.232),
        ("Nemotron-3-Nano", 1.297),
    ],
)
def test_sizes_of_the_layers(name, billions):
    """The table has these layers, each with this many weights of 2 bytes."""
    shape = SHAPES[name]
    assert shape.weight_bytes(shape.num_experts) / 2e9 == pytest.approx(billions, abs=1e-3)
    assert (shape.weight_on == "input") == name.startswith("Llama-4") == shape.is_replicable


def test_table():
    """Eleven layers, six numbers of tokens, what is particular about some."""
    assert len(SHAPES) == 11
    assert NUM_TOKENS == (1, 8, 64, 512, 4096, 16384)
    assert SHAPES["DeepSeek-V2-Lite"].shared_width == 2816
    assert SHAPES["Qwen2-57B-A14B"].shared_width == 20480
    assert [name for name, shape in SHAPES.items() if shape.shared_gate] == ["Qwen3-Next-80B", "Qwen2-57B-A14B"]
    assert SHAPES["Nemotron-3-Nano"].num_matrices == 2


def test_counts():
    """Two operations a weight and token, two bytes a weight that is hit."""
    assert SHAPES["Mixtral-8x7B"].flops(3) == 6 * 3 * 4096 * 2 * 14336
    assert SHAPES["Mixtral-8x7B"].weight_bytes(5) == 6 * 4096 * 5 * 14336
    shared, ungated = TINY_SHAPES["shared"], TINY_SHAPES["ungated"]
    assert shared.flops(10) == 6 * 10 * 64 * (2 * 48 + 2 * 40)
    assert shared.weight_bytes(0) == 6 * 64 * 2 * 40
    assert ungated.flops(1) == 4 * 64 * (2 * 48 + 40)


@pytest.mark.parametrize("name", TINY_SHAPES)
def test_drawn_weights_are_those_that_are_counted(name):
    """Of routed and shared experts together."""
    shape = TINY_SHAPES[name]
    weights = Weights(np, shape, BF16)
    runs = [weights.experts.weights, *(weights.shared.weights if weights.shared else ())]
    assert sum(each.w_gate_up.nbytes + each.w_down.nbytes for each in runs) == shape.weight_bytes(shape.num_experts)
    assert (weights.shared is None) == (not shape.shared_width)
    assert (weights.stacked is not None) == shape.is_replicable
    assert weights.shared is None or (weights.shared.gate is not None) == shape.shared_gate
    assert (weights.experts.weights.b_down is not None) == shape.biases


def test_ceiling():
    """Whichever takes longer, computing or reading."""
    assert ROOFS.ceiling(800 * 10**6, 1) == pytest.approx(1)
    assert ROOFS.ceiling(1, 8 * 10**6) == pytest.approx(2)
    assert ROOFS.binding(800 * 10**6, 1) == "product"
    assert ROOFS.binding(1, 8 * 10**6) == "read"


def test_quantiles():
    """Of twenty runs the fifth from either end, about."""
    assert times_of([float(i) for i in range(19, -1, -1)]) == Times(9.5, 4.0, 15.0)
    assert times_of([3.0]) == Times(3.0, 3.0, 3.0)


@pytest.mark.parametrize("on_output", [None, 260.0])
def test_rows(on_output):
    """Rates follow from the time; a CSV row has a cell for each field, in the order that it always had."""
    problem, shape = problem_of(TINY, 1), TINY
    measured = Measured(Times(250.0, 240.0, 255.0), on_output, {"torch": 500.0, "replication": None}, {"sm": 1755})
    found = case_of("tiny", problem, measured, ROOFS, "uniform")
    assert found.tflops == pytest.approx(shape.flops(1) / 250e-6 / 1e12)
    assert found.tb_per_s == pytest.approx(shape.weight_bytes(2) / 250e-6 / 1e12)
    assert found.ceiling_us == pytest.approx(shape.weight_bytes(2) / 4e6)
    assert found.percent == pytest.approx(100 * found.ceiling_us / 250)
    assert Case._fields[:11] == (
        "layer", "tokens", "dtype", "weight_on", "experts_hit", "us", "tflops", "tb_per_s", "ceiling_us", "percent",
        "us_on_output",
    )  # fmt: skip
    cells = dict(zip(Case._fields, found.row(), strict=True))
    wanted = {
        "layer": "tiny", "tokens": "1", "experts_hit": "2", "us": "250.0000", "us_20": "240.0000",
        "us_on_output": "" if on_output is None else "260.0000", "binds": "read", "routing": "uniform",
        "most_tokens": "1", "balancedness": "0.2500", "us_torch": "500.0000", "us_replication": "",
        "us_cublas_loop": "", "sm_mhz": "1755", "memory_mhz": "",
    }  # fmt: skip
    assert {name: cells[name] for name in wanted} == wanted
    assert found.line().endswith("2.00x")
    assert len(found.line()) == len(HEADER)
