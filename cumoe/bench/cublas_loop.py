"""A baseline: the experts one after the other, each with two cuBLAS products.

The order of the tokens is known on the host before the clock starts, which favours the loop; three small kernels gather
an expert's tokens, activate and add up. CuPy does not let cuBLAS be captured in a graph, so everything is launched.
"""

from functools import cache
from itertools import pairwise
from typing import Any

import numpy as np

from cumoe.bench.problem import Problem
from cumoe.door.arrays import cupy

ACTIVATIONS = ("silu", "relu2")
THREADS = 256

SOURCE = r"""
#include <cuda_bf16.h>
#include <cuda_fp16.h>

using int64 = long long;

__device__ int64 first() { return (int64)blockIdx.x * blockDim.x + threadIdx.x; }
__device__ int64 step() { return (int64)gridDim.x * blockDim.x; }

template <typename T>
__device__ void gather(const T* x, const int* tokens, const float* scales, T* rows, int hidden, int64 count) {
  for (int64 i = first(); i < count; i += step()) {
    float value = (float)x[(int64)tokens[i / hidden] * hidden + i % hidden];
    rows[i] = (T)(scales ? scales[i / hidden] * value : value);
  }
}

template <typename T> __device__ void activate(const T* in, T* out, int width, int gated, int64 count) {
  for (int64 i = first(); i < count; i += step()) {
    const T* row = in + i / width * width * (gated ? 2 : 1);
    float v = (float)row[i % width];
    out[i] = (T)(gated ? v / (1.0f + __expf(-v)) * (float)row[width + i % width] : fmaxf(v, 0.0f) * fmaxf(v, 0.0f));
  }
}

template <typename T>  // no token twice in a launch
__device__ void add(const T* rows, const int* tokens, const float* scales, float* y, int hidden, int64 count) {
  for (int64 i = first(); i < count; i += step()) {
    float value = (float)rows[i];
    y[(int64)tokens[i / hidden] * hidden + i % hidden] += scales ? scales[i / hidden] * value : value;
  }
}

#define KERNELS(NAME, T)                                                                                  \
  extern "C" __global__ void gather_##NAME(const T* x, const int* tokens, const float* scales, T* rows,   \
                                           int hidden, int64 count) {                                     \
    gather(x, tokens, scales, rows, hidden, count);                                                       \
  }                                                                                                       \
  extern "C" __global__ void activate_##NAME(const T* in, T* out, int width, int gated, int64 count) {    \
    activate(in, out, width, gated, count);                                                               \
  }                                                                                                       \
  extern "C" __global__ void add_##NAME(const T* rows, const int* tokens, const float* scales, float* y,  \
                                        int hidden, int64 count) {                                        \
    add(rows, tokens, scales, y, hidden, count);                                                          \
  }

KERNELS(bfloat16, __nv_bfloat16)
KERNELS(float16, __half)
"""


class GpuSteps:
    """What is done besides the products, on CuPy arrays."""

    def __init__(self, dtype: Any) -> None:
        self._name = np.dtype(dtype).name

    def gather(self, x: Any, tokens: Any, scales: Any) -> Any:
        """Return the rows of `x` that `tokens` name, times `scales` where there are some."""
        rows = cupy.empty((tokens.size, x.shape[1]), x.dtype)
        self._launch("gather", rows.size, x, tokens, _pointer(scales), rows, np.int32(x.shape[1]))
        return rows

    def activate(self, hidden: Any, activation: str) -> Any:
        """Return silu(gate) * up, or relu(hidden)^2."""
        gated = activation == "silu"
        width = hidden.shape[1] // 2 if gated else hidden.shape[1]
        out = cupy.empty((hidden.shape[0], width), hidden.dtype)
        self._launch("activate", out.size, hidden, out, np.int32(width), np.int32(gated))
        return out

    def add(self, total: Any, rows: Any, tokens: Any, scales: Any) -> None:
        """Add rows, times `scales` where there are some, to the rows of `total` that `tokens` name."""
        self._launch("add", rows.size, rows, tokens, _pointer(scales), total, np.int32(rows.shape[1]))

    def _launch(self, step: str, count: int, *arguments: Any) -> None:
        grid = (min(-(-count // THREADS), 1 << 16),)
        _module().get_function(f"{step}_{self._name}")(grid, (THREADS,), (*arguments, np.int64(count)))


def _pointer(array: Any) -> Any:
    return np.uintp(0) if array is None else array


@cache
def _module() -> Any:
    return cupy.RawModule(code=SOURCE, options=("--std=c++17",))


class CublasLoop:
    """The layer as a loop over its experts."""

    def __init__(self, problem: Problem, steps: Any = None) -> None:
        xp, groups = problem.xp, problem.groups
        to_host = np.asarray if xp is np else xp.asnumpy
        top_k = problem.shape.top_k
        slots = to_host(groups.permutation)
        factors = to_host(problem.routing.topk_weights).ravel()[slots]
        offsets = to_host(groups.expert_offsets)
        self._problem, self._steps = problem, steps or GpuSteps(problem.x.dtype)
        self._experts = [
            (e, xp.asarray((slots[begin:end] // top_k).astype(np.int32)), xp.asarray(factors[begin:end]))
            for e, (begin, end) in enumerate(pairwise(offsets))
            if begin < end
        ]
        self._everyone = xp.arange(problem.num_tokens, dtype=np.int32)

    @staticmethod
    def serves(problem: Problem) -> bool:
        """Whether the loop knows the layer: no biases, no gate on the shared expert, a known activation."""
        shape = problem.shape
        is_known = shape.activation in ACTIVATIONS and (shape.activation == "silu") == (shape.layout == "stacked")
        return is_known and not shape.biases and not shape.shared_gate and problem.weight_on != "activation"

    def run(self) -> Any:
        """Compute the layer; return a new array in the dtype of the tokens."""
        problem, steps = self._problem, self._steps
        x, weights, xp = problem.x, problem.weights, problem.xp
        total = xp.zeros(x.shape, np.float32)
        on_input = problem.weight_on == "input"
        for e, tokens, factors in self._experts:
            rows = steps.gather(x, tokens, factors if on_input else None)
            rows = self._project(rows, weights.experts.weights, e)
            steps.add(total, rows, tokens, None if on_input else factors)
        for own in weights.shared.weights if weights.shared is not None else ():
            steps.add(total, self._project(x, own, 0), self._everyone, None)
        return total.astype(x.dtype)

    def _project(self, rows: Any, weights: Any, e: int) -> Any:
        hidden = self._problem.xp.matmul(rows, weights.w_gate_up[e].T)
        return self._problem.xp.matmul(self._steps.activate(hidden, weights.activation.name), weights.w_down[e].T)
