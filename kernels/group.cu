// group: topk_ids -> permutation, inverse_permutation, expert_offsets, tokens_per_expert; see group.cuh
//
//   grid     group_count and group_place: the same blocks, each owns a run of `slots_per_block` slots; a single block needs
//            no group_count
//   block    1024 threads, or 256 where there is one block and where shared memory is short
#include "group.cuh"
#include "overlap.cuh"

#define GROUP_COUNT(NAME, WARPS)                                                    \
  extern "C" __global__ void __launch_bounds__(WARPS * WARP, 1)                     \
      NAME(const __grid_constant__ group::GroupLaunch launch) {                     \
    extern __shared__ int histograms[]; /* (WARPS, num_experts + 1) */              \
    wait_for_previous_kernel();                                                     \
    launch_next_kernel();                                                           \
    group::Part part{(int)blockIdx.x, (int)gridDim.x};                              \
    group::count<WARPS>(launch, part, histograms);                                  \
    group::publish<WARPS>(launch, part, histograms);                                \
  }
#define GROUP_PLACE(NAME, WARPS)                                                    \
  extern "C" __global__ void __launch_bounds__(WARPS * WARP, 1)                     \
      NAME(const __grid_constant__ group::GroupLaunch launch) {                     \
    extern __shared__ int histograms[]; /* (WARPS + 2, num_experts + 1) */          \
    wait_for_previous_kernel();                                                     \
    launch_next_kernel();                                                           \
    group::place<WARPS>(launch, {(int)blockIdx.x, (int)gridDim.x}, histograms);     \
  }

GROUP_COUNT(group_count, 32)
GROUP_COUNT(group_count_few, 8)
GROUP_PLACE(group_place, 32)
GROUP_PLACE(group_place_few, 8)
