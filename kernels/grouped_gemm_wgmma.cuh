// grouped_gemm_wgmma: C[rows(e)] = epilogue(A[rows(e)] @ W[e]^T) for every expert e of every stack; 16-bit types, sm_90a.
// One launch computes one product, or both projections of the experts: the second one's tiles follow the first one's, so that
// weights stream on where a kernel would end and another begin.
//
// Weights are the M operand of wgmma and tokens the N operand, so that a tile takes as many tokens as an expert happens to
// have, in steps of 8 up to MAX_ROWS; the same kernel streams weights for one token and fills the tensor cores for many.
//
//   grid       persistent blocks; a work unit is (product, stack, expert, run of rows, weight block), see Schedule
//   cluster    in some shapes two blocks, which take their tiles together: where an expert has two runs of rows or more, they
//              multiply the same weights with two of them, and each brings half of the weights for both (multicast)
//   block      warpgroup 0   brings tokens: rows that the permutation names with cp.async by all threads (no permuted copy of
//                            the tokens exists), rows that are neighbours with TMA by the first where tiles are large
//              warpgroup 1   warp 0 plans tiles, a thread of warp 1 and one of warp 2 bring half of the weights each with TMA,
//                            one of warp 3 reports
//              CONSUMERS further warpgroups multiply and finish
//   tile       a consumer owns two runs of 64 weight rows: gate and up rows of the same features, or neighbours; in
//              tiles for few rows (INNER) one run, with eight gate and eight up rows in turn, and twice the inner positions.
//              Either way a lane holds both halves of a pair
//   smem       num_stages x (2 HALF_ROWS + TOKEN_ROWS) rows of 64 inner positions (128 bytes, swizzled as wgmma wants them),
//              a slab of SLAB_ROWS x 64 results a consumer, RING descriptions of tiles with their row factors, row blocks
//
//   barrier     count       from                  a phase ends when
//   full[s]     2 + 128     weights, tokens       TMA and the copies have written stage s
//   empty[s]    warps       consumers             every consumer warp of the cluster has multiplied stage s
//   placed[r]   1           planner               ring place r says which tile comes next
//   told[r]     32          planner               where its rows are and their factors stand there too
//   done[r]     threads     tokens, consumers     all rows of that tile are asked for, and its results stored
//   free[r]     1           reporter              nobody reads that place any more
//   wanted      1           the first half's      the end of a tile is near: the next one is to be planned
//   sync_consumer           its warps             a consumer's slab is written, or has been stored and may be overwritten
//   sync_tokens             tokens                the first of them has seen that the rows of the first product are there
//   sync_cluster            both blocks           barriers stand, at the beginning; nobody writes to the other any more
//   Progress    global      reporters             row block b of the first product is complete; the second product's tokens
//               memory                            wait for it, while its weights are on their way already
//
//   Whatever takes a trip to memory happens in a warp of its own: under full load a trip takes 2 to 5 us, a tile has four of
//   them (position, rows, slots, factors), or one where there are few slots, and so has the fence before a report.
//
//   edges      weight rows and inner positions past the end are zeros (TMA fills them, cp.async fills the tokens'), so a
//              neighbour's NaN cannot leak in; rows past the expert's last are whatever the stage held: products of
//              different rows never meet, and they are not stored.
//   needs      bases and strides that are multiples of 16 bytes, a multiple of 8 features (the host checks)
//
// The sum over the inner dimension runs in the same order whatever the tile, so a row has the same bits in every batch.
#pragma once
#include "barriers_sm90.cuh"
#include "finish_sm90.cuh"
#include "schedule_sm90.cuh"
#include "wgmma.cuh"

namespace hopper {

template <typename T, typename Shape, WeightOrder ORDER> struct GroupedGemm {
  static constexpr int MAX_ROWS = Shape::MAX_ROWS, CONSUMERS = Shape::CONSUMERS, HALF_ROWS = Shape::HALF_ROWS;
  static constexpr int THREADS = (2 + CONSUMERS) * WARPGROUP, HALF_BYTES = HALF_ROWS * ROW_BYTES;
  static constexpr int ROWS_BYTES = MAX_ROWS * ROW_BYTES, TOKEN_BYTES = (Shape::HALVES == INNER ? 2 : 1) * ROWS_BYTES;
  static constexpr int W_BYTES = 2 * HALF_BYTES, STAGE_BYTES = W_BYTES + TOKEN_BYTES;
  static constexpr int CLUSTER = Shape::CLUSTER;
  static constexpr int RING = Shape::RING, ROWS_OF_BOX = Shape::ROWS_OF_BOX;
  using Tiles = Schedule<Shape, ORDER>;
  using Place = RingPlace<MAX_ROWS>;
  using Meetings = Barriers<Shape>;
  using Turn = hopper::Turn<RING>;
  using Epilogue = Finish<T, Shape>;
  using Accumulators = typename Epilogue::Accumulators;

  const WgmmaLaunch& launch;
  Tiles schedule;
  Meetings& barriers;
  Place* ring;
  uint32 smem;  // the stages, then the slabs

  __device__ __forceinline__ const ExpertStack& stack_of(const TileInfo& tile) const { return launch.stacks[tile.stack_idx]; }
  __device__ __forceinline__ bool is_second(const TileInfo& tile) const { return tile.stack_idx >= launch.num_stacks; }

  // Every role walks the same tiles: visit(turn) of each, in order. Weights are asked for before the rows are described.
  enum Known { PLACED, TOLD };
  template <Known KNOWN = TOLD, typename Visit> __device__ __forceinline__ void for_each_tile(Visit visit) const {
    for (Turn turn;; ++turn.tile) {
      barrier_wait(KNOWN == PLACED ? barriers.placed(turn.place()) : barriers.told(turn.place()), turn.parity());
      if (ring[turn.place()].tile.stack_idx < 0) return;
      visit(turn);
    }
  }

  // --- the planner: a warp -------------------------------------------------------------------------------------------

  __device__ __forceinline__ void plan_tiles(Positions<CLUSTER> position, const RowBlocks<Shape>& row_blocks) const {
    for (Turn turn;; ++turn.tile) {
      Place& next = ring[turn.place()];
      barrier_wait(barriers.free(turn.place()), turn.parity() ^ 1);
      while (!find_tile(position.value, row_blocks, next.tile)) position.advance();
      if (threadIdx.x % WARP == 0) barrier_arrive(barriers.placed(turn.place()));
      describe_rows(next, row_blocks);
      barrier_arrive(barriers.told(turn.place()));
      if (next.tile.stack_idx < 0) return;
      barrier_wait(barriers.wanted(), turn.tile % 2);  // as late as possible, so that the last tiles go to whoever is free
      position.advance();
    }
  }

  // Writes the tile at `position`, unless it is to be passed over.
  __device__ __forceinline__ bool find_tile(int position, const RowBlocks<Shape>& row_blocks, TileInfo& found) const {
    TileInfo tile = schedule.tile(position, row_blocks);
    if (tile.num_rows < 0) return false;
    if (threadIdx.x % WARP == 0) found = tile;
    __syncwarp();
    return true;
  }

  __device__ __forceinline__ void describe_rows(Place& place, const RowBlocks<Shape>& row_blocks) const {
    const ExpertStack& stack = stack_of(place.tile);
    if constexpr (Shape::SLOTS == FEW) {
      if (place.tile.num_rows > 0 && stack.expert_offsets) return row_blocks.describe(stack, place);
    }
    for (int r = threadIdx.x % WARP; r < place.tile.num_rows; r += WARP) {
      RowScales scales = row_scales(stack, place.tile.row_begin + r);
      place.scale_in[r] = scales.in;
      place.scale_out[r] = scales.out;
      place.offsets[r] = a_row_of(stack, place.tile.row_begin + r) * (uint32)(stack.a_row_stride / 8);
    }
  }

  // --- weights: a thread for each half -------------------------------------------------------------------------------

  // One box of every inner block. What does not change is computed once a tile: with all of it in the loop a thread took 570
  // clocks for two boxes, where a block that is to read its share of 4.5 TB/s has 840.
  __device__ __forceinline__ void bring_weights(int half) const {
    Cursor stage;
    for_each_tile<PLACED>([&](Turn turn) {
      TileInfo tile = ring[turn.place()].tile;
      const ExpertStack& stack = stack_of(tile);
      bool pairs = Tiles::pairs(stack), inward = schedule.inward(stack);
      if (ORDER == INNER_MAJOR && inward && pairs) bring_half<true>(half, tile, pairs, inward, stage);
      else bring_half<false>(half, tile, pairs, inward, stage);
    });
  }

  template <bool WOVEN>
  __device__ __forceinline__ void bring_half(int half, const TileInfo& tile, bool pairs, bool inward, Cursor& stage) const {
    const ExpertStack& stack = stack_of(tile);
    const TensorMap& map = launch.w_maps[tile.stack_idx];
    uint64 hint = weights_hint(stack);
    int row = (pairs || inward ? tile.weight_block : 2 * tile.weight_block + half) * HALF_ROWS;
    int inner = inward ? half * BLOCK_K : 0, step = inward ? 2 * BLOCK_K : BLOCK_K, pair_half = pairs ? half : 0;
    // Blocks of a cluster with the same weights bring a half each, for both.
    bool together = CLUSTER > 1 && tile.is_together, is_there = together && half != rank_in_cluster<CLUSTER>();
    // With few slots the second product has about a tile a block: nobody takes two before the first one's rows are there.
    bool late = Shape::SLOTS == FEW && is_second(tile);
    int k_wanted = half == 0 && !late ? max(tile.k_blocks - LEAD, 0) : -1;
    Cursor first = stage;
#pragma unroll 1
    for (int k = 0; k < tile.k_blocks; ++k, inner += step) {
      barrier_wait(barriers.empty(stage.at()), stage.parity() ^ 1);
      uint32 destination = smem + stage.at() * STAGE_BYTES + half * HALF_BYTES, barrier = barriers.full(stage.at());
      barrier_arrive_expect(barrier, HALF_BYTES);
      if (WOVEN) {  // eight gate and eight up rows in turn
        load_tensor_5d(destination, map, barrier, inner, 0, 0, row / 16, tile.expert, hint);
      } else if (!is_there) {
        if (ORDER == INNER_MAJOR) {
          load_box(together, hint, destination, map, barrier, inner, row, pair_half, tile.expert);
        } else {
#pragma unroll
          for (int run = 0; run < CONSUMERS; ++run)
            load_box(together, hint, destination + run * RUN_BYTES, map, barrier, row + run * RUN, inner, pair_half,
                     tile.expert);
        }
      }
      if (k == k_wanted) barrier_arrive(barriers.wanted());
      stage.advance(launch.num_stages);
    }
    if (late && half == 0) {
      if (tile.k_blocks <= launch.num_stages) barrier_wait(barriers.full(first.at()), first.parity());
      barrier_arrive(barriers.wanted());  // with more blocks the stage of the first has been emptied since
    }
  }

  static constexpr bool HINTS = Shape::HALVES == INNER || Shape::ALTERNATES;
  __device__ __forceinline__ void load_box(bool together, uint64 hint, uint32 destination, const TensorMap& map,
                                           uint32 barrier, int c0, int c1, int c2, int c3) const {
    if (together) load_tensor_4d_for(0b11, destination, map, barrier, c0, c1, c2, c3);
    else if (HINTS) load_tensor_4d(destination, map, barrier, c0, c1, c2, c3, hint);
    else load_tensor_4d(destination, map, barrier, c0, c1, c2, c3);
  }
  __device__ __forceinline__ uint64 weights_hint(const ExpertStack& stack) const {
    bool passes = Shape::ALTERNATES ? launch.alternate && stack.expert_offsets : launch.pass_through;
    return passes ? EVICT_FIRST : EVICT_NORMAL;
  }

  // --- tokens: a warpgroup -------------------------------------------------------------------------------------------

  __device__ __forceinline__ void bring_tokens() const {
    Cursor stage;
    for_each_tile([&](Turn turn) {
      const Place& now = ring[turn.place()];
      // Few rows come sooner one by one than in boxes: asking for one takes a thread 80 clocks, whatever is in it.
      bool one_by_one = Shape::HALVES == INNER || gathers(stack_of(now.tile));
      if (is_second(now.tile) && now.tile.num_rows > 0) {
        if (threadIdx.x == 0) wait_for_first_product(now.tile);
        if (one_by_one) sync_tokens();
      }
      if (one_by_one) gather_rows(now, stage);
      else load_rows(now.tile, stage);
      asm volatile("" : "+r"(turn.tile));  // the place is computed again, not kept: 40 registers are few
      barrier_arrive(barriers.done(turn.place()));
    });
  }

  __device__ __forceinline__ static void sync_tokens() { sync_some<4, TOKEN_THREADS>(); }

  // Rows one by one: eight threads a row, 16 bytes each. The addresses stay in registers; reading them
  // again from shared memory for every inner block made this loop the bottleneck.
  __device__ __forceinline__ void gather_rows(const Place& now, Cursor& stage) const {
    constexpr int STEP = TOKEN_THREADS / 8, COPIES = MAX_ROWS / STEP;  // rows between two copies of a thread
    static_assert(STEP % 8 == 0, "all rows of a thread have the same swizzle");
    const ExpertStack& stack = stack_of(now.tile);
    int thread = thread_of_warpgroup(), chunk = thread % 8, first = thread / 8, rows_left = now.tile.num_rows - first;
    uint32 offsets[COPIES];
#pragma unroll
    for (int i = 0; i < COPIES; ++i) offsets[i] = i * STEP < rows_left ? now.offsets[first + i * STEP] : 0;
    const uint4* source = static_cast<const uint4*>(stack.a) + chunk;
    uint32 place_in_stage = W_BYTES + first * ROW_BYTES + ((chunk ^ (first & 7)) << 4);
    int block_k = schedule.inward(stack) ? 2 * BLOCK_K : BLOCK_K;
#pragma unroll 1
    for (int inner_left = stack.inner; inner_left > 0; inner_left -= block_k) {
      barrier_wait(barriers.empty(stage.at()), stage.parity() ^ 1);
      uint32 destination = smem + stage.at() * STAGE_BYTES + place_in_stage;
#pragma unroll
      for (int block = 0; block < TOKEN_BYTES / ROWS_BYTES; ++block) {
        if (block * BLOCK_K < block_k) {
          int bytes = min(max(inner_left - block * BLOCK_K - thread_of_warpgroup() % 8 * 8, 0), 8) * 2;
#pragma unroll
          for (int i = 0; i < COPIES; ++i)
            if (i * STEP < rows_left)
              copy_async_16(destination + block * ROWS_BYTES + i * STEP * ROW_BYTES, source + offsets[i], bytes);
          source += BLOCK_K / 8;
        }
      }
      barrier_arrive_after_copies(barriers.full(stage.at()));
      stage.advance(launch.num_stages);
    }
  }

  // Rows that are neighbours, in boxes of 64 and ROWS_OF_BOX. What follows the expert's last row comes along and is not used.
  __device__ __forceinline__ void load_rows(const TileInfo& tile, Cursor& stage) const {
    const TensorMap* maps = launch.a_maps[tile.stack_idx];
    int rows = ceil_div(tile.num_rows, ROWS_OF_BOX) * ROWS_OF_BOX;
    if (threadIdx.x == 0 && is_second(tile)) fence_async_proxy_global();  // TMA is about to read what others stored
#pragma unroll 1
    for (int k = 0; k < tile.k_blocks; ++k) {
      barrier_wait(barriers.empty(stage.at()), stage.parity() ^ 1);
      if (threadIdx.x == 0) {
        uint32 destination = smem + stage.at() * STAGE_BYTES + W_BYTES, barrier = barriers.full(stage.at());
        barrier_arrive_expect(barrier, rows * ROW_BYTES);
        int row = 0, begin = tile.row_begin;
#pragma unroll 1
        for (; row + 64 <= rows; row += 64)
          load_tensor_4d(destination + row * ROW_BYTES, maps[0], barrier, k * BLOCK_K, begin + row, 0, 0);
#pragma unroll 1
        for (; row < rows; row += ROWS_OF_BOX)
          load_tensor_4d(destination + row * ROW_BYTES, maps[1], barrier, k * BLOCK_K, begin + row, 0, 0);
      } else {
        barrier_arrive(barriers.full(stage.at()));
      }
      stage.advance(launch.num_stages);
    }
  }

  // Until all weight blocks of the first product have stored these rows.
  __device__ __forceinline__ void wait_for_first_product(const TileInfo& tile) const {
    int parts = schedule.weight_blocks(launch.stacks[tile.stack_idx - launch.num_stacks]);
    while (!Progress{launch.progress}.reached(tile.row_block, parts)) __nanosleep(64);
  }

  // --- consumers -----------------------------------------------------------------------------------------------------

  // acc <- the products of this consumer's runs of weight rows with N token rows.
  template <int N, bool INWARD>
  __device__ __forceinline__ void multiply(int consumer, int k_blocks, Cursor& stage, Accumulators& acc) const {
    constexpr int STEP = ORDER == INNER_MAJOR ? 32 : 16 * ROW_BYTES;  // 16 inner positions of the weights, in bytes
    constexpr int STEPS = BLOCK_K / 16;
    // Of how many stages the products are still under way while the next ones begin. With two consumers, or two blocks an SM,
    // somebody else keeps the tensor cores busy meanwhile; with few slots a consumer is often alone.
    constexpr int BEHIND = Shape::SLOTS == FEW;
    int last = 0;
    for (int k = 0; k < k_blocks; ++k) {
      barrier_wait(barriers.full(stage.at()), stage.parity());
      fence_async_proxy();
      uint32 w = smem + stage.at() * STAGE_BYTES + consumer * RUN_BYTES, a = smem + stage.at() * STAGE_BYTES + W_BYTES;
      wgmma_fence();
#pragma unroll
      for (int i = 0; i < 2 * STEPS; ++i) {
        int half = INWARD ? i / STEPS : i % 2, step = INWARD ? i % STEPS : i / 2;
        Wgmma<T, N>::template multiply<ORDER == ROW_MAJOR>(
            acc[INWARD ? 0 : half], operand(w + half * HALF_BYTES + step * STEP),
            operand(a + (INWARD ? half * ROWS_BYTES : 0) + step * 32), k + (INWARD ? i : step) > 0);
      }
      wgmma_commit();
      wgmma_wait<BEHIND>();
      if (k >= BEHIND) give_back(BEHIND ? last : stage.at());
      last = stage.at();
      stage.advance(launch.num_stages);
    }
    if (BEHIND) wgmma_wait<0>(), give_back(last);
  }

  // Of every warp one thread, when it has multiplied a stage.
  __device__ __forceinline__ void give_back(int stage) const {
    if (threadIdx.x % WARP) return;
    barrier_arrive(barriers.empty(stage));
    if (CLUSTER > 1) barrier_arrive_there(in_other_block(barriers.empty(stage)));
  }

  template <int N>
  __device__ __forceinline__ void multiply_rows(int consumer, const TileInfo& tile, Cursor& stage, Accumulators& acc) const {
    if constexpr (N <= MAX_ROWS) {
      int k_blocks = __shfl_sync(FULL_MASK, tile.k_blocks, 0);
      if constexpr (Shape::HALVES == INNER) {
        if (schedule.inward(stack_of(tile))) return multiply<N, true>(consumer, k_blocks, stage, acc);
      }
      multiply<N, false>(consumer, k_blocks, stage, acc);
    }
  }

  __device__ __forceinline__ void multiply_and_finish(int consumer) const {
    Cursor stage;
    Accumulators acc;
    for_each_tile([&](Turn turn) {
      const TileInfo& tile = ring[turn.place()].tile;
      int num_rows = __shfl_sync(FULL_MASK, tile.num_rows, 0);
      switch ((num_rows + 7) / 8) {
        case 0:  // the odd one out of a cluster keeps step
#define UP_TO_ROWS(EIGHTS) case EIGHTS: multiply_rows<8 * EIGHTS>(consumer, tile, stage, acc); break;
        UP_TO_ROWS(1) UP_TO_ROWS(2) UP_TO_ROWS(3) UP_TO_ROWS(4) UP_TO_ROWS(5) UP_TO_ROWS(6) UP_TO_ROWS(7) UP_TO_ROWS(8)
        UP_TO_ROWS(9) UP_TO_ROWS(10) UP_TO_ROWS(11) UP_TO_ROWS(12) UP_TO_ROWS(13) UP_TO_ROWS(14) UP_TO_ROWS(15) UP_TO_ROWS(16)
        UP_TO_ROWS(17) UP_TO_ROWS(18) UP_TO_ROWS(19) UP_TO_ROWS(20) UP_TO_ROWS(21) UP_TO_ROWS(22) UP_TO_ROWS(23) UP_TO_ROWS(24)
#undef UP_TO_ROWS
      }
      const ExpertStack& stack = stack_of(tile);
      Epilogue epilogue{stack, ring[turn.place()], Tiles::pairs(stack), schedule.inward(stack), num_rows, consumer,
                        smem + launch.num_stages * STAGE_BYTES + consumer * Epilogue::SLAB_BYTES};
      epilogue.store(acc);  // ends in a barrier of the consumer
      barrier_arrive(barriers.done(turn.place()));
    });
  }

  // --- the reporter: a thread ----------------------------------------------------------------------------------------

  __device__ __forceinline__ void report_tiles() const {
    for_each_tile([&](Turn turn) {
      TileInfo tile = ring[turn.place()].tile;
      bool awaited = launch.num_products == 2 && !is_second(tile) && tile.num_rows > 0;
      barrier_wait(barriers.done(turn.place()), turn.parity());
      barrier_arrive(barriers.free(turn.place()));
      if (awaited) Progress{launch.progress}.add(tile.row_block);
    });
  }
};

template <typename T, typename Shape, WeightOrder ORDER>
__device__ __forceinline__ void grouped_gemm(const WgmmaLaunch& launch) {
  using Gemm = GroupedGemm<T, Shape, ORDER>;
  extern __shared__ unsigned char dynamic_smem[];
  __shared__ typename Gemm::Meetings barriers;
  __shared__ typename Gemm::Place ring[Gemm::RING];
  uint32 stages = (shared_address(dynamic_smem) + 1023) & ~1023u;
  unsigned char* after = dynamic_smem + (stages - shared_address(dynamic_smem)) + launch.num_stages * Gemm::STAGE_BYTES +
                         Gemm::CONSUMERS * Gemm::Epilogue::SLAB_BYTES;
  if (threadIdx.x == 0) {
    barriers.begin(launch.num_stages);
    for (int s = 0; s < launch.num_stacks * launch.num_products; ++s) prefetch_tensor_map(launch.w_maps[s]);
  }
  if (Gemm::CLUSTER > 1) sync_cluster();  // the barriers of both blocks stand
  Gemm gemm{launch, {launch}, barriers, ring, stages};
  int warp = __shfl_sync(FULL_MASK, threadIdx.x / WARP, 0), warpgroup = warp / 4;
  Positions<Gemm::CLUSTER> position{launch.progress, barriers.mail};
  RowBlocks<Shape> row_blocks(launch, reinterpret_cast<int*>(after));
  row_blocks.template count<Gemm::THREADS>([&] { if (warp == 4) position.ask(); }, warp == 4);  // publishes the barriers too
  if (warp == 4) position.take();
  if (warpgroup == 0) {
    if (Gemm::CONSUMERS == 2) keep_registers<Shape::TOKEN_REGISTERS>();
    gemm.bring_tokens();
  } else if (warpgroup == 1) {
    if (Gemm::CONSUMERS == 2) keep_registers<Shape::HELPER_REGISTERS>();
    if (warp == 4) gemm.plan_tiles(position, row_blocks);
    if (threadIdx.x == 5 * WARP || threadIdx.x == 6 * WARP) gemm.bring_weights(warp - 5);
    if (threadIdx.x == 7 * WARP) gemm.report_tiles();
  } else {
    if (Gemm::CONSUMERS == 2) take_registers<Shape::CONSUMER_REGISTERS>();
    gemm.multiply_and_finish(warpgroup - 2);
  }
  if (Gemm::CLUSTER > 1) sync_cluster();  // the other block may still write and arrive here
}

}  // namespace hopper
