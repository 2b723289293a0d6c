"""What a few families have around the experts, against its definition: norms, latents, identity experts, a bias."""

import numpy as np
import pytest
from support import BF16, CPU, DTYPES, assert_close, random_layer
from whole_layers import COMBINATIONS, PARTS, frame, on

import cumoe


@pytest.fixture
def rng():
    return np.random.default_rng(11)


def build(backend, layer, parts, rng, hidden_size):
    """Return (MoE, its router weight in NumPy)."""
    _, _, experts, shared = layer.build(backend)
    num_choices = experts.num_experts + parts.get("num_identity_experts", 0)
    weight = (rng.standard_normal((num_choices, hidden_size)) * hidden_size**-0.5).astype(layer.x.dtype)
    router = cumoe.Router(3, renormalize=True)
    return cumoe.MoE(router, experts, shared, router_weight=backend.asarray(weight), **on(backend, parts)), weight


def by_definition(layer, parts, weight, x):
    """Return the layer in float64."""
    parts = on(CPU, parts)
    norm = parts.pop("input_norm", None)
    u = x.astype(np.float64) if norm is None else cumoe.reference.over_rms(x, norm.eps)
    v = u if norm is None else u * norm.weight
    if norm is not None and x.dtype != np.float32:
        v = v.astype(x.dtype)  # the experts read the dtype of x
    routing = cumoe.reference.route(u @ weight.astype(np.float64).T, cumoe.Router(3, renormalize=True))
    _, _, experts, shared = layer.build(CPU)
    return cumoe.reference.moe(v, routing, experts, shared, **parts)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shared_sizes", [(), (16, 40)], ids=["alone", "shared"])
@pytest.mark.parametrize("names", COMBINATIONS, ids="+".join)
def test_a_framed_layer_is_its_definition(backend, rng, names, shared_sizes, dtype):
    """Each part alone and several together, with shared experts and without."""
    dtype, hidden_size, latent_size = DTYPES[dtype], 72, 24
    width = latent_size if "latent" in names else hidden_size
    layer = random_layer(rng, dtype, hidden_size=width, num_experts=6, top_k=3)
    wide = random_layer(rng, dtype, hidden_size=hidden_size, num_tokens=33, shared_sizes=shared_sizes)
    layer.shared, layer.x = wide.shared, wide.x
    parts = frame(rng, names, hidden_size, latent_size, dtype)
    moe, weight = build(backend, layer, parts, rng, hidden_size)
    assert all((name in repr(moe)) == (name in names) for name in PARTS)
    y = backend.asnumpy(moe(backend.asarray(layer.x)))
    assert y.dtype == dtype
    wanted = by_definition(layer, parts, weight, layer.x)
    assert_close(y, wanted, dtype, "+".join(names))
    residual = rng.standard_normal(layer.x.shape).astype(dtype)
    y = backend.asnumpy(moe(backend.asarray(layer.x), residual=backend.asarray(residual)))
    assert_close(y, wanted + residual.astype(np.float64), dtype, "residual")


@pytest.mark.parametrize("names", [("latent", "output_norm"), ("num_identity_experts",), ("input_norm",)], ids="+".join)
def test_strides_out_and_no_tokens(backend, rng, names):
    """Any strides of x; the result may be written over x; zero tokens are a batch too; the same bits each time."""
    hidden_size, latent_size = 40, 16
    layer = random_layer(rng, "float32", hidden_size=latent_size if "latent" in names else hidden_size, top_k=3)
    parts = frame(rng, names, hidden_size, latent_size, np.dtype(np.float32))
    moe, weight = build(backend, layer, parts, rng, hidden_size)
    x = rng.standard_normal((hidden_size, 21), np.float32).T
    y = moe(backend.asarray(x))
    assert_close(backend.asnumpy(y), by_definition(layer, parts, weight, x), np.float32)
    out = backend.asarray(np.ascontiguousarray(x))
    y = backend.asnumpy(moe(out))
    assert moe(out, out=out) is out
    np.testing.assert_array_equal(backend.asnumpy(out), y)
    assert moe(backend.asarray(x[:0])).shape == (0, hidden_size)


def test_identity_experts_do_not_spread_nan(backend, rng):
    """A token that has none is not multiplied by 0; one whose choices are all identities is a multiple of itself."""
    layer = random_layer(rng, "float32", hidden_size=40, num_experts=6, num_tokens=2, shared_sizes=())
    moe, _ = build(backend, layer, {"num_identity_experts": 3}, rng, 40)
    x = rng.standard_normal((2, 40), np.float32)
    logits = np.full((2, 9), -50, np.float32)
    logits[0, 6:] = 3, 2, 1
    logits[1, :3] = 3, 2, 1
    y = backend.asnumpy(moe(backend.asarray(x), backend.asarray(logits)))
    np.testing.assert_allclose(y[0], x[0], rtol=1e-6)  # weights of a row sum to 1
    x[1] = np.inf
    with np.errstate(invalid="ignore"):
        y = backend.asnumpy(moe(backend.asarray(x), backend.asarray(logits)))
    np.testing.assert_allclose(y[0], x[0], rtol=1e-6)
    assert np.isnan(y[1]).all()


@pytest.mark.gpu
def test_a_framed_layer_can_be_captured(rng):
    """Its kernels are compiled when it is made, its memory is its own."""
    cupy = pytest.importorskip("cupy")
    from support import GPU

    names = ("input_norm", "latent", "output_bias", "output_norm")
    layer = random_layer(rng, BF16, hidden_size=64, num_experts=6, top_k=3)
    layer.shared = random_layer(rng, BF16, hidden_size=128, shared_sizes=(64,)).shared
    moe, _ = build(GPU, layer, frame(rng, names, 128, 64, BF16), rng, 128)
    x = GPU.asarray(rng.standard_normal((33, 128)).astype(BF16))
    y = cupy.zeros(x.shape, x.dtype)
    cupy.cuda.Device().synchronize()  # the next stream waits for no other
    stream = cupy.cuda.Stream(non_blocking=True)
    with stream:
        expected = moe(x)
        stream.begin_capture()
        moe(x, out=y)
        graph = stream.end_capture()
        graph.launch(stream)
        stream.synchronize()
    np.testing.assert_array_equal(cupy.asnumpy(y).view(np.uint16), cupy.asnumpy(expected).view(np.uint16))


def refusals():
    """Return (changes of the arguments, error, message)."""
    norm = {"weight": np.ones(40, np.float32)}
    wide = {"w_in": np.ones((40, 48), np.float32), "w_out": np.ones((48, 40), np.float32)}
    return [
        ({"input_norm": cumoe.RMSNorm(np.ones(8))}, ValueError, r"input_norm: .*hidden_size=40.*got \(8,\)"),
        ({"output_norm": "rms"}, TypeError, r"output_norm: expected a cumoe.RMSNorm, got str"),
        ({"output_bias": np.ones(39)}, ValueError, r"output_bias: .*hidden_size=40.*got \(39,\)"),
        ({"num_identity_experts": -1}, ValueError, r"num_identity_experts: expected at least 0, got -1"),
        ({"num_identity_experts": 2, "weight_on": "input"}, ValueError, r"num_identity_experts: expected weight_on="),
        ({"latent": norm}, TypeError, r"latent: expected a cumoe.Latent, got dict"),
        ({"latent": cumoe.Latent(wide["w_out"], wide["w_in"])}, ValueError, r"latent: expected latent_size=40"),
        (
            {"latent": cumoe.Latent(**{k: v.astype(np.float16) for k, v in wide.items()})}, TypeError,
            r"latent: expected dtype float32, like experts, got float16",
        ),
    ]  # fmt: skip


@pytest.mark.parametrize(("changes", "error", "message"), refusals())
def test_parts_that_do_not_fit_are_refused(rng, changes, error, message):
    _, _, experts, _ = random_layer(rng, "float32", hidden_size=40).build(CPU)
    with pytest.raises(error, match=message):
        cumoe.MoE(cumoe.Router(2), experts, **changes)


@pytest.mark.parametrize(("make", "error", "message"), [
    (lambda: cumoe.RMSNorm(np.ones((2, 2))), ValueError, r"weight: expected 1 dimension \(hidden_size\)"),
    (lambda: cumoe.RMSNorm(np.ones(2, int)), TypeError, r"weight: expected dtype"),
    (lambda: cumoe.RMSNorm(np.ones(2), -1.0), ValueError, r"eps: expected a number of at least 0"),
    (lambda: cumoe.Latent(np.ones((2, 3)), np.ones((3, 2))), TypeError, r"w_in: expected dtype float32"),
    (lambda: cumoe.Latent(np.ones((2, 3), "f"), np.ones((2, 3), "f")), ValueError, r"w_out: expected shape .*3.*2"),
    (lambda: cumoe.Latent(np.ones((2, 3), "f"), np.ones((3, 2), "e")), TypeError, r"w_out: expected dtype float32"),
])  # fmt: skip
def test_nouns_are_checked_when_they_are_made(make, error, message):
    with pytest.raises(error, match=message):
        make()
