"""Where a result goes: a new array, or the caller's; and what is added to it on the way."""

import math
from typing import Any

import numpy as np

from cumoe.door.arrays import Kind, admit_like, cupy
from cumoe.door.checks import check_dtype, check_shape, refuse


def output(
    out: Any, shape: tuple[int, int], dtype: np.dtype, kind: Kind, owner: str, *, over: Any = None, **apart: Any
) -> tuple[Any, Any]:
    """Return the NumPy or CuPy array to write, and the caller's own `out` (None if it is ours).

    What a GPU reads while it writes may not be overwritten: `out` shares no memory with the arrays `apart`, nor with
    the tokens `over` unless it is these tokens, element for element.
    """
    if out is None:
        return (cupy if kind.on_gpu else np).empty(shape, dtype), None
    y = admit_like("out", out, kind, owner)
    check_dtype("out", y, (dtype,))
    check_shape("out", y, {"num_tokens": shape[0], "hidden_size": shape[1]})
    if kind.on_gpu and not y.flags.c_contiguous:
        raise ValueError(refuse("out", "a C-contiguous array on a GPU", f"strides {y.strides}"))
    if not (_is_writable(out) if kind.on_gpu else y.flags.writeable):
        raise ValueError(refuse("out", "a writable array", "a read-only one"))
    if not kind.on_gpu and _repeats(y):
        raise ValueError(refuse("out", "elements that share no memory", f"strides {y.strides}"))
    if over is not None and overlap_partly(over, y):
        apart[owner] = over
    for name, array in apart.items() if kind.on_gpu else ():
        if array is not None and _overlap(y, array):
            raise ValueError(refuse("out", f"memory that {name} has no part in", "an overlapping array"))
    return y, out


def admit_residual(residual: Any, y: Any, kind: Kind, owner: str) -> Any:
    """View what is added to the result `y`; on a GPU as a C-contiguous array, a copy where it is none. None stays None.

    Raises
    ------
    TypeError
        If it is no array, not of the given kind (that of `owner`), or not of the dtype of `y`.
    ValueError
        If it has another shape than `y`, or lies partly where `y` lies on a GPU.
    """
    if residual is None:
        return None
    array = admit_like("residual", residual, kind, owner)
    check_dtype("residual", array, (y.dtype,))
    check_shape("residual", array, {"num_tokens": y.shape[0], "hidden_size": y.shape[1]})
    if kind.on_gpu:
        array = cupy.ascontiguousarray(array)
        if overlap_partly(array, y):
            raise ValueError(refuse("out", "residual itself or memory apart from it", "an overlapping array"))
    return array


def _is_writable(out: Any) -> bool:
    """Whether a device array can be changed in place: it has no flag, but a library like JAX has no `+=` either."""
    by_interface_alone = not hasattr(type(out), "__iadd__") and not hasattr(out, "__dlpack__")
    return not out.__cuda_array_interface__["data"][1] if by_interface_alone else hasattr(type(out), "__iadd__")


def _repeats(y: np.ndarray) -> bool:
    """Whether two elements of a matrix are the same memory: i * a = j * b for steps i, j that the shape has."""
    (a, b), (num_rows, num_columns) = y.strides, y.shape
    if (a == 0 and num_rows > 1) or (b == 0 and num_columns > 1):
        return y.size > 0
    common = math.gcd(a, b)
    return common > 0 and abs(b) // common < num_rows and abs(a) // common < num_columns


def overlap_partly(one: Any, other: Any) -> bool:
    """Return whether two device arrays may share memory, but not element by element."""
    return (one.data.ptr, one.strides) != (other.data.ptr, other.strides) and _overlap(one, other)


def _overlap(one: Any, other: Any) -> bool:
    """Whether two device arrays may share memory."""
    if one.size == 0 or other.size == 0:
        return False
    (low, high), (other_low, other_high) = _span(one), _span(other)
    return low < other_high and other_low < high


def _span(array: Any) -> tuple[int, int]:
    """Return the first byte of an array, and the one behind its last."""
    steps = [stride * (size - 1) for stride, size in zip(array.strides, array.shape, strict=True)]
    first = array.data.ptr + sum(step for step in steps if step < 0)
    return first, array.data.ptr + sum(step for step in steps if step > 0) + array.dtype.itemsize
