// scheduler: from a tile number to (stack, expert, rows), without asking the host.
//
// The number of rows of an expert is known only on the device. Every block therefore counts the tiles of all
// experts into shared memory once (an exclusive prefix sum, num_groups + 1 entries) and then looks its tiles up by
// bisection: tile t = blockIdx.x, + gridDim.x, ... A group is one expert of one stack, stacks in order.
#pragma once
#include "scan.cuh"
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

struct Group {
  int stack_idx, expert;
  int row_begin, num_rows;  // of the expert
  int tile;                 // number of the tile within the group
};

// Tiling::tiles(stack, num_rows) says into how many tiles a group is cut; Offset is the type of a tile number.
template <typename Tiling, typename Offset, int THREADS> struct Scheduler {
  const GemmLaunch& launch;
  Offset* tile_offsets;  // (num_groups + 1) in shared memory
  int num_groups;

  __device__ __forceinline__ Scheduler(const GemmLaunch& launch, Offset* shared) : launch(launch), tile_offsets(shared) {
    num_groups = 0;
    for (int s = 0; s < launch.num_stacks; ++s) num_groups += launch.stacks[s].num_experts;
    for (int group = threadIdx.x; group <= num_groups; group += THREADS)
      tile_offsets[group] = group < num_groups ? (Offset)tiles_of(group) : 0;
    __syncthreads();  // every group's tiles are counted
    exclusive_scan<THREADS>(tile_offsets, num_groups + 1);
  }

  __device__ __forceinline__ Offset num_tiles() const { return tile_offsets[num_groups]; }

  __device__ __forceinline__ Group find(Offset tile) const {
    int low = 0, high = num_groups;  // tile_offsets[low] <= tile < tile_offsets[high]
    while (high - low > 1) {
      int middle = (low + high) / 2;
      if (tile_offsets[middle] <= tile) low = middle; else high = middle;
    }
    Group group = at(low);
    group.tile = (int)(tile - tile_offsets[low]);
    return group;
  }

 private:
  __device__ __forceinline__ Group at(int index) const {
    Group group{0, index, 0, 0, 0};
    while (group.expert >= launch.stacks[group.stack_idx].num_experts)
      group.expert -= launch.stacks[group.stack_idx++].num_experts;
    const ExpertStack& stack = launch.stacks[group.stack_idx];
    group.row_begin = stack.expert_offsets ? stack.expert_offsets[group.expert] : 0;
    group.num_rows = stack.expert_offsets ? stack.expert_offsets[group.expert + 1] - group.row_begin : stack.num_rows;
    return group;
  }

  __device__ __forceinline__ int64 tiles_of(int index) const {
    Group group = at(index);
    return Tiling::tiles(launch.stacks[group.stack_idx], group.num_rows);
  }
};

// Tiles of BLOCK_M rows by 2 HALF weight rows. Inside a group the row blocks run fastest, so that neighbouring blocks read
// the same weights from L2.
struct Tile {
  int stack_idx;
  int expert;
  int row_begin, row_end;  // first row of the tile, end of the expert's rows
  int n_block;
};

template <int BLOCK_M, int HALF> struct GridTiling {
  __device__ __forceinline__ static int64 tiles(const ExpertStack& stack, int num_rows) {
    return (int64)ceil_div(num_rows, BLOCK_M) * WeightHalves<HALF>::blocks(stack);
  }
  __device__ __forceinline__ static Tile tile(const Group& group) {
    int m_blocks = ceil_div(group.num_rows, BLOCK_M);
    return {group.stack_idx, group.expert, group.row_begin + group.tile % m_blocks * BLOCK_M,
            group.row_begin + group.num_rows, group.tile / m_blocks};
  }
};
