// scheduler: from a tile number to (stack, expert, rows, weight rows), without asking the host.
//
// The number of rows of an expert is known only on the device. Every block therefore counts the tiles of all
// experts into shared memory once (an exclusive prefix sum, num_groups + 1 entries) and then looks its tiles up by
// bisection: tile t = blockIdx.x, + gridDim.x, ... A group is one expert of one stack, stacks in order.
// Inside a group the row blocks run fastest, so that neighbouring blocks read the same weights from L2.
#pragma once
#include "stacks.cuh"

// The weight tile of a block is two halves of HALF rows each. In a stacked pair the first half holds gate rows and
// the second the up rows of the same features; otherwise the halves are neighbours.
template <int HALF> struct WeightHalves {
  __device__ __forceinline__ static int blocks(const ExpertStack& stack) {
    return stack.pairing == PAIR_STACKED ? ceil_div(stack.weight_rows / 2, HALF) : ceil_div(stack.weight_rows, 2 * HALF);
  }
  __device__ __forceinline__ static int begin(const ExpertStack& stack, int n_block, int half) {
    return stack.pairing == PAIR_STACKED ? n_block * HALF + half * (stack.weight_rows / 2) : (2 * n_block + half) * HALF;
  }
  __device__ __forceinline__ static int end(const ExpertStack& stack, int half) {
    return stack.pairing == PAIR_STACKED && half == 0 ? stack.weight_rows / 2 : stack.weight_rows;
  }
};

struct Tile {
  int stack_idx;
  int expert;
  int row_begin, row_end;  // first row of the tile, end of the expert's rows
  int n_block;
};

template <int BLOCK_M, int HALF, int THREADS> struct Scheduler {
  const GemmLaunch& launch;
  int64* tile_offsets;  // (num_groups + 1) in shared memory
  int num_groups;

  __device__ __forceinline__ Scheduler(const GemmLaunch& launch, int64* shared) : launch(launch), tile_offsets(shared) {
    num_groups = 0;
    for (int s = 0; s < launch.num_stacks; ++s) num_groups += launch.stacks[s].num_experts;
    count_tiles();
  }

  __device__ __forceinline__ int64 num_tiles() const { return tile_offsets[num_groups]; }

  __device__ __forceinline__ Tile tile(int64 tile_idx) const {
    int low = 0, high = num_groups;  // tile_offsets[low] <= tile_idx < tile_offsets[high]
    while (high - low > 1) {
      int middle = (low + high) / 2;
      if (tile_offsets[middle] <= tile_idx) low = middle; else high = middle;
    }
    Tile tile;
    locate(low, tile.stack_idx, tile.expert);
    const ExpertStack& stack = launch.stacks[tile.stack_idx];
    int first = stack.expert_offsets ? stack.expert_offsets[tile.expert] : 0;
    tile.row_end = stack.expert_offsets ? stack.expert_offsets[tile.expert + 1] : stack.num_rows;
    int m_blocks = ceil_div(tile.row_end - first, BLOCK_M);
    int local = (int)(tile_idx - tile_offsets[low]);
    tile.row_begin = first + local % m_blocks * BLOCK_M;
    tile.n_block = local / m_blocks;
    return tile;
  }

 private:
  __device__ __forceinline__ void locate(int group, int& stack_idx, int& expert) const {
    stack_idx = 0;
    while (group >= launch.stacks[stack_idx].num_experts) group -= launch.stacks[stack_idx++].num_experts;
    expert = group;
  }

  __device__ __forceinline__ int64 tiles_of(int group) const {
    int stack_idx, expert;
    locate(group, stack_idx, expert);
    const ExpertStack& stack = launch.stacks[stack_idx];
    int rows = stack.expert_offsets ? stack.expert_offsets[expert + 1] - stack.expert_offsets[expert] : stack.num_rows;
    return (int64)ceil_div(rows, BLOCK_M) * WeightHalves<HALF>::blocks(stack);
  }

  // Exclusive prefix sum over the groups: every thread sums a run of neighbours, the block scans the runs.
  __device__ __forceinline__ void count_tiles() {
    __shared__ int64 warp_totals[THREADS / WARP];
    int run = ceil_div(num_groups, THREADS), begin = min(threadIdx.x * run, num_groups), end = min(begin + run, num_groups);
    int64 sum = 0;
    for (int group = begin; group < end; ++group) sum += tiles_of(group);
    int64 inclusive = sum;
    int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    for (int step = 1; step < WARP; step *= 2) {
      int64 left = __shfl_up_sync(FULL_MASK, inclusive, step);
      if (lane >= step) inclusive += left;
    }
    if (lane == WARP - 1) warp_totals[warp] = inclusive;
    __syncthreads();  // the totals of all warps are written
    int64 offset = inclusive - sum;
    for (int w = 0; w < warp; ++w) offset += warp_totals[w];
    for (int group = begin; group < end; ++group) { tile_offsets[group] = offset; offset += tiles_of(group); }
    if (threadIdx.x == THREADS - 1) tile_offsets[num_groups] = offset;  // the last thread's end is the total
    __syncthreads();  // the prefix sum is complete
  }
};
