"""A captured forward: the bits of a plain call, on buffers that outlive whatever made them."""

import gc

import numpy as np
import pytest
from support import CPU, DTYPES, GPU, random_layer
from whole_layers import EXPERTS, HIDDEN, TOP_K, VOCABULARY, bits, build, draw

import cumoe


def fill(captured, arguments):
    """Write the arguments of a plain call into the buffers."""
    for name, array in arguments.items():
        getattr(captured, name)[...] = array


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_tokens", [1, 20])
def test_graph_replays_are_calls(dtype, num_tokens):
    """Other tokens, routed to other experts, at every replay; the result is the same array each time."""
    layer = build(dtype)
    captured = layer.capture(num_tokens)
    assert captured.x.shape == captured.y.shape == (num_tokens, HIDDEN)
    assert captured.x.dtype == captured.y.dtype == DTYPES[dtype]
    assert captured.router_logits is captured.input_ids is captured.residual is None
    assert not GPU.asnumpy(captured.x).any()
    for seed in range(3):
        arguments = draw(layer, seed, num_tokens)
        fill(captured, arguments)
        captured.y[...] = np.nan
        assert captured() is captured.y
        assert bits(captured.y) == bits(layer(**arguments))


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("names", "inputs", "with_table"),
    [
        ((), ("residual",), False),
        ((), ("router_logits",), False),
        ((), (), True),
        ((), ("router_logits", "input_ids", "residual"), True),
        (("input_norm", "num_identity_experts", "output_bias", "output_norm"), ("residual",), False),
        (("latent", "output_norm"), ("router_logits",), False),
    ],
)
def test_captured_inputs(names, inputs, with_table):
    """What is asked for, and what the layer needs anyway, is there and is read."""
    layer = build("bfloat16", names, with_table=with_table)
    captured = layer.capture(7, inputs)
    wanted = {*inputs} | ({"input_ids"} if with_table else set())
    there = {name for name in ("router_logits", "input_ids", "residual") if getattr(captured, name) is not None}
    assert there == wanted
    assert repr(captured).startswith("Captured(MoE(") and all(f"'{name}'" in repr(captured) for name in wanted)
    for seed in range(2):
        arguments = draw(layer, seed, 7, inputs)
        fill(captured, arguments)
        assert bits(captured()) == bits(layer(**arguments))


@pytest.mark.gpu
def test_captured_without_a_router_weight():
    """The logits are an input unasked."""
    made = build("float32")
    layer = cumoe.MoE(made.router, made.experts, made.shared)
    captured = layer.capture(5)
    assert captured.router_logits.shape == (5, EXPERTS) and captured.router_logits.dtype == np.float32
    arguments = draw(layer, 0, 5, ("router_logits",))
    fill(captured, arguments)
    assert bits(captured()) == bits(layer(**arguments))


@pytest.mark.gpu
def test_captured_layers_outlive_what_made_them():
    """The layer, its weights and its workspace; and larger calls in between move nothing."""
    import cupy

    layer = build("bfloat16", max_tokens=4)
    captured, others = layer.capture(6), [layer.capture(n) for n in (3, 9)]
    arguments = draw(layer, 1, 6)
    wanted = bits(build("bfloat16")(**arguments))
    layer(draw(layer, 2, 100)["x"])
    del layer, others
    gc.collect()
    poison = [cupy.full((1 << 12,), 255, np.uint8) for _ in range(50)]
    fill(captured, arguments)
    y = captured()
    assert bits(y) == wanted
    del captured, poison
    gc.collect()
    assert bits(y) == wanted  # the result is the reader's as long as it is held


@pytest.mark.gpu
def test_captured_replays_allocate_nothing():
    """And take no more memory than they say, however much the layer has reserved."""
    import cupy

    layer = build("bfloat16", max_tokens=5000)
    captured = layer.capture(8, ("residual",))
    buffers = 3 * 8 * HIDDEN * 2
    assert captured.num_bytes <= layer.workspace_bytes(8) + buffers + 4 * 512

    def refused(size):
        raise AssertionError(f"{size} bytes")

    with cupy.cuda.using_allocator(refused):
        for _ in range(3):
            captured()


@pytest.mark.parametrize("num_tokens", [1, 8])
def test_captured_layers_need_a_gpu(num_tokens):
    """A layer of NumPy arrays says so."""
    _, _, experts, _ = random_layer(np.random.default_rng(0), "float32").build(CPU)
    layer = cumoe.MoE(cumoe.Router(2), experts, router_weight=np.ones((6, 72), np.float32))
    with pytest.raises(ValueError, match=r"^capture: expected a layer on a GPU, got a numpy array on cpu$"):
        layer.capture(num_tokens)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((0,), ValueError, f"num_tokens: expected an int from 1 to {(2**31 - 1) // TOP_K}, got 0"),
        ((2**30,), ValueError, f"num_tokens: expected an int from 1 to {(2**31 - 1) // TOP_K}, got {2**30}"),
        ((4.0,), TypeError, "num_tokens: expected an int, got float"),
        ((4, "residual"), TypeError, "inputs: expected a sequence of words, got str"),
        ((4, ("weights",)), ValueError, "inputs: expected 'router_logits', 'input_ids' or 'residual', got 'weights'"),
        ((4, ("input_ids",)), ValueError, "inputs: expected no input_ids, since the router has no expert_table"),
    ],
)
def test_captured_refusals(arguments, error, message):
    """Each names the argument."""
    with pytest.raises(error, match=message):
        build("float32").capture(*arguments)


@pytest.mark.gpu
def test_a_captured_table_takes_any_id():
    """Ids beyond the table have no expert, as in a plain call."""
    layer = build("float32", with_table=True)
    captured = layer.capture(4)
    captured.input_ids[...] = GPU.asarray(np.array([-1, 0, VOCABULARY - 1, VOCABULARY], np.int32))
    captured.x[...] = draw(layer, 0, 4)["x"]
    wanted = layer(captured.x, input_ids=captured.input_ids)
    assert bits(captured()) == bits(wanted)
