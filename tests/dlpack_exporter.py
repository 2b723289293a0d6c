"""What the DLPack tests share: arrays, and an exporter with no library behind it."""

import ctypes
import weakref

import ml_dtypes
import numpy as np

BF16 = ml_dtypes.bfloat16
SHARED = [np.float32, np.float16, np.int32, BF16]  # dtypes that every library here has


def bytes_of(array):
    """Return the contents as bytes: NaNs and signed zeros then compare like all else."""
    return np.ascontiguousarray(array).tobytes()


def address(array):
    return array.__array_interface__["data"][0]


def aligned(shape, dtype):
    """Return a distinct-valued array on a 64-byte boundary, where JAX has no reason to copy."""
    count = int(np.prod(shape))
    raw = np.empty(count * np.dtype(dtype).itemsize + 64, np.uint8)
    start = -address(raw) % 64
    array = raw[start : start + count * np.dtype(dtype).itemsize].view(dtype).reshape(shape)
    array[...] = (np.arange(count).reshape(shape) - 3).astype(dtype)
    return array


class DLTensor(ctypes.Structure):
    _fields_ = [
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    ]


DELETER = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


class Legacy(ctypes.Structure):
    _fields_ = [("tensor", DLTensor), ("manager_ctx", ctypes.c_void_p), ("deleter", DELETER)]


class Versioned(ctypes.Structure):
    _fields_ = [
        ("major", ctypes.c_uint32),
        ("minor", ctypes.c_uint32),
        ("manager_ctx", ctypes.c_void_p),
        ("deleter", DELETER),
        ("flags", ctypes.c_uint64),
        ("tensor", DLTensor),
    ]


new_capsule = ctypes.PYFUNCTYPE(ctypes.py_object, ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)(
    ("PyCapsule_New", ctypes.pythonapi)
)
capsule_name = ctypes.PYFUNCTYPE(ctypes.c_char_p, ctypes.py_object)(("PyCapsule_GetName", ctypes.pythonapi))


KEPT = []  # capsules point into their exporters, which must not go first when a test fails


class HandMade:
    """A DLPack exporter built field by field; `deleted` records the deleter's calls."""

    def __init__(
        self,
        data,
        shape,
        code,
        bits,
        *,
        strides=None,
        offset=0,
        lanes=1,
        version=None,
        read_only=False,
        device=1,
    ):
        ints = ctypes.c_int64 * len(shape)
        self.shape = ints(*shape)
        self.strides = None if strides is None else ints(*strides)
        self.tensor = DLTensor(data, device, 0, len(shape), code, bits, lanes, self.shape, self.strides, offset)
        self.version = version
        self.read_only = read_only
        self.deleted = []
        self.deleter = DELETER(self.deleted.append)
        self.capsule = None
        KEPT.append(self)

    def __dlpack_device__(self):
        return (self.tensor.device_type, 0)

    def __dlpack__(self, **keywords):
        self.keywords = keywords
        if self.version is None:
            if keywords:
                raise TypeError("unexpected keyword")
            self.managed, name = Legacy(self.tensor, None, self.deleter), b"dltensor"
        else:
            self.managed = Versioned(*self.version, None, self.deleter, int(self.read_only), self.tensor)
            name = b"dltensor_versioned"
        self.name = name  # the capsule keeps a pointer to it
        self.capsule = new_capsule(ctypes.addressof(self.managed), name, None)
        return self.capsule


class MutableHandMade(HandMade):
    """The same from a type that says it can be changed in place."""

    def __iadd__(self, other):
        raise NotImplementedError


class Tracked(np.ndarray):
    """An ndarray that takes weak references to itself and keeps no other state."""


def tracked(dtype):
    array = np.arange(4).astype(dtype).view(Tracked)
    return array, weakref.ref(array)
