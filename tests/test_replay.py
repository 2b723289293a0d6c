"""A call that is repeated is the call itself: when a record of launches serves and when it does not."""

import threading
from contextlib import nullcontext

import numpy as np
import pytest
from support import BF16, CPU, DTYPES, GPU, random_layer
from whole_layers import COMBINATIONS, EXPERTS, HIDDEN, TOP_K, bits, build, draw

import cumoe
from cumoe.gpu import workspace
from cumoe.gpu.layer_router import LayerRouter
from cumoe.gpu.tape import Tape


@pytest.fixture
def plays(monkeypatch):
    """Return the list of addresses with which tapes were played since."""
    seen, play = [], Tape.play
    monkeypatch.setattr(Tape, "play", lambda tape, addresses: (seen.append(addresses), play(tape, addresses))[1])
    return seen


ALL = ("router_logits", "residual", "out")
BROUGHT = [
    *(("bfloat16", brought, "learned") for brought in ((), ("router_logits",), ("residual",), ("out",))),
    *((dtype, ALL, ids) for dtype in DTYPES for ids in ("learned", "table")),
]


@pytest.mark.gpu
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


@pytest.mark.gpu
@pytest.mark.parametrize("names", COMBINATIONS[1:], ids="+".join)
def test_a_repeated_call_of_a_framed_layer(plays, names):
    """Norms, latents, identity experts and a last bias, with a residual behind them."""
    layer = build("bfloat16", names)
    for number, arguments in enumerate(draw(layer, seed, 9, ("residual",)) for seed in range(3)):
        y = layer(**arguments)
        assert len(plays) == number
        assert bits(y) == bits(build("bfloat16", names)(**arguments))


@pytest.mark.gpu
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


@pytest.mark.gpu
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


@pytest.mark.gpu
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


@pytest.mark.gpu
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


@pytest.mark.gpu
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


@pytest.mark.gpu
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


@pytest.mark.gpu
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


@pytest.mark.gpu
def test_only_the_last_kinds_are_kept(plays, monkeypatch):
    """The one that was used least recently goes."""
    monkeypatch.setattr(workspace, "MAX_TAPES", 3)
    layer = build("float32", max_tokens=8)
    calls = {num_tokens: draw(layer, num_tokens, num_tokens) for num_tokens in range(1, 6)}
    for num_tokens, expected in ((1, 0), (2, 0), (3, 0), (1, 1), (4, 1), (2, 1), (1, 2), (4, 3), (3, 3)):
        assert bits(layer(**calls[num_tokens])) == bits(build("float32")(**calls[num_tokens]))
        assert len(plays) == expected


@pytest.mark.gpu
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


@pytest.mark.gpu
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


@pytest.mark.gpu
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


@pytest.mark.gpu
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
