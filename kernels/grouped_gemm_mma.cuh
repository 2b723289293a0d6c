// grouped_gemm_mma: C[rows(e)] = epilogue(A[rows(e)] @ W[e]^T) for every expert e of every stack, 16-bit types, sm_80 up.
//
//   grid     persistent blocks; a work unit is (stack, expert, row block, weight block), see scheduler.cuh
//   block    256 threads = 8 warps; WARPS_M x WARPS_N warps share the tile
//   tile     BLOCK_M rows x 128 weight rows x 32 inner, float32 accumulators in registers (64 a thread at BLOCK_M = 128)
//   smem     STAGES x (BLOCK_M + 128) x 64 B  (64 KiB at BLOCK_M = 128), XOR-swizzled by 16-byte chunks
//
//   A rows are gathered through the permutation by cp.async, 16 bytes a thread: no permuted copy of the tokens exists.
//   W is read in either order: INNER_MAJOR (inner contiguous, the usual (E, N, K) array) or ROW_MAJOR (weight rows
//   contiguous, a transposed checkpoint seen through a strided view); the second kind is turned by ldmatrix.trans.
//
//   barrier                      means
//   wait_group + __syncthreads   the copies of this inner block have landed for every thread, and every warp has
//                                finished with the stage that the next copies overwrite
//
//   edges    chunks past the end of a row, of the weight rows or of the expert's rows are filled with zeros and never
//            read from memory, so that no neighbour's NaN can leak in; stores are predicated.
//   needs    bases and strides that are multiples of 16 bytes (the host checks); everything else: grouped_gemm_simt.cuh
//
// The sum over the inner dimension runs in the same order for every BLOCK_M and every position of a row in a tile, so a
// row has the same bits whatever the batch.
#pragma once
#include "epilogue.cuh"
#include "ptx.cuh"
#include "scheduler.cuh"

enum WeightOrder { INNER_MAJOR = 0, ROW_MAJOR = 1 };

namespace mma {

constexpr int HALF = 64, BLOCK_K = 32, STAGES = 4, THREADS = 256, WARPS = THREADS / WARP;
constexpr int HALF_BYTES = HALF * BLOCK_K * 2;  // one half of the weight tile, in either order

// Byte offset of 16-byte chunk `chunk` of row `row`: eight rows that ldmatrix reads together hit eight bank groups.
__device__ __forceinline__ int swizzle_64(int row, int chunk) { return row * 64 + ((chunk ^ ((row >> 1) & 3)) << 4); }
__device__ __forceinline__ int swizzle_128(int row, int chunk) { return row * 128 + ((chunk ^ (row & 7)) << 4); }

__device__ __forceinline__ int bytes_left(int elements) { return min(max(elements, 0), 8) * 2; }

template <typename T, int BLOCK_M, WeightOrder ORDER> struct GroupedGemm {
  static constexpr int WARPS_M = BLOCK_M >= 64 ? 2 : 1, WARPS_N = WARPS / WARPS_M;
  static constexpr int M_TILES = BLOCK_M / WARPS_M / 16;  // 16-row mma tiles of a warp
  static constexpr int N_TILES = HALF / WARPS_N / 8;      // 8-column mma tiles of a warp in each half
  static constexpr int A_BYTES = BLOCK_M * BLOCK_K * 2, STAGE_BYTES = A_BYTES + 2 * HALF_BYTES;
  static constexpr int A_COPIES = (BLOCK_M * 4 + THREADS - 1) / THREADS;
  static_assert(M_TILES >= 1 && N_TILES >= 1, "every warp owns a part of the tile");

  using Halves = WeightHalves<HALF>;

  const GemmLaunch& launch;
  uint32 smem;  // (STAGES, A tile | two weight halves)
  int lane, warp_m, warp_n;

  // What this thread copies in every inner block of the current tile.
  const T* a_source[A_COPIES];
  bool a_valid[A_COPIES];
  const T* w_source[2];
  int w_left[2];  // INNER_MAJOR: 1 if the weight row exists; ROW_MAJOR: weight rows from this chunk on

  __device__ __forceinline__ GroupedGemm(const GemmLaunch& launch, uint32 smem) : launch(launch), smem(smem) {
    lane = threadIdx.x % WARP;
    int warp = __shfl_sync(FULL_MASK, threadIdx.x / WARP, 0);
    warp_m = warp / WARPS_N, warp_n = warp % WARPS_N;
  }

  __device__ __forceinline__ void aim(const ExpertStack& stack, const Tile& tile) {
#pragma unroll
    for (int i = 0; i < A_COPIES; ++i) {
      int copy = threadIdx.x + i * THREADS, row = tile.row_begin + copy / 4;
      a_valid[i] = copy < BLOCK_M * 4 && row < tile.row_end;
      int64 a_row = a_valid[i] ? a_row_of(stack, row) : 0;
      a_source[i] = static_cast<const T*>(stack.a) + a_row * stack.a_row_stride;
    }
    const T* w = static_cast<const T*>(stack.w) + tile.expert * stack.w_expert_stride;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      int row = Halves::begin(stack, tile.n_block, half) + (ORDER == INNER_MAJOR ? threadIdx.x / 4 : threadIdx.x % 8 * 8);
      int left = Halves::end(stack, half) - row;
      w_left[half] = ORDER == INNER_MAJOR ? left > 0 : left;
      w_source[half] = left > 0 ? w + row * (ORDER == INNER_MAJOR ? stack.w_row_stride : 1) : w;
    }
  }

  __device__ __forceinline__ void copy_stage(const ExpertStack& stack, int k_block) {
    uint32 stage = smem + k_block % STAGES * STAGE_BYTES;
#pragma unroll
    for (int i = 0; i < A_COPIES; ++i) {
      int copy = threadIdx.x + i * THREADS, chunk = copy % 4, k = k_block * BLOCK_K + chunk * 8;
      if (copy < BLOCK_M * 4) {
        int bytes = a_valid[i] ? bytes_left(stack.inner - k) : 0;
        copy_async_16(stage + swizzle_64(copy / 4, chunk), bytes ? a_source[i] + k : a_source[i], bytes);
      }
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      uint32 tile = stage + A_BYTES + half * HALF_BYTES;
      if (ORDER == INNER_MAJOR) {
        int row = threadIdx.x / 4, chunk = threadIdx.x % 4, k = k_block * BLOCK_K + chunk * 8;
        int bytes = w_left[half] ? bytes_left(stack.inner - k) : 0;
        copy_async_16(tile + swizzle_64(row, chunk), bytes ? w_source[half] + k : w_source[half], bytes);
      } else {
        int k_row = threadIdx.x / 8, chunk = threadIdx.x % 8, k = k_block * BLOCK_K + k_row;
        int bytes = k < stack.inner ? bytes_left(w_left[half]) : 0;
        copy_async_16(tile + swizzle_128(k_row, chunk), bytes ? w_source[half] + k * stack.w_col_stride : w_source[half], bytes);
      }
    }
  }

  __device__ __forceinline__ void multiply_stage(int k_block, float (&acc)[M_TILES][2][N_TILES][4]) {
    uint32 stage = smem + k_block % STAGES * STAGE_BYTES;
#pragma unroll
    for (int step = 0; step < BLOCK_K / 16; ++step) {
      uint32 a[M_TILES][2][2];
#pragma unroll
      for (int m = 0; m < M_TILES; ++m)
        load_matrix_x4(a[m][0], a[m][1], stage + swizzle_64((warp_m * M_TILES + m) * 16 + lane % 16, step * 2 + lane / 16));
#pragma unroll
      for (int n = 0; n < N_TILES; ++n) {
        uint32 b[2][2], tile = stage + A_BYTES + lane / 16 * HALF_BYTES;  // lanes 0-15 address the first half
        int column = (warp_n * N_TILES + n) * 8;
        if (ORDER == INNER_MAJOR) load_matrix_x4(b[0], b[1], tile + swizzle_64(column + lane % 8, step * 2 + lane / 8 % 2));
        else load_matrix_x4_transposed(b[0], b[1], tile + swizzle_128(step * 16 + lane % 16, column / 8));
#pragma unroll
        for (int half = 0; half < 2; ++half)
#pragma unroll
          for (int m = 0; m < M_TILES; ++m) mma_16816(T(), acc[m][half][n], a[m], b[half]);
      }
    }
  }

  // One store where the address allows it: rows of odd width begin between two pairs.
  template <typename C> __device__ __forceinline__ static void put_pair(C* c, C first, C second, int left) {
    struct alignas(2 * sizeof(C)) Pair { C first, second; };
    if (left >= 2 && reinterpret_cast<uint64>(c) % sizeof(Pair) == 0) {
      *reinterpret_cast<Pair*>(c) = {first, second};
      return;
    }
    c[0] = first;
    if (left >= 2) c[1] = second;
  }

  __device__ __forceinline__ void store_pair(const ExpertStack& stack, int row, int feature, float first, float second) {
    int left = features(stack) - feature;
    if (left <= 0) return;
    if (launch.c_is_float32) put_pair(result<float>(stack, row, feature), first, second, left);
    else put_pair(result<T>(stack, row, feature), from_float<T>(first), from_float<T>(second), left);
  }

  __device__ __forceinline__ void store_tile(const ExpertStack& stack, const Tile& tile, float (&acc)[M_TILES][2][N_TILES][4]) {
#pragma unroll
    for (int m = 0; m < M_TILES; ++m)
#pragma unroll
      for (int r = 0; r < 4; r += 2) {  // acc[..][r], acc[..][r + 1]: neighbouring weight rows of one token row
        int row = tile.row_begin + (warp_m * M_TILES + m) * 16 + lane / 4 + r * 4;
        if (row >= tile.row_end) continue;
        RowScales scales = row_scales(stack, row);
#pragma unroll
        for (int n = 0; n < N_TILES; ++n) {
          int column = (warp_n * N_TILES + n) * 8 + lane % 4 * 2;
          if (stack.pairing == PAIR_STACKED) {
            int feature = tile.n_block * HALF + column;
            float out[2];
#pragma unroll
            for (int i = 0; i < 2; ++i)
              out[i] = feature + i < features(stack)
                  ? finish_pair(stack, tile.expert, feature + i, acc[m][0][n][r + i], acc[m][1][n][r + i], scales) : 0.0f;
            store_pair(stack, row, feature, out[0], out[1]);
            continue;
          }
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            int weight_row = (2 * tile.n_block + half) * HALF + column;
            if (weight_row >= stack.weight_rows) continue;
            float first = acc[m][half][n][r], second = acc[m][half][n][r + 1];
            if (stack.pairing == PAIR_INTERLEAVED) {
              store<T>(launch, stack, row, weight_row / 2, finish_pair(stack, tile.expert, weight_row / 2, first, second, scales));
            } else {
              first = finish(stack, tile.expert, weight_row, first, scales);
              if (weight_row + 1 < stack.weight_rows) second = finish(stack, tile.expert, weight_row + 1, second, scales);
              store_pair(stack, row, weight_row, first, second);
            }
          }
        }
      }
  }

  __device__ __forceinline__ void compute(const Tile& tile) {
    const ExpertStack& stack = launch.stacks[tile.stack_idx];
    int k_blocks = ceil_div(stack.inner, BLOCK_K);
    float acc[M_TILES][2][N_TILES][4] = {};
    aim(stack, tile);
    __syncthreads();  // every warp has left the previous tile's stages
#pragma unroll
    for (int k_block = 0; k_block < STAGES - 1; ++k_block) {
      if (k_block < k_blocks) copy_stage(stack, k_block);
      copy_async_commit();  // a group per inner block, empty or not, keeps the wait count constant
    }
    for (int k_block = 0; k_block < k_blocks; ++k_block) {
      copy_async_wait<STAGES - 2>();
      __syncthreads();
      if (k_block + STAGES - 1 < k_blocks) copy_stage(stack, k_block + STAGES - 1);
      copy_async_commit();
      multiply_stage(k_block, acc);
    }
    store_tile(stack, tile, acc);
  }
};

template <typename T, int BLOCK_M, WeightOrder ORDER>
__device__ __forceinline__ void grouped_gemm(const GemmLaunch& launch) {
  extern __shared__ __align__(128) unsigned char dynamic_smem[];  // stages, then the tile offsets
  using Gemm = GroupedGemm<T, BLOCK_M, ORDER>;
  Scheduler<BLOCK_M, HALF, THREADS> scheduler(launch, reinterpret_cast<int64*>(dynamic_smem + STAGES * Gemm::STAGE_BYTES));
  Gemm gemm(launch, shared_address(dynamic_smem));
  for (int64 tile_idx = blockIdx.x; tile_idx < scheduler.num_tiles(); tile_idx += gridDim.x) gemm.compute(scheduler.tile(tile_idx));
}

}  // namespace mma

#define GROUPED_GEMM_MMA(NAME, T, BLOCK_M, ORDER)                                                                    \
  extern "C" __global__ void __launch_bounds__(mma::THREADS, 2) NAME(const __grid_constant__ GemmLaunch launch) {       \
    mma::grouped_gemm<T, BLOCK_M, ORDER>(launch);                                                                    \
  }

#define GROUPED_GEMM_MMA_ALL(NAME, T)                               \
  GROUPED_GEMM_MMA(NAME##_16_inner_major, T, 16, INNER_MAJOR)       \
  GROUPED_GEMM_MMA(NAME##_64_inner_major, T, 64, INNER_MAJOR)       \
  GROUPED_GEMM_MMA(NAME##_128_inner_major, T, 128, INNER_MAJOR)     \
  GROUPED_GEMM_MMA(NAME##_16_row_major, T, 16, ROW_MAJOR)           \
  GROUPED_GEMM_MMA(NAME##_64_row_major, T, 64, ROW_MAJOR)           \
  GROUPED_GEMM_MMA(NAME##_128_row_major, T, 128, ROW_MAJOR)
