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
#include "epilogue.cuh"
#include "overlap.cuh"
#include "scheduler.cuh"
#include "wgmma.cuh"

enum WeightOrder { INNER_MAJOR = 0, ROW_MAJOR = 1 };

struct WgmmaLaunch {
  TensorMap w_maps[MAX_STACKS];  // (expert, half, row, inner), or (expert, half, inner, row) where rows are contiguous
  TensorMap a_maps[MAX_STACKS][2];  // (1, 1, row, inner), boxes of 64 and of 16 rows
  GemmLaunch gemm;
  int* next_position;  // how many tiles beyond the first of each block are taken, zero at the beginning; or null
  int num_stages;
  int weights_first;  // 1: tiles follow from what is older than the previous kernel, so that weights may come before its end
};
static_assert(sizeof(WgmmaLaunch) == 4416, "cumoe/gpu/stacks.py packs 2368 bytes");

namespace hopper {

constexpr int BLOCK_K = 64, ROW_BYTES = BLOCK_K * 2, RUN = 64, RUN_BYTES = RUN * ROW_BYTES;
constexpr int SLAB_PITCH = RUN + 4;  // floats; the pad spreads the rows of four lanes over all banks
constexpr int PRODUCERS = 128, WARPGROUP = 128, RING = 2, MAX_STAGES = 10;
constexpr int BAND = 4;  // weight blocks that are walked together over all row blocks of an expert

__device__ constexpr int max_of(int a, int b) { return a > b ? a : b; }

// cumoe/gpu/config.py has the same numbers.
template <int ROWS, int CONSUMER_GROUPS, int BLOCKS> struct TileShape {
  static constexpr int MAX_ROWS = ROWS, CONSUMERS = CONSUMER_GROUPS, BLOCKS_PER_SM = BLOCKS;
};

// An expert's rows are cut into even runs, multiples of 8 rows.
template <int MAX_ROWS, int HALF_ROWS> struct Tiling {
  __device__ __forceinline__ static int weight_blocks(const ExpertStack& stack) {
    return ceil_div(stack.weight_rows, 2 * HALF_ROWS);
  }
  __device__ __forceinline__ static int tiles(const ExpertStack& stack, int num_rows) {
    return ceil_div(num_rows, MAX_ROWS) * weight_blocks(stack);
  }
};

// Whether rows are found through the permutation; else they are neighbours, and TMA brings them.
__device__ __forceinline__ bool gathers(const ExpertStack& stack) {
  return stack.slots_per_a_row > 0 && stack.permutation;
}

struct TileInfo {
  int stack_idx, expert, row_begin, num_rows;  // num_rows = 0: there is no further tile
  int weight_block, k_blocks;
};

template <int MAX_ROWS> struct alignas(16) RingPlace {  // rows of float2 are read from it
  float scale_in[MAX_ROWS], scale_out[MAX_ROWS];
  uint32 offsets[MAX_ROWS];  // where the rows of A begin, in units of 16 bytes
  TileInfo tile;
};

template <typename T, typename Shape, WeightOrder ORDER, bool PAIRED> struct GroupedGemm {
  static constexpr int MAX_ROWS = Shape::MAX_ROWS, CONSUMERS = Shape::CONSUMERS, THREADS = PRODUCERS + CONSUMERS * WARPGROUP;
  static constexpr int HALF_ROWS = CONSUMERS * RUN, HALF_BYTES = HALF_ROWS * ROW_BYTES;
  static constexpr int A_BYTES = MAX_ROWS * ROW_BYTES, W_BYTES = 2 * HALF_BYTES, STAGE_BYTES = W_BYTES + A_BYTES;
  static constexpr int SLAB_BYTES = max_of(MAX_ROWS * RUN * 2, 2 * 16 * SLAB_PITCH * 4);
  static constexpr int CONSUMER_WARPS = CONSUMERS * WARPGROUP / WARP;
  static constexpr int ACCUMULATORS = MAX_ROWS / 2;
  using Tiles = Tiling<MAX_ROWS, HALF_ROWS>;
  using Schedule = Scheduler<Tiles, int, THREADS>;
  using Place = RingPlace<MAX_ROWS>;

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
    const ExpertStack& stack = launch.gemm.stacks[group.stack_idx];
    int weight_blocks = Tiles::weight_blocks(stack), row_blocks = ceil_div(group.num_rows, MAX_ROWS);
    int band = group.tile / (BAND * row_blocks), in_band = group.tile % (BAND * row_blocks);
    int width = min(BAND, weight_blocks - band * BAND);
    int first = (ceil_div(group.num_rows, row_blocks) + 7) / 8 * 8 * (in_band / width);
    int last = min((ceil_div(group.num_rows, row_blocks) + 7) / 8 * 8 * (in_band / width + 1), group.num_rows);
    return {group.stack_idx, group.expert, group.row_begin + first, last - first, band * BAND + in_band % width,
            ceil_div(stack.inner, BLOCK_K)};
  }

  // --- producers -----------------------------------------------------------------------------------------------------

  __device__ __forceinline__ void bring_operands() {
    Cursor stage;
    Cursor place;
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

  using Accumulators = float[2][ACCUMULATORS];

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
    Cursor stage;
    Cursor place;
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
      Finish finish{launch.gemm.stacks[tile.stack_idx], ring[place.at], num_rows, consumer,
                    smem + launch.num_stages * STAGE_BYTES + consumer * SLAB_BYTES};
      finish.store(acc);
      if (threadIdx.x % WARP == 0) barrier_arrive(read(place.at));
      place.advance(RING);
    }
  }

  // From accumulators to stored results, 16 rows at a time. A lane holds, of each half and of every 16 rows, eight
  // results v[q]: row 8 (q / 4) + 2 (lane % 4) + q % 2, weight row 16 warp + lane / 4 + 8 (q / 2 % 2) of the run.
  struct Finish {
    const ExpertStack& stack;
    const Place& place;
    int num_rows, consumer;
    uint32 slab;

    // RAMP: identity, relu, relu2 of single rows. SIGMOIDAL: silu and gelu_tanh of pairs. Both in registers; whatever else
    // there is takes the detour of store_any.
    enum Kind { RAMP, SIGMOIDAL, ANY };

    __device__ __forceinline__ Kind kind() const {
      const Activation& act = stack.activation;
      if (PAIRED) return act.name == SILU || act.name == GELU_TANH ? SIGMOIDAL : ANY;
      bool ramp = act.name == IDENTITY || act.name == RELU || act.name == RELU2;
      return ramp && act.clamp == CLAMP_NONE && stack.pairing == PAIR_NONE ? RAMP : ANY;
    }

    // g * sigmoid(g * (c1 + c3 * g^2)), with log2(e) in the constants: silu, and gelu_tanh since (1 + tanh(z)) / 2 =
    // sigmoid(2 z).
    struct Sigmoidal { float c1, c3; };
    __device__ __forceinline__ static Sigmoidal sigmoidal(const Activation& act) {
      constexpr float LOG2_E = 1.4426950408889634f, TWICE_ROOT = 2.0f * 0.79788456080286536f;
      return act.name == SILU ? Sigmoidal{act.alpha * LOG2_E, 0.0f}
                              : Sigmoidal{TWICE_ROOT * LOG2_E, TWICE_ROOT * 0.044715f * LOG2_E};
    }

    __device__ __forceinline__ void scale(float (&v)[8], const float* factors, int row) const {
      float2 low = *reinterpret_cast<const float2*>(factors + row), high = *reinterpret_cast<const float2*>(factors + row + 8);
      v[0] *= low.x, v[1] *= low.y, v[2] *= low.x, v[3] *= low.y;
      v[4] *= high.x, v[5] *= high.y, v[6] *= high.x, v[7] *= high.y;
    }
    __device__ __forceinline__ static void add_bias(float (&v)[8], const float (&bias)[2]) {
#pragma unroll
      for (int q = 0; q < 8; ++q) v[q] += bias[q / 2 % 2];
    }

    __device__ __forceinline__ void gate(float (&v)[8], float (&up)[8], const Sigmoidal& sigmoid) const {
      const Activation& act = stack.activation;
      if (act.clamp != CLAMP_NONE) {
#pragma unroll
        for (int q = 0; q < 8; ++q) {
          up[q] = at_least(at_most(up[q], act.limit), -act.limit);
          if (act.clamp == CLAMP_BEFORE) v[q] = at_most(v[q], act.limit);
        }
      }
#pragma unroll
      for (int q = 0; q < 8; ++q) {
        float z = v[q] * fmaf(sigmoid.c3 * v[q], v[q], sigmoid.c1), e;
        asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(e) : "f"(-z));
        v[q] = __fdividef(v[q], 1.0f + e);
        if (act.clamp == CLAMP_AFTER) v[q] = at_most(v[q], act.limit);
        v[q] *= up[q] + act.up_offset;
      }
    }
    __device__ __forceinline__ void ramp(float (&v)[8]) const {
      if (stack.activation.name == IDENTITY) return;
#pragma unroll
      for (int q = 0; q < 8; ++q) {
        float positive = at_least(v[q], 0.0f);
        v[q] = stack.activation.name == RELU ? positive : positive * positive;
      }
    }

    // The biases of this lane's two weight rows of a half, whose features begin at `feature`.
    __device__ __forceinline__ void load_bias(float (&bias)[2], int feature, int half) const {
      int lane = threadIdx.x % WARP, warp = threadIdx.x % WARPGROUP / WARP;
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        int f = feature + 16 * warp + lane / 4 + 8 * i;
        int row = !PAIRED ? f : stack.pairing == PAIR_STACKED ? f + half * features(stack) : 2 * f + half;
        bias[i] = stack.bias && f < features(stack) ? stack.bias[(int64)place.tile.expert * stack.weight_rows + row] : 0.0f;
      }
    }

    __device__ __forceinline__ void to_slab(const float (&first)[ACCUMULATORS], const float (&second)[ACCUMULATORS],
                                            int feature) const {
      int lane = threadIdx.x % WARP, warp = threadIdx.x % WARPGROUP / WARP;
      float bias[2], up_bias[2];
      load_bias(bias, feature, 0);
      if (PAIRED) load_bias(up_bias, feature, 1);
      Sigmoidal sigmoid = sigmoidal(stack.activation);
      int slab_row = lane % 8 + lane / 16 * 8, slab_chunk = warp * 2 + lane / 8 % 2;
      uint32 address = slab + slab_row * 128 + ((slab_chunk ^ (lane & 7)) << 4);
#pragma unroll
      for (int j = 0; j < MAX_ROWS / 16; ++j) {
        if (j * 16 < num_rows) {
          int row = 16 * j + 2 * (lane % 4);
          float v[8], up[8];
#pragma unroll
          for (int q = 0; q < 8; ++q) v[q] = first[8 * j + q], up[q] = second[8 * j + q];
          if (stack.scale_in) {
            scale(v, place.scale_in, row);
            if (PAIRED) scale(up, place.scale_in, row);
          }
          if (stack.bias) {
            add_bias(v, bias);
            if (PAIRED) add_bias(up, up_bias);
          }
          if (PAIRED) gate(v, up, sigmoid);
          else ramp(v);
          if (stack.scale_out) scale(v, place.scale_out, row);
          uint32 packed[4];
#pragma unroll
          for (int i = 0; i < 4; ++i) packed[i] = pack_two(T(), v[2 * i], v[2 * i + 1]);
          store_matrix_x4_transposed(address + j * 16 * 128, packed);
        }
      }
    }

    // Whole 128-byte rows of 64 features, eight lanes a row.
    __device__ __forceinline__ void store_slab(int feature) const {
      int thread = threadIdx.x % WARPGROUP, chunk = thread % 8, row = thread / 8;
      bool exists = feature + chunk * 8 < features(stack);
      T* c = result<T>(stack, place.tile.row_begin, feature + chunk * 8);
      uint32 address = slab + row * 128 + ((chunk ^ (row & 7)) << 4);
      for (; row < num_rows; row += 16, address += 16 * 128)
        if (exists) *reinterpret_cast<uint4*>(c + row * stack.c_row_stride) = load_shared_16(address);
    }

    __device__ __forceinline__ void sync_consumer() const {
      if (CONSUMERS == 1 || consumer == 0) sync_some<2, WARPGROUP>();
      else sync_some<3, WARPGROUP>();
    }

    __device__ __forceinline__ void store_half(const float (&first)[ACCUMULATORS], const float (&second)[ACCUMULATORS],
                                               int feature) const {
      to_slab(first, second, feature);
      sync_consumer();
      store_slab(feature);
      sync_consumer();
    }

    // Everything that has no way of its own, slower but in a tenth of the code: 16 rows of accumulators at a time go to the
    // slab as they are, and a thread finishes one result after the other. `weight_row` is that of the first accumulator;
    // an interleaved pair that came in single rows lies in neighbouring columns.
    __device__ __forceinline__ void store_any(const float (&first)[ACCUMULATORS], const float (&second)[ACCUMULATORS],
                                              int weight_row) const {
      int lane = threadIdx.x % WARP, warp = threadIdx.x % WARPGROUP / WARP, thread = threadIdx.x % WARPGROUP;
      bool neighbours = !PAIRED && stack.pairing == PAIR_INTERLEAVED;
      int columns = neighbours ? RUN / 2 : RUN, column = thread % columns, step = neighbours ? 2 : 1;
      int feature = weight_row / step + column;
      float* rows = reinterpret_cast<float*>(__cvta_shared_to_generic(slab));  // (halves, 16, SLAB_PITCH)
#pragma unroll
      for (int j = 0; j < MAX_ROWS / 16; ++j) {
        if (j * 16 < num_rows) {
#pragma unroll
          for (int q = 0; q < 8; ++q) {
            int at = (8 * (q / 4) + 2 * (lane % 4) + q % 2) * SLAB_PITCH + 16 * warp + lane / 4 + 8 * (q / 2 % 2);
            rows[at] = first[8 * j + q];
            if (PAIRED) rows[16 * SLAB_PITCH + at] = second[8 * j + q];
          }
          sync_consumer();
#pragma unroll 1
          for (int i = thread / columns; i < min(16, num_rows - 16 * j) && feature < features(stack); i += WARPGROUP / columns) {
            const float* at = rows + i * SLAB_PITCH + column * step;
            float v[1] = {at[0]}, up[1] = {PAIRED ? at[16 * SLAB_PITCH] : at[step - 1]};
            RowScales scales[1] = {{place.scale_in[16 * j + i], place.scale_out[16 * j + i]}};
            finish(stack, place.tile.expert, feature, v, up, scales);
            *result<T>(stack, place.tile.row_begin + 16 * j + i, feature) = from_float<T>(v[0]);
          }
          sync_consumer();
        }
      }
    }

    __device__ __forceinline__ void store(const Accumulators& acc) const {
      int run = consumer * RUN;
      if (PAIRED) {
        int feature = place.tile.weight_block * HALF_ROWS + run;
        if (kind() == ANY) store_any(acc[0], acc[1], feature);
        else store_half(acc[0], acc[1], feature);
      } else {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          int weight_row = (2 * place.tile.weight_block + half) * HALF_ROWS + run;
          if (kind() == ANY) store_any(acc[half], acc[half], weight_row);
          else store_half(acc[half], acc[half], weight_row);
        }
      }
    }
  };
};

template <typename T, typename Shape, WeightOrder ORDER, bool PAIRED>
__device__ __forceinline__ void grouped_gemm(const WgmmaLaunch& launch) {
  using Gemm = GroupedGemm<T, Shape, ORDER, PAIRED>;
  extern __shared__ unsigned char dynamic_smem[];
  __shared__ typename Gemm::Barriers barriers;
  __shared__ typename Gemm::Place ring[RING];
  uint32 stages = (shared_address(dynamic_smem) + 1023) & ~1023u;
  unsigned char* after = dynamic_smem + (stages - shared_address(dynamic_smem)) + launch.num_stages * Gemm::STAGE_BYTES +
                         Gemm::CONSUMERS * Gemm::SLAB_BYTES;
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

// Rows x weight rows of a tile.
using Shape32x128 = hopper::TileShape<32, 1, 2>;
using Shape64x256 = hopper::TileShape<64, 2, 1>;
using Shape112x256 = hopper::TileShape<112, 2, 1>;
using Shape192x256 = hopper::TileShape<192, 2, 1>;

#define GROUPED_GEMM_WGMMA_ALL(NAME, T, ORDER)                     \
  GROUPED_GEMM_WGMMA_PAIR(NAME##_32x128, T, Shape32x128, ORDER)    \
  GROUPED_GEMM_WGMMA_PAIR(NAME##_64x256, T, Shape64x256, ORDER)    \
  GROUPED_GEMM_WGMMA_PAIR(NAME##_112x256, T, Shape112x256, ORDER)  \
  GROUPED_GEMM_WGMMA_PAIR(NAME##_192x256, T, Shape192x256, ORDER)
