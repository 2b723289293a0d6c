"""A layer with random weights, the same numbers on every machine."""

import math
import zlib
from typing import Any, NamedTuple

import numpy as np

import cumoe
from cumoe.cli.families import Family

CHUNK = 1 << 24  # numbers drawn at a time, to bound the memory of the intermediate steps
DEVIATION = math.sqrt((2**32 - 1) / 6)  # of the sum of two integers that are uniform in [0, 2^16)

Arrays = dict[str, Any]


class Layer(NamedTuple):
    """The arrays of a layer; where replication is shown the shared expert lies behind the routed ones."""

    family: Family
    stack: Arrays  # arrays of cumoe.Experts, with num_experts entries, or one more
    shared: Arrays  # arrays of cumoe.SharedExperts; empty without one
    router_weight: Any
    router_bias: Any
    selection_bias: Any

    def experts(self, pick: Any = slice(None)) -> cumoe.Experts:
        """Return a run of the stack."""
        parts = {name: array[pick] for name, array in self.stack.items()}
        return cumoe.Experts(**parts, activation=self.family.activation, layout=self.family.layout)

    @property
    def routed(self) -> cumoe.Experts:
        """The routed experts."""
        return self.experts(slice(self.family.num_experts))

    @property
    def shared_experts(self) -> cumoe.SharedExperts | None:
        """The shared expert."""
        return cumoe.SharedExperts(**self.shared, activation=self.family.activation) if self.shared else None

    def route(self, x: Any, xp: Any) -> cumoe.Routing:
        """Return where the tokens go. The logits are a grouped product with one group: no cuBLAS is needed."""
        groups = cumoe.group(xp.zeros((x.shape[0], 1), np.int32), 1)
        logits = cumoe.grouped_gemm(x, self.router_weight[None], groups, bias=self.router_bias, dtype=np.float32)
        return cumoe.route(logits, self.family.router(self.selection_bias))


def draw(xp: Any, name: str, shape: tuple[int, ...], scale: float, dtype: Any) -> Any:
    """Return random numbers of deviation `scale`, a function of `name` and index alone.

    Each is an integer hash of its index, exact on every machine; cupy.random would need cuRAND, which comes with
    neither CuPy nor the driver.
    """
    out = xp.empty(math.prod(shape), dtype)
    key, factor = np.uint32(zlib.crc32(name.encode())), np.float32(scale / DEVIATION)
    for first in range(0, out.size, CHUNK):
        bits = xp.arange(min(CHUNK, out.size - first), dtype=np.uint32)
        bits += np.uint32(first % 2**32)  # stacks of more than 2^32 numbers repeat; no expert is that large
        bits ^= bits >> np.uint32(16)
        bits *= np.uint32(0x7FEB352D)
        bits += key
        bits ^= bits >> np.uint32(15)
        bits *= np.uint32(0x846CA68B)
        bits ^= bits >> np.uint32(16)
        sums = ((bits & np.uint32(0xFFFF)) + (bits >> np.uint32(16))).astype(np.float32)
        out[first : first + CHUNK] = (sums - np.float32(2**16 - 1)) * factor
    return out.reshape(shape)


def draw_tokens(xp: Any, seed: int, shape: tuple[int, int], dtype: Any) -> Any:
    """Return tokens of deviation 1."""
    return draw(xp, f"{seed} tokens", shape, 1.0, dtype)


def draw_layer(xp: Any, seed: int, family: Family, dtype: Any) -> Layer:
    """Return a layer whose activations stay near 1 and whose experts are not equally popular."""
    num_experts, hidden_size = family.num_experts, family.hidden_size

    def normal(name: str, *shape: int, scale: float, dtype: Any = dtype) -> Any:
        return draw(xp, f"{seed} {name}", shape, scale, dtype)

    def projections(name: str, num: int, width: int) -> Arrays:
        parts = {
            "w_gate_up": normal(f"{name} gate_up", num, 2 * width, hidden_size, scale=hidden_size**-0.5),
            "w_down": normal(f"{name} down", num, hidden_size, width, scale=width**-0.5),
        }
        if family.biases:
            parts["b_gate_up"] = normal(f"{name} gate_up bias", num, 2 * width, scale=0.1)
            parts["b_down"] = normal(f"{name} down bias", num, hidden_size, scale=0.1)
        return parts

    stack = projections("expert", num_experts + family.is_replicable, family.intermediate_size)
    shared: Arrays = {}
    if family.is_replicable:
        shared = {name: array[num_experts] for name, array in stack.items()}
    elif family.shared_size:
        shared = {name: array[0] for name, array in projections("shared", 1, family.shared_size).items()}
    if family.shared_gate:
        shared["gate"] = normal("shared gate", hidden_size, scale=hidden_size**-0.5)
    router = normal("router", num_experts, hidden_size, scale=hidden_size**-0.5, dtype=np.float32)
    popularity = np.linspace(0.7, 1.3, num_experts, dtype=np.float32)[(5 * np.arange(num_experts)) % num_experts]
    return Layer(
        family,
        stack,
        shared,
        (router * xp.asarray(popularity)[:, None]).astype(dtype),
        normal("router bias", 1, num_experts, scale=0.1, dtype=np.float32) if family.router_bias else None,
        normal("selection bias", num_experts, scale=0.05, dtype=np.float32) if family.selection_bias else None,
    )
