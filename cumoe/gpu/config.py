"""Which kernel serves a grouped GEMM, with what grid: pure functions of integers, importable without a GPU."""

from typing import NamedTuple

THREADS = 256


class TileConfig(NamedTuple):
    """One way to compute a grouped GEMM; the numbers are those of kernels/grouped_gemm_*."""

    engine: str  # "mma": tensor cores, 16-bit, aligned; "simt": float32 units, anything
    block_m: int  # rows of a tile
    half: int  # weight rows in one of the two halves of a tile
    block_k: int
    stages: int  # tiles in dynamic shared memory; simt keeps its single one in static shared memory
    blocks_per_sm: int

    def shared_bytes(self, num_groups: int) -> int:
        """Return the dynamic shared memory: the pipeline's stages, then a tile offset (int64) a group and one more."""
        return self.stages * (self.block_m + 2 * self.half) * self.block_k * 2 + 8 * (num_groups + 1)


CONFIGS = (
    TileConfig("mma", block_m=16, half=64, block_k=64, stages=4, blocks_per_sm=3),
    TileConfig("mma", block_m=64, half=64, block_k=64, stages=3, blocks_per_sm=2),
    TileConfig("mma", block_m=128, half=128, block_k=32, stages=3, blocks_per_sm=1),
    TileConfig("simt", block_m=64, half=32, block_k=16, stages=0, blocks_per_sm=2),
)
"""Every tile that a kernel is compiled for, the smaller ones of an engine first."""


class StackSizes(NamedTuple):
    """The integers of one expert stack that decide about tiles."""

    num_experts: int
    num_rows: int  # all rows of the stack
    weight_rows: int
    stacked_pair: bool


def select_config(engine: str, stacks: tuple[StackSizes, ...]) -> TileConfig:
    """Return the smallest tile that holds the mean number of rows of an expert of the first stack, or the largest."""
    first = stacks[0]
    mean_rows = -(-first.num_rows // first.num_experts)
    configs = [config for config in CONFIGS if config.engine == engine]
    return next((config for config in configs if config.block_m >= mean_rows), configs[-1])


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
