"""Which kernel serves a grouped GEMM, with what grid: pure functions of integers, importable without a GPU."""

from collections.abc import Sequence
from typing import NamedTuple

THREADS = 256
WARPGROUP = 128
SMALLEST_SLAB_BYTES = 2 * 16 * 68 * 4

FEW_SLOTS = 32
"""Up to so many slots are sorted by the kernel of the smallest wgmma tile itself: see kernels/few_slots_sm90.cuh."""


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
    pairs: str = "halves"  # how gate and up rows lie in a tile, or "woven" where halves are "inner"
    slab_rows: int = 0  # rows of results that wgmma stores at a time
    cluster: int = 1  # neighbouring blocks that share weights
    slots: str = "many"  # or "few", which the kernel sorts by itself

    @property
    def weight_rows(self) -> int:
        """Weight rows of a tile."""
        return self.half if self.halves == "inner" else 2 * self.half

    @property
    def name(self) -> str:
        """Rows x weight rows, as kernels are named."""
        tile = f"{self.block_m}x{self.weight_rows}" + ("few" if self.slots == "few" else "")
        return tile if self.cluster == 1 else f"{self.cluster}x{tile}"

    @property
    def threads(self) -> int:
        """Threads of a block; with wgmma two warpgroups that bring operands and one for every 64 rows of a half."""
        return WARPGROUP * (2 + self.half // 64) if self.engine == "wgmma" else THREADS

    @property
    def box_rows(self) -> int:
        """Rows that TMA brings at a time where fewer than 64 are left."""
        return 16 if self.block_m > 16 else 8

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
    TileConfig("wgmma", block_m=16, half=64, block_k=64, stages=5, blocks_per_sm=2, halves="inner", slab_rows=16),
    TileConfig("wgmma", block_m=64, half=128, block_k=64, stages=5, blocks_per_sm=1, slab_rows=64),
    TileConfig("wgmma", block_m=144, half=128, block_k=64, stages=4, blocks_per_sm=1, slab_rows=64),
    TileConfig("wgmma", block_m=192, half=128, block_k=64, stages=3, blocks_per_sm=1, slab_rows=64),
    TileConfig("wgmma", block_m=144, half=128, block_k=64, stages=4, blocks_per_sm=1, slab_rows=64, cluster=2),
    TileConfig("wgmma", block_m=192, half=128, block_k=64, stages=3, blocks_per_sm=1, slab_rows=64, cluster=2),
    TileConfig("mma", block_m=16, half=64, block_k=64, stages=4, blocks_per_sm=3),
    TileConfig("mma", block_m=64, half=64, block_k=64, stages=3, blocks_per_sm=2),
    TileConfig("mma", block_m=128, half=128, block_k=32, stages=3, blocks_per_sm=1),
    TileConfig("simt", block_m=64, half=32, block_k=16, stages=0, blocks_per_sm=2),
)
"""Every tile that a kernel is compiled for, the smaller ones of an engine first, pairs of blocks behind single ones.
The smallest of wgmma has two kernels, one of them for few slots."""

SMALLEST_WGMMA_TILE = next(config for config in CONFIGS if config.engine == "wgmma")

WGMMA_MEAN_ROWS = (
    ("16x64", 4),
    ("64x256", 24),
    ("144x256", 144),
    ("2x144x256", 272),
    ("144x256", 384),
    ("192x256", 800),
    ("2x192x256", 2**31 - 1),
)
"""Up to how many rows an expert has on average a wgmma tile is chosen, by its name: a pair of blocks that share weights
pays where most experts have two runs of rows, or many."""

MANY_ROWS = 144
"""Tiles for more mean rows than this suit any wide shared expert."""

WOVEN_TILES, ALONE_TILES, FEW_TILES = 3, 10, 18
"""Up to how many tiles an SM has in the first product, the smallest wgmma tile weaves pairs, has an SM for itself, and
serves at all: with few tiles, small ones leave fewer SMs idle at the end; with many, large ones read memory faster.
Where the second product has a tile an SM or less, which evens nothing out, a tile alone weaves pairs too if that gives
the SMs more equal work."""

SHORT_INNER = 512
"""Up to this intermediate size two blocks of an SM are quicker than one with all stages: a tile of the second product
has fewer inner blocks than a block has stages, and much of its time is the way from one to the next."""

PASSING_BYTES = 256 << 20
"""Up to so many bytes of weights, each of which the smallest wgmma tile reads once, these are the first to leave the L2
again, and what was there stays. Loads that say so take 2 or 3 per cent longer: with more bytes they cost more than they
spare."""

ALTERNATING_TILES = ("144x256", "2x144x256")
"""Tiles whose kernels can take shared and routed experts in turn."""

ALTERNATING_ROWS, ALTERNATING_WORK = 96, 8
"""Up to how many rows an expert has on average they do, if the shared experts have at least an eighth of the routed
ones' work: the ones multiply while the others read weights. One after the other takes up to 8 per cent longer; with
more rows the routed ones multiply as much."""


class StackSizes(NamedTuple):
    """The integers of one expert stack that decide about tiles."""

    num_experts: int
    num_rows: int  # all rows of the stack
    weight_rows: int
    inner: int  # length of the dot products


def select_config(engine: str, stacks: tuple[StackSizes, ...], num_multiprocessors: int) -> TileConfig:
    """Return the tile for these stacks of the first product.

    It is the smallest one that suits the mean number of rows of an expert of the first stack, or the largest. With
    wgmma it also has to hold the rows of the other stacks if these do at least as much work as the first, or to be
    one for many rows: else the weights of a wide shared expert would be read once for every few rows. The smallest
    one serves only few tiles.
    """
    first, *others = stacks
    mean_rows = -(-first.num_rows // first.num_experts)
    configs = [config for config in CONFIGS if config.engine == engine]
    if engine != "wgmma":
        return next((config for config in configs if config.block_m >= mean_rows), configs[-1])
    work, other_work = (sum(stack.num_rows * stack.weight_rows for stack in some) for some in ((first,), others))
    rows_to_hold = max((stack.num_rows for stack in others), default=0) if other_work >= work else 0
    if max_tiles(SMALLEST_WGMMA_TILE, stacks) > FEW_TILES * num_multiprocessors:
        configs.remove(SMALLEST_WGMMA_TILE)
    by_name = {config.name: config for config in configs}
    return next(
        by_name[name]
        for name, limit in WGMMA_MEAN_ROWS
        if name in by_name and limit >= mean_rows and (by_name[name].block_m >= rows_to_hold or limit > MANY_ROWS)
    )


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


def spread(
    config: TileConfig, products: Sequence[tuple[StackSizes, ...]], num_slots: int, num_multiprocessors: int
) -> TileConfig:
    """Return the tile in the form that suits the number of tiles, see `WOVEN_TILES`, and of slots, see `FEW_SLOTS`.

    Parameters
    ----------
    products : sequence of tuple of StackSizes
        The stacks of each product of the launch, one or two; routed experts come first.
    num_slots : int
        How many the kernel could sort by itself; 0 where it is not told of them.
    """
    if config.halves == "rows":
        return config
    if len(products) == 2 and 0 < num_slots <= FEW_SLOTS:
        config = config._replace(slots="few")
    woven = config._replace(pairs="woven")
    first, second = products[0], products[1] if len(products) == 2 else ()
    tiles = max_tiles(config, first)
    if tiles <= WOVEN_TILES * num_multiprocessors:
        return woven
    if tiles > ALONE_TILES * num_multiprocessors:
        return config
    if second and second[0].inner <= SHORT_INNER:
        return woven
    turns, turns_of_halves = -(-tiles // num_multiprocessors), -(-tiles // (2 * num_multiprocessors))
    if second and max_tiles(config, second) <= num_multiprocessors and turns < 2 * turns_of_halves:
        return woven.alone()
    return config.alone()


def alternates(config: TileConfig, stacks: tuple[StackSizes, ...]) -> bool:
    """Return whether tiles of shared and routed experts come in turn: see `ALTERNATING_ROWS`.

    The routed ones are those of the first stack; the shared ones need more than one run of rows.
    """
    routed, *shared = stacks
    work = sum(stack.num_rows * stack.weight_rows for stack in shared)
    return (
        config.name in ALTERNATING_TILES
        and any(stack.num_rows > config.block_m for stack in shared)
        and routed.num_rows <= ALTERNATING_ROWS * routed.num_experts
        and ALTERNATING_WORK * work >= routed.num_rows * routed.weight_rows
    )


def grid_size(config: TileConfig, tiles: int, num_multiprocessors: int) -> int:
    """Return the number of persistent blocks for at most so many tiles."""
    return min(tiles, num_multiprocessors // config.cluster * config.cluster * config.blocks_per_sm)
