// scan: exclusive prefix sums over the threads of a block, and of an array in shared memory.
#pragma once
#include "types.cuh"

// The sum of `value` over the earlier threads. Once a kernel, or with a barrier between two calls.
template <int THREADS, typename T> __device__ __forceinline__ T sum_of_earlier_threads(T value) {
  __shared__ T warp_totals[THREADS / WARP];
  T inclusive = value;
  int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
#pragma unroll
  for (int step = 1; step < WARP; step *= 2) {
    T left = __shfl_up_sync(FULL_MASK, inclusive, step);
    if (lane >= step) inclusive += left;
  }
  if (lane == WARP - 1) warp_totals[warp] = inclusive;
  __syncthreads();  // the totals of all warps are written
  T offset = inclusive - value;
  for (int w = 0; w < warp; ++w) offset += warp_totals[w];
  return offset;
}

// values[i] <- values[0] + ... + values[i - 1]. Every thread sums a run of neighbours. Call after a barrier; returns after
// one.
template <int THREADS, typename T> __device__ __forceinline__ void exclusive_scan(T* values, int n) {
  int run = ceil_div(n, THREADS), begin = min((int)threadIdx.x * run, n), end = min(begin + run, n);
  T sum = 0;
  for (int i = begin; i < end; ++i) sum += values[i];
  T offset = sum_of_earlier_threads<THREADS>(sum);
  for (int i = begin; i < end; ++i) { T value = values[i]; values[i] = offset; offset += value; }
  __syncthreads();  // the prefix sum is complete
}
