"""Offsets beyond 2^31 elements; only the experts and tokens that are looked at hold numbers, all others NaN."""

import numpy as np
import pytest
from support import DTYPES, GPU, assert_close, gpu_is_there

import cumoe

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not gpu_is_there(), reason="no CUDA device")]


def poisoned_stack(cupy, dtype, shape, numbers, transposed):
    """Return a stack on the GPU that is NaN but for the experts in `numbers`; transposed: seen through such strides."""
    num_experts, rows, columns = shape
    memory = cupy.empty((num_experts, columns, rows) if transposed else shape, dtype)
    memory.view(np.uint16 if dtype.itemsize == 2 else np.uint32).fill(0xFFFF if dtype.itemsize == 2 else 0xFFFFFFFF)
    stack = memory.swapaxes(1, 2) if transposed else memory
    for expert, values in numbers.items():
        stack[expert] = cupy.asarray(values)
    return stack


@pytest.mark.parametrize(
    ("dtype", "transposed"), [("bfloat16", False), ("bfloat16", True), ("float16", False), ("float32", False)]
)
def test_weight_stack_over_2_31_elements(dtype, transposed):
    """Tokens of the first and the last expert find their weights, which begin past element 2^31 and past 4 GiB."""
    cupy = pytest.importorskip("cupy")
    dtype = DTYPES[dtype]
    num_experts, hidden_size, intermediate_size = 1024, 1048, 1032
    assert (num_experts - 1) * 2 * intermediate_size * hidden_size > 2**31
    rng = np.random.default_rng(0)

    def normal(*shape, scale):
        return (rng.standard_normal(shape) * scale).astype(dtype)

    gate_up = normal(2, 2 * intermediate_size, hidden_size, scale=hidden_size**-0.5)
    down = normal(2, hidden_size, intermediate_size, scale=intermediate_size**-0.5)
    x, ids = normal(9, hidden_size, scale=1.0), rng.integers(0, 2, (9, 1)).astype(np.int32)
    weights = np.ones((9, 1), np.float32)
    expected = cumoe.reference.moe(x, cumoe.Routing(ids, weights), cumoe.Experts(gate_up, down))

    last = num_experts - 1
    big_gate_up = poisoned_stack(
        cupy, dtype, (num_experts, 2 * intermediate_size, hidden_size), {0: gate_up[0], last: gate_up[1]}, transposed
    )
    big_down = poisoned_stack(
        cupy, dtype, (num_experts, hidden_size, intermediate_size), {0: down[0], last: down[1]}, transposed
    )
    routing = cumoe.Routing(GPU.asarray(ids * last), GPU.asarray(weights))
    y = cumoe.moe(GPU.asarray(x), routing, cumoe.Experts(big_gate_up, big_down))
    assert_close(GPU.asnumpy(y), expected, dtype)


def check_first_and_last_tokens(dtype, hidden_size, intermediate_size, elements):
    """Compare ten tokens of 65,546 with their definition; all others are NaN."""
    cupy = pytest.importorskip("cupy")
    num_tokens, top_k, num_experts = 65546, 8, 9
    assert num_tokens * top_k * max(hidden_size, intermediate_size) > elements
    rng = np.random.default_rng(1)

    def normal(*shape, scale):
        return (rng.standard_normal(shape) * scale).astype(dtype)

    experts = {
        "w_gate_up": normal(num_experts, 2 * intermediate_size, hidden_size, scale=hidden_size**-0.5),
        "w_down": normal(num_experts, hidden_size, intermediate_size, scale=intermediate_size**-0.5),
    }
    ids = np.argsort(rng.random((num_tokens, num_experts)), axis=1)[:, :top_k].astype(np.int32)
    weights = rng.uniform(0.1, 1, ids.shape).astype(np.float32)
    looked_at = np.r_[0:5, num_tokens - 5 : num_tokens]
    tokens = normal(len(looked_at), hidden_size, scale=1.0)
    x = cupy.full((num_tokens, hidden_size), np.nan, np.float32).astype(dtype)
    x[cupy.asarray(looked_at)] = cupy.asarray(tokens)
    expected = cumoe.reference.moe(tokens, cumoe.Routing(ids[looked_at], weights[looked_at]), cumoe.Experts(**experts))

    routing = cumoe.Routing(GPU.asarray(ids), GPU.asarray(weights))
    y = cumoe.moe(x, routing, cumoe.Experts(**{name: GPU.asarray(array) for name, array in experts.items()}))
    assert_close(GPU.asnumpy(y[cupy.asarray(looked_at)]), expected, dtype)
    del x, y
    cupy.get_default_memory_pool().free_all_blocks()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("hidden_size", [4224, 4223])
def test_rows_over_2_31_elements(dtype, hidden_size):
    """65,546 tokens x 8 rows x 4,224 columns: first and last tokens are right, also where nothing is aligned."""
    check_first_and_last_tokens(DTYPES[dtype], hidden_size=hidden_size, intermediate_size=16, elements=2**31)


@pytest.mark.parametrize("dtype", DTYPES)
def test_hidden_rows_over_2_31_elements(dtype):
    """65,546 tokens x 8 rows x 4,224 hidden numbers: what one projection writes and the other reads."""
    check_first_and_last_tokens(DTYPES[dtype], hidden_size=72, intermediate_size=4224, elements=2**31)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_rows_over_2_32_elements(dtype):
    """65,546 tokens x 8 rows x 8,256 columns: more than an unsigned integer counts."""
    check_first_and_last_tokens(DTYPES[dtype], hidden_size=8256, intermediate_size=16, elements=2**32)
