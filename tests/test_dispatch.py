"""Which Hopper tile is launched, and how it cuts rows; no GPU needed."""

from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cumoe.gpu import config
from cumoe.gpu.config import StackSizes
from cumoe.gpu.stacks import ExpertStack

RAGGED = (0, 1, 7, 8, 9, 63, 64, 65, 127, 128, 129, 191, 192, 193, 255)
TILES = [tile for tile in config.CONFIGS if tile.engine == "wgmma"]
NUM_SMS, INNER = 132, 4096
BAND = 4  # weight blocks that the kernel walks together

LIMITS = config.WGMMA_MEAN_ROWS
TILE_OF = {tile.name: tile for tile in TILES}

each_tile = pytest.mark.parametrize("tile", TILES, ids=lambda tile: tile.name)


def chosen(*sizes, num_slots=0, inner=INNER):
    """Return the tile for (num_experts, num_rows, weight_rows) of every stack; `inner` is the second product's."""
    first = tuple(StackSizes(*size, 4096) for size in sizes)
    second = tuple(size._replace(weight_rows=4096, inner=inner) for size in first)
    return config.select_config("wgmma", (first, second), num_slots)


# --- the choice ---


@pytest.mark.parametrize("place", range(len(LIMITS)), ids=[f"{name}-{limit}" for name, limit in LIMITS])
def test_a_tile_serves_up_to_its_mean_rows(place):
    """One row more goes to the next tile, if there is one."""
    (name, limit), following = LIMITS[place], (LIMITS + LIMITS[-1:])[place + 1][0]
    assert chosen((8, 8 * limit, 256), num_slots=1).name == name
    assert chosen((8, 8 * limit - 7, 256), num_slots=1).name == name  # the mean is rounded up
    if place + 1 < len(LIMITS):
        assert chosen((8, 8 * limit + 1, 256), num_slots=1).name == following


def test_every_tile_has_a_limit_and_limits_grow():
    """The table of mean rows speaks of the tiles that exist, and has a tile for any number of rows."""
    assert {name for name, _ in LIMITS} == {tile.name for tile in TILES}
    limits = [limit for _, limit in LIMITS]
    assert limits == sorted(set(limits))
    assert limits[-1] == 2**31 - 1


@given(st.integers(1, 64), st.integers(1, 8), st.integers(1, 4096), st.lists(st.integers(1, 4096), max_size=3))
def test_more_tokens_never_choose_a_smaller_tile(num_experts, top_k, width, shared_widths):
    """Also beside shared experts, which see all tokens."""
    heights = [
        chosen((num_experts, top_k * rows, width), *((1, rows, shared) for shared in shared_widths)).block_m
        for rows in (*RAGGED, 1000, 10_000)
    ]
    assert heights == sorted(heights)


@pytest.mark.parametrize("rows", RAGGED[1:])
def test_a_wide_shared_expert_asks_for_a_tile_that_holds_its_rows(rows):
    """As soon as it does as much work as the routed experts, and not before."""
    alone, equal = chosen((256, rows, 512)), chosen((256, rows, 512), (1, rows, 512))
    assert chosen((256, rows, 512), (1, rows, 511)) == alone
    assert equal.name == next((name for name, _ in LIMITS[1:4] if TILE_OF[name].block_m >= rows), "2x144x256")
    assert chosen((256, rows, 512), (1, rows, 256), (1, rows, 256)) == equal


@pytest.mark.parametrize("rows", RAGGED)
def test_ragged_rows_get_a_tile_and_a_grid(rows):
    """Without rows there is nothing to launch; with rows, no more blocks than an SM holds."""
    sizes = (StackSizes(4, rows, 272, INNER), StackSizes(1, rows, 72, INNER))
    tile = config.select_config("wgmma", (sizes,))
    assert tile in TILES
    for shape in (tile, tile.alone()):
        tiles = config.max_tiles(shape, sizes)
        grid = config.grid_size(shape, tiles, NUM_SMS)
        assert grid == min(tiles, NUM_SMS * shape.blocks_per_sm)
        assert (grid == 0) == (rows == 0)


@each_tile
def test_a_tile_alone_is_the_same_kernel_with_all_stages(tile):
    """Rows, weight rows and threads are compiled in; stages are not."""
    alone = tile.alone()
    assert alone[:4] == tile[:4] and alone.halves == tile.halves and alone.threads == tile.threads
    assert (alone.stages, alone.blocks_per_sm) == (tile.stages * tile.blocks_per_sm, 1)
    assert alone.alone() == alone


def test_the_smallest_tile_serves_few_slots_alone():
    """Of a launch of both products that is told of them, with a row an expert, and of shared experts what it holds."""
    smallest, few = TILES[0], config.FEW_SLOTS
    assert chosen((64, few, 256), num_slots=few) == smallest.alone()
    others = [
        chosen((64, few + 1, 256), num_slots=few + 1),
        chosen((64, few, 256)),
        chosen((few // 2, few, 256), num_slots=few),
        chosen((64, few, 256), (1, few, 256), num_slots=few),
        config.select_config("wgmma", ((StackSizes(64, few, 256, INNER),),), few),
    ]
    assert others == [chosen((64, 64, 256))] * 2 + [TILES[1]] * 3
    assert chosen((64, 16, 256), (1, 16, 256), num_slots=16) == smallest.alone()


def test_short_inner_dimensions_want_two_blocks_or_long_tiles():
    """A tile of the second product is over before a block has filled its stages."""
    short = config.SHORT_INNER
    assert chosen((64, 32, 256), num_slots=32, inner=short) == TILES[0]
    assert chosen((64, 32, 256), num_slots=32, inner=short + 1) == TILES[0].alone()
    names = [chosen((64, 64 * rows, 256), inner=inner).name for inner in (short, short + 1) for rows in (6, 7, 24, 25)]
    assert names == ["32x64", "144x256", "144x256", "144x256", "32x64", "64x128", "64x128", "144x256"]


@pytest.mark.parametrize(
    ("layer", "form"),
    [
        ("Qwen3-30B-A3B, 1 token", "16x64, 10 stages, 1 blocks"),
        ("Qwen3-30B-A3B, 4 tokens", "16x64, 10 stages, 1 blocks"),
        ("Qwen3-30B-A3B, 5 tokens: 40 slots", "32x64, 4 stages, 2 blocks"),
        ("Qwen3-Next-80B, 3 tokens: a tile has 4 inner blocks", "16x64, 5 stages, 2 blocks"),
        ("Qwen3-Next-80B, 8 tokens", "32x64, 4 stages, 2 blocks"),
        ("Mixtral-8x7B, 4 tokens", "16x64, 10 stages, 1 blocks"),
        ("Mixtral-8x7B, 8 tokens: an expert has two rows", "32x64, 4 stages, 2 blocks"),
        ("Llama-4-Scout, 16 tokens", "16x64, 10 stages, 1 blocks"),
        ("Llama-4-Scout, 17 tokens: the shared expert has 17 rows", "32x64, 4 stages, 2 blocks"),
        ("Llama-4-Scout, 64 tokens", "64x128, 4 stages, 1 blocks"),
        ("DeepSeek-V3, 1 token", "16x64, 10 stages, 1 blocks"),
        ("DeepSeek-V3, 512 tokens", "64x128, 4 stages, 1 blocks"),
    ],
)
def test_forms_of_layers(layer, form):
    """See the table of what was tried in kernels/README.md."""
    name, rest = layer.split(" token")[0].rsplit(", ", 1)
    hidden, width, experts, top_k, shared = {
        "Qwen3-30B-A3B": (2048, 768, 128, 8, ()),
        "Qwen3-Next-80B": (2048, 512, 512, 10, (512,)),
        "Mixtral-8x7B": (4096, 14336, 8, 2, ()),
        "Llama-4-Scout": (5120, 8192, 16, 1, (8192,)),
        "DeepSeek-V3": (7168, 2048, 256, 8, (2048,)),
    }[name]
    tokens = int(rest)
    stacks = [(experts, tokens * top_k, width), *((1, tokens, own) for own in shared)]
    first = tuple(StackSizes(number, rows, 2 * own, hidden) for number, rows, own in stacks)
    second = tuple(StackSizes(number, rows, hidden, own) for number, rows, own in stacks)
    tile = config.select_config("wgmma", (first, second), tokens * top_k)
    assert f"{tile.name}, {tile.stages} stages, {tile.blocks_per_sm} blocks" == form


@pytest.mark.parametrize("num_sms", [1, 2, 7, 114, 131, 132])
@each_tile
def test_a_cluster_is_never_torn(tile, num_sms):
    """Blocks that share weights come in whole clusters, whatever the number of SMs and of tiles."""
    for rows in (1, 8, 200, 5000):
        tiles = config.max_tiles(tile, (StackSizes(3, rows, 300, INNER), StackSizes(1, rows, 77, INNER)))
        grid = config.grid_size(tile, tiles, num_sms)
        assert grid % tile.cluster == 0
        assert grid > 0 or num_sms < tile.cluster


@pytest.mark.parametrize(("num_rows", "experts"), [(1, 1), (3, 3), (5, 5), (500, 5)])
def test_weights_that_rows_may_meet(num_rows, experts):
    """As many experts as there are rows, or all; what fits into PASSING_BYTES need not stay in the L2."""
    w = np.zeros((5, 6, 4), np.float16)
    assert ExpertStack(a=w, w=w, c=w, num_rows=num_rows).weight_bytes == experts * 6 * 4 * 2


# --- how rows are cut: a twin of Schedule ---


def runs_of(num_rows, tile):
    """Return (first, rows) of the runs that an expert's rows are cut into; in a cluster the last may have none."""
    if num_rows <= tile.block_m:
        return [(0, num_rows)] if num_rows else []
    row_blocks = -(-num_rows // (tile.cluster * tile.block_m)) * tile.cluster
    run = (num_rows + 8 * row_blocks - 1) // (8 * row_blocks) * 8
    row_blocks = -(-num_rows // (tile.cluster * run)) * tile.cluster
    return [(i * run, max(min(run, num_rows - i * run), 0)) for i in range(row_blocks)]


def walked(num_rows, tile, weight_blocks):
    """Return (run, weight block) of an expert's tiles in order; of a cluster first the one block's, then the other."""
    row_blocks, all_blocks = len(runs_of(num_rows, tile)), -(-weight_blocks // tile.cluster) * tile.cluster
    together = tile.cluster == 1 or row_blocks > 1
    for position, rank in product(range(row_blocks * all_blocks // tile.cluster), range(tile.cluster)):
        run, weight_block = 0, position * tile.cluster + rank
        if together:
            band, in_band = divmod(position, BAND * row_blocks // tile.cluster)
            width = min(BAND, all_blocks - band * BAND)
            run, weight_block = in_band // width * tile.cluster + rank, band * BAND + in_band % width
        if weight_block < weight_blocks:
            yield run, weight_block


def check_runs(num_rows, tile):
    """Fail unless every row lies in one run, no run is longer than a tile, and a cluster has one for each block."""
    runs = runs_of(num_rows, tile)
    covered = [first + i for first, rows in runs for i in range(rows)]
    assert covered == list(range(num_rows))
    assert all(rows <= tile.block_m and first % 8 == 0 for first, rows in runs)
    assert all(rows > 0 for _, rows in runs[: max(len(runs) - tile.cluster + 1, 1)])
    assert len(runs) <= 1 or len(runs) % tile.cluster == 0


@each_tile
@pytest.mark.parametrize("num_rows", RAGGED)
def test_ragged_rows_are_covered_once(tile, num_rows):
    """And an expert of its own needs no more tiles than are reserved for it."""
    check_runs(num_rows, tile)
    sizes, runs = (StackSizes(1, num_rows, tile.weight_rows, INNER),), len(runs_of(num_rows, tile))
    assert runs <= config.max_row_blocks(tile, num_rows, 1) == config.max_tiles(tile, sizes)
    assert tile.cluster > 1 or runs == config.max_row_blocks(tile, num_rows, 1)


@given(st.integers(0, 20_000), st.sampled_from(TILES))
def test_any_rows_are_covered_once(num_rows, tile):
    """Runs are multiples of 8 rows; only the last one of a cluster may come out empty."""
    check_runs(num_rows, tile)


def test_a_cluster_may_have_a_run_without_rows():
    """The case is rare, and another test computes it: see test_tiles."""
    assert [runs_of(rows, TILE_OF[name])[-1][1] for name, rows in (("2x144x256", 2305), ("2x192x256", 4230))] == [0, 0]


@given(st.integers(0, 1000), st.integers(1, 40), st.sampled_from(TILES))
def test_bands_walk_every_run_over_every_weight_block(num_rows, weight_blocks, tile):
    """Each pair once."""
    runs = range(len(runs_of(num_rows, tile)))
    assert sorted(walked(num_rows, tile, weight_blocks)) == list(product(runs, range(weight_blocks)))


@given(st.integers(0, 3000), st.integers(1, 3000), st.sampled_from(TILES))
def test_counters_of_row_blocks_suffice(num_rows, num_experts, tile):
    """They are reserved for the smallest tile, which has most row blocks for any routing; here one expert has all."""
    assert len(runs_of(num_rows, tile)) <= config.max_row_blocks(config.SMALLEST_WGMMA_TILE, num_rows, num_experts)


STACKS = st.lists(
    st.tuples(st.lists(st.integers(0, 300), min_size=1, max_size=12), st.integers(1, 1500), st.booleans()),
    min_size=1,
    max_size=4,
)


@given(STACKS, st.sampled_from(TILES), st.integers(0, 300))
def test_max_tiles_bounds_what_the_kernel_counts(drawn, tile, without_expert):
    """Any routing, and rows that no expert has; the kernel divides all weight rows, paired or not."""
    sizes, tiles = [], 0
    for rows_of, width, paired in drawn:
        weight_rows = 2 * width if paired else width
        sizes.append(StackSizes(len(rows_of), sum(rows_of) + without_expert, weight_rows, INNER))
        tiles += sum(len(list(walked(rows, tile, -(-weight_rows // tile.weight_rows)))) for rows in rows_of)
    assert tiles <= config.max_tiles(tile, tuple(sizes)) == config.max_tiles(tile.alone(), tuple(sizes))
