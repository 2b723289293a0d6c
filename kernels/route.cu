// route: router logits (num_tokens, num_experts) -> topk_ids, topk_weights (num_tokens, top_k)
//
//   grid     one warp a token, 4 warps a block; see route.cuh
#include "overlap.cuh"
#include "route.cuh"

namespace route {

constexpr int WARPS = 4;

template <int KEYS> __device__ __forceinline__ void route(const RouterLaunch& launch) {
  extern __shared__ __align__(16) uint32 dynamic_smem[];
  wait_for_previous_kernel();
  launch_next_kernel();
  int64 begin = (int64)blockIdx.x * WARPS, end = begin + WARPS < launch.num_tokens ? begin + WARPS : launch.num_tokens;
  route_tokens<KEYS, WARPS>(launch, begin, end, dynamic_smem);
}

}  // namespace route

#define ROUTE(NAME, KEYS)                                                                    \
  extern "C" __global__ void __launch_bounds__(WARP * route::WARPS, 8)                        \
      NAME(const __grid_constant__ route::RouterLaunch launch) { route::route<KEYS>(launch); }

ROUTE(route_8, 8)
ROUTE(route_16, 16)
ROUTE(route_32, 32)
