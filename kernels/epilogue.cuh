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

__device__ __forceinline__ float with_bias(const ExpertStack& stack, int expert, int weight_row, float acc, float scale_in) {
  float value = scale_in * acc;
  return stack.bias ? value + stack.bias[(int64)expert * stack.weight_rows + weight_row] : value;
}

__device__ __forceinline__ float finish(const ExpertStack& stack, int expert, int feature, float acc, RowScales scales) {
  return scales.out * activate(stack.activation, with_bias(stack, expert, feature, acc, scales.in));
}

__device__ __forceinline__ float finish_pair(const ExpertStack& stack, int expert, int feature, float gate, float up,
                                             RowScales scales) {
  bool stacked = stack.pairing == PAIR_STACKED;
  gate = with_bias(stack, expert, stacked ? feature : 2 * feature, gate, scales.in);
  up = with_bias(stack, expert, stacked ? feature + stack.weight_rows / 2 : 2 * feature + 1, up, scales.in);
  return scales.out * activate_gated(stack.activation, gate, up);
}

template <typename C> __device__ __forceinline__ C* result(const ExpertStack& stack, int row, int feature) {
  return static_cast<C*>(stack.c) + (int64)row * stack.c_row_stride + feature;
}

template <typename T>
__device__ __forceinline__ void store(const GemmLaunch& launch, const ExpertStack& stack, int row, int feature, float value) {
  if (launch.c_is_float32) *result<float>(stack, row, feature) = value;
  else *result<T>(stack, row, feature) = from_float<T>(value);
}
