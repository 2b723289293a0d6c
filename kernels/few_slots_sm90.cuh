// few_slots_sm90: at most 32 slots, sorted by the warp that plans tiles, in its registers: a lane has a slot.
//
// The kernel ahead sorts them too, for whoever adds up the rows. But what it writes is a chain of trips to memory away:
// offsets, then the permutation, then factors. The ids and weights of the slots are one trip, which may begin before that kernel
// has ended. The rows are those of group.cuh: by expert, then by slot.
#pragma once
#include "row_blocks_sm90.cuh"

namespace hopper {

template <typename Shape> struct RowBlocks<Shape, FEW> {
  const WgmmaLaunch& launch;
  uint32 expert;  // of the slot; beyond all others where it has none
  float weight;
  int row;                   // of the slot, sorted
  int count_of_expert;       // its rows, at its first slot; 0 at the others
  int row_blocks;            // and row blocks
  int earlier;               // row blocks of smaller experts
  int of_routed, of_shared;  // row blocks of all routed experts, of a shared one

  __device__ __forceinline__ RowBlocks(const WgmmaLaunch& of, int*) : launch(of) {}

  // As for many slots. The planner alone counts; id and weight are on their way while it waits.
  template <int THREADS, typename Visit> __device__ __forceinline__ void count(Visit when_alone, bool is_planner) {
    if (is_planner && launch.ids_are_early) read();
    __syncthreads();  // what was written before is published
    wait_for_previous_kernel();
    launch_next_kernel();
    when_alone();
    if (!is_planner) return;
    if (!launch.ids_are_early) read();
    sort();
  }

  // Every stack but the last is one shared expert.
  __device__ __forceinline__ int of_stack(const ExpertStack& stack, int) const {
    return stack.expert_offsets ? of_routed : of_shared;
  }
  __device__ __forceinline__ int before_stack(int first) const { return first * of_shared; }

  __device__ __forceinline__ Found find(const ExpertStack& stack, int first, int row_block) const {
    int before = before_stack(first);
    if (!stack.expert_offsets) return {0, {0, stack.num_rows}, before};
    uint32 has_it = __ballot_sync(FULL_MASK, (uint32)(row_block - before - earlier) < (uint32)row_blocks);
    int from = __ffs(has_it) - 1;
    Rows rows{__shfl_sync(FULL_MASK, row, from), __shfl_sync(FULL_MASK, count_of_expert, from)};
    return {(int)__shfl_sync(FULL_MASK, expert, from), rows, before + __shfl_sync(FULL_MASK, earlier, from)};
  }

  // Where the rows of a routed tile are, and their factors.
  template <typename Place> __device__ __forceinline__ void describe(const ExpertStack& stack, Place& place) const {
    int r = row - place.tile.row_begin;
    if ((uint32)r >= (uint32)place.tile.num_rows) return;
    place.scale_in[r] = stack.scale_in ? weight : 1.0f;
    place.scale_out[r] = stack.scale_out ? weight : 1.0f;
    int a_row = stack.slots_per_a_row > 0 ? slot() / stack.slots_per_a_row : row;
    place.offsets[r] = a_row * (uint32)(stack.a_row_stride / 8);
  }

 private:
  static constexpr uint32 NONE = 0xffffffff;
  __device__ __forceinline__ static int slot() { return threadIdx.x % WARP; }

  __device__ __forceinline__ void read() {
    bool exists = slot() < launch.num_slots;
    expert = exists ? launch.topk_ids[slot()] : NONE;
    weight = exists ? launch.topk_weights[slot()] : 0.0f;
  }

  __device__ __forceinline__ void sort() {
    if (expert >= (uint32)launch.stacks[launch.num_stacks - 1].num_experts) expert = NONE;
    uint32 equals = __match_any_sync(FULL_MASK, expert);
    row = __popc(equals & ((1u << slot()) - 1));
    count_of_expert = row == 0 && expert != NONE ? __popc(equals) : 0;
    row_blocks = runs_of<Shape>(count_of_expert).row_blocks;
    earlier = 0;
#pragma unroll 4
    for (int from = 0; from < launch.num_slots; ++from) {
      uint32 other = __shfl_sync(FULL_MASK, expert, from);
      int more = __shfl_sync(FULL_MASK, row_blocks, from);
      if (other < expert) ++row, earlier += more;
    }
    of_routed = __reduce_add_sync(FULL_MASK, row_blocks);
    of_shared = runs_of<Shape>(launch.stacks[0].num_rows).row_blocks;  // if that is a shared one
  }
};

}  // namespace hopper
