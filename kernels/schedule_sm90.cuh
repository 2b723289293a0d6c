// schedule_sm90: which tile of the Hopper grouped GEMM comes when, and how far the blocks of a launch have come.
#pragma once
#include "few_slots_sm90.cuh"

namespace hopper {

// From a position in the order of all tiles to a tile.
//
// Products and stacks come in order, experts in order; an expert's rows are cut into even runs, multiples of 8 rows; a band
// of weight blocks is walked over all its runs. Where shared experts have rows enough to multiply all the time and routed ones
// read weights most of it, a tile of the ones and a tile of the others come in turn.
//
// The two blocks of a cluster take a position together: two runs of an expert that share the weights, or, where one run is all
// it has, two weight blocks. Where there is an odd one out, its block has no rows, but keeps step.
template <typename Shape, WeightOrder ORDER> struct Schedule {
  static constexpr int CLUSTER = Shape::CLUSTER;
  static_assert(CLUSTER == 1 || CLUSTER == 2, "a cluster has two blocks");
  const WgmmaLaunch& launch;

  // A pair's gate and up rows come together, so that a lane holds both of a feature.
  __device__ __forceinline__ static bool pairs(const ExpertStack& stack) {
    return stack.pairing == PAIR_STACKED || (stack.pairing == PAIR_INTERLEAVED && ORDER == INNER_MAJOR);
  }
  // Whether a tile's halves are inner positions: where they may be, of all weights but pairs whose rows TMA cannot weave.
  __device__ __forceinline__ static bool inward(const ExpertStack& stack) {
    return Shape::HALVES == INNER && (ORDER == INNER_MAJOR || !pairs(stack));
  }
  __device__ __forceinline__ static int weight_blocks(const ExpertStack& stack) {
    return ceil_div(stack.weight_rows, inward(stack) ? Shape::HALF_ROWS : 2 * Shape::HALF_ROWS);
  }

  // The tile of this block at `position`. num_rows is negative where the position is to be passed over by all blocks of the
  // cluster; beyond the last tile stack_idx is -1.
  __device__ __forceinline__ TileInfo tile(int position, const RowBlocks<Shape>& row_blocks) const {
    int num_stacks = launch.num_stacks;
    for (int s = 0, first = 0; s < num_stacks * launch.num_products; ++s) {
      if (s == num_stacks) first = 0;
      if (Shape::ALTERNATES && launch.alternate && first == 0) position = in_turn(s, position, row_blocks);
      const ExpertStack& stack = launch.stacks[s];
      int of_row_block = positions_of_row_block(stack), positions = row_blocks.of_stack(stack, first) * of_row_block;
      if (position < positions) {
        int before = row_blocks.before_stack(first);
        Found found = row_blocks.find(stack, first, before + position / of_row_block);
        return cut(s, found, position - (found.row_block - before) * of_row_block);
      }
      position -= positions;
      first += stack.num_experts;
    }
    TileInfo none{};
    none.stack_idx = -1;
    return none;
  }

 private:
  __device__ __forceinline__ int positions_of_row_block(const ExpertStack& stack) const {
    return ceil_div(weight_blocks(stack), CLUSTER);
  }

  // Which position in the order of stacks comes at `position` of a product, whose first stack is s: shared, routed, shared ...
  // as long as there are both. Routed experts are those of the last stack.
  __device__ __forceinline__ int in_turn(int s, int position, const RowBlocks<Shape>& row_blocks) const {
    int shared = 0, routed = 0;
    for (int first = 0, last = s + launch.num_stacks - 1; s <= last; ++s) {
      const ExpertStack& stack = launch.stacks[s];
      (s < last ? shared : routed) += row_blocks.of_stack(stack, first) * positions_of_row_block(stack);
      first += stack.num_experts;
    }
    int turns = min(shared, routed);
    if (position < 2 * turns) return position / 2 + position % 2 * shared;
    return routed < shared && position < shared + routed ? position - turns : position;
  }

  // The tile at the given position among those of an expert.
  __device__ __forceinline__ TileInfo cut(int stack_idx, const Found& found, int position) const {
    const ExpertStack& stack = launch.stacks[stack_idx];
    Rows rows = found.rows;
    Runs runs = runs_of<Shape>(rows.count);
    int blocks = weight_blocks(stack), all_blocks = ceil_div(blocks, CLUSTER) * CLUSTER, rank = blockIdx.x % CLUSTER;
    bool together = CLUSTER > 1 && runs.row_blocks > 1;
    int run = 0, weight_block = position * CLUSTER + rank;
    if (together || CLUSTER == 1) {
      int walked = runs.row_blocks / CLUSTER, band = position / (BAND * walked), in_band = position % (BAND * walked);
      int width = min(BAND, all_blocks - band * BAND);
      run = in_band / width * CLUSTER + rank;
      weight_block = band * BAND + in_band % width;
    }
    int num_rows = max(min(runs.length, rows.count - run * runs.length), 0);
    if (weight_block >= blocks) num_rows = together ? -1 : 0;
    int block_k = inward(stack) ? 2 * BLOCK_K : BLOCK_K;
    return {stack_idx, found.expert, rows.begin + run * runs.length, num_rows, weight_block, ceil_div(stack.inner, block_k),
            found.row_block + run, together};
  }
};

// How far the blocks of a launch have come, in global memory that was zero at its beginning: the number of tiles taken, in a
// line of memory of its own, then for every row block how many tiles of its first product are stored. All tiles are taken from
// the counter, those of the first product first, so whoever waits for a row block waits for blocks that run: blocks need not be
// resident together.
struct Progress {
  int* taken;

  __device__ __forceinline__ int* stored(int row_block) const { return taken + 32 + row_block; }

  // One thread, after a barrier behind the stores of the threads it speaks for.
  __device__ __forceinline__ void add(int row_block) const {
    asm volatile("red.release.gpu.global.add.s32 [%0], 1;" ::"l"(stored(row_block)) : "memory");
  }
  __device__ __forceinline__ bool reached(int row_block, int parts) const {
    int value;
    asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(value) : "l"(stored(row_block)) : "memory");
    return value >= parts;
  }
};

}  // namespace hopper
