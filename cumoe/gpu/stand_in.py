"""Arrays without memory, for a rehearsal: shape, strides and dtype, at an address that is aligned like the real one."""

from collections.abc import Sequence
from math import prod
from types import SimpleNamespace
from typing import Any

import numpy as np

NOWHERE = SimpleNamespace(id=-1)


class StandIn:
    """What launch code looks at of an array.

    Parameters
    ----------
    shape : sequence of int
    dtype : dtype
    strides : sequence of int, optional
        In bytes; those of a C-contiguous array by default.
    address : int
        Its remainder by 16 matters.
    """

    def __init__(
        self, shape: Sequence[int], dtype: Any, strides: Sequence[int] | None = None, address: int = 0
    ) -> None:
        self.shape, self.dtype = tuple(shape), np.dtype(dtype)
        steps = [self.dtype.itemsize * prod(self.shape[axis + 1 :]) for axis in range(len(self.shape))]
        self.strides = tuple(steps if strides is None else strides)
        self.data = SimpleNamespace(ptr=address)
        self.device = NOWHERE

    @classmethod
    def of(cls, array: Any) -> Any:
        """Return one for a NumPy or CuPy array; what is on the CPU is taken to be aligned. None stays None."""
        if array is None:
            return None
        address = 0 if isinstance(array, np.ndarray) else array.data.ptr % 16
        return cls(array.shape, array.dtype, array.strides, address)

    @property
    def ndim(self) -> int:
        """Number of axes."""
        return len(self.shape)

    @property
    def size(self) -> int:
        """Number of elements."""
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of all elements."""
        return self.size * self.dtype.itemsize

    def __getitem__(self, key: Any) -> "StandIn":
        """Return a part by integers, slices and None."""
        shape: list[int] = []
        strides: list[int] = []
        axis, address = 0, self.data.ptr
        for item in key if isinstance(key, tuple) else (key,):
            if item is None:
                shape.append(1)
                strides.append(0)
                continue
            size, stride = self.shape[axis], self.strides[axis]
            axis += 1
            if isinstance(item, slice):
                begin, end, step = item.indices(size)
                shape.append(len(range(begin, end, step)))
                strides.append(step * stride)
            else:
                begin = range(size)[item]
            address += begin * stride
        return StandIn((*shape, *self.shape[axis:]), self.dtype, (*strides, *self.strides[axis:]), address)
