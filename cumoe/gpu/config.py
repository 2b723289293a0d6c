"""Which kernel serves a grouped GEMM, with what grid: pure functions of integers, importable without a GPU."""

from collections.abc import Sequence
from typing import NamedTuple

THREADS = 256
WARPGROUP = 128
SMALLEST_SLAB_BYTES = 2 * 16 * 68 * 4

FEW_SLOTS = 32
"""Up to so many slots the kernel of the smallest wgmma tile sorts by itself: see kernels/few_slots_sm90.cuh."""


class Gpu(NamedTuple):
    """What of a GPU decides about kernels and grids."""

    num_multiprocessors: int = 132
    shared_bytes: int = 232_448  # that a block may have
    engine: str = "wgmma"  # the best for 16-bit arrays: "wgmma" on Hopper, else "mma"


class TileConfig(NamedTuple):
    """One way to compute a grouped GEMM; the numbers are those of kernels/grouped_gemm_*."""

    engine: str  # "wgmma": Hopper; "mma": tensor cores; both 16-bit, aligned; "simt": float32 units, anything
    block_m: int  # rows of a tile
    half: int  # weight rows in one of the two halves of a tile
    block_k: int
    stages: int  # tiles in dynamic shared memory; simt keeps its single one in static shared memory
    blocks_per_sm: int
    halves: str = "rows"  # what the halves are, or "inner": see Halves in kernels/tiles_sm90.cuh
    slab_rows: int = 0  # rows of results that wgmma stores at a time
    cluster: int = 1  # neighbouring blocks that share weights
    slots: str = "any"  # number of them, or "few", which the kernel sorts by itself

    @property
    def weight_rows(self) -> int:
        """Weight rows of a tile."""
        return self.half if self.halves == "inner" else 2 * self.half

    @property
    def name(self) -> str:
        """Rows x weight rows, as kernels are named."""
        tile = f"{self.block_m}x{self.weight_rows}"
        return tile if self.cluster == 1 else f"{self.cluster}x{tile}"

    @property
    def threads(self) -> int:
        """Threads of a block; with wgmma two warpgroups that bring operands and one for every 64 rows of a half."""
        return WARPGROUP * (2 + self.half // 64) if self.engine == "wgmma" else THREADS

    def alone(self) -> "TileConfig":
        """Return the same tile where one block an SM takes the stages of all."""
        return self._replace(stages=self.stages * self.blocks_per_sm, blocks_per_sm=1)

    def shared_bytes(self, num_groups: int) -> int:
        """Return the dynamic shared memory: the pipeline's stages, then a tile offset a group and one more.

        With wgmma the stages begin at a multiple of 1024, and between them and the offsets (int32, else int64) lies a
        slab of results for each warpgroup that multiplies.
        """
        token_rows = 2 * self.block_m if self.halves == "inner" else self.block_m
        stages = self.stages * (token_rows + 2 * self.half) * self.block_k * 2
        if self.engine != "wgmma":
            return stages + 8 * (num_groups + 1)
        slab = max(self.slab_rows * 128, SMALLEST_SLAB_BYTES)
        return 1024 + stages + self.half // 64 * slab + 4 * (num_groups + 1)


CONFIGS = (
    TileConfig(
        "wgmma", block_m=16, half=64, block_k=64, stages=5, blocks_per_sm=2, halves="inner", slab_rows=16, slots="few"
    ),
    TileConfig("wgmma", block_m=32, half=64, block_k=64, stages=4, blocks_per_sm=2, halves="inner", slab_rows=32),
    TileConfig("wgmma", block_m=64, half=128, block_k=64, stages=4, blocks_per_sm=1, halves="inner", slab_rows=64),
    TileConfig("wgmma", block_m=144, half=128, block_k=64, stages=4, blocks_per_sm=1, slab_rows=64),
    TileConfig("wgmma", block_m=192, half=128, block_k=64, stages=3, blocks_per_sm=1, slab_rows=64),
    TileConfig("wgmma", block_m=144, half=128, block_k=64, stages=4, blocks_per_sm=1, slab_rows=64, cluster=2),
    TileConfig("wgmma", block_m=192, half=128, block_k=64, stages=3, blocks_per_sm=1, slab_rows=64, cluster=2),
    TileConfig("mma", block_m=16, half=64, block_k=64, stages=4, blocks_per_sm=3),
    TileConfig("mma", block_m=64, half=64, block_k=64, stages=3, blocks_per_sm=2),
    TileConfig("mma", block_m=128, half=128, block_k=32, stages=3, blocks_per_sm=1),
    TileConfig("simt", block_m=64, half=32, block_k=16, stages=0, blocks_per_sm=2),
)
"""Every tile that a kernel is compiled for, the smaller ones of an engine first, pairs of blocks behind single ones."""

SMALLEST_WGMMA_TILE = next(config for config in CONFIGS if config.engine == "wgmma")

WGMMA_MEAN_ROWS = (
    ("16x64", 1),
    ("32x64", 6),
    ("64x128", 24),
    ("144x256", 112),
    ("2x144x256", 272),
    ("144x256", 384),
    ("192x256", 800),
    ("2x192x256", 2**31 - 1),
)
"""Up to how many rows an expert has on average a wgmma tile is chosen, by its name: a pair of blocks that share weights
pays where most experts have two runs of rows, or many."""

MANY_ROWS = 144
"""Tiles for more mean rows than this suit any wide shared expert."""

SHORT_INNER, LONG_TILE = 512, "64x128"
"""Up to this intermediate size a tile of the second product has few inner blocks, and much of its time is the way from
one to the next: two blocks of an SM are quicker than one with all stages, and tiles of more rows than `LONG_TILE` are
quicker than that."""

PASSING_BYTES = 256 << 20
"""Up to so many bytes of weights, each of which the small wgmma tiles read once, these are the first to leave the L2
again, and what was there stays. Loads that say so take 2 or 3 per cent longer: with more bytes they cost more than they
spare."""

ALTERNATING_TILES = ("144x256", "2x144x256")
"""Tiles whose kernels can take shared and routed experts in turn."""

ALTERNATING = ((96, 8), (144, 2))
"""Up to how many rows an expert has on average they do, if the shared experts have at least which part of the routed
work: an eighth, a half. The ones multiply while the others read weights; one after the other takes up to 8 per cent
longer. With more rows the routed ones multiply as much."""


class StackSizes(NamedTuple):
    """The integers of one expert stack that decide about tiles."""

    num_experts: int
    num_rows: int  # all rows of the stack
    weight_rows: int
    inner: int  # length of the dot products


def select_config(engine: str, products: Sequence[tuple[StackSizes, ...]], num_slots: int = 0) -> TileConfig:
    """Return the tile for these stacks.

    It is the smallest one that suits the mean number of rows of a routed expert, or the largest. With wgmma it also has
    to hold the rows of the other stacks if these do at least as much work, or to be one for many rows: else the weights
    of a wide shared expert would be read once for every few rows.

    Parameters
    ----------
    products : sequence of tuple of StackSizes
        The stacks of each product of the launch, one or two; routed experts come first.
    num_slots : int
        How many the kernel could sort by itself; 0 where it is not told of them.
    """
    first, *others = products[0]
    mean_rows = -(-first.num_rows // first.num_experts)
    configs = [config for config in CONFIGS if config.engine == engine]
    if engine != "wgmma":
        return next((config for config in configs if config.block_m >= mean_rows), configs[-1])
    work, other_work = (sum(stack.num_rows * stack.weight_rows for stack in some) for some in ((first,), others))
    rows_to_hold = max((stack.num_rows for stack in others), default=0) if other_work >= work else 0
    both = len(products) == 2
    few = both and 0 < num_slots <= FEW_SLOTS
    short = both and products[1][0].inner <= SHORT_INNER
    tiles = {config.name: config for config in configs}
    unfit = {name for name, tile in tiles.items() if (tile.slots == "few" and not few) or (name == LONG_TILE and short)}
    tile = next(
        tiles[name]
        for name, limit in WGMMA_MEAN_ROWS
        if name not in unfit and limit >= mean_rows and (tiles[name].block_m >= rows_to_hold or limit > MANY_ROWS)
    )
    return tile.alone() if tile.slots == "few" and not short else tile


def max_tiles(config: TileConfig, stacks: tuple[StackSizes, ...]) -> int:
    """Return an upper bound of the tiles of one product for any routing: an expert adds at most one partial tile."""
    total = 0
    for stack in stacks:
        total += -(-stack.weight_rows // config.weight_rows) * max_row_blocks(config, stack.num_rows, stack.num_experts)
    return total


def max_row_blocks(config: TileConfig, num_rows: int, num_experts: int) -> int:
    """Return an upper bound of the runs of rows that a tile takes, for any routing."""
    hit = min(num_experts, num_rows)
    return config.cluster * ((num_rows - hit) // (config.cluster * config.block_m) + hit)


def alternates(config: TileConfig, stacks: tuple[StackSizes, ...]) -> bool:
    """Return whether tiles of shared and routed experts come in turn: see `ALTERNATING`.

    The routed ones are those of the first stack; the shared ones need more than one run of rows.
    """
    routed, *shared = stacks
    work = sum(stack.num_rows * stack.weight_rows for stack in shared)
    return (
        config.name in ALTERNATING_TILES
        and any(stack.num_rows > config.block_m for stack in shared)
        and any(
            routed.num_rows <= rows * routed.num_experts and part * work >= routed.num_rows * routed.weight_rows
            for rows, part in ALTERNATING
        )
    )


def grid_size(config: TileConfig, tiles: int, num_multiprocessors: int) -> int:
    """Return the number of persistent blocks for at most so many tiles."""
    return min(tiles, num_multiprocessors // config.cluster * config.cluster * config.blocks_per_sm)
