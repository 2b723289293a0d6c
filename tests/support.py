"""What the tests share: backends and random layers; cumoe.testing compares."""

from dataclasses import dataclass, field
from typing import Any

import ml_dtypes
import numpy as np

import cumoe
from cumoe.gpu.compile import gpu_is_there
from cumoe.testing import TOLERANCE, assert_close, relative_error

BF16 = np.dtype(ml_dtypes.bfloat16)
DTYPES = {"float32": np.dtype(np.float32), "float16": np.dtype(np.float16), "bfloat16": BF16}
__all__ = [
    "BF16",
    "CPU",
    "DTYPES",
    "GPU",
    "TOLERANCE",
    "Layer",
    "assert_close",
    "gpu_is_there",
    "random_layer",
    "relative_error",
]


class Cpu:
    """NumPy arrays."""

    name = "cpu"

    def asarray(self, array):
        """Return the array where this backend computes, with the strides it had; None stays None."""
        return array

    def asnumpy(self, array):
        """Return a NumPy array."""
        return array


class Gpu:
    """CuPy arrays."""

    name = "gpu"

    def asarray(self, array):
        """Return a CuPy array with the same order of axes in memory."""
        import cupy

        if array is None:
            return None
        order = np.argsort([-abs(stride) for stride in array.strides], kind="stable")
        moved = cupy.asarray(np.ascontiguousarray(array.transpose(order)))
        return moved.transpose(np.argsort(order))

    def asnumpy(self, array):
        """Copy to the host."""
        import cupy

        return cupy.asnumpy(array)


CPU, GPU = Cpu(), Gpu()


@dataclass
class Layer:
    """The arrays of a layer, in NumPy, and how to make one from them on a backend."""

    x: np.ndarray
    topk_ids: np.ndarray
    topk_weights: np.ndarray
    experts: dict[str, Any]
    shared: list[dict[str, Any]] = field(default_factory=list)
    weight_on: str = "output"

    def build(self, backend):
        """Return (x, routing, experts, shared) on `backend`."""

        def holder(cls, parts):
            return cls(**{k: backend.asarray(v) if isinstance(v, np.ndarray) else v for k, v in parts.items()})

        routing = cumoe.Routing(backend.asarray(self.topk_ids), backend.asarray(self.topk_weights))
        shared = [holder(cumoe.SharedExperts, parts) for parts in self.shared]
        return backend.asarray(self.x), routing, holder(cumoe.Experts, self.experts), shared

    def run(self, backend, **options):
        """Compute the layer on `backend`; return a NumPy array."""
        x, routing, experts, shared = self.build(backend)
        return backend.asnumpy(cumoe.moe(x, routing, experts, shared, weight_on=self.weight_on, **options))

    def expected(self):
        """Return what the layer is by definition, in float64."""
        x, routing, experts, shared = self.build(CPU)
        return cumoe.reference.moe(x, routing, experts, shared, weight_on=self.weight_on)


def random_layer(
    rng,
    dtype,
    *,
    num_tokens=33,
    hidden_size=72,
    intermediate_size=24,
    num_experts=6,
    top_k=2,
    shared_sizes=(),
    gated_shared=False,
    layout="stacked",
    activation="silu",
    biases=False,
    transposed=False,
    weight_on="output",
    routing="uniform",
):
    """Draw a layer from normal numbers scaled so that activations stay near 1.

    routing: "uniform", "one_expert", "with_holes" (ids -1 and num_experts among them) or "repeated" (an expert twice).
    """
    dtype = DTYPES.get(dtype, dtype)

    def normal(*shape, scale=1.0):
        return (rng.standard_normal(shape) * scale).astype(dtype)

    def weights(*stack, width):
        rows = width if layout == "ungated" else 2 * width
        gate_up = normal(*stack, rows, hidden_size, scale=hidden_size**-0.5)
        down = normal(*stack, hidden_size, width, scale=width**-0.5)
        if transposed:  # the same numbers seen through the strides of a transposed checkpoint
            gate_up, down = (np.ascontiguousarray(w.swapaxes(-1, -2)).swapaxes(-1, -2) for w in (gate_up, down))
        parts = {"w_gate_up": gate_up, "w_down": down, "layout": layout, "activation": activation}
        if biases:
            parts |= {"b_gate_up": normal(*stack, rows), "b_down": normal(*stack, hidden_size)}
        return parts

    ids = np.argsort(rng.random((num_tokens, num_experts)), axis=1)[:, :top_k].astype(np.int32)
    if routing == "one_expert":
        ids[:, 0] = num_experts - 1
    if routing == "repeated":
        ids[:] = ids[:, :1]
    if routing == "with_holes":
        ids[rng.random(ids.shape) < 0.3] = -1
        ids[rng.random(ids.shape) < 0.1] = num_experts
    shared = [weights(width=width) for width in shared_sizes]
    for parts in shared:
        if gated_shared:
            parts["gate"] = normal(hidden_size, scale=hidden_size**-0.5)
    return Layer(
        normal(num_tokens, hidden_size),
        ids,
        rng.uniform(0.1, 1.0, ids.shape).astype(np.float32),
        weights(num_experts, width=intermediate_size),
        shared,
        weight_on,
    )
