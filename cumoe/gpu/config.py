"""Which kernel serves a grouped GEMM, with what grid: pure functions of integers, importable without a GPU."""

from typing import NamedTuple

THREADS = 256
WARPGROUP = 128
SMALLEST_SLAB_BYTES = 2 * 16 * 68 * 4


class TileConfig(NamedTuple):
    """One way to compute a grouped GEMM; the numbers are those of kernels/grouped_gemm_*."""

    engine: str  # "wgmma": Hopper; "mma": tensor cores; both 16-bit, aligned; "simt": float32 units, anything
    block_m: int  # rows of a tile
    half: int  # weight rows in one of the two halves of a tile
    block_k: int
    stages: int  # tiles in dynamic shared memory; simt keeps its single one in static shared memory
    blocks_per_sm: int

    @property
    def threads(self) -> int:
        """Threads of a block; with wgmma a warpgroup that brings operands and one for every 64 rows of a half."""
        return WARPGROUP * (1 + self.half // 64) if self.engine == "wgmma" else THREADS

    def alone(self) -> "TileConfig":
        """Return the same tile where one block an SM takes the stages of all."""
        return self._replace(stages=self.stages * self.blocks_per_sm, blocks_per_sm=1)

    def shared_bytes(self, num_groups: int) -> int:
        """Return the dynamic shared memory: the pipeline's stages, then a tile offset a group and one more.

        With wgmma the stages begin at a multiple of 1024, and between them and the offsets (int32, else int64) lies a
        slab of results for each warpgroup that multiplies.
        """
        stages = self.stages * (self.block_m + 2 * self.half) * self.block_k * 2
        if self.engine != "wgmma":
            return stages + 8 * (num_groups + 1)
        slab = max(self.block_m * 128, SMALLEST_SLAB_BYTES)
        return 1024 + stages + self.half // 64 * slab + 4 * (num_groups + 1)


CONFIGS = (
    TileConfig("wgmma", block_m=32, half=64, block_k=64, stages=5, blocks_per_sm=2),
    TileConfig("wgmma", block_m=64, half=128, block_k=64, stages=5, blocks_per_sm=1),
    TileConfig("wgmma", block_m=112, half=128, block_k=64, stages=4, blocks_per_sm=1),
    TileConfig("wgmma", block_m=192, half=128, block_k=64, stages=3, blocks_per_sm=1),
    TileConfig("mma", block_m=16, half=64, block_k=64, stages=4, blocks_per_sm=3),
    TileConfig("mma", block_m=64, half=64, block_k=64, stages=3, blocks_per_sm=2),
    TileConfig("mma", block_m=128, half=128, block_k=32, stages=3, blocks_per_sm=1),
    TileConfig("simt", block_m=64, half=32, block_k=16, stages=0, blocks_per_sm=2),
)
"""Every tile that a kernel is compiled for, the smaller ones of an engine first."""

ALONE_TILES = 4
"""Up to how many tiles for each SM one block with all stages takes the place of two: fewer tiles than that are long for
their number, and a block by itself keeps twice the bytes on their way."""

WGMMA_MEAN_ROWS = {32: 4, 64: 24, 112: 48, 192: 192}
"""Up to how many rows an expert has on average a wgmma tile is chosen, by its rows; beyond all, the last one."""


class StackSizes(NamedTuple):
    """The integers of one expert stack that decide about tiles."""

    num_experts: int
    num_rows: int  # all rows of the stack
    weight_rows: int
    stacked_pair: bool


def select_config(engine: str, stacks: tuple[StackSizes, ...]) -> TileConfig:
    """Return the smallest tile that suits the mean number of rows of an expert of the first stack, or the largest.

    With wgmma a tile also has to hold the rows of the other stacks if these do at least as much work as the first:
    else the weights of a wide shared expert would be read once for every few rows.
    """
    first, *others = stacks
    mean_rows = -(-first.num_rows // first.num_experts)
    configs = [config for config in CONFIGS if config.engine == engine]
    if engine != "wgmma":
        return next((config for config in configs if config.block_m >= mean_rows), configs[-1])
    work, other_work = (sum(stack.num_rows * stack.weight_rows for stack in some) for some in ((first,), others))
    rows_to_hold = max((stack.num_rows for stack in others), default=0) if other_work >= work else 0
    suiting = (
        config for config in configs if WGMMA_MEAN_ROWS[config.block_m] >= mean_rows and config.block_m >= rows_to_hold
    )
    return next(suiting, configs[-1])


def max_tiles(config: TileConfig, stacks: tuple[StackSizes, ...]) -> int:
    """Return an upper bound of the tiles for any routing: an expert that has rows adds at most one partial tile."""
    total = 0
    for stack in stacks:
        rows, per_block = (stack.weight_rows // 2, 1) if stack.stacked_pair else (stack.weight_rows, 2)
        n_blocks = -(-rows // (per_block * config.half))
        hit = min(stack.num_experts, stack.num_rows)
        total += n_blocks * ((stack.num_rows - hit) // config.block_m + hit)
    return total


def grid_size(config: TileConfig, stacks: tuple[StackSizes, ...], num_multiprocessors: int) -> int:
    """Return the number of persistent blocks."""
    return min(max_tiles(config, stacks), num_multiprocessors * config.blocks_per_sm)
