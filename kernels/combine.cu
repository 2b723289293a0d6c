// combine: y[t] = sum_j weight[t, j] * rows[inverse_permutation[t, j]] + sum_s shared_rows[s, t] + residual[t], rounded once
//
//   grid     as many blocks as are resident, over (token, run of columns); a thread owns VECTOR neighbouring columns of a token
//   order    slots 0 .. top_k - 1, then shared experts 0 .. num_shared - 1, then the residual, in float32: the same
//            bits on every run
//   memory   the residual and AHEAD rows, routed and shared alike, are asked for before the first is added, 16 bytes each;
//            where a token has few rows, more blocks keep as many bytes on their way. Nobody reads a row again: it is the
//            first to leave the L2
//   edges    a slot without an expert (row -1) adds nothing; VECTOR = 1 serves widths and addresses that are odd; y
//            may be the residual: a thread reads its elements before it writes them
#include "overlap.cuh"
#include "types.cuh"

namespace combine {

struct CombineLaunch {
  const void* rows;                // (num_slots, hidden_size), sorted by expert
  const int* inverse_permutation;  // (num_tokens, top_k)
  const float* topk_weights;       // (num_tokens, top_k), or null: the rows carry their weights
  const void* shared_rows;         // (num_shared, num_tokens, hidden_size)
  const void* residual;            // (num_tokens, hidden_size) in the type of y, or null
  void* y;                         // (num_tokens, hidden_size)
  int64 num_tokens;
  int hidden_size, top_k, num_shared, padding;
};
static_assert(sizeof(CombineLaunch) == 72, "cumoe/gpu/combine.py packs 72 bytes");

constexpr int THREADS = 256, MANY = 4, FEW = 2;  // rows ahead
#if __CUDA_ARCH__ == 900
constexpr int BLOCKS_OF_MANY = 3;  // an SM: 80 registers a thread
#else
constexpr int BLOCKS_OF_MANY = 2;
#endif
constexpr int BLOCKS_OF_FEW = 4;

template <typename T, int VECTOR> struct alignas(sizeof(T) * VECTOR) Pack { T at[VECTOR]; };

template <typename T, int VECTOR> __device__ __forceinline__ Pack<T, VECTOR> load(const void* base, int64 index) {
  return *reinterpret_cast<const Pack<T, VECTOR>*>(static_cast<const T*>(base) + index);
}

template <typename T, int VECTOR> __device__ __forceinline__ Pack<T, VECTOR> load_once(const void* base, int64 index) {
  if constexpr (sizeof(T) * VECTOR == 16) {
    int4 bits = __ldcs(reinterpret_cast<const int4*>(static_cast<const T*>(base) + index));
    return *reinterpret_cast<Pack<T, VECTOR>*>(&bits);
  }
  return load<T, VECTOR>(base, index);
}

// T: type of y; R: type of the rows.
template <typename T, typename R, int VECTOR, int AHEAD> __device__ __forceinline__ void combine(const CombineLaunch& p) {
  wait_for_previous_kernel();
  launch_next_kernel();
  int columns = p.hidden_size / VECTOR, num_sources = p.top_k + p.num_shared;
  int64 total = p.num_tokens * columns;
  for (int64 i = (int64)blockIdx.x * THREADS + threadIdx.x; i < total; i += (int64)gridDim.x * THREADS) {
    // A division of 64 bits takes as long as all the rest.
    int token = total <= 0xffffffffll ? (int)((uint32)i / (uint32)columns) : (int)(i / columns);
    int column = (int)(i - (int64)token * columns) * VECTOR;
    int64 at = (int64)token * p.hidden_size + column;
    float sum[VECTOR] = {};
    Pack<T, VECTOR> residual;
    if (p.residual) residual = load<T, VECTOR>(p.residual, at);
    for (int first = 0; first < num_sources; first += AHEAD) {
      Pack<R, VECTOR> values[AHEAD];
      float weights[AHEAD];
      bool exists[AHEAD];
#pragma unroll
      for (int j = 0; j < AHEAD; ++j) {
        int source = first + j, slot = token * p.top_k + source;
        int row = source < p.top_k ? p.inverse_permutation[slot] : -1;
        weights[j] = row >= 0 && p.topk_weights ? p.topk_weights[slot] : 1.0f;
        exists[j] = row >= 0 || (source >= p.top_k && source < num_sources);
        int64 index = row >= 0 ? (int64)row * p.hidden_size + column
                               : (int64)(source - p.top_k) * p.num_tokens * p.hidden_size + at;
        if (exists[j]) values[j] = load_once<R, VECTOR>(row >= 0 ? p.rows : p.shared_rows, index);
      }
#pragma unroll
      for (int j = 0; j < AHEAD; ++j)
        if (exists[j]) {
#pragma unroll
          for (int v = 0; v < VECTOR; ++v) sum[v] = fmaf(weights[j], to_float(values[j].at[v]), sum[v]);
        }
    }
    if (p.residual) {
#pragma unroll
      for (int v = 0; v < VECTOR; ++v) sum[v] += to_float(residual.at[v]);
    }
    Pack<T, VECTOR> out;
#pragma unroll
    for (int v = 0; v < VECTOR; ++v) out.at[v] = from_float<T>(sum[v]);
    *reinterpret_cast<Pack<T, VECTOR>*>(static_cast<T*>(p.y) + at) = out;
  }
}

}  // namespace combine

#define COMBINE_AHEAD(NAME, T, R, VECTOR, AHEAD, BLOCKS)                                                    \
  extern "C" __global__ void __launch_bounds__(combine::THREADS, combine::BLOCKS)                           \
      NAME(const __grid_constant__ combine::CombineLaunch launch) {                                         \
    combine::combine<T, R, VECTOR, combine::AHEAD>(launch);                                                 \
  }
#define COMBINE(NAME, T, R, VECTOR)                                                                         \
  COMBINE_AHEAD(NAME, T, R, VECTOR, MANY, BLOCKS_OF_MANY)                                                   \
  COMBINE_AHEAD(NAME##_few, T, R, VECTOR, FEW, BLOCKS_OF_FEW)

COMBINE(combine_float32_float32_1, float, float, 1)
COMBINE(combine_float32_float32_4, float, float, 4)
COMBINE(combine_bfloat16_float32_1, bf16, float, 1)
COMBINE(combine_bfloat16_float32_4, bf16, float, 4)
COMBINE(combine_bfloat16_bfloat16_1, bf16, bf16, 1)
COMBINE(combine_bfloat16_bfloat16_8, bf16, bf16, 8)
COMBINE(combine_float16_float32_1, fp16, float, 1)
COMBINE(combine_float16_float32_4, fp16, float, 4)
COMBINE(combine_float16_float16_1, fp16, fp16, 1)
COMBINE(combine_float16_float16_8, fp16, fp16, 8)
