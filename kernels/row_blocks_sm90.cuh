// row_blocks_sm90: into how many runs the rows of every expert are cut, and which expert has a run.
//
// The number of rows of an expert is known only on the device: every block counts once, before its first tile. A group is one
// expert of one stack of the first product; a row block is one run of rows of a group.
#pragma once
#include "overlap.cuh"
#include "scan.cuh"
#include "tiles_sm90.cuh"

namespace hopper {

struct Rows { int begin, count; };  // of an expert
struct Found {
  int expert;
  Rows rows;
  int row_block;  // number of its first one among those of all groups
};

// How an expert's rows are cut: one run, or CLUSTER times as many as are needed; the last one may have no rows then.
struct Runs { int length, row_blocks; };
template <typename Shape> __device__ __forceinline__ Runs runs_of(int num_rows) {
  constexpr int CLUSTER = Shape::CLUSTER;
  if (num_rows <= Shape::MAX_ROWS) return {Shape::MAX_ROWS, num_rows > 0};
  int length = ceil_div(ceil_div(num_rows, ceil_div(num_rows, CLUSTER * Shape::MAX_ROWS) * CLUSTER), 8) * 8;
  return {length, ceil_div(num_rows, CLUSTER * length) * CLUSTER};
}

// Any number of slots: all threads count the row blocks of all groups.
template <typename Shape, Slots = Shape::SLOTS> struct RowBlocks {
  const WgmmaLaunch& launch;
  int* before;  // (num_groups + 1) in shared memory

  __device__ __forceinline__ RowBlocks(const WgmmaLaunch& of, int* shared) : launch(of), before(shared) {}

  // All threads; when_alone() as soon as the previous kernel has ended. A barrier in here publishes what was written before.
  //
  // Until then rows are counted as far as can be: that is all there is to count where ids came early, and elsewhere the code
  // has been fetched meanwhile.
  template <int THREADS, typename Visit> __device__ __forceinline__ void count(Visit when_alone, bool) {
    constexpr int FIRST = Shape::COUNTS_EARLY ? EARLY_IDS : OFFSETS;
#pragma unroll 1
    for (int source = FIRST; source <= OFFSETS; ++source) {
      if (source == OFFSETS) {
        wait_for_previous_kernel();
        launch_next_kernel();
        when_alone();
        if (Shape::COUNTS_EARLY && launch.ids_are_early) break;
      }
      count_from<THREADS>(static_cast<Source>(source));
    }
  }

  // Of a stack whose first group is given, and of all stacks before it.
  __device__ __forceinline__ int of_stack(const ExpertStack& stack, int first) const {
    return before[first + stack.num_experts] - before[first];
  }
  __device__ __forceinline__ int before_stack(int first) const { return before[first]; }

  // The expert of that stack which holds a row block: before[group] <= row_block < before[group + 1].
  __device__ __forceinline__ Found find(const ExpertStack& stack, int first, int row_block) const {
    int low = first, high = first + stack.num_experts;
    while (high - low > 1) {
      int middle = (low + high) / 2;
      if (before[middle] <= row_block) low = middle; else high = middle;
    }
    return {low - first, rows_of(stack, low - first), before[low]};
  }

 private:
  // Where the numbers of rows come from: the ids of the slots, whether or not there are any, or the experts' offsets.
  enum Source { EARLY_IDS, OFFSETS };
  template <int THREADS> __device__ __forceinline__ void count_from(Source source) const {
    if (source == EARLY_IDS) count_early_ids<THREADS>();
    int group = threadIdx.x, first = 0;
    for (int s = 0; s < launch.num_stacks; ++s) {
      const ExpertStack& stack = launch.stacks[s];
      for (; group - first < stack.num_experts; group += THREADS) {
        bool counted = source == EARLY_IDS && stack.expert_offsets;
        before[group] = runs_of<Shape>(counted ? before[group] : rows_of(stack, group - first).count).row_blocks;
      }
      first += stack.num_experts;
    }
    if (group == first) before[group] = 0;
    __syncthreads();  // every group is counted
    exclusive_scan<THREADS>(before, first + 1);
  }

  // before[group] <- how many slots name the expert; routed experts are those of the last stack.
  template <int THREADS> __device__ __forceinline__ void count_early_ids() const {
    int groups = 0, routed = 0, num_ids = launch.ids_are_early ? launch.num_slots : 0;
    for (int s = 0; s < launch.num_stacks; ++s) routed = groups, groups += launch.stacks[s].num_experts;
    for (int group = threadIdx.x; group < groups; group += THREADS) before[group] = 0;
    __syncthreads();  // the counts are zero
    for (int slot = threadIdx.x; slot < num_ids; slot += THREADS) {
      uint32 expert = launch.topk_ids[slot];
      if (expert < (uint32)(groups - routed)) atomicAdd(&before[routed + expert], 1);
    }
    __syncthreads();  // every slot is counted
  }

  __device__ __forceinline__ static Rows rows_of(const ExpertStack& stack, int expert) {
    if (!stack.expert_offsets) return {0, stack.num_rows};
    int begin = stack.expert_offsets[expert];
    return {begin, stack.expert_offsets[expert + 1] - begin};
  }
};

}  // namespace hopper
