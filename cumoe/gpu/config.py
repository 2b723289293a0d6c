"""Which kernel serves a grouped GEMM, with what grid: pure functions of integers, importable without a GPU."""

from typing import NamedTuple

HALF = {"mma": 64, "simt": 32}
"""Weight rows in one of the two halves of a block's weight tile (kernels/grouped_gemm_*)."""

BLOCK_M = {"mma": (16, 64, 128), "simt": (64,)}
BLOCKS_PER_SM = {("mma", 16): 4, ("mma", 64): 2, ("mma", 128): 2, ("simt", 64): 2}
STAGES, BLOCK_K, THREADS = 4, 32, 256


class TileConfig(NamedTuple):
    """One way to compute a grouped GEMM."""

    engine: str  # "mma": tensor cores, 16-bit, aligned; "simt": float32 units, anything
    block_m: int  # rows of a tile

    def shared_bytes(self, num_groups: int) -> int:
        """Return the dynamic shared memory: the pipeline's stages and a tile offset (int64) a group, and one more."""
        stage = (self.block_m + 2 * HALF["mma"]) * BLOCK_K * 2 if self.engine == "mma" else 0
        return STAGES * stage + 8 * (num_groups + 1)


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
    fitting = [block_m for block_m in BLOCK_M[engine] if block_m >= mean_rows]
    return TileConfig(engine, min(fitting, default=BLOCK_M[engine][-1]))


def max_tiles(config: TileConfig, stacks: tuple[StackSizes, ...]) -> int:
    """Return an upper bound of the tiles for any routing: an expert that has rows adds at most one partial tile."""
    total = 0
    for stack in stacks:
        half = HALF[config.engine]
        n_blocks = -(-(stack.weight_rows // 2) // half) if stack.stacked_pair else -(-stack.weight_rows // (2 * half))
        hit = min(stack.num_experts, stack.num_rows)
        total += n_blocks * ((stack.num_rows - hit) // config.block_m + hit)
    return total


def grid_size(config: TileConfig, stacks: tuple[StackSizes, ...], num_multiprocessors: int) -> int:
    """Return the number of persistent blocks."""
    return min(max_tiles(config, stacks), num_multiprocessors * BLOCKS_PER_SM[config.engine, config.block_m])
