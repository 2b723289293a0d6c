"""Every portable tile against the definition, at every awkward number of rows; each tile is forced.

Run by tests/test_cuda_on_cpu.py with plugin.py, never by itself: `cupy` is the fake one here.
"""

from dataclasses import replace
from functools import lru_cache

import numpy as np
import pytest
from support import DTYPES, GPU, assert_close, random_layer

import cumoe
from cumoe.gpu import config, grouped_gemm

pytestmark = pytest.mark.gpu

COUNTS = (0, 1, 7, 8, 9, 15, 16, 17, 63, 64, 65, 127, 128, 129, 0)
TILES = {f"{tile.engine}_{tile.block_m}": tile for tile in config.CONFIGS if tile.engine in ("mma", "simt")}
DTYPES_OF = {"mma": ("bfloat16", "float16"), "simt": ("float32",)}
LAYERS = {
    "silu": {"activation": "silu", "layout": "stacked"},
    "relu2": {"activation": "relu2", "layout": "ungated"},
    "gelu": {"activation": "gelu", "layout": "stacked"},
    "gelu_tanh": {"activation": "gelu_tanh", "layout": "ungated"},
    "gpt_oss": {"activation": "gpt_oss", "layout": "interleaved"},
    "relu": {"activation": "relu", "layout": "interleaved"},
    "clamped_after": {"activation": cumoe.Activation("silu", limit=0.5, clamp="after"), "layout": "stacked"},
}

each_tile = pytest.mark.parametrize("tile", TILES)
each_order = pytest.mark.parametrize("transposed", [False, True], ids=["inner_major", "row_major"])
each_tile_and_dtype = pytest.mark.parametrize(
    ("tile", "dtype"), [(name, dtype) for name, tile in TILES.items() for dtype in DTYPES_OF[tile.engine]]
)


def sizes_of(dtype):
    """Return (hidden_size, intermediate_size, shared sizes): aligned for tensor cores, else odd."""
    return (67, 37, (21,)) if dtype == "float32" else (136, 72, (24,))


@lru_cache
def ragged_layer(dtype, transposed, kind="silu", weight_on="output", counts=COUNTS):
    """Return a layer whose expert e has exactly counts[e] rows, in shuffled order. Not to be changed."""
    rng = np.random.default_rng(12)
    hidden_size, intermediate_size, shared_sizes = sizes_of(dtype)
    layer = random_layer(
        rng, dtype, num_tokens=sum(counts), hidden_size=hidden_size, intermediate_size=intermediate_size,
        num_experts=len(counts), top_k=1, shared_sizes=shared_sizes, gated_shared=True, biases=True,
        transposed=transposed, weight_on=weight_on, **LAYERS[kind],
    )  # fmt: skip
    ids = np.repeat(np.arange(len(counts), dtype=np.int32), counts)
    return replace(layer, topk_ids=rng.permutation(ids)[:, None])


@lru_cache
def expected(dtype, *options):
    """Return the layer by definition; the order of axes does not matter."""
    return ragged_layer(dtype, False, *options).expected()


@pytest.fixture
def force(monkeypatch):
    """Return a function that has every launch of a tile's engine use that tile; it gives the kernels launched since."""
    select, launch = grouped_gemm.select_config, grouped_gemm.launch

    def force_tile(name):
        seen = []

        def forced(engine, *sizes):
            return TILES[name] if engine == TILES[name].engine else select(engine, *sizes)

        def recorded(kernel, *arguments, **options):
            seen.append(kernel)
            launch(kernel, *arguments, **options)

        monkeypatch.setattr(grouped_gemm, "select_config", forced)
        monkeypatch.setattr(grouped_gemm, "launch", recorded)
        return seen

    return force_tile


def kernel_of(tile, dtype, transposed):
    """Return the name of the kernel that serves both products of an aligned layer."""
    engine, _, rows = tile.partition("_")
    if engine == "simt":
        return f"grouped_gemm_simt_{dtype}_{dtype}"
    return f"grouped_gemm_mma_{dtype}_{rows}_{'row_major' if transposed else 'inner_major'}"


@each_tile_and_dtype
@each_order
@pytest.mark.parametrize("kind", ["silu", "relu2"])
def test_ragged_rows(force, tile, dtype, transposed, kind):
    """Paired and single weights, both products, routed and shared experts, biases, gates."""
    seen = force(tile)
    y = ragged_layer(dtype, transposed, kind).run(GPU)
    assert_close(y, expected(dtype, kind), dtype, tile)
    assert seen == [kernel_of(tile, dtype, transposed)] * 2


@each_tile
@each_order
@pytest.mark.parametrize("kind", ["gelu", "gelu_tanh", "gpt_oss", "relu", "clamped_after"])
def test_activations_and_interleaved_pairs(force, tile, transposed, kind):
    """Every phi, both clamps, pairs side by side and half an array apart, and no pairs."""
    dtype = DTYPES_OF[TILES[tile].engine][0]
    counts = (1, 0, 17, 65)
    seen = force(tile)
    y = ragged_layer(dtype, transposed, kind, "output", counts).run(GPU)
    assert_close(y, expected(dtype, kind, "output", counts), dtype, f"{tile} {kind}")
    assert seen == [kernel_of(tile, dtype, transposed)] * 2


@each_tile
@pytest.mark.parametrize("weight_on", ["input", "activation"])
def test_weights_anywhere(force, tile, weight_on):
    """Factors of rows before the first bias, and after the activation."""
    dtype, counts = DTYPES_OF[TILES[tile].engine][0], (9, 0, 64, 129)
    seen = force(tile)
    y = ragged_layer(dtype, False, "silu", weight_on, counts).run(GPU)
    assert_close(y, expected(dtype, "silu", weight_on, counts), dtype, f"{tile} {weight_on}")
    assert seen == [kernel_of(tile, dtype, False)] * 2


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@each_order
def test_every_tile_gives_the_same_bits(force, dtype, transposed):
    """The order of sums does not depend on the tile."""
    layer, results = ragged_layer(dtype, transposed, "gpt_oss", "output", (3, 40, 0, 70)), set()
    tiles = [name for name, tile in TILES.items() if tile.engine == "mma"]
    for tile in tiles:
        force(tile)
        results.add(layer.run(GPU).tobytes())
    assert len(tiles) == 3
    assert len(results) == 1


@each_tile
@each_order
def test_nan_that_nobody_uses_stays_where_it_is(force, tile, transposed):
    """Experts without rows, and tokens without an expert."""
    dtype = DTYPES_OF[TILES[tile].engine][0]
    force(tile)
    layer = ragged_layer(dtype, transposed, "silu", "output", (5, 0, 33, 0, 66))
    experts = {k: part.copy(order="K") if isinstance(part, np.ndarray) else part for k, part in layer.experts.items()}
    layer = replace(layer, x=layer.x.copy(), topk_ids=layer.topk_ids.copy(), experts=experts, shared=[])
    unused = np.arange(len(layer.x)) % 5 == 0
    layer.topk_ids[unused] = -1
    clean = layer.run(GPU)
    layer.x[unused] = np.nan
    for name in ("w_gate_up", "w_down", "b_gate_up", "b_down"):
        layer.experts[name][[1, 3]] = np.nan
    spoiled = layer.run(GPU)
    assert spoiled.tobytes() == clean.tobytes()
    assert np.isfinite(clean.astype(np.float32)).all()
    assert not clean[unused].astype(np.float32).any()


@pytest.mark.parametrize("inner", [8, 16, 24, 56, 64, 72, 200])
@each_tile
@each_order
def test_inner_tails(force, tile, inner, transposed):
    """Less than a step, whole steps, and a tail; more steps than stages."""
    dtype = DTYPES_OF[TILES[tile].engine][0]
    seen = force(tile)
    rng = np.random.default_rng(inner)
    ids = rng.integers(0, 3, (20, 2)).astype(np.int32)
    x = rng.standard_normal((20, inner)).astype(DTYPES[dtype])
    w = rng.standard_normal((3, 24, inner)).astype(DTYPES[dtype])
    held = np.ascontiguousarray(w.swapaxes(1, 2)).swapaxes(1, 2) if transposed else w
    groups = cumoe.group(GPU.asarray(ids), 3)
    y = cumoe.grouped_gemm(GPU.asarray(x), GPU.asarray(held), groups, rows="tokens", dtype=np.float32)
    definition = cumoe.reference.grouped_gemm(x, w, cumoe.reference.group(ids, 3), rows="tokens")
    assert_close(GPU.asnumpy(y), definition, np.float32, f"{tile} inner {inner}")
    assert seen == [kernel_of(tile, dtype, transposed)]


@each_tile
@pytest.mark.parametrize("num_experts", [256, 257, 600, 1024])
def test_more_experts_than_threads(force, tile, num_experts):
    """A thread adds up the tiles of several experts, most of which have none."""
    dtype = DTYPES_OF[TILES[tile].engine][0]
    seen = force(tile)
    rng = np.random.default_rng(num_experts)
    ids = rng.integers(-1, num_experts + 1, (30, 2)).astype(np.int32)
    ids[:2, 0] = 0, num_experts - 1
    x, w = (rng.standard_normal(shape).astype(DTYPES[dtype]) for shape in ((30, 16), (num_experts, 8, 16)))
    groups = cumoe.group(GPU.asarray(ids), num_experts)
    y = cumoe.grouped_gemm(GPU.asarray(x), GPU.asarray(w), groups, rows="tokens", dtype=np.float32)
    definition = cumoe.reference.grouped_gemm(x, w, cumoe.reference.group(ids, num_experts), rows="tokens")
    assert_close(GPU.asnumpy(y), definition, np.float32, f"{tile} {num_experts} experts")
    assert seen == [kernel_of(tile, dtype, False)]
