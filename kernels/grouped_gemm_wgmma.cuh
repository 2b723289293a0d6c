// grouped_gemm_wgmma: C[rows(e)] = epilogue(A[rows(e)] @ W[e]^T) for every expert e of every stack; 16-bit types, sm_90a.
//
// Weights are the M operand of wgmma and tokens the N operand, so that a tile takes as many tokens as an expert happens to
// have, in steps of 8 up to MAX_ROWS; the same kernel streams weights for one token and fills the tensor cores for many.
//
//   grid       persistent blocks; a work unit is (stack, expert, run of rows, weight block), see Tiling
//   block      warpgroup 0 brings the operands: thread 0 asks TMA for weights and for rows that are neighbours; rows that
//              the permutation names are gathered by all its threads with cp.async (no permuted copy of the tokens exists).
//              CONSUMERS further warpgroups multiply and finish
//   tile       a consumer owns two runs of 64 weight rows: gate and up rows of the same features, or neighbours; a lane
//              therefore holds both halves of a pair
//   smem       num_stages x (2 HALF_ROWS + MAX_ROWS) rows of 64 inner positions (128 bytes, swizzled as wgmma wants them),
//              a slab of MAX_ROWS x 64 results a consumer, RING descriptions of tiles with their row factors, tile offsets
//
//   barrier       count            a phase ends when
//   full[s]       1 + 128          TMA and the producers' own copies have written stage s
//   empty[s]      warps            every consumer warp has multiplied stage s
//   told[r]       128              the description of a tile and its row factors stand in ring place r
//   read[r]       warps            every consumer warp has finished with that place
//   sync_consumer                  a consumer's slab is written, or has been stored and may be overwritten
//
//   edges      weight rows and inner positions past the end are zeros (TMA fills them, cp.async fills the tokens'), so a
//              neighbour's NaN cannot leak in; rows past the expert's last are whatever the stage held: products of
//              different rows never meet, and they are not stored.
//   needs      bases and strides that are multiples of 16 bytes, a multiple of 8 features (the host checks)
//
// The sum over the inner dimension runs in the same order whatever the tile, so a row has the same bits in every batch.
#pragma once
#include "finish_sm90.cuh"
#include "overlap.cuh"
#include "wgmma.cuh"

namespace hopper {

template <typename T, typename Shape, WeightOrder ORDER, bool PAIRED> struct GroupedGemm {
  static constexpr int MAX_ROWS = Shape::MAX_ROWS, CONSUMERS = Shape::CONSUMERS, HALF_ROWS = Shape::HALF_ROWS;
  static constexpr int THREADS = PRODUCERS + CONSUMERS * WARPGROUP, HALF_BYTES = HALF_ROWS * ROW_BYTES;
  static constexpr int A_BYTES = MAX_ROWS * ROW_BYTES, W_BYTES = 2 * HALF_BYTES, STAGE_BYTES = W_BYTES + A_BYTES;
  static constexpr int CONSUMER_WARPS = CONSUMERS * WARPGROUP / WARP;
  using Schedule = Scheduler<Tiling<Shape>, int, THREADS>;
  using Place = RingPlace<MAX_ROWS>;
  using Epilogue = Finish<T, Shape, PAIRED>;
  using Accumulators = typename Epilogue::Accumulators;

  struct Barriers { uint64 full[MAX_STAGES], empty[MAX_STAGES], told[RING], read[RING]; };

  const WgmmaLaunch& launch;
  const Schedule& schedule;
  Barriers& barriers;
  Place* ring;
  uint32 smem;  // the stages, then the slabs

  __device__ __forceinline__ uint32 full(int stage) const { return shared_address(&barriers.full[stage]); }
  __device__ __forceinline__ uint32 empty(int stage) const { return shared_address(&barriers.empty[stage]); }
  __device__ __forceinline__ uint32 told(int place) const { return shared_address(&barriers.told[place]); }
  __device__ __forceinline__ uint32 read(int place) const { return shared_address(&barriers.read[place]); }

  // A place in a ring, and the parity of the round.
  struct Cursor {
    int at = 0, parity = 0;
    __device__ __forceinline__ void advance(int length) { if (++at == length) { at = 0; parity ^= 1; } }
  };

  __device__ __forceinline__ TileInfo tile_info(int tile) const {
    Group group = schedule.find(tile);
    return Tiling<Shape>::tile(group, launch.gemm.stacks[group.stack_idx]);
  }

  // --- producers -----------------------------------------------------------------------------------------------------

  __device__ __forceinline__ void bring_operands() {
    Cursor stage, place;
    int position = blockIdx.x;
    bool first_tile = true;
    for (;; place.advance(RING)) {
      Place& now = ring[place.at];
      if (threadIdx.x == 0) {
        barrier_wait(read(place.at), place.parity ^ 1);
        now.tile = next_tile(position);
      }
      sync_some<1, PRODUCERS>();  // the description is written
      if (now.tile.num_rows == 0) break;
      int ahead = 0;  // inner blocks whose weights are on their way already
      if (first_tile) {
        if (threadIdx.x == 0)
          for (; ahead < min(now.tile.k_blocks, launch.num_stages); ++ahead) load_weights(now.tile, ahead, ahead);
        if (launch.weights_first) {
          wait_for_previous_kernel();
          launch_next_kernel();
        }
        first_tile = false;
      }
      describe_rows(now);
      barrier_arrive(told(place.at));
      sync_some<1, PRODUCERS>();  // the offsets of all rows are written
      if (gathers(launch.gemm.stacks[now.tile.stack_idx])) gather_rows(now, ahead, stage);
      else load_rows(now, ahead, stage);
    }
    barrier_arrive(told(place.at));
    // A grid without tiles must not end before the previous kernel either: the next one counts on both.
    if (first_tile && launch.weights_first) wait_for_previous_kernel();
  }

  // The next tile that has rows, from `position` on.
  __device__ __forceinline__ TileInfo next_tile(int& position) const {
    int first = schedule.tile_offsets[launch.gemm.stacks[0].num_experts], others = schedule.num_tiles() - first;
    TileInfo tile{};
    while (tile.num_rows <= 0 && position < schedule.num_tiles()) {
      tile = tile_info(position < others ? first + position : position - others);
      position = launch.next_position ? gridDim.x + atomicAdd(launch.next_position, 1) : position + gridDim.x;
    }
    tile.num_rows = max(tile.num_rows, 0);
    return tile;
  }

  __device__ __forceinline__ void describe_rows(Place& now) const {
    const ExpertStack& stack = launch.gemm.stacks[now.tile.stack_idx];
    for (int r = threadIdx.x; r < now.tile.num_rows; r += PRODUCERS) {
      RowScales scales = row_scales(stack, now.tile.row_begin + r);
      now.scale_in[r] = scales.in;
      now.scale_out[r] = scales.out;
      now.offsets[r] = a_row_of(stack, now.tile.row_begin + r) * (uint32)(stack.a_row_stride / 8);
    }
  }

  // One thread: an inner block of the weights into a stage.
  __device__ __forceinline__ void load_weights(const TileInfo& tile, int k_block, int stage) const {
    const TensorMap& map = launch.w_maps[tile.stack_idx];
    uint32 destination = smem + stage * STAGE_BYTES;
    barrier_arrive_expect(full(stage), W_BYTES);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      int row = PAIRED ? tile.weight_block * HALF_ROWS : (2 * tile.weight_block + half) * HALF_ROWS;
      int pair_half = PAIRED ? half : 0;
      if (ORDER == INNER_MAJOR) {
        load_tensor_4d(destination + half * HALF_BYTES, map, full(stage), k_block * BLOCK_K, row, pair_half, tile.expert);
      } else {
#pragma unroll
        for (int run = 0; run < CONSUMERS; ++run)
          load_tensor_4d(destination + half * HALF_BYTES + run * RUN_BYTES, map, full(stage), row + run * RUN,
                         k_block * BLOCK_K, pair_half, tile.expert);
      }
    }
  }

  // Rows of A that the permutation names: eight threads a row, 16 bytes each. The addresses stay in registers; reading them
  // again from shared memory for every inner block made this loop the bottleneck.
  __device__ __forceinline__ void gather_rows(const Place& now, int ahead, Cursor& stage) const {
    constexpr int STEP = PRODUCERS / 8, COPIES = MAX_ROWS / STEP;  // rows between two copies of a thread
    static_assert(STEP % 8 == 0, "all rows of a thread have the same swizzle");
    const ExpertStack& stack = launch.gemm.stacks[now.tile.stack_idx];
    int chunk = threadIdx.x % 8, first = threadIdx.x / 8, rows_left = now.tile.num_rows - first;
    uint32 offsets[COPIES];
#pragma unroll
    for (int i = 0; i < COPIES; ++i) offsets[i] = i * STEP < rows_left ? now.offsets[first + i * STEP] : 0;
    const uint4* source = static_cast<const uint4*>(stack.a) + chunk;
    int inner_left = stack.inner - chunk * 8;
    uint32 place_in_stage = smem + W_BYTES + first * ROW_BYTES + ((chunk ^ (first & 7)) << 4);
    int k_blocks = now.tile.k_blocks;
#pragma unroll 1
    for (int k = 0; k < k_blocks; ++k) {
      barrier_wait(empty(stage.at), stage.parity ^ 1);
      if (threadIdx.x == 0 && k >= ahead) load_weights(now.tile, k, stage.at);
      uint32 destination = place_in_stage + stage.at * STAGE_BYTES;
      int bytes = min(max(inner_left, 0), 8) * 2;
#pragma unroll
      for (int i = 0; i < COPIES; ++i)
        if (i * STEP < rows_left) copy_async_16(destination + i * STEP * ROW_BYTES, source + offsets[i], bytes);
      barrier_arrive_after_copies(full(stage.at));
      source += BLOCK_K / 8;
      inner_left -= BLOCK_K;
      stage.advance(launch.num_stages);
    }
  }

  // Rows of A that are neighbours, in boxes of 64 and 16. What follows the expert's last row comes along and is not used.
  __device__ __forceinline__ void load_rows(const Place& now, int ahead, Cursor& stage) const {
    const TensorMap* maps = launch.a_maps[now.tile.stack_idx];
    int rows = (now.tile.num_rows + 15) / 16 * 16, first_row = now.tile.row_begin, k_blocks = now.tile.k_blocks;
#pragma unroll 1
    for (int k = 0; k < k_blocks; ++k) {
      barrier_wait(empty(stage.at), stage.parity ^ 1);
      if (threadIdx.x == 0) {
        if (k >= ahead) load_weights(now.tile, k, stage.at);
        uint32 destination = smem + stage.at * STAGE_BYTES + W_BYTES;
        barrier_arrive_expect(full(stage.at), rows * ROW_BYTES);
        int row = 0;
#pragma unroll 1
        for (; row + 64 <= rows; row += 64)
          load_tensor_4d(destination + row * ROW_BYTES, maps[0], full(stage.at), k * BLOCK_K, first_row + row, 0, 0);
#pragma unroll 1
        for (; row < rows; row += 16)
          load_tensor_4d(destination + row * ROW_BYTES, maps[1], full(stage.at), k * BLOCK_K, first_row + row, 0, 0);
      } else {
        barrier_arrive(full(stage.at));
      }
      stage.advance(launch.num_stages);
    }
  }

  // --- consumers -----------------------------------------------------------------------------------------------------

  // acc <- the products of this consumer's two runs of weight rows with N token rows.
  template <int N>
  __device__ __forceinline__ void multiply(int consumer, int k_blocks, Cursor& stage, Accumulators& acc) {
    if constexpr (N <= MAX_ROWS) {
      constexpr int STEP = ORDER == INNER_MAJOR ? 32 : 16 * ROW_BYTES;  // 16 inner positions of the weights, in bytes
      for (int k = 0; k < k_blocks; ++k) {
        barrier_wait(full(stage.at), stage.parity);
        fence_async_proxy();
        uint32 w = smem + stage.at * STAGE_BYTES + consumer * RUN_BYTES, a = smem + stage.at * STAGE_BYTES + W_BYTES;
        wgmma_fence();
#pragma unroll
        for (int step = 0; step < BLOCK_K / 16; ++step)
#pragma unroll
          for (int half = 0; half < 2; ++half)
            Wgmma<T, N>::template multiply<ORDER == ROW_MAJOR>(acc[half], operand(w + half * HALF_BYTES + step * STEP),
                                                               operand(a + step * 32), k + step > 0);
        wgmma_commit();
        wgmma_wait<0>();  // the other consumer keeps the tensor cores busy meanwhile
        if (threadIdx.x % WARP == 0) barrier_arrive(empty(stage.at));
        stage.advance(launch.num_stages);
      }
    }
  }

  __device__ __forceinline__ void multiply_and_finish(int consumer) {
    Cursor stage, place;
    Accumulators acc;
    for (;;) {
      barrier_wait(told(place.at), place.parity);
      const TileInfo& tile = ring[place.at].tile;
      int num_rows = __shfl_sync(FULL_MASK, tile.num_rows, 0), k_blocks = __shfl_sync(FULL_MASK, tile.k_blocks, 0);
      if (num_rows == 0) break;
      switch ((num_rows + 7) / 8) {
        case 1: multiply<8>(consumer, k_blocks, stage, acc); break;
        case 2: multiply<16>(consumer, k_blocks, stage, acc); break;
        case 3: multiply<24>(consumer, k_blocks, stage, acc); break;
        case 4: multiply<32>(consumer, k_blocks, stage, acc); break;
        case 5: multiply<40>(consumer, k_blocks, stage, acc); break;
        case 6: multiply<48>(consumer, k_blocks, stage, acc); break;
        case 7: multiply<56>(consumer, k_blocks, stage, acc); break;
        case 8: multiply<64>(consumer, k_blocks, stage, acc); break;
        case 9: multiply<72>(consumer, k_blocks, stage, acc); break;
        case 10: multiply<80>(consumer, k_blocks, stage, acc); break;
        case 11: multiply<88>(consumer, k_blocks, stage, acc); break;
        case 12: multiply<96>(consumer, k_blocks, stage, acc); break;
        case 13: multiply<104>(consumer, k_blocks, stage, acc); break;
        case 14: multiply<112>(consumer, k_blocks, stage, acc); break;
        case 15: multiply<120>(consumer, k_blocks, stage, acc); break;
        case 16: multiply<128>(consumer, k_blocks, stage, acc); break;
        case 17: multiply<136>(consumer, k_blocks, stage, acc); break;
        case 18: multiply<144>(consumer, k_blocks, stage, acc); break;
        case 19: multiply<152>(consumer, k_blocks, stage, acc); break;
        case 20: multiply<160>(consumer, k_blocks, stage, acc); break;
        case 21: multiply<168>(consumer, k_blocks, stage, acc); break;
        case 22: multiply<176>(consumer, k_blocks, stage, acc); break;
        case 23: multiply<184>(consumer, k_blocks, stage, acc); break;
        default: multiply<192>(consumer, k_blocks, stage, acc);
      }
      Epilogue epilogue{launch.gemm.stacks[tile.stack_idx], ring[place.at], num_rows, consumer,
                        smem + launch.num_stages * STAGE_BYTES + consumer * Epilogue::SLAB_BYTES};
      epilogue.store(acc);
      if (threadIdx.x % WARP == 0) barrier_arrive(read(place.at));
      place.advance(RING);
    }
  }
};

template <typename T, typename Shape, WeightOrder ORDER, bool PAIRED>
__device__ __forceinline__ void grouped_gemm(const WgmmaLaunch& launch) {
  using Gemm = GroupedGemm<T, Shape, ORDER, PAIRED>;
  extern __shared__ unsigned char dynamic_smem[];
  __shared__ typename Gemm::Barriers barriers;
  __shared__ typename Gemm::Place ring[RING];
  uint32 stages = (shared_address(dynamic_smem) + 1023) & ~1023u;
  unsigned char* after = dynamic_smem + (stages - shared_address(dynamic_smem)) + launch.num_stages * Gemm::STAGE_BYTES +
                         Gemm::CONSUMERS * Gemm::Epilogue::SLAB_BYTES;
  if (threadIdx.x == 0) {
    for (int i = 0; i < launch.num_stages; ++i) {
      barrier_init(shared_address(&barriers.full[i]), 1 + PRODUCERS);
      barrier_init(shared_address(&barriers.empty[i]), Gemm::CONSUMER_WARPS);
    }
    for (int i = 0; i < RING; ++i) {
      barrier_init(shared_address(&barriers.told[i]), PRODUCERS);
      barrier_init(shared_address(&barriers.read[i]), Gemm::CONSUMER_WARPS);
    }
    barrier_init_fence();
    for (int s = 0; s < launch.gemm.num_stacks; ++s) prefetch_tensor_map(launch.w_maps[s]);
  }
  if (!launch.weights_first) {
    wait_for_previous_kernel();
    launch_next_kernel();
  }
  typename Gemm::Schedule schedule(launch.gemm, reinterpret_cast<int*>(after));  // its barriers also publish those above
  Gemm gemm{launch, schedule, barriers, ring, stages};
  int warpgroup = __shfl_sync(FULL_MASK, threadIdx.x / WARPGROUP, 0);
  if (warpgroup == 0) {
    if (Gemm::CONSUMERS == 2) keep_registers<40>();
    gemm.bring_operands();
  } else {
    if (Gemm::CONSUMERS == 2) take_registers<232>();
    gemm.multiply_and_finish(warpgroup - 1);
  }
}

}  // namespace hopper

#define GROUPED_GEMM_WGMMA(NAME, T, SHAPE, ORDER, PAIRED)                                                      \
  extern "C" __global__ void __launch_bounds__(hopper::GroupedGemm<T, SHAPE, ORDER, PAIRED>::THREADS,          \
                                               SHAPE::BLOCKS_PER_SM)                                           \
      NAME(const __grid_constant__ WgmmaLaunch launch) { hopper::grouped_gemm<T, SHAPE, ORDER, PAIRED>(launch); }
#define GROUPED_GEMM_WGMMA_PAIR(NAME, T, SHAPE, ORDER)    \
  GROUPED_GEMM_WGMMA(NAME##_paired, T, SHAPE, ORDER, true) \
  GROUPED_GEMM_WGMMA(NAME##_single, T, SHAPE, ORDER, false)
