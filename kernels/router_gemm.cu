// router_gemm: logits[part, t, e] = sum over a part of the hidden dimension of x[t] . w[e], to be added up by route.cuh.
//
//   grid     (part, token tile, expert tile); a part is one CHUNK of 512 hidden positions, or all of them
//   block    WARPS_E x WARPS_T warps; a warp owns 16 M_TILES experts x 16 N_TILES tokens
//   tile     experts are the M operand of mma.sync, tokens the N operand, float32 accumulators; FEW is 32 experts x 16
//            tokens by two warps, and holds a whole chunk in shared memory; SLIM is 32 x 64 by four, where more experts than
//            that are not there; MANY is 128 x 128 by eight
//   smem     STAGES x (experts + tokens) rows of 64 hidden positions (128 bytes), XOR-swizzled by 16-byte chunks: 48 KiB
//            (FEW), 72 KiB (SLIM), 96 KiB (MANY)
//
//   One token meets 2 D E bytes of weights; a column of tiles would leave most SMs idle, so the hidden dimension is cut too.
//   Float32 weights come as num_planes = 3 bfloat16 arrays whose sum they are, exactly; a product of two bfloat16 numbers
//   is exact in float32, so nothing is rounded to 16 bits.
//
//   barrier                      means
//   wait_group + __syncthreads   this block of the hidden dimension has landed for every thread, and every warp has finished
//                                with the stage that the next copies overwrite
//
//   edges    hidden positions, tokens and experts past the end are zeros in shared memory and never read from memory
//   needs    16-byte aligned bases and strides of x and w (the host checks)
//
// A chunk is summed from zero, in order, and the chunks are added in order, here or by the reader: a logit has the same bits
// whatever the batch, the tile and the number of parts.
#include "overlap.cuh"
#include "ptx.cuh"

namespace router_gemm {

struct RouterGemmLaunch {
  const void* x;  // (num_tokens, hidden_size)
  const void* w;  // (num_planes, num_experts, hidden_size)
  float* logits;  // (num_parts, num_tokens, num_experts)
  int* blocks_done;  // set to 0 for route_and_group, which follows
  int64 x_row_stride, w_plane_stride, w_row_stride;
  int num_tokens, num_experts, hidden_size, num_planes;
  int num_parts;  // 1, or the number of chunks
  int padding;
};
static_assert(sizeof(RouterGemmLaunch) == 80, "cumoe/gpu/router_gemm.py packs 80 bytes");

constexpr int CHUNK = 512, BLOCK_K = 64, ROW_BYTES = BLOCK_K * 2;

// cumoe/gpu/router_gemm.py has the same numbers.
template <int EXPERT_WARPS, int TOKEN_WARPS, int EXPERT_TILES, int TOKEN_TILES, int NUM_STAGES> struct TileShape {
  static constexpr int WARPS_E = EXPERT_WARPS, WARPS_T = TOKEN_WARPS, M_TILES = EXPERT_TILES, N_TILES = TOKEN_TILES;
  static constexpr int EXPERTS = WARPS_E * M_TILES * 16, TOKENS = WARPS_T * N_TILES * 16;
  static constexpr int THREADS = WARPS_E * WARPS_T * WARP, STAGES = NUM_STAGES;
};
using Few = TileShape<2, 1, 1, 1, 8>;
using Slim = TileShape<2, 2, 1, 2, 6>;
using Many = TileShape<2, 4, 4, 2, 3>;

// Where the sum over the hidden dimension has come to: chunk, then plane, then block of 64.
struct Place {
  int chunk, plane, block;
  __device__ __forceinline__ int inner() const { return chunk * CHUNK + block * BLOCK_K; }
  // To the next place; whether a chunk is complete.
  __device__ __forceinline__ bool advance(const RouterGemmLaunch& p) {
    if (++block < min(CHUNK / BLOCK_K, ceil_div(p.hidden_size - chunk * CHUNK, BLOCK_K))) return false;
    block = 0;
    if (++plane < p.num_planes) return false;
    plane = 0, ++chunk;
    return true;
  }
};

template <typename T, typename Shape> struct RouterGemm {
  static constexpr int W_BYTES = Shape::EXPERTS * ROW_BYTES, STAGE_BYTES = W_BYTES + Shape::TOKENS * ROW_BYTES;
  using Accumulators = float[Shape::M_TILES][Shape::N_TILES][2][4];

  const RouterGemmLaunch& p;
  uint32 smem;
  int part, first_token, first_expert;

  __device__ __forceinline__ static uint32 swizzle(int row, int chunk) { return row * ROW_BYTES + ((chunk ^ (row & 7)) << 4); }

  // Rows of 64 hidden positions, eight threads a row.
  template <int ROWS>
  __device__ __forceinline__ void copy_rows(uint32 destination, const T* source, int64 stride, int rows_left, int inner) const {
    constexpr int STEP = Shape::THREADS / 8;
    static_assert(STEP % 8 == 0, "all rows of a thread have the same swizzle");
    int chunk = threadIdx.x % 8, first = threadIdx.x / 8, bytes = min(max(p.hidden_size - inner - chunk * 8, 0), 8) * 2;
    source += first * stride + inner + chunk * 8;
    destination += swizzle(first, chunk);
#pragma unroll
    for (int row = 0; row < ROWS; row += STEP, source += STEP * stride)
      copy_async_16(destination + row * ROW_BYTES, source, first + row < rows_left ? bytes : 0);
  }

  // Asks for a block of operands, or for nothing: the groups of copies are counted all the same.
  __device__ __forceinline__ void copy(Place& place, int last_chunk, int stage) const {
    if (place.chunk < last_chunk) {
      uint32 destination = smem + stage * STAGE_BYTES;
      const T* w = static_cast<const T*>(p.w) + place.plane * p.w_plane_stride + first_expert * p.w_row_stride;
      const T* x = static_cast<const T*>(p.x) + first_token * p.x_row_stride;
      copy_rows<Shape::EXPERTS>(destination, w, p.w_row_stride, p.num_experts - first_expert, place.inner());
      copy_rows<Shape::TOKENS>(destination + W_BYTES, x, p.x_row_stride, p.num_tokens - first_token, place.inner());
      place.advance(p);
    }
    copy_async_commit();
  }

  __device__ __forceinline__ void multiply(int stage, Accumulators& acc) const {
    int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    int expert_row = warp % Shape::WARPS_E * Shape::M_TILES * 16 + lane % 16, expert_chunk = lane / 16;
    int token_row = warp / Shape::WARPS_E * Shape::N_TILES * 16 + lane % 8 + lane / 16 * 8, token_chunk = lane / 8 % 2;
    uint32 w = smem + stage * STAGE_BYTES, x = w + W_BYTES;
#pragma unroll
    for (int k = 0; k < BLOCK_K / 16; ++k) {
      uint32 a[Shape::M_TILES][2][2], b[Shape::N_TILES][2][2];
#pragma unroll
      for (int m = 0; m < Shape::M_TILES; ++m)
        load_matrix_x4(a[m][0], a[m][1], w + swizzle(expert_row + 16 * m, 2 * k + expert_chunk));
#pragma unroll
      for (int n = 0; n < Shape::N_TILES; ++n)
        load_matrix_x4(b[n][0], b[n][1], x + swizzle(token_row + 16 * n, 2 * k + token_chunk));
#pragma unroll
      for (int m = 0; m < Shape::M_TILES; ++m)
#pragma unroll
        for (int n = 0; n < Shape::N_TILES; ++n)
#pragma unroll
          for (int half = 0; half < 2; ++half) mma_16816(T(), acc[m][n][half], a[m], b[n][half]);
    }
  }

  // total += acc; acc <- 0
  __device__ __forceinline__ static void end_chunk(Accumulators& acc, Accumulators& total) {
#pragma unroll
    for (int m = 0; m < Shape::M_TILES; ++m)
#pragma unroll
      for (int n = 0; n < Shape::N_TILES; ++n)
#pragma unroll
        for (int i = 0; i < 8; ++i) {
          total[m][n][i / 4][i % 4] += acc[m][n][i / 4][i % 4];
          acc[m][n][i / 4][i % 4] = 0.0f;
        }
  }

  // A lane holds experts lane / 4 and + 8 of two tokens that are neighbours.
  __device__ __forceinline__ void store(const Accumulators& total) const {
    int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    int64 rows = (int64)part * p.num_tokens;
#pragma unroll
    for (int m = 0; m < Shape::M_TILES; ++m)
#pragma unroll
      for (int n = 0; n < Shape::N_TILES; ++n)
#pragma unroll
        for (int i = 0; i < 8; ++i) {
          int expert = first_expert + (warp % Shape::WARPS_E * Shape::M_TILES + m) * 16 + lane / 4 + i / 2 % 2 * 8;
          int token = first_token + (warp / Shape::WARPS_E * Shape::N_TILES + n) * 16 + i / 4 * 8 + lane % 4 * 2 + i % 2;
          if (expert < p.num_experts && token < p.num_tokens)
            p.logits[(rows + token) * p.num_experts + expert] = total[m][n][i / 4][i % 4];
        }
  }

  __device__ __forceinline__ void run() const {
    int chunks = ceil_div(p.hidden_size, CHUNK), begin = p.num_parts == 1 ? 0 : part, end = p.num_parts == 1 ? chunks : part + 1;
    Place asked{begin, 0, 0}, at{begin, 0, 0};
    Accumulators acc = {}, total = {};
#pragma unroll
    for (int stage = 0; stage < Shape::STAGES - 1; ++stage) copy(asked, end, stage);
    for (int stage = 0; at.chunk < end; stage = (stage + 1) % Shape::STAGES) {
      copy_async_wait<Shape::STAGES - 2>();
      __syncthreads();
      multiply(stage, acc);
      copy(asked, end, (stage + Shape::STAGES - 1) % Shape::STAGES);
      if (at.advance(p)) end_chunk(acc, total);
    }
    store(total);
  }
};

template <typename T, typename Shape> __device__ __forceinline__ void router_gemm(const RouterGemmLaunch& launch) {
  extern __shared__ unsigned char dynamic_smem[];
  wait_for_previous_kernel();
  launch_next_kernel();
  if (blockIdx.x == 0 && threadIdx.x == 0) *launch.blocks_done = 0;
  int expert_tiles = ceil_div(launch.num_experts, Shape::EXPERTS), part = blockIdx.x % launch.num_parts;
  int tile = blockIdx.x / launch.num_parts;
  RouterGemm<T, Shape>{launch, shared_address(dynamic_smem), part, tile / expert_tiles * Shape::TOKENS,
                       tile % expert_tiles * Shape::EXPERTS}.run();
}

}  // namespace router_gemm

#define ROUTER_GEMM(NAME, T, SHAPE)                                                          \
  extern "C" __global__ void __launch_bounds__(router_gemm::SHAPE::THREADS)                  \
      NAME(const __grid_constant__ router_gemm::RouterGemmLaunch launch) {                   \
    router_gemm::router_gemm<T, router_gemm::SHAPE>(launch);                                 \
  }

ROUTER_GEMM(router_gemm_bfloat16_few, bf16, Few)
ROUTER_GEMM(router_gemm_bfloat16_slim, bf16, Slim)
ROUTER_GEMM(router_gemm_bfloat16_many, bf16, Many)
ROUTER_GEMM(router_gemm_float16_few, fp16, Few)
ROUTER_GEMM(router_gemm_float16_slim, fp16, Slim)
ROUTER_GEMM(router_gemm_float16_many, fp16, Many)
