// route_and_group: router logits -> topk_ids, topk_weights, and the order in which the experts read the slots; one launch
// where one block can place all slots, else the first of two.
//
//   grid     each block routes a run of neighbouring tokens, tokens_per_warp by each warp, one after the other
//   then     PLACE: the block that ends last sorts all slots (at most 4096); the others are gone by then
//            PUBLISH: every block counts its own slots, and group_place follows with the same blocks
//   block    32 warps, or 8 for few tokens and where shared memory is short
//   smem     words_per_warp words a warp (see route.cuh), then the counters of group.cuh in the same place
//
//   barrier            means
//   before the count   all ids of the block are written, and nobody reads the logits in shared memory any more
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
  int tokens_per_warp, then;
};
static_assert(sizeof(RouteAndGroupLaunch) == 248, "cumoe/gpu/route_and_group.py packs 248 bytes");

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

template <typename T, int WARPS> __device__ __forceinline__ void run(const RouteAndGroupLaunch& launch) {
  extern __shared__ uint32 dynamic_smem[];
  wait_for_previous_kernel();
  launch_next_kernel();
  int warp = threadIdx.x / WARP;
  int64 begin = ((int64)blockIdx.x * WARPS + warp) * launch.tokens_per_warp, num_tokens = launch.router.num_tokens;
  int64 end = begin + launch.tokens_per_warp < num_tokens ? begin + launch.tokens_per_warp : num_tokens;
  for (int64 token = begin; token < end; ++token) {
    route::route_token<T>(launch.router, token, dynamic_smem + warp * launch.router.words_per_warp);
    __syncwarp();  // the next token's logits take the place of these
  }
  __syncthreads();
  int* histograms = reinterpret_cast<int*>(dynamic_smem);
  if (launch.then == PUBLISH) {
    group::Part part{(int)blockIdx.x, (int)gridDim.x};
    group::count<WARPS>(launch.group, part, histograms);
    group::publish<WARPS>(launch.group, part, histograms);
  } else if (gridDim.x == 1 || comes_last(launch.blocks_done)) {
    group::count<WARPS>(launch.group, {0, 1}, histograms);
    group::place<WARPS>(launch.group, {0, 1}, histograms);
  }
}

}  // namespace route_and_group

#define ROUTE_AND_GROUP(NAME, T, WARPS)                                       \
  extern "C" __global__ void __launch_bounds__(WARPS * WARP)                  \
      NAME(const __grid_constant__ route_and_group::RouteAndGroupLaunch launch) { \
    route_and_group::run<T, WARPS>(launch);                                   \
  }

ROUTE_AND_GROUP(route_and_group_float32, float, 32)
ROUTE_AND_GROUP(route_and_group_bfloat16, bf16, 32)
ROUTE_AND_GROUP(route_and_group_float16, fp16, 32)
ROUTE_AND_GROUP(route_and_group_float32_few, float, 8)
ROUTE_AND_GROUP(route_and_group_bfloat16_few, bf16, 8)
ROUTE_AND_GROUP(route_and_group_float16_few, fp16, 8)
