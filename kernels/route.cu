// route: router logits (num_tokens, num_experts) -> topk_ids, topk_weights (num_tokens, top_k)
//
//   grid     one warp a token, 4 warps a block; see route.cuh
#include "overlap.cuh"
#include "route.cuh"

namespace route {

constexpr int WARPS = 4;

template <typename T> __device__ __forceinline__ void route(const RouterLaunch& launch) {
  extern __shared__ uint32 dynamic_smem[];
  wait_for_previous_kernel();
  launch_next_kernel();
  int warp = threadIdx.x / WARP;
  int64 token = (int64)blockIdx.x * WARPS + warp;
  if (token < launch.num_tokens) route_token<T>(launch, token, dynamic_smem + warp * launch.words_per_warp);
}

}  // namespace route

#define ROUTE(NAME, T)                                                                       \
  extern "C" __global__ void __launch_bounds__(WARP * route::WARPS, 6)                        \
      NAME(const __grid_constant__ route::RouterLaunch launch) { route::route<T>(launch); }

ROUTE(route_float32, float)
ROUTE(route_bfloat16, bf16)
ROUTE(route_float16, fp16)
