"""Where a result goes: a new array, or the caller's."""

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
