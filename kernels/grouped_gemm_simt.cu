// grouped_gemm_simt: the same product as grouped_gemm_mma.cuh for every type, stride and alignment, on plain float32 FMAs.
//
//   serves   float32 layers (float32 accuracy: no tf32 anywhere), 16-bit layers whose bases or strides are not multiples
//            of 16 bytes (their hidden rows stay float32), and the router GEMM of 16-bit tokens with float32 weights
//   grid     persistent blocks; a work unit is (stack, expert, row block, weight block), see scheduler.cuh
//   block    256 threads as 16 x 16; a thread owns 4 rows x (2 + 2) weight rows, 2 in each half of the weight tile
//   tile     64 rows x 64 weight rows x 16 inner; smem 2 x 16 x 68 x 4 B = 8.5 KiB, inner-major so that a thread reads
//            its rows side by side; the pad of 4 keeps 16-byte alignment and spreads the writes over the banks
//
//   barrier           means
//   1st of a k step   the tile in shared memory is no longer read
//   2nd               the next tile is complete; its loads were started before the previous tile was multiplied
//
//   edges    everything out of range is loaded as zero and never read from memory; stores are predicated
#include "epilogue.cuh"
#include "scheduler.cuh"

namespace simt {

constexpr int BLOCK_M = 64, HALF = 32, BLOCK_N = 2 * HALF, BLOCK_K = 16, THREADS = 256, PITCH = BLOCK_M + 4;
constexpr int LOADS = BLOCK_M * BLOCK_K / THREADS;  // elements of A, and of W, that a thread brings a k step
static_assert(BLOCK_M == BLOCK_N, "A and W tiles share one loading pattern");

struct Shared {
  float a[BLOCK_K][PITCH];
  float w[BLOCK_K][PITCH];
};

// One copy of the epilogue for the sixteen results of a thread: a call costs less than their inlined code.
__device__ __noinline__ float finish_one(const ExpertStack& stack, int expert, int feature, float first, float second,
                                         float scale_in, float scale_out) {
  float acc[1] = {first}, up[1] = {second};
  RowScales scales[1] = {{scale_in, scale_out}};
  finish(stack, expert, feature, acc, up, scales);
  return acc[0];
}

template <typename A, typename W> struct GroupedGemm {
  using Halves = WeightHalves<HALF>;
  const GemmLaunch& launch;
  Shared& shared;
  const A* a_source[LOADS];  // null: the row does not exist
  const W* w_source[LOADS];
  float a_next[LOADS], w_next[LOADS];

  // Element i of a thread: (row, k) of the tile. Neighbouring threads walk along whichever direction is contiguous.
  __device__ __forceinline__ static int row_at(int i, bool along_rows) {
    int element = threadIdx.x + i * THREADS;
    return along_rows ? element % BLOCK_M : element / BLOCK_K;
  }
  __device__ __forceinline__ static int k_at(int i, bool along_rows) {
    int element = threadIdx.x + i * THREADS;
    return along_rows ? element / BLOCK_M : element % BLOCK_K;
  }

  __device__ __forceinline__ void aim(const ExpertStack& stack, const Tile& tile, bool w_along_rows) {
    const A* a = static_cast<const A*>(stack.a);
    const W* w = static_cast<const W*>(stack.w) + tile.expert * stack.w_expert_stride;
#pragma unroll
    for (int i = 0; i < LOADS; ++i) {
      int row = tile.row_begin + row_at(i, false);
      a_source[i] = row < tile.row_end ? a + a_row_of(stack, row) * stack.a_row_stride : nullptr;
      int column = row_at(i, w_along_rows), half = column / HALF;
      int weight_row = Halves::begin(stack, tile.n_block, half) + column % HALF;
      w_source[i] = weight_row < Halves::end(stack, half) ? w + weight_row * stack.w_row_stride : nullptr;
    }
  }

  __device__ __forceinline__ void load(const ExpertStack& stack, int k_begin, bool w_along_rows) {
#pragma unroll
    for (int i = 0; i < LOADS; ++i) {
      int k = k_begin + k_at(i, false);
      a_next[i] = a_source[i] && k < stack.inner ? to_float(a_source[i][k * stack.a_col_stride]) : 0.0f;
      k = k_begin + k_at(i, w_along_rows);
      w_next[i] = w_source[i] && k < stack.inner ? to_float(w_source[i][k * stack.w_col_stride]) : 0.0f;
    }
  }

  __device__ __forceinline__ void compute(const Tile& tile) {
    const ExpertStack& stack = launch.stacks[tile.stack_idx];
    bool w_along_rows = stack.w_row_stride == 1 && stack.w_col_stride != 1;
    int thread_row = threadIdx.x / 16 * 4, thread_column = threadIdx.x % 16 * 2;  // column within a half
    float acc[4][2][2] = {};                                                     // (rows, halves, columns)
    aim(stack, tile, w_along_rows);
    load(stack, 0, w_along_rows);
    for (int k_begin = 0; k_begin < stack.inner; k_begin += BLOCK_K) {
      __syncthreads();
#pragma unroll
      for (int i = 0; i < LOADS; ++i) {
        shared.a[k_at(i, false)][row_at(i, false)] = a_next[i];
        shared.w[k_at(i, w_along_rows)][row_at(i, w_along_rows)] = w_next[i];
      }
      __syncthreads();
      load(stack, k_begin + BLOCK_K, w_along_rows);
#pragma unroll
      for (int k = 0; k < BLOCK_K; ++k) {
        float4 a = *reinterpret_cast<float4*>(&shared.a[k][thread_row]);
        float2 w0 = *reinterpret_cast<float2*>(&shared.w[k][thread_column]);
        float2 w1 = *reinterpret_cast<float2*>(&shared.w[k][thread_column + HALF]);
        float rows[4] = {a.x, a.y, a.z, a.w}, columns[2][2] = {{w0.x, w0.y}, {w1.x, w1.y}};
#pragma unroll
        for (int r = 0; r < 4; ++r)
#pragma unroll
          for (int half = 0; half < 2; ++half)
#pragma unroll
            for (int c = 0; c < 2; ++c) acc[r][half][c] = fmaf(rows[r], columns[half][c], acc[r][half][c]);
      }
    }
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      int row = tile.row_begin + thread_row + r;
      if (row < tile.row_end) store_row(stack, tile, row, thread_column, acc[r]);
    }
  }

  __device__ __forceinline__ void store_row(const ExpertStack& stack, const Tile& tile, int row, int column,
                                            float (&acc)[2][2]) {
    RowScales scales = row_scales(stack, row);
    if (stack.pairing == PAIR_STACKED) {
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        int feature = tile.n_block * HALF + column + c;
        if (feature < features(stack))
          store<A>(launch, stack, row, feature,
                   finish_one(stack, tile.expert, feature, acc[0][c], acc[1][c], scales.in, scales.out));
      }
      return;
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      int weight_row = (2 * tile.n_block + half) * HALF + column;
      if (stack.pairing == PAIR_INTERLEAVED) {
        if (weight_row < stack.weight_rows)
          store<A>(launch, stack, row, weight_row / 2,
                   finish_one(stack, tile.expert, weight_row / 2, acc[half][0], acc[half][1], scales.in, scales.out));
        continue;
      }
#pragma unroll
      for (int c = 0; c < 2; ++c)
        if (weight_row + c < stack.weight_rows)
          store<A>(launch, stack, row, weight_row + c,
                   finish_one(stack, tile.expert, weight_row + c, acc[half][c], 0.0f, scales.in, scales.out));
    }
  }
};

template <typename A, typename W> __device__ __forceinline__ void grouped_gemm(const GemmLaunch& launch) {
  extern __shared__ __align__(16) unsigned char dynamic_smem[];  // the tile offsets
  __shared__ Shared shared;
  using Tiling = GridTiling<BLOCK_M, HALF>;
  Scheduler<Tiling, int64, THREADS> scheduler(launch, reinterpret_cast<int64*>(dynamic_smem));
  GroupedGemm<A, W> gemm{launch, shared};
  for (int64 tile_idx = blockIdx.x; tile_idx < scheduler.num_tiles(); tile_idx += gridDim.x)
    gemm.compute(Tiling::tile(scheduler.find(tile_idx)));
}

}  // namespace simt

#define GROUPED_GEMM_SIMT(NAME, A, W)                                                                             \
  extern "C" __global__ void __launch_bounds__(simt::THREADS) NAME(const __grid_constant__ GemmLaunch launch) {   \
    simt::grouped_gemm<A, W>(launch);                                                                             \
  }

GROUPED_GEMM_SIMT(grouped_gemm_simt_float32_float32, float, float)
GROUPED_GEMM_SIMT(grouped_gemm_simt_bfloat16_bfloat16, bf16, bf16)
GROUPED_GEMM_SIMT(grouped_gemm_simt_float16_float16, fp16, fp16)
GROUPED_GEMM_SIMT(grouped_gemm_simt_float32_bfloat16, float, bf16)
GROUPED_GEMM_SIMT(grouped_gemm_simt_float32_float16, float, fp16)
GROUPED_GEMM_SIMT(grouped_gemm_simt_bfloat16_float32, bf16, float)
GROUPED_GEMM_SIMT(grouped_gemm_simt_float16_float32, fp16, float)
