"""The weights of routed and shared experts, checked once and held as views."""

from collections.abc import Callable, Sequence
from operator import itemgetter
from typing import Any, Literal, NamedTuple

import numpy as np

from cumoe.data.activation import Activation, as_activation
from cumoe.door.arrays import Kind, admit, admit_like, check_kind
from cumoe.door.checks import (
    FLOAT_DTYPES,
    check_count,
    check_dtype,
    check_rank,
    check_same_dtype,
    check_shape,
    check_word,
    refuse,
)
from cumoe.door.factors import admit_factors
from cumoe.door.streams import on_producers_stream

LAYOUTS = ("stacked", "interleaved", "ungated")
Layout = Literal["stacked", "interleaved", "ungated"]


class ExpertWeights(NamedTuple):
    """One run of experts of equal size, on NumPy or CuPy arrays: what the CPU and GPU stages compute with."""

    w_gate_up: Any  # (num_experts, 2 * intermediate_size, hidden_size); half as many rows where ungated
    w_down: Any  # (num_experts, hidden_size, intermediate_size)
    b_gate_up: Any  # (num_experts, rows of w_gate_up) float32 contiguous, or None
    b_down: Any  # (num_experts, hidden_size) float32 contiguous, or None
    activation: Activation
    layout: Layout

    @property
    def intermediate_size(self) -> int:
        """Width of the hidden activations."""
        return int(self.w_down.shape[2])

    def split(self, projected: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
        """Return the gate and up columns of ``x @ w_gate_up^T``; up is None where there is no gate."""
        if self.layout == "stacked":
            return projected[..., : self.intermediate_size], projected[..., self.intermediate_size :]
        if self.layout == "interleaved":
            return projected[..., 0::2], projected[..., 1::2]
        return projected, None

    def map(self, change: Callable[[Any], Any]) -> "ExpertWeights":
        """Return the same weights with `change` applied to every array that exists."""
        gate_up, down, b_gate_up, b_down = (None if array is None else change(array) for array in self[:4])
        return ExpertWeights(gate_up, down, b_gate_up, b_down, self.activation, self.layout)


class Experts:
    """The routed experts of a layer.

    ::

        Expert_e(v) = down_e( phi(gate_e v + b_gate_e) * (up_e v + b_up_e + up_offset) ) + b_down_e
        Expert_e(v) = down_e( phi(up_e v + b_up_e) ) + b_down_e                              layout="ungated"

    Nothing is copied but the biases: a transposed checkpoint ``(E, D, 2I)`` is passed as ``w.swapaxes(1, 2)`` and is
    read through its strides.

    Parameters
    ----------
    w_gate_up : (num_experts, 2 * intermediate_size, hidden_size) array, float32, float16 or bfloat16
        Any strides. ``(num_experts, intermediate_size, hidden_size)`` with ``layout="ungated"``.
    w_down : (num_experts, hidden_size, intermediate_size) array, like `w_gate_up`
    b_gate_up : (num_experts, rows of w_gate_up) array, optional
        Any float dtype; converted to float32.
    b_down : (num_experts, hidden_size) array, optional
    activation : str or Activation
        A word of `Activation`, or "gpt_oss".
    layout : {"stacked", "interleaved", "ungated"}
        Whether gate rows come before all up rows, alternate with them (gate first, gpt-oss), or do not exist.

    Attributes
    ----------
    num_experts, hidden_size, intermediate_size : int
    dtype : numpy.dtype

    Raises
    ------
    TypeError
        If something is no array, dtypes differ, or arrays differ in library or device.
    ValueError
        If a rank or shape does not fit, a size is 0, or a word is unknown.
    """

    @on_producers_stream
    def __init__(
        self,
        w_gate_up: Any,
        w_down: Any,
        b_gate_up: Any = None,
        b_down: Any = None,
        activation: str | Activation = "silu",
        *,
        layout: Layout = "stacked",
    ) -> None:
        arrays = (w_gate_up, w_down, b_gate_up, b_down)
        self.weights, self.kind = _check_weights(arrays, ("num_experts",), activation, layout)
        self.num_experts, self.hidden_size, self.intermediate_size = self.weights.w_down.shape
        self.dtype = self.weights.w_down.dtype
        self.captured: list[Any] = []  # what graphs go on using: see `moe`

    def __repr__(self) -> str:
        """Return the sizes."""
        return (
            f"Experts(num_experts={self.num_experts}, hidden_size={self.hidden_size}, "
            f"intermediate_size={self.intermediate_size}, {self.dtype.name}, {self.kind.device})"
        )


class SharedExperts:
    """One shared expert, or several of equal width: every token joins, no routing weight ever reaches it.

    ::

        y[t] += sigmoid(x[t] . gate_s) * Shared_s(x[t])          without `gate` the sigmoid is 1

    Parameters
    ----------
    w_gate_up : (2 * intermediate_size, hidden_size) or (num_shared, 2 * intermediate_size, hidden_size) array
        dtype, layout and strides as in `Experts`; the intermediate size is its own.
    w_down : (hidden_size, intermediate_size) or (num_shared, hidden_size, intermediate_size) array
    gate : (hidden_size,) or (num_shared, hidden_size) array, optional
        Sigmoid gate (Qwen2-MoE), in the dtype of the weights.
    b_gate_up, b_down : arrays, optional
        As in `Experts`, without the first axis where the weights have none.
    activation, layout
        As in `Experts`.

    Raises
    ------
    TypeError, ValueError
        As in `Experts`; also if `gate` does not fit.
    """

    @on_producers_stream
    def __init__(
        self,
        w_gate_up: Any,
        w_down: Any,
        gate: Any = None,
        b_gate_up: Any = None,
        b_down: Any = None,
        activation: str | Activation = "silu",
        *,
        layout: Layout = "stacked",
    ) -> None:
        first, _ = admit("w_gate_up", w_gate_up)
        if first.ndim not in (2, 3):
            rows = _row_axis(layout)
            expected = f"2 dimensions ({rows}, hidden_size) or 3 (num_shared, {rows}, hidden_size)"
            raise ValueError(refuse("w_gate_up", expected, f"shape {tuple(first.shape)}"))
        stack = ("num_shared",) if first.ndim == 3 else ()
        weights, self.kind = _check_weights((w_gate_up, w_down, b_gate_up, b_down), stack, activation, layout)
        self.num_shared, self.hidden_size, self.intermediate_size = weights.w_down.shape
        self.dtype = weights.w_down.dtype
        self.gate = self._check_gate(gate, bool(stack))
        self.weights = [weights.map(itemgetter(slice(s, s + 1))) for s in range(self.num_shared)]

    def _check_gate(self, gate: Any, is_stack: bool) -> Any:
        """Return the gates as (num_shared, hidden_size), or None; one gate may also come as (1, hidden_size)."""
        if gate is None:
            return None
        gate = admit_like("gate", gate, self.kind, "w_gate_up")
        check_same_dtype("gate", gate, self.dtype, "w_gate_up")
        axes = {"num_shared": self.num_shared, "hidden_size": self.hidden_size}
        if not is_stack and gate.shape != (1, self.hidden_size):
            check_shape("gate", gate, {"hidden_size": self.hidden_size})
            return gate[None]
        check_shape("gate", gate, axes)
        return gate

    def __repr__(self) -> str:
        """Return the sizes."""
        return (
            f"SharedExperts(num_shared={self.num_shared}, hidden_size={self.hidden_size}, "
            f"intermediate_size={self.intermediate_size}, gated={self.gate is not None}, "
            f"{self.dtype.name}, {self.kind.device})"
        )


def check_shared(shared: Any, experts: Experts, hidden_size: int | None = None) -> tuple[SharedExperts, ...]:
    """Return None, one SharedExperts or a sequence of them as a tuple.

    Raise unless all fit the routed experts and tokens of `hidden_size`, where that is not the experts' own.
    """
    wanted = hidden_size or experts.hidden_size
    if shared is None:
        return ()
    members = tuple(shared) if isinstance(shared, Sequence) else (shared,)
    for i, member in enumerate(members):
        name = f"shared[{i}]" if isinstance(shared, Sequence) else "shared"
        if not isinstance(member, SharedExperts):
            raise TypeError(refuse(name, "a cumoe.SharedExperts, or a sequence of them", type(member).__name__))
        check_kind(name, member.kind, experts.kind, "experts")
        check_same_dtype(name, member, experts.dtype, "experts")
        if member.hidden_size != wanted:
            raise ValueError(refuse(name, f"hidden_size={wanted}, like experts", member.hidden_size))
    return members


def _check_weights(
    arrays: tuple[Any, Any, Any, Any], stack: tuple[str, ...], activation: Any, layout: Any
) -> tuple[ExpertWeights, Kind]:
    """Return checked (w_gate_up, w_down, b_gate_up, b_down) with an axis of experts, whatever `stack` they came with.

    `stack` names the axis in front that the caller's arrays have, if they have one.
    """
    check_word("layout", layout, LAYOUTS)
    gate_up, kind = admit("w_gate_up", arrays[0])
    check_rank("w_gate_up", gate_up, (*stack, _row_axis(layout), "hidden_size"))
    check_dtype("w_gate_up", gate_up, FLOAT_DTYPES)
    *num, rows, hidden_size = gate_up.shape
    for axis, size in zip((*stack, _row_axis(layout), "hidden_size"), gate_up.shape, strict=True):
        check_count(f"{axis} of w_gate_up", size, 1)
    if layout != "ungated" and rows % 2:
        raise ValueError(
            refuse("w_gate_up", f"an even number of rows with layout={layout!r}", f"shape {gate_up.shape}")
        )
    in_front = dict(zip(stack, num, strict=True))
    width = rows if layout == "ungated" else rows // 2

    down = admit_like("w_down", arrays[1], kind, "w_gate_up")
    check_same_dtype("w_down", down, gate_up.dtype, "w_gate_up")
    axes = {**in_front, "hidden_size": hidden_size, "intermediate_size": width}
    check_rank("w_down", down, tuple(axes))
    check_shape("w_down", down, axes)

    def bias(name: str, array: Any, axis: str, size: int) -> Any:
        return admit_factors(name, array, {**in_front, axis: size}, kind, "w_gate_up")

    weights = ExpertWeights(
        gate_up,
        down,
        bias("b_gate_up", arrays[2], _row_axis(layout), rows),
        bias("b_down", arrays[3], "hidden_size", hidden_size),
        as_activation(activation),
        layout,
    )
    return (weights if stack else weights.map(itemgetter(None))), kind


def _row_axis(layout: str) -> str:
    return "intermediate_size" if layout == "ungated" else "2 * intermediate_size"
