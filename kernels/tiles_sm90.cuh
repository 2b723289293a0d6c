// tiles_sm90: what the Hopper grouped GEMM is launched with, the shapes of its tiles, and what is known of one.
#pragma once
#include "ptx_sm90.cuh"
#include "stacks.cuh"

enum WeightOrder { INNER_MAJOR = 0, ROW_MAJOR = 1 };

// One product, or both projections of the experts: then stack s + num_stacks reads what stack s has written.
struct WgmmaLaunch {
  TensorMap w_maps[2 * MAX_STACKS];     // see cumoe/gpu/tensor_map.py
  TensorMap a_maps[2 * MAX_STACKS][2];  // (1, 1, row, inner), boxes of 64 rows and of ROWS_OF_BOX; not where halves are INNER
  ExpertStack stacks[2 * MAX_STACKS];   // num_stacks of the first product, then as many of the second
  int* progress;                        // see Progress; null for one product
  const int* topk_ids;                  // (num_slots)
  const float* topk_weights;            // (num_slots)
  int num_stacks, num_products, num_stages;
  int alternate;  // 1: shared and routed experts take turns, see Schedule, and routed weights are the first to leave the L2
  // Of tiles whose halves are INNER.
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
  INNER,  // the same weight rows at the next inner positions: 256 bytes of each at a time, which memory gives sooner, and
          // smaller tiles that keep as many bytes on their way
};

// How many slots a launch may have: any number, or so few that the planner sorts them by itself, see few_slots_sm90.cuh.
enum Slots { ANY_NUMBER, FEW };

// cumoe/gpu/config.py has the same numbers, and how many stages each shape gets.
template <int ROWS, int CONSUMER_GROUPS, int BLOCKS, Halves OF_TILE, int BLOCKS_OF_CLUSTER = 1, Slots OF_LAUNCH = ANY_NUMBER>
struct TileShape {
  static constexpr int MAX_ROWS = ROWS, CONSUMERS = CONSUMER_GROUPS, BLOCKS_PER_SM = BLOCKS, CLUSTER = BLOCKS_OF_CLUSTER;
  static constexpr int HALF_ROWS = CONSUMERS * RUN;  // weight rows of a half
  static constexpr int RING = ROWS > 64 ? 2 : 4;     // tiles that are planned or under way
  static constexpr int ROWS_OF_BOX = 16;             // of neighbours, where fewer than 64 are left
  static constexpr Halves HALVES = OF_TILE;
  static constexpr Slots SLOTS = OF_LAUNCH;
  static constexpr bool COUNTS_EARLY = ROWS <= 64;  // there are some hundred slots, and every microsecond shows
  static constexpr int SLAB_ROWS = ROWS < 64 ? ROWS : 64;  // results on their way out at a time
  static constexpr bool ALTERNATES = ROWS == 144;  // may: see cumoe/gpu/config.py
  // Of a thread that brings tokens, plans or brings weights, multiplies: 512 for the four warpgroups of two consumers.
  static constexpr int TOKEN_REGISTERS = 40, HELPER_REGISTERS = ROWS > 144 ? 24 : 40;
  static constexpr int CONSUMER_REGISTERS = (512 - TOKEN_REGISTERS - HELPER_REGISTERS) / 2;
};
// Rows x weight rows of a tile.
using Shape16x64 = TileShape<16, 1, 2, INNER, 1, FEW>;
using Shape32x64 = TileShape<32, 1, 2, INNER>;
using Shape64x128 = TileShape<64, 2, 1, INNER>;
using Shape144x256 = TileShape<144, 2, 1, ROWS>;
using Shape192x256 = TileShape<192, 2, 1, ROWS>;
using Shape2x144x256 = TileShape<144, 2, 1, ROWS, 2>;
using Shape2x192x256 = TileShape<192, 2, 1, ROWS, 2>;

// Whether rows are found through the permutation; else they are neighbours.
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

}  // namespace hopper
