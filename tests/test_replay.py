"""Recorded calls: what is patched and what is not, when a record serves and when it does not."""

import ctypes
import threading
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
from support import BF16, CPU, DTYPES, GPU, gpu_is_there, random_layer
from test_frame import COMBINATIONS, frame, on

import cumoe
from cumoe.gpu import driver as driver_module
from cumoe.gpu import tensor_map, workspace
from cumoe.gpu.driver import Launch
from cumoe.gpu.layer_router import LayerRouter
from cumoe.gpu.operand import Operand
from cumoe.gpu.structs import Packed, Struct, joined
from cumoe.gpu.tape import Tape

HIDDEN, EXPERTS, TOP_K, VOCABULARY = 72, 6, 2, 50

# --- without a GPU: what is packed, and what a tape changes of it ---


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


# --- on a GPU: a call that is repeated is the call itself ---


def on_gpu(test):
    """Mark a test that has no CPU half."""
    return pytest.mark.gpu(pytest.mark.skipif(not gpu_is_there(), reason="no CUDA device")(test))


@pytest.fixture
def plays(monkeypatch):
    """Return the list of addresses with which tapes were played since."""
    seen, play = [], Tape.play
    monkeypatch.setattr(Tape, "play", lambda tape, addresses: (seen.append(addresses), play(tape, addresses))[1])
    return seen


def build(dtype="bfloat16", names=(), with_table=False, seed=0, **options):
    """Return a layer on the GPU: gated shared experts, biases, a router of its own, and parts around the experts."""
    rng = np.random.default_rng(seed)
    latent = 24 if "latent" in names else HIDDEN
    inner = random_layer(rng, dtype, hidden_size=latent, num_experts=EXPERTS, biases=True)
    outer = random_layer(rng, dtype, hidden_size=HIDDEN, shared_sizes=(16, 40), gated_shared=True, biases=True)
    inner.shared = outer.shared
    _, _, experts, shared = inner.build(GPU)
    parts = on(GPU, frame(rng, names, HIDDEN, 24, DTYPES[dtype]))
    choices = EXPERTS + int(parts.get("num_identity_experts", 0))
    table = GPU.asarray(rng.integers(0, choices, (VOCABULARY, TOP_K)).astype(np.int32)) if with_table else None
    router = cumoe.Router(TOP_K, renormalize=True, expert_table=table)
    weight = GPU.asarray((rng.standard_normal((choices, HIDDEN)) * HIDDEN**-0.5).astype(DTYPES[dtype]))
    return cumoe.MoE(router, experts, shared, router_weight=weight, **parts, **options)


def draw(layer, seed, num_tokens=33, brought=()):
    """Return the arguments of a call on the GPU."""
    rng = np.random.default_rng(seed)

    def normal(*shape, dtype=layer.experts.dtype):
        return GPU.asarray(rng.standard_normal(shape).astype(dtype))

    arguments = {"x": normal(num_tokens, HIDDEN)}
    for name in brought:
        if name == "router_logits":
            arguments[name] = normal(num_tokens, layer.num_choices, dtype=np.float32)
        elif name == "input_ids":
            arguments[name] = GPU.asarray(rng.integers(-1, VOCABULARY, num_tokens).astype(np.int32))
        else:
            arguments[name] = normal(num_tokens, HIDDEN)
    if layer.router.expert_table is not None:
        arguments["input_ids"] = GPU.asarray(rng.integers(-1, VOCABULARY, num_tokens).astype(np.int32))
    return arguments


def bits(array):
    """Return the bytes of a CuPy array."""
    return GPU.asnumpy(array).tobytes()


ALL = ("router_logits", "residual", "out")
BROUGHT = [
    *(("bfloat16", brought, "learned") for brought in ((), ("router_logits",), ("residual",), ("out",))),
    *((dtype, ALL, ids) for dtype in DTYPES for ids in ("learned", "table")),
]


@on_gpu
@pytest.mark.parametrize(("dtype", "brought", "ids"), BROUGHT)
def test_a_repeated_call_is_the_call(plays, dtype, brought, ids):
    """Bit for bit what a layer without any record gives, with every argument elsewhere."""
    layer = build(dtype, with_table=ids == "table")
    first, *others = (draw(layer, seed, 9, brought) for seed in range(3))
    layer(**first)
    assert plays == []
    for number, arguments in enumerate(others, 1):
        y = layer(**arguments)
        assert len(plays) == number and (("out" in brought) <= (y is arguments.get("out")))
        kept = bits(y)
        assert kept == bits(build(dtype, with_table=ids == "table")(**arguments))
        assert not np.isnan(GPU.asnumpy(y).astype(np.float32)).any()


@on_gpu
@pytest.mark.parametrize("names", COMBINATIONS[1:], ids="+".join)
def test_a_repeated_call_of_a_framed_layer(plays, names):
    """Norms, latents, identity experts and a last bias, with a residual behind them."""
    layer = build("bfloat16", names)
    for number, arguments in enumerate(draw(layer, seed, 9, ("residual",)) for seed in range(3)):
        y = layer(**arguments)
        assert len(plays) == number
        assert bits(y) == bits(build("bfloat16", names)(**arguments))


@on_gpu
def test_strides_and_alignments_have_records_of_their_own(plays):
    """The same numbers from rows further apart, columns apart, and odd addresses; each served again as it was."""
    layer = build("bfloat16")
    plain = draw(layer, 0)["x"]
    flat = GPU.asarray(np.zeros(33 * HIDDEN + 8, BF16))
    odd = flat[3 : 3 + 33 * HIDDEN].reshape(33, HIDDEN)
    wide = GPU.asarray(np.zeros((66, 2 * HIDDEN), BF16))
    backward = GPU.asarray(np.zeros((33, HIDDEN), BF16))[::-1]
    views = [plain, odd, wide[::2, ::2], wide[:33, HIDDEN:], backward]
    expected = [bits(layer(plain))]
    for view in views[1:]:
        view[...] = plain
        expected.append(bits(layer(view)))
    assert plays == []
    assert expected[0] == expected[3]  # aligned rows: the same units
    for _ in range(2):
        for view, wanted in zip(views[::-1], expected[::-1], strict=True):
            view[...] = plain
            assert bits(layer(view)) == wanted
    assert len(plays) == 10


@on_gpu
def test_arrays_may_share_memory_in_a_record_and_not_behind_it(plays):
    """Tokens that are a weight of the layer, a residual and a result that are the tokens: names tell them apart."""
    layer, others = build("float32"), [draw(build("float32"), seed) for seed in (1, 2)]
    weight = layer.router_weight
    kept = weight.copy()
    layer(weight)
    for arguments in others:
        x = draw(layer, 5, num_tokens=EXPERTS)["x"]
        assert bits(layer(x)) == bits(build("float32")(x))
        y = layer(**arguments)
        assert bits(y) == bits(build("float32")(**arguments))
    assert bits(weight) == bits(kept)
    played = len(plays)
    x = draw(layer, 3)["x"]
    for _ in range(2):
        both, apart = x.copy(), x.copy()
        assert layer(both, residual=both, out=both) is both
        assert bits(both) == bits(layer(apart, residual=apart.copy(), out=apart.copy()))
    assert len(plays) == played + 3


@on_gpu
@pytest.mark.parametrize("repeated", [False, True])
def test_a_result_over_a_part_of_what_is_still_read_is_refused(repeated):
    """Rows of the residual would be overwritten before they are added; with identity experts those of x, too."""
    layer, identity = build("float32"), build("float32", ("num_identity_experts",))
    room = GPU.asarray(np.zeros((40, HIDDEN), np.float32))
    x, shifted, out = draw(layer, 0)["x"], room[1:34], room[:33]
    if repeated:
        layer(x, residual=x.copy(), out=out)
        identity(x, out=out)
    for case in (lambda: layer(x, residual=shifted, out=out), lambda: identity(shifted, out=out)):
        with pytest.raises(
            ValueError,
            match=r"^out: expected (residual itself or|memory that x has no part in).*, got an overlapping array$",
        ):
            case()
    layer(shifted, out=out)  # x has been read when the first row is written
    assert layer(x, residual=out, out=out) is out


@on_gpu
def test_refusals_are_the_same_behind_a_record():
    """What the door refuses it refuses later, too."""
    layer = build("bfloat16")
    arguments = draw(layer, 0, brought=("residual", "out"))
    for _ in range(2):
        layer(**arguments)
    x = arguments["x"]
    wrong = [
        (TypeError, "x: expected dtype bfloat16", {"x": x.astype(np.float32)}),
        (ValueError, "x: expected shape", {"x": x[:, :8]}),
        (TypeError, "x: expected a cupy array", {"x": GPU.asnumpy(x)}),
        (ValueError, "out: expected shape", {"out": x[:3].copy()}),
        (ValueError, "out: expected a C-contiguous array", {"out": GPU.asarray(np.zeros((66, HIDDEN), BF16))[::2]}),
        (TypeError, "residual: expected dtype bfloat16", {"residual": x.astype(np.float32)}),
        (ValueError, "residual: expected shape", {"residual": x[:1].copy()}),
        (ValueError, "input_ids: expected None", {"input_ids": x}),
    ]
    for error, message, changes in wrong:
        with pytest.raises(error, match=message):
            layer(**{**arguments, **changes})


@on_gpu
def test_a_residual_may_have_any_strides():
    """It is copied first; so it may even lie across the result."""
    layer = build("float32")
    x = draw(layer, 0)["x"]
    wide = GPU.asarray(np.random.default_rng(3).standard_normal((66, HIDDEN), np.float32))
    for residual in (wide[::2], wide[:33][::-1]):
        wanted = bits(layer(x, residual=residual.copy()))
        for _ in range(2):
            assert bits(layer(x, residual=residual)) == wanted
    out = wide[:33]
    wanted = bits(layer(x, residual=out[::-1].copy()))
    assert bits(layer(x, residual=out[::-1], out=out)) == wanted


@on_gpu
def test_a_call_that_does_more_than_launch_is_not_recorded(plays, monkeypatch):
    """An array made on the way would be another one the next time."""
    import cupy

    layer, call = build("float32"), LayerRouter.__call__

    def copying(router, x, logits, input_ids, num_experts, buffers):
        fresh = cupy.empty((x.shape[0], EXPERTS), np.float32)
        fresh.fill(0)
        return call(router, x, fresh, input_ids, num_experts, buffers)

    monkeypatch.setattr(LayerRouter, "__call__", copying)
    calls = [draw(layer, seed) for seed in range(3)]
    results = [bits(layer(**arguments)) for arguments in calls]
    assert plays == []
    monkeypatch.undo()
    zeros = GPU.asarray(np.zeros((33, EXPERTS), np.float32))
    assert results == [bits(build("float32")(**arguments, router_logits=zeros)) for arguments in calls]


@on_gpu
def test_records_end_with_the_memory_they_used(plays):
    """A larger batch brings a larger block; what was recorded on the old one is recorded anew."""
    layer = build("bfloat16")
    small, large = draw(layer, 0, 5), draw(layer, 1, 200)
    wanted = [bits(build("bfloat16")(**arguments)) for arguments in (small, large)]
    for expected_plays, arguments, expected in zip(
        (0, 1, 1, 1, 2, 3), (small, small, large, small, small, large), [wanted[i] for i in (0, 0, 1, 0, 0, 1)],
        strict=True,
    ):  # fmt: skip
        assert bits(layer(**arguments)) == expected
        assert len(plays) == expected_plays


@on_gpu
def test_only_the_last_kinds_are_kept(plays, monkeypatch):
    """The one that was used least recently goes."""
    monkeypatch.setattr(workspace, "MAX_TAPES", 3)
    layer = build("float32", max_tokens=8)
    calls = {num_tokens: draw(layer, num_tokens, num_tokens) for num_tokens in range(1, 6)}
    for num_tokens, expected in ((1, 0), (2, 0), (3, 0), (1, 1), (4, 1), (2, 1), (1, 2), (4, 3), (3, 3)):
        assert bits(layer(**calls[num_tokens])) == bits(build("float32")(**calls[num_tokens]))
        assert len(plays) == expected


@on_gpu
def test_other_parts_of_a_layer_end_its_records(plays):
    """A router that is put in the place of another is the one that routes."""
    layer, arguments = build("float32"), draw(build("float32"), 0)
    for _ in range(2):
        layer(**arguments)
    layer.router = cumoe.Router(TOP_K, renormalize=True, scale=3.0)
    other = build("float32")
    other.router = layer.router
    assert bits(layer(**arguments)) == bits(other(**arguments))
    assert len(plays) == 1


@on_gpu
@pytest.mark.parametrize("names", [(), ("input_norm", "num_identity_experts"), ("latent", "output_norm")], ids="+".join)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_later_call_allocates_its_result_alone(dtype, names):
    """Nothing where that is given: counted at the allocator, with every argument elsewhere."""
    import cupy

    layer = build(dtype, names)
    sizes, allocate = [], cupy.cuda.get_allocator()
    first, second, third = (draw(layer, seed, brought=("residual", "out")) for seed in range(3))
    layer(**first)
    layer(first["x"])

    def counted(size):
        sizes.append(size)
        return allocate(size)

    with cupy.cuda.using_allocator(counted):
        for arguments in (second, third, first):
            layer(**arguments)
            assert sizes == []
        y = layer(second["x"])
        assert sizes == [y.nbytes]


@on_gpu
def test_a_thread_that_has_used_no_gpu_repeats_a_call():
    """It has no context of its own when it comes; the current device is all it knows."""
    layer = build("bfloat16")
    arguments = draw(layer, 0, brought=("out",))
    layer(**arguments)
    wanted, failures = bits(arguments["out"]), []
    arguments["out"][...] = arguments["x"]

    def work():
        try:
            layer(**arguments)
        except BaseException as error:  # noqa: BLE001 - the thread's own; it is looked at below
            failures.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert failures == []
    assert bits(arguments["out"]) == wanted


@on_gpu
def test_streams_have_records_of_their_own(plays):
    """As they have memory of their own."""
    import cupy

    layer, arguments = build("bfloat16"), draw(build("bfloat16"), 0)
    streams = [nullcontext(), *(cupy.cuda.Stream(non_blocking=True) for _ in range(2))]
    wanted = bits(layer(**arguments))
    for repeats in range(3):
        for number, stream in enumerate(streams):
            with stream:
                assert bits(layer(**arguments)) == wanted
            assert len(plays) == max(1, 3 * repeats - 1 + number)


def test_the_cpu_half_records_nothing(plays):
    """There is nothing to launch."""
    layer = random_layer(np.random.default_rng(0), "float32")
    x, _, experts, _ = layer.build(CPU)
    moe = cumoe.MoE(cumoe.Router(2), experts, router_weight=np.ones((6, 72), np.float32))
    assert (moe(x) == moe(x)).all()
    assert plays == []
