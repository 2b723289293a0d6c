// tiles_sm90: what the Hopper grouped GEMM is launched with, the shapes of its tiles, and which tile comes when.
#pragma once
#include "ptx_sm90.cuh"
#include "scan.cuh"
#include "stacks.cuh"

enum WeightOrder { INNER_MAJOR = 0, ROW_MAJOR = 1 };

// One product, or both projections of the experts: then stack s + num_stacks reads what stack s has written.
struct WgmmaLaunch {
  TensorMap w_maps[2 * MAX_STACKS];     // see cumoe/gpu/tensor_map.py
  TensorMap a_maps[2 * MAX_STACKS][2];  // (1, 1, row, inner), boxes of 64 rows and of ROWS_OF_BOX
  ExpertStack stacks[2 * MAX_STACKS];   // num_stacks of the first product, then as many of the second
  int* progress;                        // see Progress; null for one product
  const int* topk_ids;                  // (num_slots)
  const float* topk_weights;            // (num_slots)
  int num_stacks, num_products, num_stages;
  int alternate;  // 1: shared and routed experts take turns, see Schedule, and routed weights are the first to leave the L2
  // Of tiles whose halves are INNER.
  int weave;          // 1: they take pairs as eight gate and eight up rows in turn; 0: as halves
  int pass_through;   // 1: weights are the first to leave the L2 again
  int num_slots;      // 0: not told
  int ids_are_early;  // 1: ids and weights of the slots were there before the previous kernel began
};
static_assert(sizeof(WgmmaLaunch) == 8768, "cumoe/gpu/grouped_gemm.py packs 8768 bytes");

namespace hopper {

constexpr int BLOCK_K = 64, ROW_BYTES = BLOCK_K * 2, RUN = 64, RUN_BYTES = RUN * ROW_BYTES;
constexpr int WARPGROUP = 128, TOKEN_THREADS = WARPGROUP, MAX_STAGES = 10;
constexpr int LEAD = 16;  // inner blocks of a tile that are still to be asked for when the next tile is planned
constexpr int BAND = 4;  // weight blocks that are walked together over all row blocks of an expert

// What the two halves of a tile's weights are.
enum Halves {
  ROWS,   // gate and up rows of the same features, or neighbours
  INNER,  // the same weight rows at the next inner positions: smaller tiles that keep as many bytes on their way
};

// How many slots a launch may have: any number, or so few that the planner sorts them by itself, see few_slots_sm90.cuh.
enum Slots { MANY, FEW };

// cumoe/gpu/config.py has the same numbers, and how many stages each shape gets.
template <int ROWS, int CONSUMER_GROUPS, int BLOCKS, Halves OF_TILE, int BLOCKS_OF_CLUSTER = 1, Slots OF_LAUNCH = MANY>
struct TileShape {
  static constexpr int MAX_ROWS = ROWS, CONSUMERS = CONSUMER_GROUPS, BLOCKS_PER_SM = BLOCKS, CLUSTER = BLOCKS_OF_CLUSTER;
  static constexpr int HALF_ROWS = CONSUMERS * RUN;  // weight rows of a half
  static constexpr int RING = ROWS > 64 ? 2 : 4;     // tiles that are planned or under way
  static constexpr int ROWS_OF_BOX = ROWS > 16 ? 16 : 8;  // few rows: what comes along would be a quarter of all traffic
  static constexpr Halves HALVES = OF_TILE;
  static constexpr Slots SLOTS = OF_LAUNCH;
  static constexpr bool COUNTS_EARLY = ROWS <= 64 && SLOTS == MANY;  // there are some hundred slots, and every microsecond shows
  static constexpr int SLAB_ROWS = ROWS < 64 ? ROWS : 64;  // results on their way out at a time
  static constexpr bool ALTERNATES = ROWS == 144;  // may: see cumoe/gpu/config.py
  // Of a thread that brings tokens, plans or brings weights, multiplies: 512 for the four warpgroups of two consumers.
  static constexpr int TOKEN_REGISTERS = 40, HELPER_REGISTERS = ROWS > 144 ? 24 : 40;
  static constexpr int CONSUMER_REGISTERS = (512 - TOKEN_REGISTERS - HELPER_REGISTERS) / 2;
};
// Rows x weight rows of a tile.
using Shape16x64 = TileShape<16, 1, 2, INNER>;
using Shape16x64few = TileShape<16, 1, 2, INNER, 1, FEW>;
using Shape64x256 = TileShape<64, 2, 1, ROWS>;
using Shape144x256 = TileShape<144, 2, 1, ROWS>;
using Shape192x256 = TileShape<192, 2, 1, ROWS>;
using Shape2x144x256 = TileShape<144, 2, 1, ROWS, 2>;
using Shape2x192x256 = TileShape<192, 2, 1, ROWS, 2>;

// Whether rows are found through the permutation; else they are neighbours, and TMA brings them.
__device__ __forceinline__ bool gathers(const ExpertStack& stack) {
  return stack.slots_per_a_row > 0 && stack.permutation;
}

struct TileInfo {
  int stack_idx, expert, row_begin, num_rows;  // stack_idx = -1: there is no further tile
  int weight_block, k_blocks;
  int row_block;    // number of its run of rows among those of all groups; the same in both products
  int is_together;  // 1: the other block of the cluster multiplies the same weights with the next or previous run
};

// A place of the ring in which the producers describe tiles to the consumers.
template <int MAX_ROWS> struct alignas(16) RingPlace {  // factors are read two at a time
  float scale_in[MAX_ROWS], scale_out[MAX_ROWS];
  uint32 offsets[MAX_ROWS];  // where the rows of A begin, in units of 16 bytes
  TileInfo tile;
};

struct Rows { int begin, count; };  // of an expert
struct Found {
  int expert;
  Rows rows;
  int row_block;  // number of its first one among those of all groups
};

// How an expert's rows are cut: one run, or CLUSTER times as many as are needed; the last one may have no rows then.
struct Runs { int length, row_blocks; };
template <typename Shape> __device__ __forceinline__ Runs runs_of(int num_rows) {
  constexpr int CLUSTER = Shape::CLUSTER;
  if (num_rows <= Shape::MAX_ROWS) return {Shape::MAX_ROWS, num_rows > 0};
  int length = ceil_div(ceil_div(num_rows, ceil_div(num_rows, CLUSTER * Shape::MAX_ROWS) * CLUSTER), 8) * 8;
  return {length, ceil_div(num_rows, CLUSTER * length) * CLUSTER};
}

// The row blocks of all groups: a group is one expert of one stack of the first product. The number of rows of an expert is
// known only on the device; every block counts once.
template <typename Shape> struct RowBlocks {
  const WgmmaLaunch& launch;
  int* before;  // (num_groups + 1) in shared memory

  // Where the numbers of rows come from: the ids of the slots, whether or not there are any, or the experts' offsets.
  enum Source { EARLY_IDS, OFFSETS };
  template <int THREADS> __device__ __forceinline__ void count(Source source) const {
    if (source == EARLY_IDS) count_early_ids<THREADS>();
    int group = threadIdx.x, first = 0;
    for (int s = 0; s < launch.num_stacks; ++s) {
      const ExpertStack& stack = launch.stacks[s];
      for (; group - first < stack.num_experts; group += THREADS) {
        bool counted = source == EARLY_IDS && stack.expert_offsets;
        before[group] = runs_of<Shape>(counted ? before[group] : rows_of(stack, group - first).count).row_blocks;
      }
      first += stack.num_experts;
    }
    if (group == first) before[group] = 0;
    __syncthreads();  // every group is counted
    exclusive_scan<THREADS>(before, first + 1);
  }

  // Of a stack whose first group is given, and of all stacks before it.
  __device__ __forceinline__ int of_stack(const ExpertStack& stack, int first) const {
    return before[first + stack.num_experts] - before[first];
  }
  __device__ __forceinline__ int before_stack(int first) const { return before[first]; }

  // The expert of that stack which holds a row block: before[group] <= row_block < before[group + 1].
  __device__ __forceinline__ Found find(const ExpertStack& stack, int first, int row_block) const {
    int low = first, high = first + stack.num_experts;
    while (high - low > 1) {
      int middle = (low + high) / 2;
      if (before[middle] <= row_block) low = middle; else high = middle;
    }
    return {low - first, rows_of(stack, low - first), before[low]};
  }

 private:
  // before[group] <- how many slots name the expert; routed experts are those of the last stack.
  template <int THREADS> __device__ __forceinline__ void count_early_ids() const {
    int groups = 0, routed = 0, num_ids = launch.ids_are_early ? launch.num_slots : 0;
    for (int s = 0; s < launch.num_stacks; ++s) routed = groups, groups += launch.stacks[s].num_experts;
    for (int group = threadIdx.x; group < groups; group += THREADS) before[group] = 0;
    __syncthreads();  // the counts are zero
    for (int slot = threadIdx.x; slot < num_ids; slot += THREADS) {
      uint32 expert = launch.topk_ids[slot];
      if (expert < (uint32)(groups - routed)) atomicAdd(&before[routed + expert], 1);
    }
    __syncthreads();  // every slot is counted
  }

  __device__ __forceinline__ static Rows rows_of(const ExpertStack& stack, int expert) {
    if (!stack.expert_offsets) return {0, stack.num_rows};
    int begin = stack.expert_offsets[expert];
    return {begin, stack.expert_offsets[expert + 1] - begin};
  }
};

// From a position in the order of all tiles to a tile.
//
// Products and stacks come in order, experts in order; an expert's rows are cut into even runs, multiples of 8 rows; a band
// of weight blocks is walked over all its runs. Where shared experts have rows enough to multiply all the time and routed ones
// read weights most of it, a tile of the ones and a tile of the others come in turn.
//
// The two blocks of a cluster take a position together: two runs of an expert that share the weights, or, where one run is all
// it has, two weight blocks. Where there is an odd one out, its block has no rows, but keeps step.
template <typename Shape, WeightOrder ORDER> struct Schedule {
  static constexpr int CLUSTER = Shape::CLUSTER;
  static_assert(CLUSTER == 1 || CLUSTER == 2, "a cluster has two blocks");
  const WgmmaLaunch& launch;

  // A pair's gate and up rows come together, so that a lane holds both of a feature.
  __device__ __forceinline__ static bool pairs(const ExpertStack& stack) {
    return stack.pairing == PAIR_STACKED || (stack.pairing == PAIR_INTERLEAVED && ORDER == INNER_MAJOR);
  }
  __device__ __forceinline__ bool inward(const ExpertStack& stack) const {
    return Shape::HALVES == INNER && (!pairs(stack) || (ORDER == INNER_MAJOR && launch.weave));
  }
  __device__ __forceinline__ int weight_blocks(const ExpertStack& stack) const {
    return ceil_div(stack.weight_rows, inward(stack) ? Shape::HALF_ROWS : 2 * Shape::HALF_ROWS);
  }

  // The tile of this block at `position`. num_rows is negative where the position is to be passed over by all blocks of the
  // cluster; beyond the last tile stack_idx is -1.
  template <typename Counts> __device__ __forceinline__ TileInfo tile(int position, const Counts& counts) const {
    int num_stacks = launch.num_stacks;
    for (int s = 0, first = 0; s < num_stacks * launch.num_products; ++s) {
      if (s == num_stacks) first = 0;
      if (Shape::ALTERNATES && launch.alternate && first == 0) position = in_turn(s, position, counts);
      const ExpertStack& stack = launch.stacks[s];
      int of_row_block = positions_of_row_block(stack), positions = counts.of_stack(stack, first) * of_row_block;
      if (position < positions) {
        int before = counts.before_stack(first);
        Found found = counts.find(stack, first, before + position / of_row_block);
        return cut(s, found, position - (found.row_block - before) * of_row_block);
      }
      position -= positions;
      first += stack.num_experts;
    }
    TileInfo none{};
    none.stack_idx = -1;
    return none;
  }

 private:
  __device__ __forceinline__ int positions_of_row_block(const ExpertStack& stack) const {
    return ceil_div(weight_blocks(stack), CLUSTER);
  }

  // Which position in the order of stacks comes at `position` of a product, whose first stack is s: shared, routed, shared ...
  // as long as there are both. Routed experts are those of the last stack.
  template <typename Counts> __device__ __forceinline__ int in_turn(int s, int position, const Counts& counts) const {
    int shared = 0, routed = 0;
    for (int first = 0, last = s + launch.num_stacks - 1; s <= last; ++s) {
      const ExpertStack& stack = launch.stacks[s];
      (s < last ? shared : routed) += counts.of_stack(stack, first) * positions_of_row_block(stack);
      first += stack.num_experts;
    }
    int turns = min(shared, routed);
    if (position < 2 * turns) return position / 2 + position % 2 * shared;
    return routed < shared && position < shared + routed ? position - turns : position;
  }

  // The tile at the given position among those of an expert.
  __device__ __forceinline__ TileInfo cut(int stack_idx, const Found& found, int position) const {
    const ExpertStack& stack = launch.stacks[stack_idx];
    Rows rows = found.rows;
    Runs runs = runs_of<Shape>(rows.count);
    int blocks = weight_blocks(stack), all_blocks = ceil_div(blocks, CLUSTER) * CLUSTER, rank = blockIdx.x % CLUSTER;
    bool together = CLUSTER > 1 && runs.row_blocks > 1;
    int run = 0, weight_block = position * CLUSTER + rank;
    if (together || CLUSTER == 1) {
      int walked = runs.row_blocks / CLUSTER, band = position / (BAND * walked), in_band = position % (BAND * walked);
      int width = min(BAND, all_blocks - band * BAND);
      run = in_band / width * CLUSTER + rank;
      weight_block = band * BAND + in_band % width;
    }
    int num_rows = max(min(runs.length, rows.count - run * runs.length), 0);
    if (weight_block >= blocks) num_rows = together ? -1 : 0;
    int block_k = inward(stack) ? 2 * BLOCK_K : BLOCK_K;
    return {stack_idx, found.expert, rows.begin + run * runs.length, num_rows, weight_block, ceil_div(stack.inner, block_k),
            found.row_block + run, together};
  }
};

// How far the blocks of a launch have come, in global memory that was zero at its beginning: the number of tiles taken, in a
// line of memory of its own, then for every row block how many tiles of its first product are stored. All tiles are taken from
// the counter, those of the first product first, so whoever waits for a row block waits for blocks that run: blocks need not be
// resident together.
struct Progress {
  int* taken;

  __device__ __forceinline__ int* stored(int row_block) const { return taken + 32 + row_block; }

  // One thread, after a barrier behind the stores of the threads it speaks for.
  __device__ __forceinline__ void add(int row_block) const {
    asm volatile("red.release.gpu.global.add.s32 [%0], 1;" ::"l"(stored(row_block)) : "memory");
  }
  __device__ __forceinline__ bool reached(int row_block, int parts) const {
    int value;
    asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(value) : "l"(stored(row_block)) : "memory");
    return value >= parts;
  }
};

}  // namespace hopper
