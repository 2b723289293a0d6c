// route_and_count: router logits -> topk_ids, topk_weights and a row of counts a block, for many tokens; group_place follows.
//
//   grid     a block routes a run of tokens_per_block neighbouring tokens, each of its warps a part of it; see route_lanes.cuh
//   block    8 to 32 warps, up to 24 with 16 experts a lane, as many as there are tokens
//   smem     the histogram of the block's choices, then words_per_warp words a warp
//
//   barrier       means
//   after zeros   the histogram is empty
//   publish       all choices of the block are in the histogram; they may be added in any order
#include "group.cuh"
#include "overlap.cuh"
#include "route_lanes.cuh"

namespace route_and_count {

struct RouteAndCountLaunch {
  route::RouterLaunch router;
  group::GroupLaunch group;
  route::Lanes lanes;
  int tokens_per_block, tokens_per_warp, words_per_warp, padding;
};
static_assert(sizeof(RouteAndCountLaunch) == 280, "cumoe/gpu/route_and_count.py packs 280 bytes");

template <int KEYS, bool WHOLE> __device__ __forceinline__ void run(const RouteAndCountLaunch& launch) {
  extern __shared__ uint32 dynamic_smem[];
  int* histogram = reinterpret_cast<int*>(dynamic_smem);
  int warp = __shfl_sync(FULL_MASK, (int)threadIdx.x / WARP, 0);  // which tells the compiler that lanes agree
  uint32* row = dynamic_smem + group::row_vectors(launch.group) * group::VECTOR + warp * launch.words_per_warp;
  group::clear(launch.group, histogram);
  wait_for_previous_kernel();
  launch_next_kernel();
  int first = warp * launch.tokens_per_warp, left = min(launch.tokens_per_block - first, launch.tokens_per_warp);
  int64 begin = (int64)blockIdx.x * launch.tokens_per_block + first;
  int count = (int)(launch.router.num_tokens - begin < left ? launch.router.num_tokens - begin : left);
  route::route_in_lanes<KEYS, WHOLE>(launch.router, launch.lanes, begin, count, row,
                                     [&](int expert) { group::count(launch.group, histogram, expert); });
  group::publish(launch.group, blockIdx.x, histogram);
}

}  // namespace route_and_count

#define ROUTE_AND_COUNT(NAME, KEYS, WHOLE, WARPS)                                 \
  extern "C" __global__ void __launch_bounds__(WARPS * WARP, 1)                   \
      NAME(const __grid_constant__ route_and_count::RouteAndCountLaunch launch) { \
    route_and_count::run<KEYS, WHOLE>(launch);                                    \
  }

ROUTE_AND_COUNT(route_and_count_4, 4, false, 32)
ROUTE_AND_COUNT(route_and_count_8, 8, false, 32)
ROUTE_AND_COUNT(route_and_count_16, 16, false, 24)
ROUTE_AND_COUNT(route_and_count_4_whole, 4, true, 32)
ROUTE_AND_COUNT(route_and_count_8_whole, 8, true, 32)
ROUTE_AND_COUNT(route_and_count_16_whole, 16, true, 24)
