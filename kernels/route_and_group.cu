// route_and_group: router logits -> topk_ids, topk_weights, and the order in which the experts read the slots; one launch
// where one block places all slots, else the first of two.
//
//   grid     each block routes a run of tokens_per_block neighbouring tokens; see route.cuh
//   then     PLACE: the block that ends last sorts all slots (at most 4096); the others are gone by then
//            PUBLISH: every block counts its own slots, and group_place follows
//   block    32 warps, or 8 where one block sorts and where shared memory is short
//   smem     words_per_warp words a warp that routes (see route.cuh), then the counters of group.cuh in the same place
//
//   blocks_done        counter in global memory, 0 between launches: ids written before an arrival are seen by the last one
//
// Which block comes last decides only who works: positions follow from the ids alone.
#include "group.cuh"
#include "overlap.cuh"
#include "route.cuh"

namespace route_and_group {

enum Then { PLACE = 0, PUBLISH = 1 };

struct RouteAndGroupLaunch {
  route::RouterLaunch router;
  group::GroupLaunch group;
  int* blocks_done;
  int tokens_per_block, then;
};
static_assert(sizeof(RouteAndGroupLaunch) == 264, "cumoe/gpu/route_and_group.py packs 264 bytes");

// Whether all other blocks have come here before this one. Sets the counter back for the next launch.
__device__ __forceinline__ bool comes_last(int* blocks_done) {
  __shared__ int last;
  if (threadIdx.x == 0) {
    __threadfence();
    last = atomicAdd(blocks_done, 1) == (int)gridDim.x - 1;
    if (last) *blocks_done = 0;
    __threadfence();
  }
  __syncthreads();
  return last;
}

template <int KEYS, int WARPS> __device__ __forceinline__ void run(const RouteAndGroupLaunch& launch) {
  extern __shared__ __align__(16) uint32 dynamic_smem[];
  wait_for_previous_kernel();
  launch_next_kernel();
  int64 begin = (int64)blockIdx.x * launch.tokens_per_block, end = begin + launch.tokens_per_block;
  if (end > launch.router.num_tokens) end = launch.router.num_tokens;
  route::route_tokens<KEYS, WARPS>(launch.router, begin, end, dynamic_smem);
  int* histograms = reinterpret_cast<int*>(dynamic_smem);
  if (launch.then == PUBLISH) {
    group::count_row<WARPS>(launch.group, blockIdx.x, histograms);
    return;
  }
  if (gridDim.x > 1 && !comes_last(launch.blocks_done)) return;
  if (WARPS == group::FEW_WARPS) group::place_all<group::FEW_WARPS>(launch.group, histograms);
}

}  // namespace route_and_group

#define ROUTE_AND_GROUP(NAME, KEYS, WARPS)                                    \
  extern "C" __global__ void __launch_bounds__(WARPS * WARP, 1)               \
      NAME(const __grid_constant__ route_and_group::RouteAndGroupLaunch launch) { \
    route_and_group::run<KEYS, WARPS>(launch);                                \
  }

ROUTE_AND_GROUP(route_and_group_8, 8, 32)
ROUTE_AND_GROUP(route_and_group_16, 16, 32)
ROUTE_AND_GROUP(route_and_group_32, 32, 32)
ROUTE_AND_GROUP(route_and_group_8_few, 8, 8)
ROUTE_AND_GROUP(route_and_group_16_few, 16, 8)
ROUTE_AND_GROUP(route_and_group_32_few, 32, 8)
