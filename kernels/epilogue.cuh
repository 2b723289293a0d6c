// epilogue: from float32 accumulators to one stored result.
//
//   v   = scale_in[slot] * acc + bias           ((w x) W + b = w (x W) + b: a weight on the input costs one multiply)
//   out = scale_out[slot] * phi(v)              not paired
//   out = scale_out[slot] * phi(gate) * (up + up_offset)
#pragma once
#include "stacks.cuh"

struct RowScales { float in, out; };

__device__ __forceinline__ RowScales row_scales(const ExpertStack& stack, int row) {
  int slot = stack.scale_in || stack.scale_out ? slot_of(stack, row) : 0;
  return {stack.scale_in ? stack.scale_in[slot] : 1.0f, stack.scale_out ? stack.scale_out[slot] : 1.0f};
}

__device__ __forceinline__ float bias_of(const ExpertStack& stack, int expert, int weight_row) {
  return stack.bias ? stack.bias[(int64)expert * stack.weight_rows + weight_row] : 0.0f;
}

// Finishes N results of one feature: acc (and up, the second accumulator of a pair) in, results in acc.
template <int N>
__device__ __forceinline__ void finish(const ExpertStack& stack, int expert, int feature, float (&acc)[N], float (&up)[N],
                                       const RowScales (&scales)[N]) {
  bool interleaved = stack.pairing == PAIR_INTERLEAVED;
  float bias = bias_of(stack, expert, interleaved ? 2 * feature : feature);
#pragma unroll
  for (int i = 0; i < N; ++i) acc[i] = scales[i].in * acc[i] + bias;
  if (stack.pairing == PAIR_NONE) {
    activate(stack.activation, acc);
  } else {
    float up_bias = bias_of(stack, expert, interleaved ? 2 * feature + 1 : feature + stack.weight_rows / 2);
#pragma unroll
    for (int i = 0; i < N; ++i) up[i] = scales[i].in * up[i] + up_bias;
    activate_gated(stack.activation, acc, up);
  }
#pragma unroll
  for (int i = 0; i < N; ++i) acc[i] *= scales[i].out;
}

template <typename C> __device__ __forceinline__ C* result(const ExpertStack& stack, int row, int feature) {
  return static_cast<C*>(stack.c) + (int64)row * stack.c_row_stride + feature;
}

template <typename T>
__device__ __forceinline__ void store(const GemmLaunch& launch, const ExpertStack& stack, int row, int feature, float value) {
  if (launch.c_is_float32) *result<float>(stack, row, feature) = value;
  else *result<T>(stack, row, feature) = from_float<T>(value);
}
