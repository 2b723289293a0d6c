"""Host arrays out of NumPy by DLPack: no copy, right dtype, memory held and freed once."""

import ctypes
import gc
import os
import subprocess
import sys
import threading

import ml_dtypes
import numpy as np
import pytest
from dlpack_exporter import (
    BF16,
    SHARED,
    Legacy,
    Versioned,
    address,
    bytes_of,
    capsule_name,
    tracked,
)

from cumoe.door.dlpack import Exported, to_numpy


@pytest.mark.parametrize("dtype", [*SHARED, np.float64, np.int8, np.int64, np.uint8, np.uint16, np.bool_, np.complex64])
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
    with pytest.raises((RuntimeError, BufferError), match="Unsupported dtype"):  # NumPy 2.4, 2.5
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
    ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.py_object, ctypes.c_char_p)(("PyCapsule_SetName", ctypes.pythonapi))(
        capsule, used
    )
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
