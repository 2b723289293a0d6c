// group: topk_ids -> permutation, inverse_permutation, expert_offsets, tokens_per_expert; see group.cuh
//
//   group_count      a block counts the slots of one row of the matrix of counts; 1024 threads
//   group_place      follows: a block places the slots of rows_per_block rows; 512 threads
//   group_place_all  alone: one block counts and places all slots; 256 threads, since there is less to clear and to add up
#include "group.cuh"
#include "overlap.cuh"

#define GROUP_COUNT(NAME, WARPS)                                                          \
  extern "C" __global__ void __launch_bounds__(WARPS * WARP)                              \
      NAME(const __grid_constant__ group::GroupLaunch launch) {                           \
    extern __shared__ int histogram[]; /* (num_experts + 1), rounded up */                \
    wait_for_previous_kernel();                                                           \
    launch_next_kernel();                                                                 \
    group::count_row<WARPS>(launch, blockIdx.x, histogram);                               \
  }
#define GROUP_PLACE(NAME, WARPS)                                                          \
  extern "C" __global__ void __launch_bounds__(WARPS * WARP)                              \
      NAME(const __grid_constant__ group::GroupLaunch launch) {                           \
    extern __shared__ int histograms[]; /* (WARPS + 2, num_experts + 1), rounded up */    \
    int first_row = blockIdx.x * launch.rows_per_block;                                   \
    group::Placing<WARPS> placing{launch, histograms, first_row, false};                  \
    placing.prepare();                                                                    \
    wait_for_previous_kernel();                                                           \
    launch_next_kernel();                                                                 \
    placing.run();                                                                        \
  }
#define GROUP_PLACE_ALL(NAME, WARPS)                                                      \
  extern "C" __global__ void __launch_bounds__(WARPS * WARP)                              \
      NAME(const __grid_constant__ group::GroupLaunch launch) {                           \
    extern __shared__ int histograms[]; /* (WARPS, num_experts + 1), or the ranked slots */ \
    wait_for_previous_kernel();                                                           \
    launch_next_kernel();                                                                 \
    group::place_all<WARPS>(launch, histograms);                                          \
  }

GROUP_COUNT(group_count, 32)
GROUP_PLACE(group_place, 16)
GROUP_PLACE_ALL(group_place_all, 8)
