"""Arrays as the launch code of a layer sees them: what a kernel needs to know, and nothing that computes."""

from types import EllipsisType
from typing import Any


class Operand:
    """An array that can be looked at, cut and handed to a kernel, but neither copied, filled nor converted.

    A recorded call (see `cumoe.gpu.tape`) repeats its launches and nothing else. It works on operands, so that launch
    code which does anything else to an array fails at its first run and not in the numbers of its second.

    Parameters
    ----------
    array : CuPy array
    source : str, optional
        The argument of the call that the array came with. Arrays without one stay where they are for later calls.

    Attributes
    ----------
    data : object with `ptr`
        Where the first element lies.
    offset : int
        Bytes from the first element of the argument to that of this part of it.
    """

    __slots__ = ("_array", "data", "dtype", "offset", "shape", "source", "strides")

    def __init__(self, array: Any, source: str | None = None, offset: int = 0) -> None:
        self._array, self.source, self.offset = array, source, offset
        self.data, self.dtype, self.shape, self.strides = array.data, array.dtype, array.shape, array.strides

    @property
    def ndim(self) -> int:
        """Number of axes."""
        return len(self.shape)

    @property
    def size(self) -> int:
        """Number of elements."""
        return int(self._array.size)

    @property
    def device(self) -> Any:
        """The GPU that it lies on."""
        return self._array.device

    @property
    def flags(self) -> Any:
        """How its elements lie."""
        return self._array.flags

    def __getitem__(self, key: Any) -> "Operand":
        """Return a part by integers, slices, None and ``...``; lists and arrays would make a copy."""
        for item in key if isinstance(key, tuple) else (key,):
            if not isinstance(item, (int, slice, EllipsisType, type(None))):
                raise TypeError(f"an operand cannot be cut by {type(item).__name__}")
        part = self._array[key]
        return Operand(part, self.source, self.offset + part.data.ptr - self.data.ptr)
