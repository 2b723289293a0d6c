"""Host arrays across DLPack without a copy, bfloat16 included.

NumPy refuses bfloat16 both ways, because the dtype is ``ml_dtypes``'s and not its own. Its bytes
are no obstacle: a bfloat16 element is as wide as a uint16 one. So NumPy carries the array as uint16
and this module changes the type code in the capsule, before NumPy reads an imported one and after
NumPy has made an exported one.

Ownership thus stays with NumPy's compiled code, which calls each deleter once, frees a capsule that
nobody consumed, and takes the interpreter lock where a deleter runs on another thread. A capsule
destructor written in Python could not do this: a consumer that refuses a capsule drops it while its
exception is pending, and running Python code then loses that exception.
"""

from __future__ import annotations

import ctypes
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from cumoe.door.checks import refuse

__all__ = ["Exported", "to_numpy"]

_CPU = 1  # kDLCPU
_VERSION = (1, 0)  # the DLPack version whose layout is declared below
_UINT, _BFLOAT = 1, 4  # DLPack type codes; 0 is int, 2 float, 5 complex, 6 bool
_WIDTHS = {  # by type code, the bits of the dtypes that have a NumPy counterpart
    0: (8, 16, 32, 64),
    _UINT: (8, 16, 32, 64),
    2: (16, 32, 64),
    _BFLOAT: (16,),
    5: (64, 128),
    6: (8,),
}
_BF16 = np.dtype(ml_dtypes.bfloat16)


class _DataType(ctypes.Structure):
    """DLDataType."""

    _fields_ = [("code", ctypes.c_uint8), ("bits", ctypes.c_uint8), ("lanes", ctypes.c_uint16)]


class _Tensor(ctypes.Structure):
    """DLTensor as far as its dtype. A legacy capsule's DLManagedTensor begins with it."""

    _fields_ = [
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("dtype", _DataType),
    ]


class _Versioned(ctypes.Structure):
    """DLManagedTensorVersioned as far as the dtype of its tensor."""

    _fields_ = [
        ("major", ctypes.c_uint32),
        ("minor", ctypes.c_uint32),
        ("manager_ctx", ctypes.c_void_p),
        ("deleter", ctypes.c_void_p),
        ("flags", ctypes.c_uint64),
        ("tensor", _Tensor),
    ]


# Prototypes of our own: argtypes set on ctypes.pythonapi would be shared with all its other users.
_is_valid = ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.py_object, ctypes.c_char_p)(("PyCapsule_IsValid", ctypes.pythonapi))
_get_pointer = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.py_object, ctypes.c_char_p)(
    ("PyCapsule_GetPointer", ctypes.pythonapi)
)


def to_numpy(exporter: Any) -> npt.NDArray[Any]:
    """View the memory of a host DLPack exporter as a NumPy array, without a copy.

    Parameters
    ----------
    exporter : object with ``__dlpack__`` and ``__dlpack_device__``
        For example a torch or JAX CPU tensor.

    Returns
    -------
    numpy.ndarray
        A view that keeps the memory alive; bfloat16 comes as ``ml_dtypes.bfloat16``.

    Raises
    ------
    TypeError
        If this is no DLPack exporter, its memory is not the CPU's, or its dtype has no NumPy
        counterpart. What the exporter itself raises passes through.

    Notes
    -----
    The array is read-only where a versioned capsule says so. A legacy capsule cannot say. NumPy
    then always makes a read-only array, right for JAX but wrong for a torch release that has only
    legacy capsules. So there the exporter's type decides: one that defines an in-place ``+=`` is
    mutable and its array is writable, any other array is read-only.
    """
    if not (hasattr(exporter, "__dlpack__") and hasattr(exporter, "__dlpack_device__")):
        raise TypeError(refuse("exporter", "a DLPack exporter", type(exporter).__name__))
    device = int(exporter.__dlpack_device__()[0])
    if device != _CPU:
        raise TypeError(refuse("exporter", "CPU memory", f"DLPack device type {device}"))
    try:
        capsule = exporter.__dlpack__(max_version=_VERSION, copy=False)
    except TypeError:  # the exporter predates these keywords
        capsule = exporter.__dlpack__()

    dtype, versioned = _read(capsule)
    if dtype.lanes != 1 or dtype.bits not in _WIDTHS.get(dtype.code, ()):
        got = f"DLPack type code {dtype.code}, {dtype.bits} bits, {dtype.lanes} lanes"
        raise TypeError(refuse("exporter", "a dtype with a NumPy counterpart", got))
    is_bf16 = dtype.code == _BFLOAT
    if is_bf16:
        dtype.code = _UINT
    array = np.from_dlpack(_Handover(capsule))
    if not versioned and hasattr(type(exporter), "__iadd__"):
        array = np.asarray(_Writable(array))
    return array.view(_BF16) if is_bf16 else array


class Exported:
    """Export a NumPy array through DLPack without a copy, bfloat16 included.

    Parameters
    ----------
    array : numpy.ndarray
        Of a native dtype that NumPy exports, or ``ml_dtypes.bfloat16``. The consumer shares its
        memory and keeps it alive.

    Raises
    ------
    TypeError
        If `array` is not a NumPy array or its dtype is another.
    ValueError
        If a stride is negative: NumPy would export the array, and torch ends the process on it.

    Notes
    -----
    Only a versioned capsule can say that the array is read-only. ``__dlpack__`` raises BufferError
    for a read-only array if the consumer asks for a legacy capsule, as JAX does. Torch asks for a
    versioned one and ignores the flag. JAX may copy memory that is not aligned to 64 bytes.
    """

    def __init__(self, array: npt.NDArray[Any]) -> None:
        if not isinstance(array, np.ndarray):
            raise TypeError(refuse("array", "numpy.ndarray", type(array).__name__))
        dtype = array.dtype
        # "g" and "G" are the long double types, whose layout DLPack cannot name.
        known = dtype == _BF16 or (dtype.kind in "biufc" and dtype.char not in "gG")
        if not (known and dtype.isnative):
            raise TypeError(refuse("array", "a native bool, number or bfloat16 dtype", repr(dtype)))
        # The stride of an axis with a single element is never stepped.
        if any(s < 0 and n > 1 for s, n in zip(array.strides, array.shape, strict=True)):
            raise ValueError(refuse("array", "no negative stride", f"strides {array.strides}"))
        self._array = array

    def __dlpack__(
        self,
        *,
        stream: Any = None,
        max_version: tuple[int, int] | None = None,
        dl_device: tuple[Any, int] | None = None,
        copy: bool | None = None,
    ) -> Any:
        """Export the array as a DLPack capsule; the keywords are the protocol's."""
        is_bf16 = self._array.dtype == _BF16
        source = self._array.view(np.uint16) if is_bf16 else self._array
        capsule = source.__dlpack__(stream=stream, max_version=max_version, dl_device=dl_device, copy=copy)
        if is_bf16:
            _read(capsule)[0].code = _BFLOAT
        return capsule

    def __dlpack_device__(self) -> tuple[int, int]:
        """Return the DLPack device, always the CPU."""
        return (_CPU, 0)


class _Handover:
    """Hand ``numpy.from_dlpack`` a capsule that has been asked for already."""

    def __init__(self, capsule: Any) -> None:
        self._capsule = capsule

    def __dlpack__(self, **_: Any) -> Any:
        return self._capsule

    def __dlpack_device__(self) -> tuple[int, int]:
        return (_CPU, 0)


class _Writable:
    """Offer the memory of a read-only array as writable.

    NumPy does not let the flag be set on memory it does not own. An array made from this object has
    it as its base, which keeps the read-only array and the capsule behind it alive.
    """

    def __init__(self, array: npt.NDArray[Any]) -> None:
        self._array = array
        address = array.__array_interface__["data"][0]
        self.__array_interface__ = array.__array_interface__ | {"data": (address, False)}


def _read(capsule: Any) -> tuple[_DataType, bool]:
    """Return the dtype inside an unconsumed capsule, in place, and whether it is versioned."""
    if _is_valid(capsule, b"dltensor_versioned"):
        managed = _Versioned.from_address(_get_pointer(capsule, b"dltensor_versioned"))
        if managed.major != _VERSION[0]:  # another major version may move the tensor
            raise TypeError(refuse("capsule", f"DLPack {_VERSION[0]}.x", f"{managed.major}.{managed.minor}"))
        return managed.tensor.dtype, True
    if _is_valid(capsule, b"dltensor"):
        return _Tensor.from_address(_get_pointer(capsule, b"dltensor")).dtype, False
    raise TypeError(refuse("capsule", "an unconsumed DLPack capsule", repr(capsule)))
