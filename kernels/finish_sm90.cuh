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

  // What is to be done to every result, in registers: from where the stack lies each piece would be fetched again for every
  // 16 rows.
  enum { SCALE_IN = 1, BIAS = 2, CLAMP = 4, CLAMP_GATE = 8, CLAMP_RESULT = 16, RELU_OF = 32, SQUARE = 64, SCALE_OUT = 128 };
  struct Steps { int what; float limit, up_offset; Sigmoidal sigmoid; };
  __device__ __forceinline__ Steps steps() const {
    const Activation& act = stack.activation;
    int what = (stack.scale_in ? SCALE_IN : 0) | (stack.bias ? BIAS : 0) | (stack.scale_out ? SCALE_OUT : 0) |
               (act.clamp != CLAMP_NONE ? CLAMP : 0) | (act.clamp == CLAMP_BEFORE ? CLAMP_GATE : 0) |
               (act.clamp == CLAMP_AFTER ? CLAMP_RESULT : 0) | (act.name == RELU || act.name == RELU2 ? RELU_OF : 0) |
               (act.name == RELU2 ? SQUARE : 0);
    Steps all{what, act.limit, act.up_offset, sigmoidal(act)};
    asm volatile("" : "+r"(all.what), "+f"(all.limit), "+f"(all.up_offset), "+f"(all.sigmoid.c1), "+f"(all.sigmoid.c3));
    return all;
  }

  __device__ __forceinline__ static void gate(float (&v)[8], float (&up)[8], const Steps& todo) {
    if (todo.what & CLAMP) {
#pragma unroll
      for (int q = 0; q < 8; ++q) {
        up[q] = at_least(at_most(up[q], todo.limit), -todo.limit);
        if (todo.what & CLAMP_GATE) v[q] = at_most(v[q], todo.limit);
      }
    }
#pragma unroll
    for (int q = 0; q < 8; ++q) {
      float z = v[q] * fmaf(todo.sigmoid.c3 * v[q], v[q], todo.sigmoid.c1), e;
      asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(e) : "f"(-z));
      v[q] = __fdividef(v[q], 1.0f + e);
    }
    if (todo.what & CLAMP_RESULT) {
#pragma unroll
      for (int q = 0; q < 8; ++q) v[q] = at_most(v[q], todo.limit);
    }
#pragma unroll
    for (int q = 0; q < 8; ++q) v[q] *= up[q] + todo.up_offset;
  }
  __device__ __forceinline__ static void ramp(float (&v)[8], const Steps& todo) {
    if (!(todo.what & RELU_OF)) return;
#pragma unroll
    for (int q = 0; q < 8; ++q) {
      float positive = at_least(v[q], 0.0f);
      v[q] = todo.what & SQUARE ? positive * positive : positive;
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

  // v, up <- what the accumulators have of 16 rows: set SET, J-th 16 rows; of pairs both sets.
  template <Form FORM, int SET, int J>
  __device__ __forceinline__ static void copy(const Accumulators& acc, float (&v)[8], float (&up)[8]) {
    if constexpr (8 * J < ACCUMULATORS) {
#pragma unroll
      for (int q = 0; q < 8; ++q) {
        v[q] = acc[SET][8 * J + (FORM == PAIR_WOVEN ? q & ~2 : q)];
        if (FORM != ROWS_ALONE) up[q] = acc[FORM == PAIR_WOVEN ? 0 : 1][8 * J + (FORM == PAIR_WOVEN ? q | 2 : q)];
      }
    }
  }
  template <Form FORM, int SET>
  __device__ __forceinline__ static void copy_any(int j, const Accumulators& acc, float (&v)[8], float (&up)[8]) {
    switch (j) {
      case 0: copy<FORM, SET, 0>(acc, v, up); break;
      case 1: copy<FORM, SET, 1>(acc, v, up); break;
      case 2: copy<FORM, SET, 2>(acc, v, up); break;
      case 3: copy<FORM, SET, 3>(acc, v, up); break;
      case 4: copy<FORM, SET, 4>(acc, v, up); break;
      case 5: copy<FORM, SET, 5>(acc, v, up); break;
      case 6: copy<FORM, SET, 6>(acc, v, up); break;
      case 7: copy<FORM, SET, 7>(acc, v, up); break;
      case 8: copy<FORM, SET, 8>(acc, v, up); break;
      case 9: copy<FORM, SET, 9>(acc, v, up); break;
      case 10: copy<FORM, SET, 10>(acc, v, up); break;
      default: copy<FORM, SET, 11>(acc, v, up);
    }
  }
  // The same for any set and any j. Registers have no index, so each j has a branch of its own, and what follows is there
  // once: with a copy for each j the first tile of a block waited 15,000 to 30,000 cycles for instructions.
  template <Form FORM>
  __device__ __forceinline__ static void take(int set, int j, const Accumulators& acc, float (&v)[8], float (&up)[8]) {
    if (FORM != ROWS_ALONE || set == 0) copy_any<FORM, 0>(j, acc, v, up);
    else copy_any<FORM, 1>(j, acc, v, up);
  }

  template <Form FORM> __device__ __forceinline__ void store_set(const Accumulators& acc, int set, int feature) const {
    int thread = thread_of_warpgroup(), lane = thread % WARP, warp = thread / WARP;
    constexpr bool PAIRED = FORM != ROWS_ALONE;
    float bias[2], up_bias[2];
    load_bias<FORM>(bias, feature, 0);
    if (PAIRED) load_bias<FORM>(up_bias, feature, 1);
    Steps todo = steps();
    int slab_row = lane % 8 + lane / 16 * 8, twin = lane / 8 % 2;
    int slab_chunk = FORM == PAIR_WOVEN ? warp + 4 * twin : warp * 2 + twin;
    uint32 address = slab + slab_row * 128 + ((slab_chunk ^ (lane & 7)) << 4);
#pragma unroll 1
    for (int first_row = 0; first_row < num_rows; first_row += 16) {
      int row = first_row + 2 * (lane % 4);
      float v[8], up[8];
      take<FORM>(set, first_row / 16, acc, v, up);
      if (todo.what & SCALE_IN) {
        scale(v, place.scale_in, row);
        if (PAIRED) scale(up, place.scale_in, row);
      }
      if (todo.what & BIAS) {
        add_bias(v, bias);
        if (PAIRED) add_bias(up, up_bias);
      }
      if (PAIRED) gate(v, up, todo);
      else ramp(v, todo);
      if (todo.what & SCALE_OUT) scale(v, place.scale_out, row);
      uint32 packed[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) packed[i] = pack_two(T(), v[2 * i], v[2 * i + 1]);
      store_matrix_x4_transposed(address + first_row % SLAB_ROWS * 128, packed);
      if ((first_row + 16) % SLAB_ROWS == 0 || first_row + 16 >= num_rows)
        store_slab<FORM>(feature, first_row / SLAB_ROWS * SLAB_ROWS);
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
  template <Form FORM> __device__ __forceinline__ void store_any(const Accumulators& acc, int set, int weight_row) const {
    int thread = thread_of_warpgroup(), lane = thread % WARP, warp = thread / WARP;
    constexpr bool PAIRED = FORM != ROWS_ALONE;
    bool neighbours = !PAIRED && stack.pairing == PAIR_INTERLEAVED;
    int columns = neighbours || FORM == PAIR_WOVEN ? RUN / 2 : RUN, step = neighbours ? 2 : 1;
    float* rows = reinterpret_cast<float*>(__cvta_shared_to_generic(slab));  // (halves, 16, SLAB_PITCH)
#pragma unroll 1
    for (int first_row = 0; first_row < num_rows; first_row += 16) {
      float v[8], up[8];
      take<FORM>(set, first_row / 16, acc, v, up);
#pragma unroll
      for (int q = 0; q < 8; ++q) {
        int row = 8 * (q / 4) + 2 * (lane % 4) + q % 2, eight = q / 2 % 2;
        int at = row * SLAB_PITCH + (FORM == PAIR_WOVEN ? 8 * warp : 16 * warp + 8 * eight) + lane / 4;
        if (FORM != PAIR_WOVEN || eight == 0) rows[at] = v[q];
        if (PAIRED && (FORM != PAIR_WOVEN || eight == 0)) rows[16 * SLAB_PITCH + at] = up[q];
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

  template <Form FORM>
  __device__ __forceinline__ void store_run(const Accumulators& acc, int set, int weight_row) const {
    if (kind() == ANY) store_any<FORM>(acc, set, weight_row);
    else store_set<FORM>(acc, set, weight_row);
  }

  __device__ __forceinline__ void store(const Accumulators& acc) const {
    int run = consumer * RUN, block = place.tile.weight_block;
    if (Shape::HALVES == INNER && inward) {
      if (pairs) store_run<PAIR_WOVEN>(acc, 0, (block * HALF_ROWS + run) / 2);
      else store_run<ROWS_ALONE>(acc, 0, block * HALF_ROWS + run);
    } else if (pairs) {
      store_run<PAIR_OF_HALVES>(acc, 0, block * HALF_ROWS + run);
    } else {
#pragma unroll 1
      for (int set = 0; set < 2; ++set) store_run<ROWS_ALONE>(acc, set, (2 * block + set) * HALF_ROWS + run);
    }
  }
};

}  // namespace hopper
