"""Calls of a kind that was seen before: from the caller's arrays to the tape that serves them, past the door.

The door looks at nothing but types, shapes, strides, dtypes, devices and whether arrays share memory. A call whose
arrays agree in all of that with those of a recorded call needs no second look.
"""

from collections.abc import Hashable
from typing import Any

from cumoe.door.arrays import cupy
from cumoe.door.output import overlap_partly
from cumoe.gpu.workspace import Workspace

VECTOR_BYTES = 16
"""Launch code may look at an address modulo this, and at no more of it."""

Arrays = tuple[Any, Any, Any, Any]
"""x, router_logits, input_ids, residual; None where there is none."""


def key_of(arrays: Arrays, out: Any) -> tuple[Hashable, tuple[int, ...]]:
    """Return all that the launches of a call depend on besides the layer, its memory and the stream, and the addresses.

    Parameters
    ----------
    arrays : tuple of CuPy array or None
    out : CuPy array or None
        None: a new array, C-contiguous and aligned.
    """
    key: list[Hashable] = []
    addresses: list[int] = []
    for array in (*arrays, out):
        if array is None:
            key.append(None)
            addresses.append(0)
        else:
            data = array.data
            address = data.ptr
            key.append((array.shape, array.strides, array.dtype, data.device_id, address % VECTOR_BYTES))
            addresses.append(address)
    return tuple(key), tuple(addresses)


def replayed(workspace: Workspace, device_id: int, arrays: Arrays, out: Any, *, reads_x_late: bool) -> Any:
    """Repeat a recorded call and return its result; None if there is no such record, or the door has to look.

    `reads_x_late`: x is read while the result is written.
    """
    kind = cupy.ndarray
    for array in (*arrays, out):
        if not (array is None or type(array) is kind):
            return None
    x, _, _, residual = arrays
    if out is not None:
        if residual is not None and overlap_partly(residual, out):
            return None
        if reads_x_late and overlap_partly(x, out):
            return None
    cuda = cupy.cuda
    if x is None or cuda.runtime.getDevice() != device_id:
        return None
    key, addresses = key_of(arrays, out)
    with workspace.lock:
        stream = cuda.get_current_stream().ptr
        block = workspace.block(device_id, stream)
        tape = None if block is None else block.tape(key)
        if tape is None:
            return None
        if out is None:
            out = kind(x.shape, x.dtype)
            addresses = (*addresses[:-1], out.data.ptr)
            if addresses[-1] % VECTOR_BYTES:
                return None
        workspace.hold_if_captured(stream, *arrays, out)
        tape.play(addresses)
    return out
