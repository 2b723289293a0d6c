"""Host arrays across DLPack: no copy, right dtype, right writability, memory freed once."""

from __future__ import annotations

import ctypes
import gc
import os
import subprocess
import sys
import threading
import weakref

import ml_dtypes
import numpy as np
import pytest

from cumoe.door.dlpack import Exported, to_numpy

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


# ---- an exporter with no library behind it -------------------------------------------------------


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


new_capsule = ctypes.PYFUNCTYPE(
    ctypes.py_object, ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p
)(("PyCapsule_New", ctypes.pythonapi))
capsule_name = ctypes.PYFUNCTYPE(ctypes.c_char_p, ctypes.py_object)(
    ("PyCapsule_GetName", ctypes.pythonapi)
)


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
        self.tensor = DLTensor(
            data, device, 0, len(shape), code, bits, lanes, self.shape, self.strides, offset
        )
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
            self.managed = Versioned(
                *self.version, None, self.deleter, int(self.read_only), self.tensor
            )
            name = b"dltensor_versioned"
        self.name = name  # the capsule keeps a pointer to it
        self.capsule = new_capsule(ctypes.addressof(self.managed), name, None)
        return self.capsule


class MutableHandMade(HandMade):
    """The same from a type that says it can be changed in place."""

    def __iadd__(self, other):
        raise NotImplementedError


@pytest.mark.parametrize("version", [None, (1, 0), (1, 3)])
@pytest.mark.parametrize(("dtype", "code"), [(np.float32, 2), (BF16, 4)])
def test_import_calls_the_deleter_once_after_the_last_view(dtype, code, version):
    memory = np.arange(6).astype(dtype)
    exporter = HandMade(address(memory), (2, 3), code, memory.itemsize * 8, version=version)
    array = to_numpy(exporter)
    assert array.dtype == dtype
    assert array.shape == (2, 3)
    assert address(array) == address(memory)
    assert bytes_of(array) == bytes_of(memory)
    assert capsule_name(exporter.capsule).startswith(b"used_dltensor")
    last = array[1:, ::2].T
    del array
    gc.collect()
    assert exporter.deleted == []
    del last
    gc.collect()
    assert exporter.deleted == [ctypes.addressof(exporter.managed)]
    exporter.capsule = None
    gc.collect()
    assert len(exporter.deleted) == 1


@pytest.mark.parametrize("version", [None, (1, 0)])
def test_import_of_strides_and_byte_offset(version):
    memory = np.arange(24).astype(BF16)
    expected = memory.reshape(4, 6)[1:, ::-2]
    exporter = HandMade(
        address(memory), (3, 3), 4, 16, strides=(6, -2), offset=11 * 2, version=version
    )
    array = to_numpy(exporter)
    assert address(array) == address(memory) + 22
    assert array.strides == expected.strides
    assert bytes_of(array) == bytes_of(expected)


@pytest.mark.parametrize("version", [None, (1, 0)])
@pytest.mark.parametrize("kind", [HandMade, MutableHandMade])
@pytest.mark.parametrize("strides", [None, (3, 1)])
def test_import_of_an_empty_tensor_with_null_data(strides, kind, version):
    exporter = kind(None, (0, 3), 4, 16, strides=strides, version=version)
    array = to_numpy(exporter)
    assert array.shape == (0, 3)
    assert array.dtype == BF16
    del array
    gc.collect()
    assert len(exporter.deleted) == 1


@pytest.mark.parametrize(("dtype", "code"), [(np.float32, 2), (BF16, 4)])
@pytest.mark.parametrize(
    ("kind", "version", "read_only", "writable"),
    [
        (HandMade, (1, 0), False, True),
        (HandMade, (1, 0), True, False),
        (MutableHandMade, (1, 0), True, False),  # what the capsule says comes first
        (HandMade, None, False, False),
        (MutableHandMade, None, False, True),
    ],
)
def test_import_writability(kind, version, read_only, writable, dtype, code):
    memory = np.zeros((2, 3), dtype)
    exporter = kind(
        address(memory), (2, 3), code, memory.itemsize * 8, version=version, read_only=read_only
    )
    array = to_numpy(exporter)
    assert array.flags.writeable is writable
    assert address(array) == address(memory)
    if writable:
        array[1, 2] = 5
        assert memory[1, 2] == 5
    else:
        with pytest.raises(ValueError, match="read-only"):
            array[1, 2] = 5
    view = array[:1]
    del array
    gc.collect()
    assert exporter.deleted == []
    del view
    gc.collect()
    assert len(exporter.deleted) == 1


@pytest.mark.parametrize(
    ("code", "bits", "lanes"), [(10, 8, 1), (4, 32, 1), (2, 8, 1), (2, 32, 4), (3, 64, 1)]
)
def test_import_refuses_a_dtype_that_numpy_lacks(code, bits, lanes):
    memory = np.zeros(8, np.uint64)
    exporter = HandMade(address(memory), (2,), code, bits, lanes=lanes, version=(1, 0))
    with pytest.raises(TypeError, match=rf"exporter: expected .*, got DLPack type code {code},"):
        to_numpy(exporter)
    # A refused capsule is still its exporter's to free.
    assert capsule_name(exporter.capsule) == b"dltensor_versioned"
    assert exporter.deleted == []


def test_import_refuses_other_devices_versions_and_objects():
    memory = np.zeros(2, np.float32)
    cuda = HandMade(address(memory), (2,), 2, 32, device=2)
    with pytest.raises(TypeError, match="exporter: expected CPU memory, got DLPack device type 2"):
        to_numpy(cuda)
    assert cuda.capsule is None
    with pytest.raises(TypeError, match=r"capsule: expected DLPack 1\.x, got 2\.0"):
        to_numpy(HandMade(address(memory), (2,), 2, 32, version=(2, 0)))
    with pytest.raises(TypeError, match="exporter: expected a DLPack exporter, got list"):
        to_numpy([1.0])

    used = HandMade(address(memory), (2,), 2, 32)
    array = to_numpy(used)
    used.__class__ = type("Again", (HandMade,), {"__dlpack__": lambda self, **_: self.capsule})
    with pytest.raises(TypeError, match="capsule: expected an unconsumed DLPack capsule, got"):
        to_numpy(used)
    del array


def test_import_asks_for_a_versioned_capsule_and_no_copy():
    memory = np.zeros(2, np.float32)
    exporter = HandMade(address(memory), (2,), 2, 32, version=(1, 0))
    to_numpy(exporter)
    assert exporter.keywords == {"max_version": (1, 0), "copy": False}


def test_import_lets_the_exporters_own_error_through():
    class Refuses(HandMade):
        def __dlpack__(self, **_):
            raise BufferError("tensor requires grad")

    with pytest.raises(BufferError, match="requires grad"):
        to_numpy(Refuses(None, (0,), 2, 32))


# ---- NumPy at both ends --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "dtype", [*SHARED, np.float64, np.int8, np.int64, np.uint8, np.uint16, np.bool_, np.complex64]
)
@pytest.mark.parametrize("shape", [(), (1,), (2, 3, 4), (0,), (3, 0, 2)])
def test_round_trip(shape, dtype):
    array = np.arange(int(np.prod(shape))).reshape(shape).astype(dtype)
    back = to_numpy(Exported(array))
    assert back.dtype == array.dtype
    assert back.shape == shape
    assert bytes_of(back) == bytes_of(array)
    assert back.flags.writeable
    if array.size:
        assert address(back) == address(array)
        back[...] = 1
        assert array.reshape(-1)[-1] == 1


@pytest.mark.parametrize("dtype", SHARED)
@pytest.mark.parametrize(
    "cut",
    [
        lambda a: a.T,
        lambda a: a[1:, ::2],
        lambda a: a[:, 1],
        lambda a: np.broadcast_to(a[0], (5, 6)),
        lambda a: a[:1][::-1],  # one element on the axis: its stride is negative but unused
    ],
)
def test_round_trip_of_a_view(cut, dtype):
    view = cut(np.arange(24).reshape(4, 6).astype(dtype))
    back = to_numpy(Exported(view))
    assert address(back) == address(view)
    assert back.shape == view.shape
    assert bytes_of(back) == bytes_of(view)
    assert back.flags.writeable == view.flags.writeable


def test_every_bfloat16_bit_pattern_survives():
    bits = np.arange(1 << 16, dtype=np.uint16)
    back = to_numpy(Exported(bits.view(BF16)))
    assert back.dtype == BF16
    assert np.array_equal(back.view(np.uint16), bits)


@pytest.mark.parametrize("dtype", SHARED)
def test_negative_strides_are_refused_outward_and_taken_inward(dtype):
    array = np.arange(6).reshape(2, 3).astype(dtype)
    for view in (array[::-1], array[:, ::-1], array[::-1, ::-1]):
        with pytest.raises(ValueError, match="array: expected no negative stride, got strides"):
            Exported(view)
    if dtype is not BF16:  # NumPy itself exports no bfloat16
        back = to_numpy(array[:, ::-1])
        assert address(back) == address(array) + 2 * array.itemsize
        assert bytes_of(back) == bytes_of(array[:, ::-1])


@pytest.mark.parametrize("dtype", SHARED)
def test_a_read_only_array_stays_read_only(dtype):
    array = np.ones(4, dtype)
    array.flags.writeable = False
    back = to_numpy(Exported(array))
    assert address(back) == address(array)
    assert not back.flags.writeable
    with pytest.raises(BufferError):
        Exported(array).__dlpack__()  # a legacy capsule could not say it


@pytest.mark.parametrize(
    "dtype",
    [
        ml_dtypes.float8_e4m3fn,
        np.longdouble,
        np.dtype(">f4"),
        np.dtype(BF16).newbyteorder(">"),
        np.dtype("V2"),
        np.dtype("M8[s]"),
        object,
    ],
)
def test_export_refuses_a_dtype(dtype):
    with pytest.raises(TypeError, match="array: expected a native bool, number or bfloat16 dtype"):
        Exported(np.zeros(2, dtype))


def test_export_refuses_what_is_no_array():
    with pytest.raises(TypeError, match=r"array: expected numpy\.ndarray, got list"):
        Exported([1.0])


def test_export_follows_the_keywords_of_the_protocol():
    exported = Exported(np.ones(2, BF16))
    assert exported.__dlpack_device__() == (1, 0)
    assert capsule_name(exported.__dlpack__()) == b"dltensor"
    assert capsule_name(exported.__dlpack__(max_version=(0, 8))) == b"dltensor"
    assert capsule_name(exported.__dlpack__(max_version=(1, 0))) == b"dltensor_versioned"
    assert capsule_name(exported.__dlpack__(stream=None, dl_device=(1, 0))) == b"dltensor"
    with pytest.raises((BufferError, ValueError)):
        exported.__dlpack__(dl_device=(2, 0))


# ---- lifetime of exported memory -----------------------------------------------------------------


class Tracked(np.ndarray):
    """An ndarray that takes weak references to itself and keeps no other state."""


def tracked(dtype):
    array = np.arange(4).astype(dtype).view(Tracked)
    return array, weakref.ref(array)


@pytest.mark.parametrize("dtype", SHARED)
def test_consumer_keeps_the_array_alive_and_frees_it(dtype):
    array, alive = tracked(dtype)
    expected = bytes_of(array)
    back = to_numpy(Exported(array))
    last = back[1:]
    del array, back
    gc.collect()
    assert alive() is not None
    assert bytes_of(last) == expected[last.itemsize :]
    del last
    gc.collect()
    assert alive() is None


@pytest.mark.parametrize("max_version", [None, (1, 0)])
@pytest.mark.parametrize("dtype", SHARED)
def test_a_capsule_never_consumed_frees_the_array(dtype, max_version):
    array, alive = tracked(dtype)
    capsule = Exported(array).__dlpack__(max_version=max_version)
    del array
    gc.collect()
    assert alive() is not None
    del capsule
    gc.collect()
    assert alive() is None


def test_a_consumer_that_refuses_the_capsule_keeps_its_own_exception():
    array, alive = tracked(BF16)
    with pytest.raises(RuntimeError, match="Unsupported dtype"):
        np.from_dlpack(Exported(array))
    del array
    gc.collect()
    assert alive() is None


@pytest.mark.parametrize("max_version", [None, (1, 0)])
def test_deleter_may_run_without_the_interpreter_lock_on_another_thread(max_version):
    array, alive = tracked(BF16)
    capsule = Exported(array).__dlpack__(max_version=max_version)
    versioned = max_version is not None
    name = b"dltensor_versioned" if versioned else b"dltensor"
    pointer = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.py_object, ctypes.c_char_p)(
        ("PyCapsule_GetPointer", ctypes.pythonapi)
    )(capsule, name)
    used = b"used_" + name
    ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.py_object, ctypes.c_char_p)(
        ("PyCapsule_SetName", ctypes.pythonapi)
    )(capsule, used)
    managed = (Versioned if versioned else Legacy).from_address(pointer)
    del capsule, array
    gc.collect()
    assert alive() is not None
    # A CFUNCTYPE call releases the lock, as a consumer's own thread would not hold it.
    thread = threading.Thread(target=managed.deleter, args=(pointer,))
    thread.start()
    thread.join()
    gc.collect()
    assert alive() is None


def test_live_imports_and_exports_survive_the_end_of_the_interpreter():
    script = """
import sys
import ml_dtypes, numpy as np
from cumoe.door.dlpack import Exported, to_numpy
array = np.ones(4, ml_dtypes.bfloat16)
sys.kept = [Exported(array).__dlpack__(), to_numpy(Exported(array)), to_numpy(array.view('u2'))]
cycle = [to_numpy(Exported(array))]
cycle.append(cycle)
"""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        check=False,
        env=environment,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""


# ---- torch ---------------------------------------------------------------------------------------


@pytest.fixture
def torch():
    return pytest.importorskip("torch")


TORCH_NAMES = ["float32", "float16", "int32", "bfloat16"]


@pytest.mark.parametrize(("name", "dtype"), list(zip(TORCH_NAMES, SHARED, strict=True)))
@pytest.mark.parametrize("shape", [(), (2, 3), (0, 3)])
def test_from_torch(torch, shape, name, dtype):
    tensor = torch.zeros(shape, dtype=getattr(torch, name))
    array = to_numpy(tensor)
    assert array.dtype == dtype
    assert array.shape == shape
    assert array.flags.writeable
    if array.size:
        assert address(array) == tensor.data_ptr()
        array[...] = 7
        assert bool((tensor == 7).all())


def test_from_torch_views(torch):
    tensor = torch.arange(24).reshape(4, 6).to(torch.bfloat16)
    view = tensor[1:, ::2].T
    array = to_numpy(view)
    assert address(array) == view.data_ptr()
    assert np.array_equal(array.astype(np.float32), view.float().numpy())


class OldTorch:
    """A torch tensor of a release that knows legacy capsules alone."""

    def __init__(self, tensor):
        self.tensor = tensor

    def __dlpack__(self, stream=None):
        return self.tensor.__dlpack__()

    def __dlpack_device__(self):
        return self.tensor.__dlpack_device__()

    def __iadd__(self, other):
        self.tensor += other
        return self


@pytest.mark.parametrize("name", TORCH_NAMES)
def test_from_torch_by_a_legacy_capsule(torch, name):
    tensor = torch.zeros((2, 3), dtype=getattr(torch, name))
    array = to_numpy(OldTorch(tensor))
    assert address(array) == tensor.data_ptr()
    array[1, 1] = 7
    assert float(tensor[1, 1]) == 7


def test_torch_memory_is_held_by_the_array(torch):
    tensor = torch.arange(1024).to(torch.bfloat16)
    array = to_numpy(tensor)[5:]
    del tensor
    gc.collect()
    filler = [torch.full((1024,), -1.0, dtype=torch.bfloat16) for _ in range(64)]
    assert float(array[0]) == 5
    del filler


def test_torch_refusals(torch):
    with pytest.raises(TypeError, match="exporter: expected a dtype with a NumPy counterpart"):
        to_numpy(torch.zeros(3, dtype=torch.float8_e4m3fn))
    with pytest.raises(BufferError, match="gradient"):
        to_numpy(torch.ones(3, requires_grad=True))


@pytest.mark.parametrize(("name", "dtype"), list(zip(TORCH_NAMES, SHARED, strict=True)))
def test_to_torch(torch, name, dtype):
    array, alive = tracked(dtype)
    expected = array.astype(np.float64).tolist()
    where = address(array)
    tensor = torch.from_dlpack(Exported(array))
    assert tensor.dtype == getattr(torch, name)
    assert tensor.data_ptr() == where
    assert tensor.tolist() == expected
    tensor[2] = 9
    assert array[2] == 9
    del array
    gc.collect()
    assert alive() is not None
    assert tensor[2] == 9
    del tensor
    gc.collect()
    assert alive() is None


@pytest.mark.parametrize("dtype", SHARED)
def test_to_torch_of_views(torch, dtype):
    array = np.arange(24).reshape(4, 6).astype(dtype)
    for view in (array.T, array[1:, ::2], array[:0], array[:1][::-1]):
        tensor = torch.from_dlpack(Exported(view))
        assert tuple(tensor.shape) == view.shape
        assert tensor.tolist() == view.astype(np.float64).tolist()
        if view.size:
            assert tensor.data_ptr() == address(view)


def test_to_torch_by_a_legacy_capsule(torch):
    array, alive = tracked(BF16)
    where = address(array)
    tensor = torch.from_dlpack(Exported(array).__dlpack__())
    del array
    gc.collect()
    assert tensor.dtype == torch.bfloat16
    assert tensor.data_ptr() == where
    assert tensor.tolist() == [0, 1, 2, 3]
    del tensor
    gc.collect()
    assert alive() is None


# ---- JAX -----------------------------------------------------------------------------------------


@pytest.fixture
def jnp(monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    return pytest.importorskip("jax.numpy")


@pytest.mark.parametrize("dtype", SHARED)
def test_from_jax_is_read_only(jnp, dtype):
    source = jnp.arange(6).reshape(2, 3).astype(dtype)
    array = to_numpy(source)
    assert array.dtype == dtype
    assert address(array) == source.unsafe_buffer_pointer()
    assert array.astype(np.int64).tolist() == [[0, 1, 2], [3, 4, 5]]
    assert not array.flags.writeable


@pytest.mark.parametrize("dtype", SHARED)
def test_to_jax(jnp, dtype):
    array = aligned((2, 4), dtype)
    result = jnp.from_dlpack(Exported(array))
    assert result.dtype == dtype
    assert result.unsafe_buffer_pointer() == address(array)
    assert bytes_of(np.asarray(result)) == bytes_of(array)


@pytest.mark.parametrize("dtype", SHARED)
def test_jax_frees_the_array(jnp, dtype):
    array = aligned((4,), dtype).view(Tracked)
    alive = weakref.ref(array)
    result = jnp.from_dlpack(Exported(array))
    assert result.unsafe_buffer_pointer() == address(array)
    del array
    gc.collect()
    assert alive() is not None
    del result
    gc.collect()
    assert alive() is None
