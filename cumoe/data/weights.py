"""The weights of routed and shared experts, checked once and held as views."""

from collections.abc import Callable, Sequence
from operator import itemgetter
from typing import Any, Literal, NamedTuple

import numpy as np

from cumoe.data.activation import Activation, as_activation
from cumoe.door.arrays import admit, admit_like, check_kind
from cumoe.door.checks import (
    FACTOR_DTYPES,
    FLOAT_DTYPES,
    check_count,
    check_dtype,
    check_rank,
    check_shape,
    check_word,
    refuse,
)

LAYOUTS = ("stacked", "interleaved", "ungated")
Layout = Literal["stacked", "interleaved", "ungated"]


class ExpertWeights(NamedTuple):
    """One run of experts of equal size, on NumPy or CuPy arrays: what the CPU and GPU stages compute with."""

    w_gate_up: (
        Any  # (num_experts, 2 * intermediate_size, hidden_size), or (num_experts, intermediate_size, hidden_size)
    )
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
        check_word("layout", layout, LAYOUTS)
        gate_up, self.kind = admit("w_gate_up", w_gate_up)
        check_rank("w_gate_up", gate_up, ("num_experts", _row_axis(layout), "hidden_size"))
        check_dtype("w_gate_up", gate_up, FLOAT_DTYPES)
        down = admit_like("w_down", w_down, self.kind, "w_gate_up")
        if down.dtype != gate_up.dtype:
            raise TypeError(refuse("w_down", f"dtype {gate_up.dtype.name}, like w_gate_up", down.dtype.name))
        num_experts, rows, hidden_size = gate_up.shape
        for axis, size in (("num_experts", num_experts), ("hidden_size", hidden_size), (_row_axis(layout), rows)):
            check_count(f"{axis} of w_gate_up", size, 1)
        if layout != "ungated" and rows % 2:
            raise ValueError(refuse("w_gate_up", f"an even number of rows with layout={layout!r}", gate_up.shape))
        self.num_experts, self.hidden_size = num_experts, hidden_size
        self.intermediate_size = rows if layout == "ungated" else rows // 2
        axes = {"num_experts": num_experts, "hidden_size": hidden_size, "intermediate_size": self.intermediate_size}
        check_rank("w_down", down, tuple(axes))
        check_shape("w_down", down, axes)
        self.dtype = gate_up.dtype
        self.weights = ExpertWeights(
            gate_up,
            down,
            self._bias("b_gate_up", b_gate_up, {"num_experts": num_experts, _row_axis(layout): rows}),
            self._bias("b_down", b_down, {"num_experts": num_experts, "hidden_size": hidden_size}),
            as_activation(activation),
            layout,
        )

    def _bias(self, name: str, bias: Any, axes: dict[str, int]) -> Any:
        if bias is None:
            return None
        bias = admit_like(name, bias, self.kind, "w_gate_up")
        check_dtype(name, bias, FACTOR_DTYPES)
        check_shape(name, bias, axes)
        return bias.astype(np.float32, order="C", copy=False)

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
        check_word("layout", layout, LAYOUTS)
        gate_up, self.kind = admit("w_gate_up", w_gate_up)
        if gate_up.ndim not in (2, 3):
            expected = f"2 dimensions ({_row_axis(layout)}, hidden_size) or 3 (num_shared first)"
            raise ValueError(refuse("w_gate_up", expected, f"shape {tuple(gate_up.shape)}"))
        stacked = gate_up.ndim == 3
        arrays = {"w_gate_up": gate_up}
        for name, array in (("w_down", w_down), ("gate", gate), ("b_gate_up", b_gate_up), ("b_down", b_down)):
            arrays[name] = (
                None if array is None and name != "w_down" else admit_like(name, array, self.kind, "w_gate_up")
            )
            rank = gate_up.ndim if name == "w_down" else gate_up.ndim - 1
            if name != "gate" and arrays[name] is not None and arrays[name].ndim != rank:
                raise ValueError(
                    refuse(name, f"{rank} dimensions, like w_gate_up", f"shape {tuple(arrays[name].shape)}")
                )
        as_stack = {name: array if stacked or array is None else array[None] for name, array in arrays.items()}
        experts = Experts(
            as_stack["w_gate_up"],
            as_stack["w_down"],
            as_stack["b_gate_up"],
            as_stack["b_down"],
            activation,
            layout=layout,
        )
        self.num_shared, self.dtype = experts.num_experts, experts.dtype
        self.hidden_size, self.intermediate_size = experts.hidden_size, experts.intermediate_size
        self.gate = self._check_gate(arrays["gate"], stacked)
        self.weights = [experts.weights.map(itemgetter(slice(s, s + 1))) for s in range(self.num_shared)]

    def _check_gate(self, gate: Any, stacked: bool) -> Any:
        """Return the gates as (num_shared, hidden_size), or None."""
        if gate is None:
            return None
        if gate.dtype != self.dtype:
            raise TypeError(refuse("gate", f"dtype {self.dtype.name}, like w_gate_up", gate.dtype.name))
        if gate.ndim == 1 and not stacked:
            gate = gate[None]
        check_shape("gate", gate, {"num_shared": self.num_shared, "hidden_size": self.hidden_size})
        return gate

    def __repr__(self) -> str:
        """Return the sizes."""
        return (
            f"SharedExperts(num_shared={self.num_shared}, hidden_size={self.hidden_size}, "
            f"intermediate_size={self.intermediate_size}, gated={self.gate is not None}, "
            f"{self.dtype.name}, {self.kind.device})"
        )


def check_shared(shared: Any, experts: Experts) -> tuple[SharedExperts, ...]:
    """Return None, one SharedExperts or a sequence of them as a tuple; raise unless all fit the routed experts."""
    if shared is None:
        return ()
    members = tuple(shared) if isinstance(shared, Sequence) else (shared,)
    for i, member in enumerate(members):
        name = f"shared[{i}]" if isinstance(shared, Sequence) else "shared"
        if not isinstance(member, SharedExperts):
            raise TypeError(refuse(name, "a cumoe.SharedExperts, or a sequence of them", type(member).__name__))
        check_kind(name, member.kind, experts.kind, "experts")
        if member.dtype != experts.dtype:
            raise TypeError(refuse(name, f"dtype {experts.dtype.name}, like experts", member.dtype.name))
        if member.hidden_size != experts.hidden_size:
            raise ValueError(refuse(name, f"hidden_size={experts.hidden_size}, like experts", member.hidden_size))
    return members


def _row_axis(layout: str) -> str:
    return "intermediate_size" if layout == "ungated" else "2 * intermediate_size"
