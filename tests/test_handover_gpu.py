"""Device arrays of torch and JAX: in without a copy, out without a copy, on streams of their own."""

import numpy as np
import pytest
from support import DTYPES, GPU, assert_close, gpu_is_there, random_layer

import cumoe

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not gpu_is_there(), reason="no CUDA device")]


def layer_of(dtype):
    """Return a layer with a gated shared expert, weights on the input."""
    return random_layer(
        np.random.default_rng(0), dtype, num_tokens=50, hidden_size=136, intermediate_size=72, shared_sizes=(40,),
        gated_shared=True, weight_on="input",
    )  # fmt: skip


class Handing:
    """A backend for `Layer.build` that converts with a foreign library."""

    def __init__(self, convert):
        self.asarray = convert


@pytest.mark.parametrize("dtype", DTYPES)
def test_torch_on_the_device(dtype):
    """Weights are views of the tensors, the result is one of CuPy's arrays seen by torch, `out` is written in place."""
    torch = pytest.importorskip("torch")

    def tensor(array):
        wide = array.astype(np.float32) if array.dtype.name == "bfloat16" else array
        return torch.from_numpy(np.ascontiguousarray(wide)).to(getattr(torch, array.dtype.name)).cuda()

    arrays = layer_of(dtype)
    x, routing, experts, shared = arrays.build(Handing(tensor))
    assert (experts.kind.library, experts.kind.device) == ("torch", "cuda:0")
    y = cumoe.moe(x, routing, experts, shared, weight_on="input")
    assert (type(y), y.dtype, y.device) == (torch.Tensor, x.dtype, x.device)
    assert_close(y.float().cpu().numpy(), arrays.expected(), dtype)
    assert (y.float().cpu().numpy() == arrays.run(GPU).astype(np.float32)).all()
    out = torch.full_like(x, torch.nan)
    assert cumoe.moe(x, routing, experts, shared, weight_on="input", out=out) is out
    assert torch.equal(out, y)


def test_torch_memory_is_viewed_both_ways():
    """The array that CuPy sees begins where the tensor begins, and so does the tensor that comes back."""
    torch = pytest.importorskip("torch")
    weights = torch.randn(3, 16, 64, device="cuda"), torch.randn(3, 64, 8, device="cuda")
    experts = cumoe.Experts(*weights)
    assert experts.weights.w_gate_up.data.ptr == weights[0].data_ptr()
    assert experts.weights.w_down.data.ptr == weights[1].data_ptr()
    groups = cumoe.group(torch.zeros((4, 1), dtype=torch.int64, device="cuda"), 3)
    assert groups.permutation.is_cuda and groups.permutation.tolist() == [0, 1, 2, 3]


def test_torch_work_on_another_stream_is_waited_for():
    """Tokens that torch is still writing on its own stream are complete when they are read, and so is the result."""
    torch = pytest.importorskip("torch")
    arrays = layer_of("float32")
    _, routing, experts, shared = arrays.build(Handing(lambda array: torch.from_numpy(array.copy()).cuda()))
    expected = arrays.run(GPU)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        x = torch.full(arrays.x.shape, torch.nan, device="cuda")
        torch.cuda._sleep(100_000_000)  # about 50 ms on the stream, before the tokens are there
        x.copy_(torch.from_numpy(arrays.x).cuda())
        y = cumoe.moe(x, routing, experts, shared, weight_on="input") + 0.0
        assert (y.cpu().numpy() == expected).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_jax_on_the_device(jax, dtype):
    """The result is a JAX array on the GPU; a JAX array is no output."""
    try:
        device = jax.devices("cuda")[0]
    except RuntimeError as error:
        pytest.skip(f"JAX without CUDA: {error}")
    arrays = layer_of(dtype)
    x, routing, experts, shared = arrays.build(Handing(lambda array: jax.device_put(array, device)))
    y = cumoe.moe(x, routing, experts, shared, weight_on="input")
    assert isinstance(y, jax.Array) and y.devices() == {device} and y.dtype == x.dtype
    assert (np.asarray(y).astype(np.float32) == arrays.run(GPU).astype(np.float32)).all()
    with pytest.raises(ValueError, match=r"^out: expected a writable array, got a read-only one$"):
        cumoe.moe(x, routing, experts, shared, weight_on="input", out=jax.device_put(np.zeros_like(arrays.x), device))
