"""The plan of a layer: the launches that really come, and numbers that follow from its sizes."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import BF16, CPU, DTYPES, random_layer
from whole_layers import COMBINATIONS, bits, build, draw, frame, on

import cumoe
from cumoe.gpu import compile as compile_module
from cumoe.gpu.config import Gpu
from cumoe.gpu.stand_in import StandIn
from cumoe.gpu.tape import Tape
from cumoe.layer.plan import HEADER, STAGES, Roofs

A100 = Gpu(108, 166_912, "mma")


def make(dtype="bfloat16", names=(), *, num_experts=6, top_k=2, hidden_size=72, intermediate_size=24, shared=(16, 40)):
    """Return a layer on the CPU."""
    rng = np.random.default_rng(0)
    width = 24 if "latent" in names else hidden_size
    sizes = {"num_tokens": 1, "top_k": top_k, "num_experts": num_experts, "intermediate_size": intermediate_size}
    inner = random_layer(rng, dtype, hidden_size=width, **sizes)
    inner.shared = random_layer(rng, dtype, hidden_size=hidden_size, shared_sizes=shared, gated_shared=True).shared
    _, _, experts, members = inner.build(CPU)
    parts = on(CPU, frame(rng, names, hidden_size, 24, DTYPES[dtype]))
    choices = num_experts + int(parts.get("num_identity_experts", 0))
    weight = np.zeros((choices, hidden_size), DTYPES[dtype])
    return cumoe.MoE(cumoe.Router(top_k), experts, members, router_weight=weight, **parts)


@given(st.data())
def test_a_stand_in_is_cut_like_an_array(data):
    """Shape, strides and address of any part by integers, slices and None."""
    shape = data.draw(st.lists(st.integers(1, 5), min_size=1, max_size=3))
    array = np.empty(shape, np.int32)
    view = array.swapaxes(0, -1)
    stand_in = StandIn(view.shape, view.dtype, view.strides, array.ctypes.data)
    items = []
    for size in view.shape[: data.draw(st.integers(0, len(shape)))]:
        slices = st.slices(size).map(lambda s, n=size: slice(*(s.indices(n)[:2]), abs(s.indices(n)[2])))
        items.append(data.draw(st.one_of(st.integers(-size, size - 1), slices)))
        if data.draw(st.booleans()):
            items.append(None)
    part, wanted = stand_in[tuple(items)], view[(*items, ...)]
    assert (part.shape, part.ndim, part.size, part.nbytes) == (wanted.shape, wanted.ndim, wanted.size, wanted.nbytes)
    walked = [
        (ours, theirs) for ours, theirs, n in zip(part.strides, wanted.strides, wanted.shape, strict=True) if n > 1
    ]
    assert all(ours == theirs for ours, theirs in walked)
    assert wanted.size == 0 or part.data.ptr == wanted.__array_interface__["data"][0]


def test_numbers_follow_from_the_sizes():
    """Every weight that is hit is read once, every product counted twice; bounds are those of the roofs."""
    layer = make(num_experts=16, top_k=4, hidden_size=512, intermediate_size=256, shared=(128,))
    roofs = Roofs(flops_per_s=1e12, bytes_per_s=1e9)
    plan = layer.plan(3, roofs=roofs)
    assert plan.experts_hit == round(16 * (1 - (12 / 16) ** 3)) == 9
    assert (plan.num_slots, plan.num_experts, plan.gpu) == (12, 16, Gpu())
    by_stage = {step.stage: step for step in plan.steps}
    assert list(by_stage) == ["router", "route, group", "shared gate", "experts", "combine"]
    experts = by_stage["experts"]
    assert experts.flops == 2 * 3 * 512 * (12 * 256 + 3 * 128)
    weights = 2 * 3 * 512 * (9 * 256 + 128)
    rows = 2 * (2 * 3 * 512 + 2 * 12 * 256 + 12 * 512 + 2 * 3 * 128 + 3 * 512)
    assert weights + rows < experts.num_bytes < weights + rows + 2000
    assert by_stage["router"].flops == 2 * 3 * 16 * 512
    for step in plan.steps:
        assert step.us == pytest.approx(max(step.num_bytes / 1e3, step.flops / 1e6))
        assert step.roof == ("memory" if step.num_bytes / 1e3 >= step.flops / 1e6 else "compute")
    assert plan.us == pytest.approx(sum(step.us for step in plan.steps))
    assert layer.plan(3, roofs=Roofs(1e6, 1e15)).steps[3].roof == "compute"


@pytest.mark.parametrize("gpu", [Gpu(), A100], ids=["H200", "A100"])
@pytest.mark.parametrize("names", COMBINATIONS, ids="+".join)
def test_every_layer_has_a_plan(names, gpu):
    """Whatever is around the experts; each stage has a name, each launch a line, nothing is left behind."""
    layer = make("bfloat16", names)
    for num_tokens in (1, 40, 5000):
        plan = layer.plan(num_tokens, gpu)
        lines = str(plan).splitlines()
        assert lines[-len(plan.steps) - 1] == HEADER and len({len(line) for line in lines[-len(plan.steps) - 2 :]}) == 1
        assert {step.stage for step in plan.steps} <= set(STAGES.values())
        assert [step.kernel.startswith("grouped_gemm_wgmma") for step in plan.steps].count(True) == 0 or gpu == Gpu()
        assert all(step.grid >= 1 and step.waves >= 1 and step.num_bytes > 0 for step in plan.steps)
        assert all(step.shared_bytes <= gpu.shared_bytes for step in plan.steps)
        assert f"{num_tokens}, {2 * num_tokens} slots" in lines[1]
    assert compile_module.rehearsal() is None
    x = np.zeros((2, 72), BF16)
    assert not np.isnan(layer(x).astype(np.float32)).any()  # the layer is as it was


def test_a_large_plan_takes_no_memory():
    """The largest batch that slots can count."""
    layer = make()
    largest = (2**31 - 1) // 2
    assert layer.plan(largest).workspace_bytes > largest * 72 * 2
    for wrong, error in ((0, ValueError), (largest + 1, ValueError), (1.0, TypeError)):
        with pytest.raises(error, match=r"^num_tokens: expected an int"):
            layer.plan(wrong)


LAUNCHED = [("float32", ()), *(("bfloat16", names) for names in (*COMBINATIONS[:6], ("input_norm", "latent")))]


@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "names"), LAUNCHED)
@pytest.mark.parametrize("num_tokens", [1, 300])
def test_a_plan_is_what_is_launched(monkeypatch, dtype, names, num_tokens):
    """Kernels, grids, blocks and shared memory, in order, on the GPU that is there; and the memory that is taken."""
    layer, launches, add = build(dtype, names), [], Tape.add
    monkeypatch.setattr(Tape, "add", lambda tape, launch, places: (launches.append(launch), add(tape, launch, places)))
    plan = layer.plan(num_tokens)
    assert launches == []
    layer(draw(layer, 0, num_tokens)["x"])
    done = [(each.name, each.config.grid[0], each.config.block[0], each.config.shared_bytes) for each in launches]
    assert [(step.kernel, step.grid, step.block, step.shared_bytes) for step in plan.steps] == done
    assert plan.workspace_bytes == layer.workspace_bytes(num_tokens)


@pytest.mark.gpu
def test_a_plan_for_another_gpu_leaves_this_one_alone():
    """What is described does not stick."""
    layer = build("bfloat16")
    arguments = draw(layer, 0)
    plans = [str(layer.plan(33)), str(layer.plan(33, Gpu())), str(layer.plan(33, A100))]
    wanted = bits(layer(**arguments))
    assert wanted == bits(build("bfloat16")(**arguments))
    assert plans == [str(layer.plan(33)), str(layer.plan(33, Gpu())), str(layer.plan(33, A100))]
