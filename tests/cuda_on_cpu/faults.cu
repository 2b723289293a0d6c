// faults: kernels that are wrong on purpose. tests/test_cuda_on_cpu.py sees that each is reported.
//
//   block     64 threads
//   memory    `ints` holds 64 ints; dynamic shared memory holds 64 more
#include "overlap.cuh"
#include "ptx.cuh"

namespace faults {
struct Launch { int* ints; int64 offset, zero; };
}

#define FAULT(NAME) \
  extern "C" __global__ void __launch_bounds__(64) NAME(const __grid_constant__ faults::Launch launch)

// Nothing wrong: every thread hands its number to its neighbour through shared memory.
FAULT(fault_none) {
  extern __shared__ __align__(16) int numbers[];
  numbers[threadIdx.x] = threadIdx.x;
  __syncthreads();
  launch.ints[threadIdx.x] = numbers[threadIdx.x ^ 63];
}

FAULT(fault_missing_barrier) {
  extern __shared__ __align__(16) int numbers[];
  numbers[threadIdx.x] = threadIdx.x;
  launch.ints[threadIdx.x] = numbers[threadIdx.x ^ 63];
}

FAULT(fault_global_overrun) { launch.ints[threadIdx.x + launch.offset] = 1; }

FAULT(fault_global_underrun) { launch.ints[(int64)threadIdx.x - launch.offset] = 1; }

FAULT(fault_dynamic_shared_overrun) {
  extern __shared__ __align__(16) int numbers[];
  numbers[threadIdx.x + launch.offset] = 1;
}

FAULT(fault_static_shared_overrun) {
  __shared__ int numbers[64];
  int* pointer = numbers;
  pointer[threadIdx.x + launch.offset] = 1;
}

FAULT(fault_misaligned) { *reinterpret_cast<float4*>(launch.ints + launch.offset) = {}; }

FAULT(fault_integer_overflow) { launch.ints[threadIdx.x] = 0x7fffffff + (int)launch.offset; }

FAULT(fault_diverging_barriers) {
  if (threadIdx.x < 32) __syncthreads();
  else if (launch.zero == 0) __syncthreads();
}

FAULT(fault_barrier_and_warp) {
  if (threadIdx.x == 5) __syncthreads();
  else __syncwarp();
}

FAULT(fault_lane_that_left) {
  if (threadIdx.x % 32 == 7) return;
  launch.ints[threadIdx.x] = __shfl_xor_sync(FULL_MASK, (int)threadIdx.x, 1);
}

FAULT(fault_foreign_mask) { __syncwarp(threadIdx.x == 9 ? 1u : FULL_MASK); }

// The copy is read without a wait: what it will bring has not landed.
FAULT(fault_copy_not_awaited) {
  extern __shared__ __align__(16) int numbers[];
  copy_async_16(shared_address(numbers + threadIdx.x / 4 * 4), launch.ints + threadIdx.x / 4 * 4, 16);
  copy_async_commit();
  copy_async_wait<1>();
  __syncthreads();
  int number = numbers[threadIdx.x];
  copy_async_wait<0>();
  __syncthreads();
  launch.ints[threadIdx.x] = number;
}
