// shared_gate: gates[t] = sigmoid(x[t] . gate), the factor of a gated shared expert (Qwen2-MoE)
//
//   grid     one warp a token, 8 warps a block; float32 sums in a fixed order
#include "activation.cuh"
#include "overlap.cuh"

namespace gate {

struct GateLaunch {
  const void* x;
  const void* gate;  // (hidden_size)
  float* gates;      // (num_tokens)
  int64 x_row_stride, x_col_stride, gate_stride;
  int num_tokens, hidden_size;
};
static_assert(sizeof(GateLaunch) == 56, "cumoe/gpu/experts.py packs 56 bytes");

constexpr int WARPS = 8;

template <typename T> __device__ __forceinline__ void shared_gate(const GateLaunch& p) {
  wait_for_previous_kernel();
  launch_next_kernel();
  int64 token = (int64)blockIdx.x * WARPS + threadIdx.x / WARP;
  if (token >= p.num_tokens) return;
  const T* x = static_cast<const T*>(p.x) + token * p.x_row_stride;
  const T* gate = static_cast<const T*>(p.gate);
  float sum = 0.0f;
  for (int d = threadIdx.x % WARP; d < p.hidden_size; d += WARP)
    sum = fmaf(to_float(x[d * p.x_col_stride]), to_float(gate[d * p.gate_stride]), sum);
  sum = warp_sum(sum);
  if (threadIdx.x % WARP == 0) p.gates[token] = sigmoid(sum);
}

}  // namespace gate

#define SHARED_GATE(NAME, T)                                                          \
  extern "C" __global__ void __launch_bounds__(WARP * gate::WARPS)                    \
      NAME(const __grid_constant__ gate::GateLaunch launch) { gate::shared_gate<T>(launch); }

SHARED_GATE(shared_gate_float32, float)
SHARED_GATE(shared_gate_bfloat16, bf16)
SHARED_GATE(shared_gate_float16, fp16)
