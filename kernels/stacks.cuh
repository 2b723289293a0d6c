// stacks: what a grouped GEMM launch is told about its operands.
//
// An ExpertStack is a run of experts that share one weight array, one output and one set of sizes:
//   routed experts   num_experts = E, rows of expert e are expert_offsets[e] .. expert_offsets[e + 1]
//   a shared expert  num_experts = 1, expert_offsets = null: all num_rows rows, in token order
// A launch takes several stacks of different sizes at once, so that shared experts of any width fill the same
// grid as the routed ones. Nothing here is a copy of a token: rows are found through the permutation.
//
// cumoe/gpu/stacks.py writes the same layout from Python; the two sizes are asserted against each other.
#pragma once
#include "activation.cuh"

enum Pairing {
  PAIR_NONE = 0,         // out[f] = phi(w[f] . a): one weight row a feature
  PAIR_STACKED = 1,      // gate rows 0 .. I-1, up rows I .. 2I-1
  PAIR_INTERLEAVED = 2,  // gate rows 0, 2, 4 ..., up rows 1, 3, 5 ...
};

struct ExpertStack {
  const void* a;              // (rows, inner) activations
  const void* w;              // (num_experts, weight_rows, inner) weights, any strides
  const float* bias;          // (num_experts, weight_rows) contiguous, or null
  const int* expert_offsets;  // (num_experts + 1), or null: one expert that every row joins
  const int* permutation;     // sorted row -> slot, or null: row r is slot r
  const float* scale_in;      // (slots) factor of the accumulator, before the bias, or null
  const float* scale_out;     // (slots) factor of the result, after bias and activation, or null
  void* c;                    // (rows, features) result, features contiguous
  int64 a_row_stride, a_col_stride;                    // in elements, like all strides
  int64 w_expert_stride, w_row_stride, w_col_stride;
  int64 c_row_stride;
  int num_experts;
  int num_rows;               // rows when expert_offsets is null
  int weight_rows;            // rows of one expert's weight: features, or 2 x features when paired
  int inner;                  // length of the dot products
  int slots_per_a_row;        // > 0: row r reads a[permutation[r] / slots_per_a_row]; 0: row r reads a[r]
  int pairing;                // Pairing
  Activation activation;
  int padding;
};

constexpr int MAX_STACKS = 8;

struct GemmLaunch {
  ExpertStack stacks[MAX_STACKS];
  int num_stacks;
  int c_is_float32;  // 1: results are stored as float32; 0: in the type of the activations
};

static_assert(sizeof(ExpertStack) == 160, "cumoe/gpu/stacks.py packs 160 bytes");
static_assert(sizeof(GemmLaunch) == 160 * MAX_STACKS + 8, "cumoe/gpu/stacks.py packs 1288 bytes");

__device__ __forceinline__ int features(const ExpertStack& stack) {
  return stack.pairing == PAIR_NONE ? stack.weight_rows : stack.weight_rows / 2;
}

// Where the slot's factors and the token's activations of a sorted row are found.
__device__ __forceinline__ int slot_of(const ExpertStack& stack, int row) {
  return stack.permutation ? stack.permutation[row] : row;
}
__device__ __forceinline__ int a_row_of(const ExpertStack& stack, int row) {
  return stack.slots_per_a_row > 0 ? slot_of(stack, row) / stack.slots_per_a_row : row;
}
