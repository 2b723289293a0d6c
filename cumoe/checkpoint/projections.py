"""How checkpoints store the projections of experts, and which bytes make up the stacked arrays."""

import math
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import numpy as np

from cumoe.checkpoint.files import Tensor
from cumoe.checkpoint.names import Names
from cumoe.data.weights import Layout
from cumoe.door.checks import FLOAT_DTYPES, one_of, refuse

Stack = Literal["each", "one", "flat"]


class Copy(NamedTuple):
    """A run of bytes of a file, and the place in an array where it goes."""

    tensor: Tensor
    begin: int  # byte offset in the tensor
    num_bytes: int
    target: Any  # index into the array; contiguous elements


class Plan(NamedTuple):
    """An array to fill."""

    shape: tuple[int, ...]
    dtype: np.dtype
    copies: tuple[Copy, ...]
    whole: Tensor | None = None  # the tensor whose first bytes, in their order, are those of the array, if there is one
    swap: bool = False  # the last two axes after filling, as a view

    @property
    def viewed_shape(self) -> tuple[int, ...]:
        """The shape that the kernels expect."""
        return (*self.shape[:-2], self.shape[-1], self.shape[-2]) if self.swap else self.shape

    def viewed(self, array: Any) -> Any:
        """Return the filled array with the axes that the kernels expect."""
        return array.swapaxes(-1, -2) if self.swap else array


def plan_tensor(tensor: Tensor, shape: tuple[int, ...]) -> Plan:
    """Return the plan of an array that is one tensor."""
    assert tensor.dtype is not None
    return Plan(shape, tensor.dtype, (Copy(tensor, 0, tensor.num_bytes, ()),), tensor)


def check_float(tensor: Tensor) -> np.dtype:
    """Return the dtype of a tensor; raise TypeError unless a layer can be made of it."""
    if tensor.dtype not in FLOAT_DTYPES:
        wanted = one_of([dtype.name for dtype in FLOAT_DTYPES])
        raise TypeError(refuse(tensor.name, f"dtype {wanted}", f"{tensor.dtype_name} (quantised weights are not read)"))
    assert tensor.dtype is not None
    return tensor.dtype


@dataclass(frozen=True)
class Projections:
    """Names of the tensors of a run of experts below their block, and how they lie.

    Parameters
    ----------
    up, down : str
    gate : str
        Empty where `up` holds gate and up rows in one tensor, or where there is no gate.
    layout : {"stacked", "interleaved", "ungated"}
        Of the rows; see `cumoe.Experts`.
    stack : {"each", "one", "flat"}
        Every expert, ``{e}`` in a name, has matrices of its own; or one tensor holds those of all experts, along an
        axis of its own, or along the rows (DBRX).
    order : {"rows", "columns"}
        A matrix is (outputs, inputs) or (inputs, outputs). The latter is viewed, not transposed.
    further : {"refused", "left"}
        What happens to further experts in one tensor of all: LongCat-Flash has room for its identity experts there.
    """

    up: str
    down: str
    gate: str = ""
    layout: Layout = "stacked"
    stack: Stack = "each"
    order: Literal["rows", "columns"] = "rows"
    further: Literal["refused", "left"] = "refused"

    def plan(self, names: Names, num_experts: int, hidden_size: int) -> dict[str, Plan]:
        """Return the plans of w_gate_up and w_down, and of the biases that exist, by argument of `cumoe.Experts`.

        Raises
        ------
        TypeError
            If a tensor's dtype is none that a layer computes with, or not that of the others.
        ValueError
            If a tensor is missing or its shape does not fit.
        """
        down = names.tensor(self.down)
        width = self._width(down, num_experts)
        parts = (self.gate, self.up) if self.gate else (self.up,)
        rows = width if self.gate or self.layout == "ungated" else 2 * width
        dtype = check_float(down)
        plans = {
            "w_gate_up": self._matrices(names, parts, num_experts, (rows, hidden_size), dtype),
            "w_down": self._matrices(names, (self.down,), num_experts, (hidden_size, width), dtype),
        }
        for name, weights, length in (("b_gate_up", parts, rows), ("b_down", (self.down,), hidden_size)):
            biases = tuple(_bias_of(weight) for weight in weights)
            if names.has(biases[0]):
                own = check_float(names.tensor(biases[0]))
                plans[name] = self._joined(names, biases, num_experts, (length,), own)
        return plans

    def _width(self, down: Tensor, num_experts: int) -> int:
        """Return the intermediate size that the down projection shows; other shapes are compared with it."""
        if self.stack == "flat":
            return down.shape[0] // num_experts
        if len(down.shape) != (3 if self.stack == "one" else 2):
            axes = "(experts, ...)" if self.stack == "one" else "of a matrix"
            raise ValueError(refuse(down.name, f"a shape {axes}", down.shape))
        return down.shape[-1 if self.order == "rows" else -2]

    def _matrices(
        self, names: Names, parts: tuple[str, ...], num_experts: int, size: tuple[int, int], dtype: np.dtype
    ) -> Plan:
        swap = self.order == "columns" or (self.stack == "flat" and parts == (self.down,))
        assert not swap or len(parts) == 1, "columns of gate and up would not be contiguous"
        return self._joined(names, parts, num_experts, size[::-1] if swap else size, dtype, swap)

    def _joined(
        self,
        names: Names,
        parts: tuple[str, ...],
        num_experts: int,
        own: tuple[int, ...],
        dtype: np.dtype,
        swap: bool = False,
    ) -> Plan:
        """Plan (num_experts, parts, ...) from tensors of which every expert has the shape `own`."""
        rows = own[0]
        stored = {"each": own, "one": (num_experts, *own), "flat": (num_experts * rows, *own[1:])}[self.stack]
        num_bytes = math.prod(own) * dtype.itemsize
        copies = []
        for e in range(num_experts):
            begin = 0 if self.stack == "each" else e * num_bytes
            for i, part in enumerate(parts):
                tensor = names.tensor(part, e)
                found = tensor.shape
                if self.further == "left" and found[1:] == stored[1:]:
                    found = (min(found[0], num_experts), *found[1:])
                if found != stored:
                    raise ValueError(refuse(tensor.name, f"shape {stored}", tensor.shape))
                if check_float(tensor) != dtype:
                    raise TypeError(refuse(tensor.name, f"dtype {dtype.name}, like {parts[0]}", tensor.dtype_name))
                copies.append(Copy(tensor, begin, num_bytes, (e, slice(i * rows, (i + 1) * rows))))
        shape = (num_experts, len(parts) * rows, *own[1:])
        is_whole = len(parts) == 1 and (self.stack != "each" or num_experts == 1)
        return Plan(shape, dtype, tuple(copies), copies[0].tensor if is_whole else None, swap)


def choose(
    ways: Sequence[Projections], names: Names, num_experts: int, hidden_size: int
) -> tuple[Projections, dict[str, Plan]]:
    """Return the first way of storing experts that this layer has, with its plans; raise as `Projections.plan` does."""
    there = [way for way in ways if names.has(way.down) and names.has(way.up)] or ways[:1]
    for way in there[:-1]:  # the same names may stand for matrices in either order
        with suppress(ValueError):
            return way, way.plan(names, num_experts, hidden_size)
    return there[-1], there[-1].plan(names, num_experts, hidden_size)


def _bias_of(weight: str) -> str:
    return weight.removesuffix(".weight") + (".bias" if weight.endswith(".weight") else "_bias")


LINEAR = Projections("experts.{e}.up_proj.weight", "experts.{e}.down_proj.weight", "experts.{e}.gate_proj.weight")
W123 = Projections("experts.{e}.w3.weight", "experts.{e}.w2.weight", "experts.{e}.w1.weight")
PACKED = Projections("experts.gate_up_proj", "experts.down_proj", stack="one")
PACKED_WITH_ROOM = replace(PACKED, further="left")
PACKED_COLUMNS = replace(PACKED, order="columns")
PACKED_LINEAR = Projections("input_linear.weight", "output_linear.weight", stack="one")
FC = Projections("experts.fc1.weight", "experts.fc2.weight", stack="one", order="columns")
STACKED = Projections("up_proj.weight", "down_proj.weight", "gate_proj.weight", stack="one")
ROWS = Projections("experts.mlp.v1", "experts.mlp.w2", "experts.mlp.w1", stack="flat")
UNGATED = Projections("experts.{e}.up_proj.weight", "experts.{e}.down_proj.weight", layout="ungated")
UNGATED_PACKED = Projections("experts.up_proj", "experts.down_proj", layout="ungated", stack="one")
UNGATED_COLUMNS = Projections(
    "experts.gate_and_up_projs", "experts.down_projs", layout="ungated", stack="one", order="columns"
)


def mlp(name: str, up: str = "up_proj", down: str = "down_proj", gate: str = "gate_proj") -> Projections:
    """Return where one shared expert lies."""
    return Projections(f"{name}.{up}.weight", f"{name}.{down}.weight", f"{name}.{gate}.weight")
