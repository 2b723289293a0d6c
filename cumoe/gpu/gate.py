"""Launching kernels/gate.cu: the gate of a shared expert."""

from typing import Any

from cumoe.gpu.compile import launch
from cumoe.gpu.stacks import strides
from cumoe.gpu.structs import Struct

THREADS = 128
LOAD_BYTES = 16  # of one thread at a time, where addresses allow

LAUNCH = Struct(
    pointer=("x", "gate", "gates"),
    int64=("x_row_stride", "x_col_stride", "gate_stride"),
    int32=("num_tokens", "hidden_size"),
)


def shared_gate(x: Any, gate: Any, gates: Any) -> None:
    """Write sigmoid(x . gate) of every token into the float32 array `gates`, on the current stream."""
    num_tokens, hidden_size = x.shape
    if num_tokens == 0:
        return
    row_stride, col_stride = strides(x)
    (gate_stride,) = strides(gate)
    argument = LAUNCH(
        x=x,
        gate=gate,
        gates=gates,
        x_row_stride=row_stride,
        x_col_stride=col_stride,
        gate_stride=gate_stride,
        num_tokens=num_tokens,
        hidden_size=hidden_size,
    )
    width = LOAD_BYTES // x.dtype.itemsize
    whole = hidden_size % width == 0 and row_stride % width == 0 and col_stride == gate_stride == 1
    aligned = x.data.ptr % LOAD_BYTES == 0 and gate.data.ptr % LOAD_BYTES == 0
    name = f"shared_gate_{x.dtype.name}_{width if whole and aligned else 1}"
    launch(name, num_tokens, THREADS, argument, overlap=True)
