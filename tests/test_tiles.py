"""Every Hopper tile against the definition, at every awkward number of rows; each tile is forced."""

from dataclasses import replace
from functools import lru_cache
from types import SimpleNamespace

import few_examples
import numpy as np
import pytest
from support import DTYPES, GPU, assert_close, gpu_is_there, random_layer

import cumoe
from cumoe.gpu import config, grouped_gemm
from cumoe.gpu.compile import has_wgmma

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not (gpu_is_there() and has_wgmma(0)), reason="no GPU that the Hopper kernels serve"),
]

EVERY_COUNT = (
    0, 1, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129, 143, 144, 145, 191, 192, 193, 255, 289, 433,
)  # fmt: skip
SOME_COUNTS = (0, 1, 8, 17, 33, 65, 129, 145, 193, 289)
COUNTS = SOME_COUNTS if few_examples.wanted else EVERY_COUNT
"""Rows of the experts; under compute-sanitizer a quarter of all."""

FEW = (0, 1, 8, 31)  # fewer tiles than SMs, whatever the tile
TILES = {tile.name: tile for tile in config.CONFIGS if tile.engine == "wgmma" and tile.slots == "any"}
"""Those that serve any number of slots; of the other one see test_few_slots.py and test_dispatch_sweep.py."""

LAYERS = {
    "silu": {"activation": "silu", "layout": "stacked"},
    "relu2": {"activation": "relu2", "layout": "ungated"},
    "gelu": {"activation": "gelu", "layout": "stacked"},
    "gelu_tanh": {"activation": "gelu_tanh", "layout": "stacked"},
    "ungated_gelu": {"activation": "gelu", "layout": "ungated"},
    "gpt_oss": {"activation": "gpt_oss", "layout": "interleaved"},
    "interleaved": {"activation": "silu", "layout": "interleaved"},
    "clamped_after": {"activation": cumoe.Activation("silu", limit=0.5, clamp="after"), "layout": "stacked"},
}

each_tile = pytest.mark.parametrize("tile", TILES)
each_order = pytest.mark.parametrize("order", ["inner_major", "row_major"])
each_dtype = pytest.mark.parametrize("dtype", ["bfloat16", "float16"])


@lru_cache
def ragged_layer(dtype, order, kind="silu", counts=COUNTS, weight_on="output", shared_sizes=(72,)):
    """Return a layer whose expert e has exactly counts[e] rows, in shuffled order. Not to be changed: see `copied`."""
    rng = np.random.default_rng(11)
    layer = random_layer(
        rng, dtype, num_tokens=sum(counts), hidden_size=200, intermediate_size=136, num_experts=len(counts), top_k=1,
        shared_sizes=shared_sizes, biases=True, transposed=order == "row_major", weight_on=weight_on, **LAYERS[kind],
    )  # fmt: skip
    ids = np.repeat(np.arange(len(counts), dtype=np.int32), counts)
    return replace(layer, topk_ids=rng.permutation(ids)[:, None])


@lru_cache
def expected(dtype, *options):
    """Return the layer by definition; the order of axes does not matter."""
    return ragged_layer(dtype, "inner_major", *options).expected()


def copied(layer):
    """Return a layer whose tokens, ids and experts may be changed; strides stay."""
    experts = {k: part.copy(order="K") if isinstance(part, np.ndarray) else part for k, part in layer.experts.items()}
    return replace(layer, x=layer.x.copy(), topk_ids=layer.topk_ids.copy(), experts=experts)


@pytest.fixture
def force(monkeypatch):
    """Return a function that makes every Hopper launch use one tile; it gives what was launched since."""
    select, launch = grouped_gemm.select_config, grouped_gemm.launch

    def force_tile(name):
        seen = SimpleNamespace(engines=[], kernels=[])

        def forced(engine, *arguments):
            seen.engines.append(engine)
            return TILES[name] if engine == "wgmma" else select(engine, *arguments)

        def recorded(kernel, *arguments, **options):
            seen.kernels.append(kernel)
            launch(kernel, *arguments, **options)

        monkeypatch.setattr("cumoe.gpu.grouped_gemm.select_config", forced)
        monkeypatch.setattr("cumoe.gpu.grouped_gemm.launch", recorded)
        return seen

    return force_tile


def check_chosen(seen, tile, dtype, order, runs=1):
    """Fail unless both projections, routed and shared together, ran in one launch on this tile and nothing else did."""
    assert seen.engines == ["wgmma"] * runs
    assert seen.kernels == [f"grouped_gemm_wgmma_{dtype}_{order}_{tile}"] * runs


def fill_pool_with_nan():
    """Let CuPy's pool hand out memory that is NaN in every dtype, so that what nobody wrote shows."""
    import cupy

    cupy.full(64 << 20, 255, np.uint8)


@each_tile
@each_dtype
@each_order
@pytest.mark.parametrize("kind", ["silu", "relu2"])
def test_ragged_rows(force, tile, dtype, order, kind):
    """Paired and single weights, both projections, routed and shared experts, biases."""
    seen = force(tile)
    fill_pool_with_nan()
    y = ragged_layer(dtype, order, kind).run(GPU)
    assert_close(y, expected(dtype, kind), dtype, tile)
    check_chosen(seen, tile, dtype, order)


@each_order
@pytest.mark.parametrize(("tile", "rows"), [("2x144x256", 2305), ("2x192x256", 4230)])
def test_a_run_without_rows_keeps_step(force, tile, rows, order):
    """The second block of a cluster has nothing to store, but half of the weights to bring, in both products."""
    seen = force(tile)
    fill_pool_with_nan()
    counts = (rows, 3, 0, 150)
    y = ragged_layer("bfloat16", order, "silu", counts).run(GPU)
    assert_close(y, expected("bfloat16", "silu", counts), "bfloat16", tile)
    check_chosen(seen, tile, "bfloat16", order)


@each_tile
@each_order
@pytest.mark.parametrize("kind", ["gelu", "gelu_tanh", "ungated_gelu", "gpt_oss", "interleaved", "clamped_after"])
def test_activations_and_interleaved_pairs(force, tile, order, kind):
    """Through the quick epilogue and the slow one; row-major interleaved pairs come as single rows."""
    seen = force(tile)
    y = ragged_layer("bfloat16", order, kind).run(GPU)
    assert_close(y, expected("bfloat16", kind), "bfloat16", f"{tile} {kind}")
    check_chosen(seen, tile, "bfloat16", order)


@each_tile
@pytest.mark.parametrize("kind", ["silu", "gelu"])
@pytest.mark.parametrize("weight_on", ["input", "activation", "output"])
def test_weights_anywhere(force, tile, kind, weight_on):
    """Factors of rows before the first bias, after the activation and after the second bias, in both epilogues."""
    seen = force(tile)
    y = ragged_layer("bfloat16", "inner_major", kind, COUNTS, weight_on).run(GPU)
    assert_close(y, expected("bfloat16", kind, COUNTS, weight_on), "bfloat16", f"{tile} {weight_on}")
    check_chosen(seen, tile, "bfloat16", "inner_major")


@each_tile
@each_dtype
@each_order
def test_a_few_rows(force, tile, dtype, order):
    """There are more SMs than tiles."""
    seen = force(tile)
    y = ragged_layer(dtype, order, "silu", FEW).run(GPU)
    assert_close(y, expected(dtype, "silu", FEW), dtype, tile)
    check_chosen(seen, tile, dtype, order)


@each_dtype
@each_order
@pytest.mark.parametrize("kind", ["silu", "relu2", "gpt_oss"])
def test_every_tile_gives_the_same_bits(force, dtype, order, kind):
    """The order of sums does not depend on the tile: dispatch, which comes first here, changes speed alone."""
    layer = ragged_layer(dtype, order, kind)
    own_choice, differing = layer.run(GPU).tobytes(), []
    for tile in TILES:
        seen = force(tile)
        if layer.run(GPU).tobytes() != own_choice:
            differing.append(tile)
        check_chosen(seen, tile, dtype, order)
    assert differing == []


@each_tile
@each_order
@pytest.mark.parametrize("shared_sizes", [(), (72,)])
def test_nan_that_nobody_uses_stays_where_it_is(force, tile, order, shared_sizes):
    """Experts without rows, and tokens without an expert: their own rows are what the shared expert makes of them."""
    seen = force(tile)
    layer = copied(ragged_layer("bfloat16", order, "silu", COUNTS, "output", shared_sizes))
    unused = np.arange(len(layer.x)) % 5 == 0
    layer.topk_ids[unused] = -1
    clean = layer.run(GPU)
    without_rows = np.bincount(layer.topk_ids[~unused, 0], minlength=len(COUNTS)) == 0
    assert without_rows.any()
    layer.x[unused] = np.nan
    for name in ("w_gate_up", "w_down", "b_gate_up", "b_down"):
        layer.experts[name][without_rows] = np.nan
    fill_pool_with_nan()
    spoiled = layer.run(GPU)
    assert spoiled[~unused].tobytes() == clean[~unused].tobytes(), tile
    own = spoiled[unused].astype(np.float32)
    assert np.isnan(own).all() if shared_sizes else not own.any()
    check_chosen(seen, tile, "bfloat16", order, runs=2)


@pytest.mark.parametrize("tile", config.ALTERNATING_TILES)
@each_order
@pytest.mark.parametrize("shared_sizes", [(72,), (1544,), (136, 392, 520)])
def test_taking_turns_changes_no_bit(monkeypatch, force, tile, order, shared_sizes):
    """With fewer tiles of shared experts than of routed ones, more, and of several experts."""
    seen, turns = force(tile), []
    monkeypatch.setattr("cumoe.gpu.grouped_gemm.alternates", lambda *_: turns[-1])
    layer = ragged_layer("bfloat16", order, "silu", COUNTS, "input", shared_sizes)
    results = []
    for turns_are_taken in (False, True):
        turns.append(turns_are_taken)
        fill_pool_with_nan()
        results.append(layer.run(GPU))
    assert_close(results[1], expected("bfloat16", "silu", COUNTS, "input", shared_sizes), "bfloat16", tile)
    assert results[0].tobytes() == results[1].tobytes()
    check_chosen(seen, tile, "bfloat16", order, runs=2)


@each_tile
def test_a_graph_gives_the_same_bits_at_every_replay(force, tile):
    """Twenty replays of one capture; each counts its tiles from zero."""
    import cupy

    seen = force(tile)
    layer = ragged_layer("bfloat16", "inner_major")
    logits = np.full((len(layer.x), len(COUNTS)), -8, np.float32)
    np.put_along_axis(logits, layer.topk_ids, 8, axis=1)
    x, _, experts, shared = layer.build(GPU)
    logits, poison = GPU.asarray(logits), GPU.asarray(np.full_like(layer.x, np.nan))
    made = cumoe.MoE(cumoe.Router(top_k=1, renormalize=True), experts, shared)
    cupy.cuda.Device().synchronize()
    stream = cupy.cuda.Stream(non_blocking=True)
    with stream:
        y = poison.copy()
        made(x, logits, out=y)
        wanted = GPU.asnumpy(y)
        stream.synchronize()
        stream.begin_capture()
        made(x, logits, out=y)
        graph = stream.end_capture()
        for replay in range(20):
            y[...] = poison
            graph.launch(stream)
            stream.synchronize()
            assert GPU.asnumpy(y).tobytes() == wanted.tobytes(), (tile, replay)
    ones = replace(layer, topk_weights=np.ones_like(layer.topk_weights))
    assert_close(wanted, ones.run(GPU), "bfloat16", tile)
    check_chosen(seen, tile, "bfloat16", "inner_major", runs=2)  # the second call of a kind decides nothing


@each_tile
def test_more_stacks_and_tiles_than_one_launch_takes(force, tile):
    """Four launches, two for each projection; each deals out more tiles than it has blocks."""
    seen = force(tile)
    layer = ragged_layer("bfloat16", "inner_major", "silu", COUNTS, "output", (136, 392) * 7)
    fill_pool_with_nan()
    y = layer.run(GPU)
    few = slice(3, None, 100)  # the rows whose definition is computed
    some = replace(layer, x=layer.x[few], topk_ids=layer.topk_ids[few], topk_weights=layer.topk_weights[few])
    assert y.dtype == DTYPES["bfloat16"]
    assert_close(y[few], some.expected(), "bfloat16", tile)
    assert seen.engines == ["wgmma"] * 4
