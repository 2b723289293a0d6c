// shared_gate: gates[t] = sigmoid(x[t] . gate), the factor of a gated shared expert (Qwen2-MoE)
//
//   grid     a block a token; every thread has WIDTH neighbouring numbers at a time, AHEAD times on their way
//   barrier  the sums of all warps are written
//
// A thread's products, a warp's threads and the warps are added in a fixed order, the same in every batch. WIDTH = 1 serves
// odd sizes, strides and addresses.
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
static_assert(sizeof(GateLaunch) == 56, "cumoe/gpu/gate.py packs 56 bytes");

constexpr int THREADS = 128, AHEAD = 4;

template <typename T, int WIDTH> struct alignas(sizeof(T) * WIDTH) Pack { T at[WIDTH]; };

template <typename T, int WIDTH> __device__ __forceinline__ Pack<T, WIDTH> load(const void* base, int64 index) {
  return *reinterpret_cast<const Pack<T, WIDTH>*>(static_cast<const T*>(base) + index);
}

template <typename T, int WIDTH> __device__ __forceinline__ void shared_gate(const GateLaunch& p) {
  __shared__ float sums[THREADS / WARP];
  wait_for_previous_kernel();
  launch_next_kernel();
  const T* x = static_cast<const T*>(p.x) + blockIdx.x * p.x_row_stride;
  float sum = 0.0f;
  for (int first = threadIdx.x * WIDTH; first < p.hidden_size; first += AHEAD * THREADS * WIDTH) {
    Pack<T, WIDTH> values[AHEAD], weights[AHEAD];
#pragma unroll
    for (int i = 0; i < AHEAD; ++i) {
      int64 d = min(first + i * THREADS * WIDTH, p.hidden_size - WIDTH);  // past the end the last ones again
      values[i] = load<T, WIDTH>(x, d * p.x_col_stride);
      weights[i] = load<T, WIDTH>(p.gate, d * p.gate_stride);
    }
#pragma unroll
    for (int i = 0; i < AHEAD; ++i)
      if (first + i * THREADS * WIDTH < p.hidden_size) {
#pragma unroll
        for (int j = 0; j < WIDTH; ++j) sum = fmaf(to_float(values[i].at[j]), to_float(weights[i].at[j]), sum);
      }
  }
  sum = warp_sum(sum);
  if (threadIdx.x % WARP == 0) sums[threadIdx.x / WARP] = sum;
  __syncthreads();
  if (threadIdx.x == 0) p.gates[blockIdx.x] = sigmoid(((sums[0] + sums[1]) + sums[2]) + sums[3]);
}

}  // namespace gate

#define SHARED_GATE(NAME, T, WIDTH)                                                   \
  extern "C" __global__ void __launch_bounds__(gate::THREADS)                         \
      NAME(const __grid_constant__ gate::GateLaunch launch) { gate::shared_gate<T, WIDTH>(launch); }

SHARED_GATE(shared_gate_float32_1, float, 1)
SHARED_GATE(shared_gate_float32_4, float, 4)
SHARED_GATE(shared_gate_bfloat16_1, bf16, 1)
SHARED_GATE(shared_gate_bfloat16_8, bf16, 8)
SHARED_GATE(shared_gate_float16_1, fp16, 1)
SHARED_GATE(shared_gate_float16_8, fp16, 8)
