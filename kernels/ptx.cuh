// ptx: one thin function per instruction of sm_80 and later; no policy.
#pragma once
#include "types.cuh"

__device__ __forceinline__ uint32 shared_address(const void* pointer) { return (uint32)__cvta_generic_to_shared(pointer); }

// Asks for the 32 bytes around an address to be brought to the L2.
__device__ __forceinline__ void prefetch_to_l2(const void* address) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(address));
}

// Copies `bytes` (0 .. 16) to shared memory without registers and fills the rest of the 16 with zeros.
__device__ __forceinline__ void copy_async_16(uint32 destination, const void* source, int bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(destination), "l"(source), "r"(bytes) : "memory");
}
__device__ __forceinline__ void copy_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int PENDING> __device__ __forceinline__ void copy_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}

// Lane l receives row l / 4, columns 2 (l % 4) and + 1 of each 8 x 8 matrix; lanes 8 i .. 8 i + 7 give the row addresses
// of matrix i. `transposed` hands out the transpose.
__device__ __forceinline__ void load_matrix_x4(uint32 (&first)[2], uint32 (&second)[2], uint32 address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(first[0]), "=r"(first[1]), "=r"(second[0]), "=r"(second[1]) : "r"(address) : "memory");
}
__device__ __forceinline__ void load_matrix_x4_transposed(uint32 (&first)[2], uint32 (&second)[2], uint32 address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(first[0]), "=r"(first[1]), "=r"(second[0]), "=r"(second[1]) : "r"(address) : "memory");
}

// d (16 x 8, float32) += a (16 x 16) b (16 x 8). Lane l holds rows l / 4 (d[0], d[1]) and l / 4 + 8 (d[2], d[3]),
// columns 2 (l % 4) and + 1.
__device__ __forceinline__ void mma_16816(bf16, float (&d)[4], const uint32 (&a)[2][2], const uint32 (&b)[2]) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0][0]), "r"(a[0][1]), "r"(a[1][0]), "r"(a[1][1]), "r"(b[0]), "r"(b[1]));
}
__device__ __forceinline__ void mma_16816(fp16, float (&d)[4], const uint32 (&a)[2][2], const uint32 (&b)[2]) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0][0]), "r"(a[0][1]), "r"(a[1][0]), "r"(a[1][1]), "r"(b[0]), "r"(b[1]));
}
