// finish_sm90: the epilogue of the Hopper grouped GEMM, from wgmma accumulators to stored rows.
//
// The formula is that of epilogue.cuh. Usual activations are computed where the accumulators are; the results go through a
// slab of shared memory of the consumer's own (SLAB_ROWS rows of 64 features at a time, 16-byte chunks permuted), because a
// lane has two weight rows of many tokens while memory wants many features of one token.
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

  // How results are finished. In registers: PLAIN, which is identity of single rows, silu and gelu_tanh of pairs; and MORE,
  // which adds relu and relu2 to the one and clamps to the other. Whatever else there is takes the detour of store_any.
  enum Kind { PLAIN, MORE, ANY };

  __device__ __forceinline__ Kind kind() const {
    const Activation& act = stack.activation;
    if (pairs && (act.name == SILU || act.name == GELU_TANH)) return act.clamp == CLAMP_NONE ? PLAIN : MORE;
    if (pairs || act.clamp != CLAMP_NONE || stack.pairing != PAIR_NONE) return ANY;
    return act.name == IDENTITY ? PLAIN : act.name == RELU || act.name == RELU2 ? MORE : ANY;
  }

  // g * sigmoid(g * (c1 + c3 * g^2)), with log2(e) in the constants: silu, and gelu_tanh since (1 + tanh(z)) / 2 =
  // sigmoid(2 z).
  struct Sigmoidal { float c1, c3, up_offset; };
  __device__ __forceinline__ static Sigmoidal sigmoidal(const Activation& act) {
    constexpr float LOG2_E = 1.4426950408889634f, TWICE_ROOT = 2.0f * 0.79788456080286536f;
    bool silu = act.name == SILU;
    Sigmoidal phi{silu ? act.alpha * LOG2_E : TWICE_ROOT * LOG2_E, silu ? 0.0f : TWICE_ROOT * 0.044715f * LOG2_E,
                  act.up_offset};
    // In registers: from where the stack lies they would be fetched again for every 16 rows.
    asm volatile("" : "+f"(phi.c1), "+f"(phi.c3), "+f"(phi.up_offset));
    return phi;
  }

  // v <- v * factor of its row + bias of its weight row; v <- v * factor.
  __device__ __forceinline__ static void scale_and_add(float (&v)[8], const float* factors, const float (&bias)[2]) {
    float2 low = *reinterpret_cast<const float2*>(factors), high = *reinterpret_cast<const float2*>(factors + 8);
#pragma unroll
    for (int q = 0; q < 8; ++q) {
      float2 two = q < 4 ? low : high;
      v[q] = fmaf(v[q], q % 2 ? two.y : two.x, bias[q / 2 % 2]);
    }
  }
  __device__ __forceinline__ static void scale(float (&v)[8], const float* factors) {
    float2 low = *reinterpret_cast<const float2*>(factors), high = *reinterpret_cast<const float2*>(factors + 8);
#pragma unroll
    for (int q = 0; q < 8; ++q) {
      float2 two = q < 4 ? low : high;
      v[q] *= q % 2 ? two.y : two.x;
    }
  }

  // v <- phi(v) * (up + up_offset)
  template <Kind KIND> __device__ __forceinline__ void gate(float (&v)[8], float (&up)[8], const Sigmoidal& phi) const {
    const Activation& act = stack.activation;
    if (KIND == MORE) {
#pragma unroll
      for (int q = 0; q < 8; ++q) {
        up[q] = at_least(at_most(up[q], act.limit), -act.limit);
        if (act.clamp == CLAMP_BEFORE) v[q] = at_most(v[q], act.limit);
      }
    }
#pragma unroll
    for (int q = 0; q < 8; ++q) {
      float z = v[q] * fmaf(phi.c3 * v[q], v[q], phi.c1), e;
      asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(e) : "f"(-z));
      v[q] = __fdividef(v[q], 1.0f + e);
      if (KIND == MORE && act.clamp == CLAMP_AFTER) v[q] = at_most(v[q], act.limit);
      v[q] *= up[q] + phi.up_offset;
    }
  }
  __device__ __forceinline__ void ramp(float (&v)[8]) const {
#pragma unroll
    for (int q = 0; q < 8; ++q) {
      v[q] = at_least(v[q], 0.0f);
      if (stack.activation.name == RELU2) v[q] *= v[q];
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

  // v <- what the accumulators have of the J-th 16 rows: set SET, or one part of a pair.
  enum Part { OF_SET, GATE, UP };
  template <Form FORM, int SET>
  __device__ __forceinline__ static void take(Part part, int j, const Accumulators& acc, float (&v)[8]) {
#pragma unroll
    for (int q = 0; q < 8; ++q) {
      if (FORM == ROWS_ALONE) v[q] = acc[SET][8 * j + q];
      if (FORM == PAIR_OF_HALVES) v[q] = acc[part == UP][8 * j + q];
      if (FORM == PAIR_WOVEN) v[q] = acc[0][8 * j + (part == UP ? q | 2 : q & ~2)];
    }
  }

  // Straight on, with a copy for every 16 rows: registers have no index, and with a loop that branched to one of several moves
  // a tile of 128 rows took 4.2 us instead of 2.5. Factors and biases that are not there are 1 and 0.
  template <Form FORM, int SET, Kind KIND>
  __device__ __forceinline__ void store_set(const Accumulators& acc, int feature) const {
    int thread = thread_of_warpgroup(), lane = thread % WARP, warp = thread / WARP;
    constexpr bool PAIRED = FORM != ROWS_ALONE;
    float bias[2], up_bias[2];
    load_bias<FORM>(bias, feature, 0);
    if (PAIRED) load_bias<FORM>(up_bias, feature, 1);
    Sigmoidal phi = sigmoidal(stack.activation);
    int slab_row = lane % 8 + lane / 16 * 8, twin = lane / 8 % 2;
    int slab_chunk = FORM == PAIR_WOVEN ? warp + 4 * twin : warp * 2 + twin;
    uint32 address = slab + slab_row * 128 + ((slab_chunk ^ (lane & 7)) << 4);
#pragma unroll
    for (int first_row = 0; first_row < MAX_ROWS; first_row += SLAB_ROWS) {
      if (first_row >= num_rows) break;
#pragma unroll
      for (int row = first_row; row < first_row + SLAB_ROWS && row < MAX_ROWS; row += 16) {
        if (row >= num_rows) break;
        const float *in = place.scale_in + row + 2 * (lane % 4), *out = place.scale_out + row + 2 * (lane % 4);
        float v[8], up[8];
        take<FORM, SET>(PAIRED ? GATE : OF_SET, row / 16, acc, v);
        scale_and_add(v, in, bias);
        if (PAIRED) {
          take<FORM, SET>(UP, row / 16, acc, up);
          scale_and_add(up, in, up_bias);
          gate<KIND>(v, up, phi);
        } else if (KIND == MORE) {
          ramp(v);
        }
        scale(v, out);
        uint32 packed[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) packed[i] = pack_two(T(), v[2 * i], v[2 * i + 1]);
        store_matrix_x4_transposed(address + (row - first_row) * 128, packed);
      }
      store_slab<FORM>(feature, first_row);
    }
  }

  // The slab's rows, the first of which is first_row of the tile: whole lines of 64 features, eight lanes a row; woven pairs
  // have half of them.
  template <Form FORM> __device__ __forceinline__ void store_slab(int feature, int first_row) const {
    int thread = thread_of_warpgroup(), chunk = thread % 8, row = first_row + thread / 8;
    bool exists = feature + chunk * 8 < features(stack) && (FORM != PAIR_WOVEN || chunk < 4);
    T* c = result<T>(stack, place.tile.row_begin + row, feature + chunk * 8);
    int64 sixteen_rows = 16 * stack.c_row_stride;
    uint32 address = slab + thread / 8 * 128 + ((chunk ^ (thread / 8 & 7)) << 4);
    int rows_left = exists ? num_rows - row : 0;
    uint4 values[SLAB_ROWS / 16];
    sync_consumer();
#pragma unroll
    for (int i = 0; i < SLAB_ROWS / 16; ++i) values[i] = load_shared_16(address + i * 16 * 128);
#pragma unroll
    for (int i = 0; i < SLAB_ROWS / 16; ++i, c += sixteen_rows)
      if (16 * i < rows_left) store_global_16(c, values[i]);
    sync_consumer();
  }

  __device__ __forceinline__ void sync_consumer() const {
    if (Shape::CONSUMERS == 1 || consumer == 0) sync_some<2, WARPGROUP>();
    else sync_some<3, WARPGROUP>();
  }

  // Everything that has no way of its own, slower but in a tenth of the code: 16 rows of accumulators at a time go to the
  // slab as they are, and a thread finishes one result after the other. `weight_row` is that of the first accumulator;
  // an interleaved pair that came in single rows lies in neighbouring columns.
  template <Form FORM, int SET> __device__ __forceinline__ void store_any(const Accumulators& acc, int weight_row) const {
    int thread = thread_of_warpgroup(), lane = thread % WARP, warp = thread / WARP;
    constexpr bool PAIRED = FORM != ROWS_ALONE;
    bool neighbours = !PAIRED && stack.pairing == PAIR_INTERLEAVED;
    int columns = neighbours || FORM == PAIR_WOVEN ? RUN / 2 : RUN, step = neighbours ? 2 : 1;
    float* rows = reinterpret_cast<float*>(__cvta_shared_to_generic(slab));  // (halves, 16, SLAB_PITCH)
#pragma unroll 1
    for (int first_row = 0; first_row < num_rows; first_row += 16) {
#pragma unroll
      for (int j = 0; j < ACCUMULATORS / 8; ++j) {
        if (16 * j != first_row) continue;
#pragma unroll
        for (int q = 0; q < 8; ++q) {
          int row = 8 * (q / 4) + 2 * (lane % 4) + q % 2, eight = q / 2 % 2;
          int at = row * SLAB_PITCH + (FORM == PAIR_WOVEN ? 8 * warp : 16 * warp + 8 * eight) + lane / 4;
          if (FORM == PAIR_WOVEN) rows[at + eight * 16 * SLAB_PITCH] = acc[0][8 * j + q];
          else rows[at] = acc[SET][8 * j + q];
          if (FORM == PAIR_OF_HALVES) rows[16 * SLAB_PITCH + at] = acc[1][8 * j + q];
        }
      }
      sync_consumer();
#pragma unroll 1
      for (int i = thread / columns; i < min(16, num_rows - first_row); i += WARPGROUP / columns) {
        int column = thread_of_warpgroup() % columns, feature = weight_row / step + column;
        if (feature >= features(stack)) break;
        const float* at = rows + i * SLAB_PITCH + column * step;
        float own[1] = {at[0]}, other[1] = {PAIRED ? at[16 * SLAB_PITCH] : at[step - 1]};
        RowScales scales[1] = {{place.scale_in[first_row + i], place.scale_out[first_row + i]}};
        finish(stack, place.tile.expert, feature, own, other, scales);
        *result<T>(stack, place.tile.row_begin + first_row + i, feature) = from_float<T>(own[0]);
      }
      sync_consumer();
    }
  }

  template <Form FORM, int SET>
  __device__ __forceinline__ void store_run(const Accumulators& acc, int weight_row) const {
    Kind finish = kind();
    if (finish == PLAIN) store_set<FORM, SET, PLAIN>(acc, weight_row);
    else if (finish == MORE) store_set<FORM, SET, MORE>(acc, weight_row);
    else store_any<FORM, SET>(acc, weight_row);
  }

  __device__ __forceinline__ void store(const Accumulators& acc) const {
    int run = consumer * RUN, block = place.tile.weight_block;
    if (Shape::HALVES == INNER && inward) {
      if (pairs) store_run<PAIR_WOVEN, 0>(acc, (block * HALF_ROWS + run) / 2);
      else store_run<ROWS_ALONE, 0>(acc, block * HALF_ROWS + run);
    } else if (pairs) {
      store_run<PAIR_OF_HALVES, 0>(acc, block * HALF_ROWS + run);
    } else {
      store_run<ROWS_ALONE, 0>(acc, 2 * block * HALF_ROWS + run);
      store_run<ROWS_ALONE, 1>(acc, (2 * block + 1) * HALF_ROWS + run);
    }
  }
};

}  // namespace hopper
