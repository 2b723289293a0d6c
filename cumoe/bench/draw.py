"""Random numbers for the benchmark, made where they are needed."""

from typing import Any

import numpy as np

import cumoe
from cumoe.bench.shapes import Shape
from cumoe.data.weights import Layout

CHUNK = 1 << 25  # numbers drawn at a time: an intermediate array takes 128 MiB, and there are at most four


def fill(xp: Any, array: Any, seed: int, scale: float) -> Any:
    """Fill an array with normal numbers of that deviation, a chunk at a time; return it.

    Each is an integer hash of its index, put through Box and Muller: cupy.random would need cuRAND.
    """
    flat = array.reshape(-1)
    for number, first in enumerate(range(0, flat.size, CHUNK)):
        size = min(CHUNK, flat.size - first)
        keys = np.random.default_rng((seed, number)).integers(2**32, size=2, dtype=np.uint32)
        radius = _uniform(xp, size, keys[0])
        xp.log(radius, out=radius)
        radius *= np.float32(-2 * scale * scale)
        xp.sqrt(radius, out=radius)
        angle = _uniform(xp, size, keys[1])
        angle *= np.float32(2 * np.pi)
        xp.cos(angle, out=angle)
        angle *= radius
        flat[first : first + size] = angle
    return array


def _uniform(xp: Any, size: int, key: Any) -> Any:
    """Return float32 numbers in (0, 1]."""
    bits = xp.arange(size, dtype=np.uint32)
    bits ^= bits >> np.uint32(16)
    bits *= np.uint32(0x7FEB352D)
    bits += key
    bits ^= bits >> np.uint32(15)
    bits *= np.uint32(0x846CA68B)
    bits ^= bits >> np.uint32(16)
    uniform = bits.astype(np.float32)
    uniform += np.float32(1)
    uniform *= np.float32(2.0**-32)
    return uniform


class Weights:
    """The weights of a layer, with which activations stay near 1.

    Where the replication is a baseline, the shared expert is one more of a stack that all experts are views of.
    """

    def __init__(self, xp: Any, shape: Shape, dtype: Any) -> None:
        self._xp, self._shape, self._dtype = xp, shape, np.dtype(dtype)
        num_experts, num_shared = shape.num_experts, shape.num_shared
        self.stacked: cumoe.Experts | None = None
        if shape.is_replicable:
            stack = self._projections(num_experts + 1, shape.intermediate_size, 0)
            self.stacked = cumoe.Experts(**stack, **self._words())
            routed = {name: array[:num_experts] for name, array in stack.items()}
            shared = {name: array[num_experts:] for name, array in stack.items()}
        else:
            routed = self._projections(num_experts, shape.intermediate_size, 0)
            shared = self._projections(num_shared, shape.shared_size, 2) if num_shared else {}
        self.experts = cumoe.Experts(**routed, **self._words())
        gate = self._normal((num_shared, shape.hidden_size), 4, shape.hidden_size**-0.5) if shape.shared_gate else None
        self.shared = cumoe.SharedExperts(**shared, gate=gate, **self._words()) if shared else None

    def _words(self) -> dict[str, Any]:
        layout: Layout = self._shape.layout
        return {"activation": self._shape.activation, "layout": layout}

    def _normal(self, shape: tuple[int, ...], seed: int, scale: float) -> Any:
        return fill(self._xp, self._xp.empty(shape, self._dtype), seed, scale)

    def _projections(self, num: int, width: int, seed: int) -> dict[str, Any]:
        hidden, rows = self._shape.hidden_size, (self._shape.num_matrices - 1) * width
        parts = {
            "w_gate_up": self._normal((num, rows, hidden), seed, hidden**-0.5),
            "w_down": self._normal((num, hidden, width), seed + 1, width**-0.5),
        }
        if self._shape.biases:
            parts["b_gate_up"] = self._normal((num, rows), seed + 5, 0.1)
            parts["b_down"] = self._normal((num, hidden), seed + 6, 0.1)
        return parts
