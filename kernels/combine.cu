// combine: y[t] = sum_j weight[t, j] * rows[inverse_permutation[t, j]] + sum_s shared_rows[s, t], rounded once
//
//   grid     blocks over (token, run of columns); a thread owns VECTOR neighbouring columns of one token
//   order    slots 0 .. top_k - 1, then shared experts 0 .. num_shared - 1, in float32: the same bits on every run
//   edges    a slot without an expert (row -1) adds nothing; VECTOR = 1 serves widths and addresses that are odd
#include "types.cuh"

namespace combine {

struct CombineLaunch {
  const float* rows;               // (num_slots, hidden_size), sorted by expert
  const int* inverse_permutation;  // (num_tokens, top_k)
  const float* topk_weights;       // (num_tokens, top_k), or null: the rows carry their weights
  const float* shared_rows;        // (num_shared, num_tokens, hidden_size)
  void* y;                         // (num_tokens, hidden_size)
  int64 num_tokens;
  int hidden_size, top_k, num_shared, padding;
};
static_assert(sizeof(CombineLaunch) == 64, "cumoe/gpu/combine.py packs 64 bytes");

constexpr int THREADS = 256;

template <int VECTOR> struct alignas(4 * VECTOR) Floats { float at[VECTOR]; };
template <typename T, int VECTOR> struct alignas(sizeof(T) * VECTOR) Pack { T at[VECTOR]; };

template <typename T, int VECTOR> __device__ __forceinline__ void combine(const CombineLaunch& p) {
  int columns = p.hidden_size / VECTOR;
  int64 total = p.num_tokens * columns;
  for (int64 i = (int64)blockIdx.x * THREADS + threadIdx.x; i < total; i += (int64)gridDim.x * THREADS) {
    int64 token = i / columns;
    int64 column = i % columns * VECTOR;
    float sum[VECTOR] = {};
    for (int j = 0; j < p.top_k; ++j) {
      int64 row = p.inverse_permutation[token * p.top_k + j];
      if (row < 0) continue;
      Floats<VECTOR> value = *reinterpret_cast<const Floats<VECTOR>*>(p.rows + row * p.hidden_size + column);
      float weight = p.topk_weights ? p.topk_weights[token * p.top_k + j] : 1.0f;
#pragma unroll
      for (int v = 0; v < VECTOR; ++v) sum[v] = fmaf(weight, value.at[v], sum[v]);
    }
    for (int s = 0; s < p.num_shared; ++s) {
      const float* source = p.shared_rows + (s * p.num_tokens + token) * p.hidden_size + column;
      Floats<VECTOR> value = *reinterpret_cast<const Floats<VECTOR>*>(source);
#pragma unroll
      for (int v = 0; v < VECTOR; ++v) sum[v] += value.at[v];
    }
    Pack<T, VECTOR> out;
#pragma unroll
    for (int v = 0; v < VECTOR; ++v) out.at[v] = from_float<T>(sum[v]);
    *reinterpret_cast<Pack<T, VECTOR>*>(static_cast<T*>(p.y) + token * p.hidden_size + column) = out;
  }
}

}  // namespace combine

#define COMBINE(NAME, T, VECTOR)                                                                         \
  extern "C" __global__ void __launch_bounds__(combine::THREADS)                                         \
      NAME(const __grid_constant__ combine::CombineLaunch launch) { combine::combine<T, VECTOR>(launch); }

COMBINE(combine_float32_1, float, 1)
COMBINE(combine_bfloat16_1, bf16, 1)
COMBINE(combine_float16_1, fp16, 1)
COMBINE(combine_float32_4, float, 4)
COMBINE(combine_bfloat16_4, bf16, 4)
COMBINE(combine_float16_4, fp16, 4)
