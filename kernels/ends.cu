// ends: what a few families have before and behind the experts
//
//   rms_norm   plain = x / rms(x) in float32 for the router, scaled = x / rms(x) * weight for the experts      Gemma-4
//   finish     y = sum_s totals[s] + (weights of the identity experts) * x + bias, then / rms * norm, + residual, rounded once
//              identity experts: LongCat-Flash; bias: JetMoE; norm: A.X-K1; two totals: latent experts and shared ones
//
//   grid       one warp a token, 8 warps a block; float32 sums in a fixed order: the same bits on every run
//   edges      a token without identity experts does not read x, which may hold NaN; y may be x or the residual: a lane
//              reads its elements before it writes them
#include "overlap.cuh"
#include "types.cuh"

namespace ends {

struct NormLaunch {
  const void* x;
  const float* weight;  // (hidden_size)
  float* plain;         // (num_tokens, hidden_size)
  void* scaled;         // (num_tokens, hidden_size)
  int64 x_row_stride, x_col_stride;
  int num_tokens, hidden_size;
  float eps;
  int padding;
};
static_assert(sizeof(NormLaunch) == 64, "cumoe/gpu/ends.py packs 64 bytes");

struct FinishLaunch {
  float* totals;              // (num_totals, num_tokens, hidden_size); the first is overwritten
  const void* x;
  const int* topk_ids;        // (num_tokens, top_k)
  const float* topk_weights;  // (num_tokens, top_k)
  const float* bias;          // (hidden_size) or null
  const float* norm;          // (hidden_size) or null
  const void* residual;       // (num_tokens, hidden_size) in the type of y, or null
  void* y;                    // (num_tokens, hidden_size)
  int64 x_row_stride, x_col_stride;
  int num_totals, num_tokens, hidden_size, top_k;
  int num_experts, num_identity_experts;
  float eps;                  // of the norm
  int padding;
};
static_assert(sizeof(FinishLaunch) == 112, "cumoe/gpu/ends.py packs 112 bytes");

constexpr int WARPS = 8;

__device__ __forceinline__ float inverse_rms(float sum_of_squares, int n, float eps) {
  return 1.0f / sqrtf(warp_sum(sum_of_squares) / n + eps);
}

template <typename T> __device__ __forceinline__ void rms_norm(const NormLaunch& p) {
  wait_for_previous_kernel();
  launch_next_kernel();
  int64 token = (int64)blockIdx.x * WARPS + threadIdx.x / WARP;
  int lane = threadIdx.x % WARP;
  if (token >= p.num_tokens) return;
  const T* x = static_cast<const T*>(p.x) + token * p.x_row_stride;
  float sum = 0.0f;
  for (int d = lane; d < p.hidden_size; d += WARP) {
    float value = to_float(x[d * p.x_col_stride]);
    sum = fmaf(value, value, sum);
  }
  float factor = inverse_rms(sum, p.hidden_size, p.eps);
  for (int d = lane; d < p.hidden_size; d += WARP) {
    float value = to_float(x[d * p.x_col_stride]) * factor;
    p.plain[token * p.hidden_size + d] = value;
    static_cast<T*>(p.scaled)[token * p.hidden_size + d] = from_float<T>(value * p.weight[d]);
  }
}

template <typename T> __device__ __forceinline__ void finish(const FinishLaunch& p) {
  wait_for_previous_kernel();
  launch_next_kernel();
  int64 token = (int64)blockIdx.x * WARPS + threadIdx.x / WARP;
  int lane = threadIdx.x % WARP;
  if (token >= p.num_tokens) return;
  float identity = 0.0f;
  if (p.num_identity_experts > 0) {
    for (int j = 0; j < p.top_k; ++j)
      if (p.topk_ids[token * p.top_k + j] >= p.num_experts) identity += p.topk_weights[token * p.top_k + j];
  }
  const T* x = static_cast<const T*>(p.x) + token * p.x_row_stride;
  float* sums = p.totals + token * p.hidden_size;  // of the first total, in place
  float squares = 0.0f;
#pragma unroll 1
  for (int d = lane; d < p.hidden_size; d += WARP) {
    float sum = sums[d];
    for (int s = 1; s < p.num_totals; ++s) sum += sums[(int64)s * p.num_tokens * p.hidden_size + d];
    if (identity != 0.0f) sum = fmaf(identity, to_float(x[d * p.x_col_stride]), sum);
    if (p.bias) sum += p.bias[d];
    squares = fmaf(sum, sum, squares);
    sums[d] = sum;
  }
  float factor = p.norm ? inverse_rms(squares, p.hidden_size, p.eps) : 1.0f;
  const T* residual = p.residual ? static_cast<const T*>(p.residual) + token * p.hidden_size : nullptr;
  T* y = static_cast<T*>(p.y) + token * p.hidden_size;
#pragma unroll 1
  for (int d = lane; d < p.hidden_size; d += WARP) {
    float value = p.norm ? sums[d] * factor * p.norm[d] : sums[d];
    if (residual) value += to_float(residual[d]);
    y[d] = from_float<T>(value);
  }
}

}  // namespace ends

#define ENDS(NORM, FINISH, T)                                                               \
  extern "C" __global__ void __launch_bounds__(WARP * ends::WARPS)                          \
      NORM(const __grid_constant__ ends::NormLaunch launch) { ends::rms_norm<T>(launch); }  \
  extern "C" __global__ void __launch_bounds__(WARP * ends::WARPS)                          \
      FINISH(const __grid_constant__ ends::FinishLaunch launch) { ends::finish<T>(launch); }

ENDS(ends_rms_norm_float32, ends_finish_float32, float)
ENDS(ends_rms_norm_bfloat16, ends_finish_bfloat16, bf16)
ENDS(ends_rms_norm_float16, ends_finish_float16, fp16)
