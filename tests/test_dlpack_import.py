"""Host arrays into NumPy by DLPack: no copy, right dtype, right writability, memory freed once."""

import ctypes
import gc

import numpy as np
import pytest
from dlpack_exporter import (
    BF16,
    HandMade,
    MutableHandMade,
    address,
    bytes_of,
    capsule_name,
)

from cumoe.door.dlpack import to_numpy


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
    exporter = HandMade(address(memory), (3, 3), 4, 16, strides=(6, -2), offset=11 * 2, version=version)
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
    exporter = kind(address(memory), (2, 3), code, memory.itemsize * 8, version=version, read_only=read_only)
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


@pytest.mark.parametrize(("code", "bits", "lanes"), [(10, 8, 1), (4, 32, 1), (2, 8, 1), (2, 32, 4), (3, 64, 1)])
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
