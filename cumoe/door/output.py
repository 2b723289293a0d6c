"""Where a result goes: a new array, or the caller's; and what is added to it on the way."""

from typing import Any

import numpy as np

from cumoe.door.arrays import Kind, admit_like, cupy
from cumoe.door.checks import check_dtype, check_shape, refuse


def output(out: Any, shape: tuple[int, int], dtype: np.dtype, kind: Kind, owner: str) -> tuple[Any, Any]:
    """Return the NumPy or CuPy array to write, and the caller's own `out` (None if it is ours)."""
    if out is None:
        return (cupy if kind.on_gpu else np).empty(shape, dtype), None
    y = admit_like("out", out, kind, owner)
    check_dtype("out", y, (dtype,))
    check_shape("out", y, {"num_tokens": shape[0], "hidden_size": shape[1]})
    if kind.on_gpu and not y.flags.c_contiguous:
        raise ValueError(refuse("out", "a C-contiguous array on a GPU", f"strides {y.strides}"))
    # A device array has no such flag: a library whose arrays cannot be changed in place, like JAX, has no `+=` either.
    if not (hasattr(type(out), "__iadd__") if kind.on_gpu else y.flags.writeable):
        raise ValueError(refuse("out", "a writable array", "a read-only one"))
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
        check_apart("residual", array, y)
    return array


def check_apart(name: str, array: Any, y: Any) -> None:
    """Raise ValueError if writing the CuPy array `y` would change elements of `array` before they are read."""
    if overlap_partly(array, y):
        raise ValueError(refuse("out", f"{name} itself or memory apart from it", "an array that shares a part of it"))


def overlap_partly(one: Any, other: Any) -> bool:
    """Return whether two CuPy arrays share memory, but not element by element."""
    if one.data.ptr == other.data.ptr and one.strides == other.strides:
        return False
    (low, high), (other_low, other_high) = _span(one), _span(other)
    return low < other_high and other_low < high


def _span(array: Any) -> tuple[int, int]:
    """Return the addresses between which the elements lie."""
    ends = [(size - 1) * stride for size, stride in zip(array.shape, array.strides, strict=True)]
    if array.size == 0:
        return 0, 0
    low = array.data.ptr + sum(min(0, end) for end in ends)
    return low, array.data.ptr + sum(max(0, end) for end in ends) + array.dtype.itemsize
