// types: the scalar types of the kernels and their conversions to and from float32.
//
// Sizes and indices of experts, rows and columns are int32; whatever is multiplied by a stride is int64.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

using int64 = long long;
using uint32 = unsigned int;
using uint64 = unsigned long long;
using bf16 = __nv_bfloat16;
using fp16 = __half;

constexpr int WARP = 32;
constexpr uint32 FULL_MASK = 0xffffffffu;

__device__ __forceinline__ float to_float(float value) { return value; }
__device__ __forceinline__ float to_float(bf16 value) { return __bfloat162float(value); }
__device__ __forceinline__ float to_float(fp16 value) { return __half2float(value); }

template <typename T> __device__ __forceinline__ T from_float(float value);
template <> __device__ __forceinline__ float from_float<float>(float value) { return value; }
template <> __device__ __forceinline__ bf16 from_float<bf16>(float value) { return __float2bfloat16_rn(value); }
template <> __device__ __forceinline__ fp16 from_float<fp16>(float value) { return __float2half_rn(value); }

__device__ __forceinline__ int ceil_div(int a, int b) { return (a + b - 1) / b; }

// Sum over the 32 lanes; every lane gets the same bits because the butterfly adds the same pairs everywhere.
__device__ __forceinline__ float warp_sum(float value) {
#pragma unroll
  for (int step = WARP / 2; step > 0; step /= 2) value += __shfl_xor_sync(FULL_MASK, value, step);
  return value;
}

__device__ __forceinline__ float warp_max(float value) {
#pragma unroll
  for (int step = WARP / 2; step > 0; step /= 2) value = fmaxf(value, __shfl_xor_sync(FULL_MASK, value, step));
  return value;
}
