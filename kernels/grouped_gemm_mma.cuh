// grouped_gemm_mma: C[rows(e)] = epilogue(A[rows(e)] @ W[e]^T) for every expert e of every stack, 16-bit types, sm_80 up.
//
//   grid     persistent blocks; a work unit is (stack, expert, row block, weight block), see scheduler.cuh
//   block    256 threads = 8 warps; WARPS_M x WARPS_N warps share the tile
//   tile     BLOCK_M rows x 2 HALF weight rows x BLOCK_K inner, float32 accumulators in registers; the three shapes are
//            TileShape below: 16 and 64 rows stream weights in whole 128-byte lines, 128 rows x 256 weight rows give a
//            warp 64 x 64 products, so that shared memory (128 B a clock) keeps up with the tensor cores
//   smem     STAGES x (BLOCK_M + 2 HALF) x BLOCK_K x 2 B = 72 KiB for all three, XOR-swizzled by 16-byte chunks
//
//   A rows are gathered through the permutation by cp.async, 16 bytes a thread: no permuted copy of the tokens exists.
//   W is read in either order: INNER_MAJOR (inner contiguous, the usual (E, N, K) array) or ROW_MAJOR (weight rows
//   contiguous, a transposed checkpoint seen through a strided view); the second kind is turned by ldmatrix.trans.
//
//   barrier                      means
//   wait_group + __syncthreads   the copies of this inner block have landed for every thread, and every warp has
//                                finished with the stage that the next copies overwrite
//   __syncthreads of store_tile  every warp has left the stages, whose memory the slabs of results reuse
//   __syncwarp                   a warp's slab of 16 rows is written, or has been stored and may be overwritten
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

constexpr int THREADS = 256, WARPS = THREADS / WARP;

// cumoe/gpu/config.py has the same numbers.
template <int BLOCK_M> struct TileShape;
template <> struct TileShape<16> { static constexpr int HALF = 64, BLOCK_K = 64, STAGES = 4, BLOCKS_PER_SM = 3; };
template <> struct TileShape<64> { static constexpr int HALF = 64, BLOCK_K = 64, STAGES = 3, BLOCKS_PER_SM = 2; };
template <> struct TileShape<128> { static constexpr int HALF = 128, BLOCK_K = 32, STAGES = 3, BLOCKS_PER_SM = 1; };

// Byte offset of 16-byte chunk `chunk` of row `row` in a tile whose rows have ROW_BYTES: eight rows that ldmatrix reads
// together hit eight different groups of four banks.
template <int ROW_BYTES> __device__ __forceinline__ int swizzle(int row, int chunk) {
  static_assert(ROW_BYTES == 64 || ROW_BYTES % 128 == 0, "two rows, or a part of one, cover the 32 banks");
  return row * ROW_BYTES + ((ROW_BYTES == 64 ? chunk ^ (row >> 1 & 3) : chunk ^ (row & 7)) << 4);
}

__device__ __forceinline__ int bytes_left(int elements) { return min(max(elements, 0), 8) * 2; }

template <typename T, int BLOCK_M, WeightOrder ORDER> struct GroupedGemm {
  using Shape = TileShape<BLOCK_M>;
  static constexpr int HALF = Shape::HALF, BLOCK_K = Shape::BLOCK_K, STAGES = Shape::STAGES;
  static constexpr int WARPS_M = BLOCK_M >= 64 ? 2 : 1, WARPS_N = WARPS / WARPS_M;
  static constexpr int M_TILES = BLOCK_M / WARPS_M / 16;  // 16-row mma tiles of a warp
  static constexpr int N_TILES = HALF / WARPS_N / 8;      // 8-column mma tiles of a warp in each half
  static constexpr int A_BYTES = BLOCK_M * BLOCK_K * 2, HALF_BYTES = HALF * BLOCK_K * 2;
  static constexpr int STAGE_BYTES = A_BYTES + 2 * HALF_BYTES;
  static constexpr int K_CHUNKS = BLOCK_K / 8, K_ROW_BYTES = BLOCK_K * 2;  // a tile row along the inner dimension
  static constexpr int N_CHUNKS = HALF / 8, N_ROW_BYTES = HALF * 2;        // ROW_MAJOR: a tile row along the weight rows
  static constexpr int A_COPIES = (BLOCK_M * K_CHUNKS + THREADS - 1) / THREADS, W_COPIES = HALF * K_CHUNKS / THREADS;
  static constexpr int WARP_N = N_TILES * 8;              // columns of a warp in each half
  static constexpr int SLAB_PITCH = 2 * WARP_N + 8;       // the pad puts four rows on 32 different banks
  static constexpr int SLAB_FLOATS = 16 * SLAB_PITCH;
  static_assert(M_TILES >= 1 && N_TILES >= 1 && W_COPIES >= 1, "every warp owns a part of the tile, every thread copies");
  static_assert(WARPS * SLAB_FLOATS * 4 <= STAGES * STAGE_BYTES, "the slabs of all warps fit where the stages were");

  using Halves = WeightHalves<HALF>;

  const GemmLaunch& launch;
  unsigned char* stages;  // (STAGES, A tile | two weight halves)
  uint32 smem;            // the same as a shared-memory address
  int lane, warp_m, warp_n;

  // What this thread copies in every inner block of the current tile: sources at inner position 0, and how many of the 16
  // bytes of a copy exist while the inner block is whole.
  const T* a_source[A_COPIES];
  int a_bytes[A_COPIES];
  const T* w_source[2][W_COPIES];
  int w_bytes[2][W_COPIES];
  int64 w_step;  // elements from one inner position to the next
  int inner;

  __device__ __forceinline__ GroupedGemm(const GemmLaunch& launch, unsigned char* stages)
      : launch(launch), stages(stages), smem(shared_address(stages)) {
    lane = threadIdx.x % WARP;
    int warp = __shfl_sync(FULL_MASK, threadIdx.x / WARP, 0);
    warp_m = warp / WARPS_N, warp_n = warp % WARPS_N;
  }

  __device__ __forceinline__ void aim(const ExpertStack& stack, const Tile& tile) {
    inner = stack.inner;
    w_step = ORDER == INNER_MAJOR ? 1 : stack.w_col_stride;
#pragma unroll
    for (int i = 0; i < A_COPIES; ++i) {
      int copy = threadIdx.x + i * THREADS, row = tile.row_begin + copy / K_CHUNKS;
      bool exists = copy < BLOCK_M * K_CHUNKS && row < tile.row_end;
      int64 a_row = exists ? a_row_of(stack, row) : 0;
      a_source[i] = static_cast<const T*>(stack.a) + a_row * stack.a_row_stride + copy % K_CHUNKS * 8;
      a_bytes[i] = exists ? 16 : 0;
    }
    const T* w = static_cast<const T*>(stack.w) + tile.expert * stack.w_expert_stride;
#pragma unroll
    for (int half = 0; half < 2; ++half)
#pragma unroll
      for (int i = 0; i < W_COPIES; ++i) {
        int copy = threadIdx.x + i * THREADS, row = Halves::begin(stack, tile.n_block, half);
        if (ORDER == INNER_MAJOR) {
          row += copy / K_CHUNKS;
          w_source[half][i] = w + row * stack.w_row_stride + copy % K_CHUNKS * 8;
          w_bytes[half][i] = row < Halves::end(stack, half) ? 16 : 0;
        } else {
          row += copy % N_CHUNKS * 8;
          w_source[half][i] = w + copy / N_CHUNKS * w_step + row;
          w_bytes[half][i] = bytes_left(Halves::end(stack, half) - row);
        }
      }
  }

  // Starts the copies of one inner block; where the block is not whole, what lies past the end becomes zeros.
  template <bool WHOLE> __device__ __forceinline__ void copy_block(int k_block) {
    constexpr int K_ROW_STEP = THREADS / K_CHUNKS, N_ROW_STEP = THREADS / N_CHUNKS;  // rows between copies of a thread
    static_assert(K_ROW_STEP % 8 == 0 && N_ROW_STEP % 8 == 0, "all copies of a thread have the same swizzle");
    uint32 stage = smem + k_block % STAGES * STAGE_BYTES;
    uint32 k_offset = swizzle<K_ROW_BYTES>(threadIdx.x / K_CHUNKS, threadIdx.x % K_CHUNKS);
    uint32 n_offset = swizzle<N_ROW_BYTES>(threadIdx.x / N_CHUNKS, threadIdx.x % N_CHUNKS);
    int k_begin = k_block * BLOCK_K, left = WHOLE ? 8 : inner - k_begin - threadIdx.x % K_CHUNKS * 8;
    int bytes_in_row = WHOLE ? 16 : bytes_left(left);
#pragma unroll
    for (int i = 0; i < A_COPIES; ++i)
      if (BLOCK_M * K_CHUNKS % THREADS == 0 || threadIdx.x + i * THREADS < BLOCK_M * K_CHUNKS)
        copy_async_16(stage + k_offset + i * K_ROW_STEP * K_ROW_BYTES, a_source[i] + k_begin,
                      min(a_bytes[i], bytes_in_row));
#pragma unroll
    for (int half = 0; half < 2; ++half)
#pragma unroll
      for (int i = 0; i < W_COPIES; ++i) {
        uint32 tile = stage + A_BYTES + half * HALF_BYTES;
        const T* source = w_source[half][i] + k_begin * w_step;
        if (ORDER == INNER_MAJOR) {
          copy_async_16(tile + k_offset + i * K_ROW_STEP * K_ROW_BYTES, source, min(w_bytes[half][i], bytes_in_row));
        } else {
          bool exists = WHOLE || k_begin + (int)threadIdx.x / N_CHUNKS + i * N_ROW_STEP < inner;
          copy_async_16(tile + n_offset + i * N_ROW_STEP * N_ROW_BYTES, source, exists ? w_bytes[half][i] : 0);
        }
      }
  }

  __device__ __forceinline__ void copy_stage(int k_block) {
    if ((k_block + 1) * BLOCK_K <= inner) copy_block<true>(k_block);
    else copy_block<false>(k_block);
  }

  // One step of 16 along the inner dimension: all fragments of a warp.
  struct Fragments {
    uint32 a[M_TILES][2][2];
    uint32 b[N_TILES][2][2];  // (tiles, halves, registers)
  };

  __device__ __forceinline__ void load_fragments(uint32 stage, int step, Fragments& fragments) {
#pragma unroll
    for (int m = 0; m < M_TILES; ++m) {
      int row = (warp_m * M_TILES + m) * 16 + lane % 16;
      load_matrix_x4(fragments.a[m][0], fragments.a[m][1], stage + swizzle<K_ROW_BYTES>(row, step * 2 + lane / 16));
    }
    uint32 tile = stage + A_BYTES + lane / 16 * HALF_BYTES;  // lanes 0-15 address the first half, 16-31 the second
#pragma unroll
    for (int n = 0; n < N_TILES; ++n) {
      int column = (warp_n * N_TILES + n) * 8;
      uint32(&b)[2][2] = fragments.b[n];
      if (ORDER == INNER_MAJOR)
        load_matrix_x4(b[0], b[1], tile + swizzle<K_ROW_BYTES>(column + lane % 8, step * 2 + lane / 8 % 2));
      else
        load_matrix_x4_transposed(b[0], b[1], tile + swizzle<N_ROW_BYTES>(step * 16 + lane % 16, column / 8));
    }
  }

  // The fragments of the next step are on their way while this one is multiplied.
  __device__ __forceinline__ void multiply_stage(int k_block, float (&acc)[M_TILES][2][N_TILES][4]) {
    uint32 stage = smem + k_block % STAGES * STAGE_BYTES;
    Fragments fragments[2];
    load_fragments(stage, 0, fragments[0]);
#pragma unroll
    for (int step = 0; step < BLOCK_K / 16; ++step) {
      if (step + 1 < BLOCK_K / 16) load_fragments(stage, step + 1, fragments[(step + 1) % 2]);
      const Fragments& now = fragments[step % 2];
#pragma unroll
      for (int n = 0; n < N_TILES; ++n)
#pragma unroll
        for (int half = 0; half < 2; ++half)
#pragma unroll
          for (int m = 0; m < M_TILES; ++m) mma_16816(T(), acc[m][half][n], now.a[m], now.b[n][half]);
    }
  }

  // Results leave through shared memory, 16 rows of a warp at a time: the code that finishes them exists once and not
  // once a register, and neighbouring lanes store neighbouring features.
  __device__ __forceinline__ void store_tile(const ExpertStack& stack, const Tile& tile,
                                             float (&acc)[M_TILES][2][N_TILES][4]) {
    __syncthreads();
    float* slab = reinterpret_cast<float*>(stages) + threadIdx.x / WARP * SLAB_FLOATS;  // (16, SLAB_PITCH) of this warp
#pragma unroll
    for (int m = 0; m < M_TILES; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half)
#pragma unroll
        for (int n = 0; n < N_TILES; ++n)
#pragma unroll
          for (int r = 0; r < 2; ++r) {
            float* at = slab + (lane / 4 + 8 * r) * SLAB_PITCH + half * WARP_N + n * 8 + lane % 4 * 2;
            *reinterpret_cast<float2*>(at) = make_float2(acc[m][half][n][2 * r], acc[m][half][n][2 * r + 1]);
          }
      __syncwarp();
      int first_row = tile.row_begin + (warp_m * M_TILES + m) * 16;
      store_slab(launch, stack, tile.expert, tile.row_end, tile.n_block, slab, first_row, warp_n * WARP_N);
      __syncwarp();
    }
  }

  // Finishes and stores 16 rows from `first_row` on; column 0 of both halves of the slab is weight row `first_column` of
  // its half of the weight tile. A lane keeps its column and goes down the rows, FEW at a time.
  __device__ __noinline__ static void store_slab(const GemmLaunch& launch, const ExpertStack& stack, int expert,
                                                 int row_end, int n_block, float* slab, int first_row,
                                                 int first_column) {
    constexpr int ROW_STEP = WARP / WARP_N, FEW = 4;  // rows between two of a lane; results a lane has in flight
    static_assert(16 / ROW_STEP % FEW == 0, "the rows of a lane are a multiple of FEW");
    int lane = threadIdx.x % WARP, column = lane % WARP_N;
    if (lane < 16) {  // the scales of a row travel in its pad
      RowScales own = first_row + lane < row_end ? row_scales(stack, first_row + lane) : RowScales{0.0f, 0.0f};
      slab[lane * SLAB_PITCH + 2 * WARP_N] = own.in;
      slab[lane * SLAB_PITCH + 2 * WARP_N + 1] = own.out;
    }
    __syncwarp();
    int outputs = stack.pairing == PAIR_NONE ? 2 : 1;
    for (int output = 0; output < outputs; ++output) {
      int half = output, first = column, feature;  // where this lane's accumulator, and that of its up row, stand
      if (stack.pairing == PAIR_INTERLEAVED) {     // a pair a lane, WARP_N / 2 pairs in each half
        half = column / (WARP_N / 2), first = column % (WARP_N / 2) * 2;
        feature = (Halves::begin(stack, n_block, half) + first_column + first) / 2;
      } else {
        feature = Halves::begin(stack, n_block, half) + first_column + first;
      }
      first += half * WARP_N;
      int second = stack.pairing == PAIR_STACKED ? first + WARP_N : first + 1;
      if (feature >= features(stack)) continue;
      for (int r = lane / WARP_N; r < 16; r += ROW_STEP * FEW) {
        float acc[FEW], up[FEW];
        RowScales scales[FEW];
#pragma unroll
        for (int i = 0; i < FEW; ++i) {
          const float* at = slab + (r + i * ROW_STEP) * SLAB_PITCH;
          acc[i] = at[first], up[i] = at[second];
          scales[i] = {at[2 * WARP_N], at[2 * WARP_N + 1]};
        }
        finish(stack, expert, feature, acc, up, scales);
#pragma unroll
        for (int i = 0; i < FEW; ++i) {
          int row = first_row + r + i * ROW_STEP;
          if (row < row_end) store<T>(launch, stack, row, feature, acc[i]);
        }
      }
    }
  }

  __device__ __forceinline__ void compute(const Tile& tile) {
    const ExpertStack& stack = launch.stacks[tile.stack_idx];
    float acc[M_TILES][2][N_TILES][4] = {};
    aim(stack, tile);
    int k_blocks = ceil_div(inner, BLOCK_K);
    __syncthreads();  // every warp has left the previous tile's stages
#pragma unroll
    for (int k_block = 0; k_block < STAGES - 1; ++k_block) {
      if (k_block < k_blocks) copy_stage(k_block);
      copy_async_commit();  // a group per inner block, empty or not, keeps the wait count constant
    }
    for (int k_block = 0; k_block < k_blocks; ++k_block) {
      copy_async_wait<STAGES - 2>();
      __syncthreads();
      multiply_stage(k_block, acc);  // first: its products run while the copies are issued (309 against 285 TFLOP/s)
      if (k_block + STAGES - 1 < k_blocks) copy_stage(k_block + STAGES - 1);
      copy_async_commit();
    }
    store_tile(stack, tile, acc);
  }
};

template <typename T, int BLOCK_M, WeightOrder ORDER>
__device__ __forceinline__ void grouped_gemm(const GemmLaunch& launch) {
  extern __shared__ __align__(128) unsigned char dynamic_smem[];  // stages, then the tile offsets
  using Gemm = GroupedGemm<T, BLOCK_M, ORDER>;
  int64* tile_offsets = reinterpret_cast<int64*>(dynamic_smem + Gemm::STAGES * Gemm::STAGE_BYTES);
  using Tiling = GridTiling<BLOCK_M, Gemm::HALF>;
  Scheduler<Tiling, int64, THREADS> scheduler(launch, tile_offsets);
  Gemm gemm(launch, dynamic_smem);
  for (int64 tile_idx = blockIdx.x; tile_idx < scheduler.num_tiles(); tile_idx += gridDim.x)
    gemm.compute(Tiling::tile(scheduler.find(tile_idx)));
}

}  // namespace mma

#define GROUPED_GEMM_MMA(NAME, T, BLOCK_M, ORDER)                                                    \
  extern "C" __global__ void __launch_bounds__(mma::THREADS, mma::TileShape<BLOCK_M>::BLOCKS_PER_SM) \
      NAME(const __grid_constant__ GemmLaunch launch) { mma::grouped_gemm<T, BLOCK_M, ORDER>(launch); }

#define GROUPED_GEMM_MMA_ALL(NAME, T)                               \
  GROUPED_GEMM_MMA(NAME##_16_inner_major, T, 16, INNER_MAJOR)       \
  GROUPED_GEMM_MMA(NAME##_64_inner_major, T, 64, INNER_MAJOR)       \
  GROUPED_GEMM_MMA(NAME##_128_inner_major, T, 128, INNER_MAJOR)     \
  GROUPED_GEMM_MMA(NAME##_16_row_major, T, 16, ROW_MAJOR)           \
  GROUPED_GEMM_MMA(NAME##_64_row_major, T, 64, ROW_MAJOR)           \
  GROUPED_GEMM_MMA(NAME##_128_row_major, T, 128, ROW_MAJOR)
