// tiles_sm90: what the Hopper grouped GEMM is launched with, the shapes of its tiles, and how tiles are described on the way.
#pragma once
#include "ptx_sm90.cuh"
#include "scheduler.cuh"

enum WeightOrder { INNER_MAJOR = 0, ROW_MAJOR = 1 };

struct WgmmaLaunch {
  TensorMap w_maps[MAX_STACKS];     // (expert, half, row, inner), or (expert, half, inner, row) where rows are contiguous
  TensorMap a_maps[MAX_STACKS][2];  // (1, 1, row, inner), boxes of 64 and of 16 rows
  GemmLaunch gemm;
  int* next_position;  // how many tiles beyond the first of each block are taken, zero at the beginning; or null
  int num_stages;
  int weights_first;  // 1: the tiles follow from what is older than the previous kernel: weights may come before its end
};
static_assert(sizeof(WgmmaLaunch) == 4416, "cumoe/gpu/stacks.py packs 4416 bytes");

namespace hopper {

constexpr int BLOCK_K = 64, ROW_BYTES = BLOCK_K * 2, RUN = 64, RUN_BYTES = RUN * ROW_BYTES;
constexpr int PRODUCERS = 128, WARPGROUP = 128, RING = 2, MAX_STAGES = 10;
constexpr int BAND = 4;  // weight blocks that are walked together over all row blocks of an expert

// cumoe/gpu/config.py has the same numbers, and how many stages each shape gets.
template <int ROWS, int CONSUMER_GROUPS, int BLOCKS> struct TileShape {
  static constexpr int MAX_ROWS = ROWS, CONSUMERS = CONSUMER_GROUPS, BLOCKS_PER_SM = BLOCKS;
  static constexpr int HALF_ROWS = CONSUMERS * RUN;  // weight rows of a half
};
// Rows x weight rows of a tile.
using Shape32x128 = TileShape<32, 1, 2>;
using Shape64x256 = TileShape<64, 2, 1>;
using Shape112x256 = TileShape<112, 2, 1>;
using Shape192x256 = TileShape<192, 2, 1>;

// Whether rows are found through the permutation; else they are neighbours, and TMA brings them.
__device__ __forceinline__ bool gathers(const ExpertStack& stack) {
  return stack.slots_per_a_row > 0 && stack.permutation;
}

struct TileInfo {
  int stack_idx, expert, row_begin, num_rows;  // num_rows = 0: there is no further tile
  int weight_block, k_blocks;
};

// A place of the ring in which the producers describe tiles to the consumers.
template <int MAX_ROWS> struct alignas(16) RingPlace {  // factors are read two at a time
  float scale_in[MAX_ROWS], scale_out[MAX_ROWS];
  uint32 offsets[MAX_ROWS];  // where the rows of A begin, in units of 16 bytes
  TileInfo tile;
};

// An expert's rows are cut into even runs, multiples of 8 rows; a band of weight blocks is walked over all its runs.
template <typename Shape> struct Tiling {
  __device__ __forceinline__ static int weight_blocks(const ExpertStack& stack) {
    return ceil_div(stack.weight_rows, 2 * Shape::HALF_ROWS);
  }
  __device__ __forceinline__ static int tiles(const ExpertStack& stack, int num_rows) {
    return ceil_div(num_rows, Shape::MAX_ROWS) * weight_blocks(stack);
  }
  // num_rows may come out as 0 or less where rounding up to 8 leaves the last runs without rows.
  __device__ __forceinline__ static TileInfo tile(const Group& group, const ExpertStack& stack) {
    int row_blocks = ceil_div(group.num_rows, Shape::MAX_ROWS), run = ceil_div(ceil_div(group.num_rows, row_blocks), 8) * 8;
    int band = group.tile / (BAND * row_blocks), in_band = group.tile % (BAND * row_blocks);
    int width = min(BAND, weight_blocks(stack) - band * BAND), first = run * (in_band / width);
    return {group.stack_idx, group.expert, group.row_begin + first, min(run, group.num_rows - first),
            band * BAND + in_band % width, ceil_div(stack.inner, BLOCK_K)};
  }
};

}  // namespace hopper
