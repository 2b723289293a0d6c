"""What is packed for a launch, and what a tape changes of it: pointers and tensor maps of the caller's arrays alone."""

import ctypes
from types import SimpleNamespace

import numpy as np
import pytest
from support import BF16

from cumoe.gpu import driver as driver_module
from cumoe.gpu import tensor_map
from cumoe.gpu.driver import Launch
from cumoe.gpu.operand import Operand
from cumoe.gpu.structs import Packed, Struct, joined
from cumoe.gpu.tape import Tape


def fake_array(address, shape=(4, 8), dtype=BF16):
    """Return what a CuPy array at that address would show."""
    plain = np.empty(shape, dtype)

    class Fake(SimpleNamespace):
        def __getitem__(self, key):
            part = plain[key]
            offset = part.ctypes.data - plain.ctypes.data
            return fake_view(address + offset, part)

    def fake_view(at, part):
        return Fake(
            data=SimpleNamespace(ptr=at), dtype=part.dtype, shape=part.shape, strides=part.strides, size=part.size,
            device=SimpleNamespace(id=0), flags=part.flags,
        )  # fmt: skip

    return fake_view(address, plain)


@pytest.fixture
def launched(monkeypatch):
    """Return the list of arguments that the driver is given, as bytes."""
    seen = []

    def launch(config, function, arguments, extra):
        seen.append(ctypes.string_at(arguments[0], function.value))  # here the handle is the length
        return 0

    monkeypatch.setattr(driver_module, "driver", lambda: SimpleNamespace(cuLaunchKernelEx=launch))
    return seen


@pytest.fixture
def encoded(monkeypatch):
    """Let a tensor map be its address, and count the encodings."""
    calls = []

    def encode(address, *_):
        calls.append(address)
        return address.to_bytes(8, "little") * 16

    monkeypatch.setattr(tensor_map, "_encode", encode)
    return calls


def made(packed):
    """Return a launch of a packed argument; see `launched`."""
    return Launch("some_kernel", len(packed.data), 1, 32, 0, 0, packed.data, overlap=False)


def test_places_follow_operands_and_parts_of_them():
    """Only arrays of the caller leave a place, with the offset of the part."""
    two = Struct(pointer=("a", "b"), int32=("n", "padding"))
    x, weights = Operand(fake_array(0x1000), "x"), fake_array(0x2000)
    first = two(a=weights, b=x[1:, 2:], n=3, padding=0)
    second = two(a=x, b=None, n=4, padding=0)
    assert np.frombuffer(first.data[:16], np.uint64).tolist() == [0x2000, 0x1000 + 16 + 4]
    places = joined((first, Packed(b"12345678"), second)).places
    assert [(place.at, place.source, place.offset) for place in places] == [(8, "x", 20), (32, "x", 0)]
    assert joined((first, second)).padded(100).data == first.data + second.data + bytes(52)


def test_a_pointer_has_to_come_as_the_array():
    """An address alone would be kept for later calls, whoever it belongs to."""
    one = Struct(pointer=("a",))
    with pytest.raises(AssertionError, match="a is a bare address"):
        one(a=0x1000)


def test_an_operand_computes_nothing():
    """What would be work outside a launch is not there."""
    operand = Operand(fake_array(0x1000), "x")
    for name in ("fill", "astype", "copy", "reshape", "__setitem__", "__add__", "__iadd__", "__array__"):
        assert not hasattr(operand, name)
    for key in ([0, 1], np.array([0]), (slice(None), [1])):
        with pytest.raises(TypeError, match="an operand cannot be cut by"):
            operand[key]
    assert operand[None, ..., 1:].shape == (1, 4, 7)


def test_a_tape_moves_pointers_and_maps(launched, encoded):
    """Those of the caller's arrays and no others; a map that stands in several places is encoded once, if it moves."""
    struct = Struct(pointer=("w", "x", "y"))
    x, y, w = (
        Operand(fake_array(0x1000), "x"),
        Operand(fake_array(0x2000), "y"),
        fake_array(0x1000),
    )  # w lies where x is
    row_map = tensor_map.row_map(x[2:], (8, 1), 16)
    packed = joined((row_map, row_map, struct(w=w, x=x[1:], y=y)))
    tape = Tape({}, x=0x1000, router_logits=0, y=0x2000)
    tape.add(made(packed), packed.places)
    encoded.clear()

    tape.play((0x1000, 0, 0x2000))
    assert launched.pop() == packed.data and encoded == []
    tape.play((0x5000, 0, 0x2000))
    (argument,) = launched
    assert encoded == [0x5020]
    assert set(np.frombuffer(argument[:256], np.uint64)) == {0x5020}
    assert np.frombuffer(argument[256:], np.uint64).tolist() == [0x1000, 0x5010, 0x2000]
    tape.play((0x5000, 0, 0x7000))
    assert np.frombuffer(launched[-1][256:], np.uint64).tolist() == [0x1000, 0x5010, 0x7000]
    assert encoded == [0x5020]


def test_an_encoding_that_fails_is_made_up_for(launched, encoded, monkeypatch):
    """The next call does not take what was half written for what it needs."""
    x = Operand(fake_array(0x1000), "x")
    packed = joined((Struct(pointer=("x",))(x=x), tensor_map.row_map(x, (8, 1), 16)))
    tape = Tape({}, x=0x1000)
    tape.add(made(packed), packed.places)
    with monkeypatch.context() as broken:
        broken.setattr(tensor_map, "_encode", lambda *_: (_ for _ in ()).throw(RuntimeError("refused")))
        with pytest.raises(RuntimeError, match="refused"):
            tape.play((0x5000,))
    for address in (0x5000, 0x1000):
        tape.play((address,))
        assert set(np.frombuffer(launched[-1], np.uint64)) == {address}


def test_a_driver_that_refuses_is_named(monkeypatch):
    """And one that has no context in this thread gets one, once."""
    answers, used = [201, 0, 1], []
    fake = SimpleNamespace(cuLaunchKernelEx=lambda *_: answers.pop(0))
    monkeypatch.setattr(driver_module, "driver", lambda: fake)
    runtime = SimpleNamespace(getDevice=lambda: 3, setDevice=used.append)
    monkeypatch.setattr(driver_module, "cupy", SimpleNamespace(cuda=SimpleNamespace(runtime=runtime)))
    launch = made(Packed(b"12345678"))
    launch()
    assert used == [3] and answers == [1]
    with pytest.raises(RuntimeError, match="cuLaunchKernelEx returned 1 for some_kernel, 1 x 32 threads"):
        launch()


def test_arguments_lie_where_tensor_maps_have_to(launched):
    """At a multiple of 64 bytes."""
    for length in (8, 100, 8768):
        launch = made(Packed(bytes(length)))
        assert ctypes.addressof(ctypes.c_char.from_buffer(launch.argument)) % 64 == 0
        launch()
        assert launched.pop() == bytes(length)
