"""Every tile that dispatch can choose, found by asking dispatch, against float64.

test_tiles.py and cuda_on_cpu/portable_tiles.py look closer at the tiles of one engine; here none is left out, on
whatever GPU this runs: on Hopper the kernels for other GPUs are launched too.
"""

import re
from dataclasses import replace
from functools import cache
from itertools import product

import numpy as np
import pytest
from support import GPU, assert_close, gpu_is_there, random_layer

from cumoe.gpu import config, grouped_gemm, sources
from cumoe.gpu.compile import has_wgmma
from cumoe.gpu.config import StackSizes

ENGINES = ("wgmma", "mma", "simt")
COUNTS = {"any": (0, 1, 9, 17, 65, 130, 0, 40), "few": (0, 1, 9, 0, 17, 3)}
INNER = (512, 4096)
KINDS = {
    "silu": {"activation": "silu", "layout": "stacked"},
    "gpt_oss": {"activation": "gpt_oss", "layout": "interleaved"},
    "relu2": {"activation": "relu2", "layout": "ungated"},
}


@cache
def reachable(engine):
    """Return every tile, in every form, that dispatch gives for some stacks on some GPU."""
    found = set()
    rows = (1, 2, 4, 5, 16, 17, 24, 25, 64, 65, 128, 129, 200, 384, 385, 2000)
    for num_experts, mean, width in product((1, 8, 256), rows, (64, 768, 4096, 28672)):
        routed = StackSizes(num_experts, num_experts * mean, width, 64)
        for shared in ((), (StackSizes(1, 64, width, 64),), (StackSizes(1, 4096, 4 * width, 64),)):
            sizes = (routed, *shared)
            found.add(config.select_config(engine, (sizes,)))
            for inner, num_slots in product(INNER, (0, 1)):
                second = tuple(size._replace(weight_rows=64, inner=inner) for size in sizes)
                found.add(config.select_config(engine, (sizes, second), num_slots))
    return sorted(found)


def name_of(tile):
    """Return the name of a test with this tile."""
    return f"{tile.engine}-{tile.name}-{tile.stages}x{tile.blocks_per_sm}"


ALL = [tile for engine in ENGINES for tile in reachable(engine)]


@pytest.mark.parametrize("engine", ENGINES)
def test_no_tile_is_out_of_reach(engine):
    """Each entry of the table is chosen for something, and nothing is chosen that is not in it, but for its form."""
    table = {tile for tile in config.CONFIGS if tile.engine == engine}
    forms = {tile.alone() for tile in table if tile.slots == "few"}
    assert set(reachable(engine)) == table | forms


@cache
def ragged_layer(dtype, order, kind, odd, slots):
    """Return a layer whose expert e has exactly COUNTS[e] rows, in shuffled order; odd: no tensor core reads it."""
    rng, counts = np.random.default_rng(13), COUNTS[slots]
    hidden_size, intermediate_size, shared = (67, 37, 21) if odd else (136, 72, 40)
    layer = random_layer(
        rng, dtype, num_tokens=sum(counts), hidden_size=hidden_size, intermediate_size=intermediate_size,
        num_experts=len(counts), top_k=1, shared_sizes=(shared,), biases=True, transposed=order == "row_major",
        weight_on="input", **KINDS[kind],
    )  # fmt: skip
    ids = np.repeat(np.arange(len(counts), dtype=np.int32), counts)
    return replace(layer, topk_ids=rng.permutation(ids)[:, None])


@cache
def expected(dtype, kind, odd, slots):
    """Return the layer by definition; the order of axes does not matter."""
    return ragged_layer(dtype, "inner_major", kind, odd, slots).expected()


def kernel_of(tile, dtype, order):
    """Return the name of the kernel that has to serve."""
    if tile.engine == "simt":
        return f"grouped_gemm_simt_{dtype}_{dtype}"
    shape = f"{order}_{tile.name}" if tile.engine == "wgmma" else f"{tile.block_m}_{order}"
    return f"grouped_gemm_{tile.engine}_{dtype}_{shape}"


def run_forced(monkeypatch, tile, layer):
    """Run a layer on one tile; return the result and the names of the kernels that were launched."""
    launched, launch = set(), grouped_gemm.launch

    def recorded(kernel, *arguments, **options):
        launched.add(kernel)
        launch(kernel, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(grouped_gemm, "select_config", lambda engine, *_: forced(tile, engine))
        patch.setattr(grouped_gemm, "launch", recorded)
        if tile.engine != "wgmma":
            patch.setattr("cumoe.gpu.stacks.has_wgmma", lambda device: False)
            patch.setattr("cumoe.gpu.experts.has_wgmma", lambda device: False)
        return layer.run(GPU), launched


def forced(tile, engine):
    """Return the tile, or any other of an engine that it does not serve."""
    return tile if engine == tile.engine else next(entry for entry in config.CONFIGS if entry.engine == engine)


def dtypes_of(tile):
    return ("bfloat16", "float16", "float32") if tile.engine == "simt" else ("bfloat16", "float16")


@pytest.mark.gpu
@pytest.mark.skipif(not gpu_is_there(), reason="no CUDA device")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("order", ["inner_major", "row_major"])
@pytest.mark.parametrize(
    ("tile", "dtype"), [pytest.param(t, d, id=f"{name_of(t)}-{d}") for t in ALL for d in dtypes_of(t)]
)
def test_every_tile_that_dispatch_can_choose(monkeypatch, tile, dtype, order, kind):
    """Each of its kernels, in each form, with routed and shared experts."""
    if tile.engine == "wgmma" and not has_wgmma(0):
        pytest.skip("no GPU that the Hopper kernels serve")
    odd = tile.engine == "simt"
    y, launched = run_forced(monkeypatch, tile, ragged_layer(dtype, order, kind, odd, tile.slots))
    assert_close(y, expected(dtype, kind, odd, tile.slots), dtype, name_of(tile))
    wanted = kernel_of(tile, dtype, order)
    # Where float32 units serve, hidden rows are float32 and a kernel of two types reads them.
    second = {f"grouped_gemm_simt_float32_{dtype}"} if odd else set()
    assert launched == {wanted} | second


def test_the_sweep_names_every_kernel():
    """What the macros of the sources define; kernels of two types serve hidden rows above, and a layer's own router."""
    named = {kernel_of(t, d, o) for t in ALL for d in dtypes_of(t) for o in ("inner_major", "row_major")}
    for dtype in ("bfloat16", "float16"):
        named |= {f"grouped_gemm_simt_float32_{dtype}", f"grouped_gemm_simt_{dtype}_float32"}
    defined = set(sources.WGMMA_UNITS)
    for unit in ("grouped_gemm_bfloat16", "grouped_gemm_float16", "grouped_gemm_simt"):
        text = sources.unit_source(unit)
        defined |= set(re.findall(r"^GROUPED_GEMM_SIMT\((\w+),", text, re.MULTILINE))
        endings = re.findall(r"^  GROUPED_GEMM_MMA\(NAME##(\w+),", text, re.MULTILINE)
        for prefix in re.findall(r"^GROUPED_GEMM_MMA_ALL\((\w+),", text, re.MULTILINE):
            defined |= {prefix + ending for ending in endings}
    assert named == defined
