// finish_sm90: the epilogue of the Hopper grouped GEMM, from wgmma accumulators to stored rows.
//
// The formula is that of epilogue.cuh. Usual activations are computed where the accumulators are; the results go through a
// slab of shared memory of the consumer's own (SLAB_ROWS rows of 64 features at a time, 16-byte chunks permuted), because a lane has
// two weight rows of many tokens while memory wants many features of one token.
#pragma once
#include "epilogue.cuh"
#include "tiles_sm90.cuh"

namespace hopper {

// From accumulators to stored results, 16 rows at a time. A lane holds, of each half and of every 16 rows, eight
// results v[q]: row 8 (q / 4) + 2 (lane % 4) + q % 2, weight row 16 warp + lane / 4 + 8 (q / 2 % 2) of the run.
template <typename T, typename Shape> struct Finish {
  static constexpr int MAX_ROWS = Shape::MAX_ROWS, HALF_ROWS = Shape::HALF_ROWS, ACCUMULATORS = MAX_ROWS / 2;
  static constexpr int SLAB_PITCH = RUN + 4;  // floats of store_any; the pad spreads the rows of four lanes over all banks
  static constexpr int SLAB_ROWS = Shape::SLAB_ROWS;  // stored at a time
  static constexpr int BYTES_OF_ANY = 2 * 16 * SLAB_PITCH * 4, BYTES = SLAB_ROWS * RUN * 2;
  static constexpr int SLAB_BYTES = BYTES > BYTES_OF_ANY ? BYTES : BYTES_OF_ANY;
  using Accumulators = float[2][ACCUMULATORS];

  const ExpertStack& stack;
  const RingPlace<MAX_ROWS>& place;
  bool pairs, inward;  // see Schedule
  int num_rows, consumer;
  uint32 slab;

  // What a consumer's two sets of accumulators are: rows of their own, gate and up rows, or (the first set alone) eight gate
  // and eight up rows in turn. A lane of the last form has v[q] and v[q + 2] of a feature; it computes both as if they were
  // two, with the same result.
  enum Form { ROWS_ALONE, PAIR_OF_HALVES, PAIR_WOVEN };

  // RAMP: identity, relu, relu2 of single rows. SIGMOIDAL: silu and gelu_tanh of pairs. Both in registers; whatever else
  // there is takes the detour of store_any.
  enum Kind { RAMP, SIGMOIDAL, ANY };

  __device__ __forceinline__ Kind kind() const {
    const Activation& act = stack.activation;
    if (pairs) return act.name == SILU || act.name == GELU_TANH ? SIGMOIDAL : ANY;
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
  template <Form FORM> __device__ __forceinline__ void load_bias(float (&bias)[2], int feature, int half) const {
    int thread = thread_of_warpgroup(), lane = thread % WARP, warp = thread / WARP;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      int f = feature + lane / 4 + (FORM == PAIR_WOVEN ? 8 * warp : 16 * warp + 8 * i);
      int row = FORM == ROWS_ALONE ? f : stack.pairing == PAIR_STACKED ? f + half * features(stack) : 2 * f + half;
      bias[i] = stack.bias && f < features(stack) ? stack.bias[(int64)place.tile.expert * stack.weight_rows + row] : 0.0f;
    }
  }

  template <Form FORM>
  __device__ __forceinline__ void store_half(const float (&first)[ACCUMULATORS], const float (&second)[ACCUMULATORS],
                                             int feature) const {
    int thread = thread_of_warpgroup(), lane = thread % WARP, warp = thread / WARP;
    constexpr bool PAIRED = FORM != ROWS_ALONE;
    float bias[2], up_bias[2];
    load_bias<FORM>(bias, feature, 0);
    if (PAIRED) load_bias<FORM>(up_bias, feature, 1);
    Sigmoidal sigmoid = sigmoidal(stack.activation);
    int slab_row = lane % 8 + lane / 16 * 8, twin = lane / 8 % 2;
    int slab_chunk = FORM == PAIR_WOVEN ? warp + 4 * twin : warp * 2 + twin;
    uint32 address = slab + slab_row * 128 + ((slab_chunk ^ (lane & 7)) << 4);
#pragma unroll
    for (int j = 0; j < MAX_ROWS / 16; ++j) {
      if (j * 16 < num_rows) {
        int row = 16 * j + 2 * (lane % 4);
        float v[8], up[8];
#pragma unroll
        for (int q = 0; q < 8; ++q) {
          v[q] = first[8 * j + (FORM == PAIR_WOVEN ? q & ~2 : q)];
          up[q] = second[8 * j + (FORM == PAIR_WOVEN ? q | 2 : q)];
        }
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
        store_matrix_x4_transposed(address + j * 16 % SLAB_ROWS * 128, packed);
        int rows = 16 * (j + 1);  // all told; the slab's last ones follow below
        if (rows % SLAB_ROWS == 0 && rows < MAX_ROWS && rows < num_rows) store_slab<FORM>(feature, rows - SLAB_ROWS, rows);
      }
    }
    store_slab<FORM>(feature, (num_rows - 1) / SLAB_ROWS * SLAB_ROWS, num_rows);
  }

  // The slab's rows, which are first_row .. end_row - 1 of the tile: whole lines of 64 features, eight lanes a row; woven
  // pairs have half of them.
  template <Form FORM> __device__ __forceinline__ void store_slab(int feature, int first_row, int end_row) const {
    int thread = thread_of_warpgroup(), chunk = thread % 8, row = thread / 8;
    bool exists = feature + chunk * 8 < features(stack) && (FORM != PAIR_WOVEN || chunk < 4);
    T* c = result<T>(stack, place.tile.row_begin, feature + chunk * 8);
    uint32 address = slab + row * 128 + ((chunk ^ (row & 7)) << 4);
    sync_consumer();
    for (row += first_row; row < end_row; row += 16, address += 16 * 128)
      if (exists) *reinterpret_cast<uint4*>(c + row * stack.c_row_stride) = load_shared_16(address);
    sync_consumer();
  }

  __device__ __forceinline__ void sync_consumer() const {
    if (Shape::CONSUMERS == 1 || consumer == 0) sync_some<2, WARPGROUP>();
    else sync_some<3, WARPGROUP>();
  }

  // Everything that has no way of its own, slower but in a tenth of the code: 16 rows of accumulators at a time go to the
  // slab as they are, and a thread finishes one result after the other. `weight_row` is that of the first accumulator;
  // an interleaved pair that came in single rows lies in neighbouring columns.
  template <Form FORM>
  __device__ __forceinline__ void store_any(const float (&first)[ACCUMULATORS], const float (&second)[ACCUMULATORS],
                                            int weight_row) const {
    int thread = thread_of_warpgroup(), lane = thread % WARP, warp = thread / WARP;
    constexpr bool PAIRED = FORM != ROWS_ALONE;
    bool neighbours = !PAIRED && stack.pairing == PAIR_INTERLEAVED;
    int columns = neighbours || FORM == PAIR_WOVEN ? RUN / 2 : RUN, step = neighbours ? 2 : 1;
    float* rows = reinterpret_cast<float*>(__cvta_shared_to_generic(slab));  // (halves, 16, SLAB_PITCH)
#pragma unroll
    for (int j = 0; j < MAX_ROWS / 16; ++j) {
      if (j * 16 < num_rows) {
#pragma unroll
        for (int q = 0; q < 8; ++q) {
          int row = 8 * (q / 4) + 2 * (lane % 4) + q % 2, eight = q / 2 % 2;
          if (FORM == PAIR_WOVEN) {
            rows[(16 * eight + row) * SLAB_PITCH + 8 * warp + lane / 4] = first[8 * j + q];
          } else {
            int at = row * SLAB_PITCH + 16 * warp + 8 * eight + lane / 4;
            rows[at] = first[8 * j + q];
            if (PAIRED) rows[16 * SLAB_PITCH + at] = second[8 * j + q];
          }
        }
        sync_consumer();
#pragma unroll 1
        for (int i = thread / columns; i < min(16, num_rows - 16 * j); i += WARPGROUP / columns) {
          int column = thread_of_warpgroup() % columns, feature = weight_row / step + column;
          if (feature >= features(stack)) break;
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

  template <Form FORM>
  __device__ __forceinline__ void store_run(const float (&first)[ACCUMULATORS], const float (&second)[ACCUMULATORS],
                                            int weight_row) const {
    if (kind() == ANY) store_any<FORM>(first, second, weight_row);
    else store_half<FORM>(first, second, weight_row);
  }

  __device__ __forceinline__ void store(const Accumulators& acc) const {
    int run = consumer * RUN, block = place.tile.weight_block;
    if constexpr (Shape::HALVES == INNER) {
      if (inward && pairs) return store_run<PAIR_WOVEN>(acc[0], acc[0], (block * HALF_ROWS + run) / 2);
      if (inward) return store_run<ROWS_ALONE>(acc[0], acc[0], block * HALF_ROWS + run);
    }
    if (pairs) return store_run<PAIR_OF_HALVES>(acc[0], acc[1], block * HALF_ROWS + run);
    store_run<ROWS_ALONE>(acc[0], acc[0], 2 * block * HALF_ROWS + run);
    store_run<ROWS_ALONE>(acc[1], acc[1], (2 * block + 1) * HALF_ROWS + run);
  }
};

}  // namespace hopper
