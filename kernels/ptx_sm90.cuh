// ptx_sm90: one thin function per instruction that begins with sm_90 (Hopper); no policy. Needs -arch=sm_90a.
#pragma once
#include "ptx.cuh"

// --- mbarrier: a phase ends when `count` arrivals and all announced bytes have come -----------------------------------

__device__ __forceinline__ void barrier_init(uint32 barrier, int count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(count) : "memory");
}
__device__ __forceinline__ void barrier_init_fence() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
__device__ __forceinline__ void barrier_arrive(uint32 barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}
__device__ __forceinline__ void barrier_arrive_expect(uint32 barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}
// Arrives once all earlier cp.async of this thread have landed.
__device__ __forceinline__ void barrier_arrive_after_copies(uint32 barrier) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(barrier) : "memory");
}
// Waits for the end of the phase of this parity; the second one also sees what threads of other blocks of the cluster wrote
// before they arrived.
#define BARRIER_WAIT(NAME, SEMANTICS)                                                    \
  __device__ __forceinline__ void NAME(uint32 barrier, int parity) {                     \
    asm volatile(                                                                        \
        "{\n"                                                                            \
        ".reg .pred done;\n"                                                             \
        "again:\n"                                                                       \
        "mbarrier.try_wait.parity" SEMANTICS ".shared::cta.b64 done, [%0], %1;\n"        \
        "@!done bra again;\n"                                                            \
        "}" ::"r"(barrier), "r"(parity) : "memory");                                     \
  }
BARRIER_WAIT(barrier_wait, "")
BARRIER_WAIT(barrier_wait_for_cluster, ".acquire.cluster")

// --- clusters: neighbouring blocks that see each other's shared memory -----------------------------------------------------

// Where `address` of this block's shared memory lies in that of another block of the cluster.
__device__ __forceinline__ uint32 in_block(uint32 address, int rank) {
  uint32 there;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(address), "r"(rank));
  return there;
}
__device__ __forceinline__ void barrier_arrive_there(uint32 barrier_there) {
  asm volatile("mbarrier.arrive.shared::cluster.b64 _, [%0];" ::"r"(barrier_there) : "memory");
}
// The same, so that who waits for the cluster sees what this thread wrote before: a fence, which takes half a microsecond.
__device__ __forceinline__ void barrier_release_there(uint32 barrier_there) {
  asm volatile("mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%0];" ::"r"(barrier_there) : "memory");
}
// Stores 4 bytes, which the barrier in the same block has to expect.
__device__ __forceinline__ void send_there(uint32 address_there, int value, uint32 barrier_there) {
  asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.s32 [%0], %1, [%2];"
               ::"r"(address_there), "r"(value), "r"(barrier_there) : "memory");
}
// All threads of all blocks of the cluster.
__device__ __forceinline__ void sync_cluster() {
  asm volatile("barrier.cluster.arrive.release;\nbarrier.cluster.wait.acquire;" ::: "memory");
}

// --- TMA ---------------------------------------------------------------------------------------------------------------

struct alignas(64) TensorMap { uint64 opaque[16]; };

__device__ __forceinline__ void prefetch_tensor_map(const TensorMap& map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
}
__device__ __forceinline__ void load_tensor_4d(uint32 destination, const TensorMap& map, uint32 barrier, int c0, int c1,
                                               int c2, int c3) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, %6}], [%2];"
      ::"r"(destination), "l"(&map), "r"(barrier), "r"(c0), "r"(c1), "r"(c2), "r"(c3) : "memory");
}

// The same with one of two hints, as createpolicy makes them: what leaves the L2 first.
constexpr uint64 EVICT_NORMAL = 0x1000000000000000, EVICT_FIRST = 0x12f0000000000000;
__device__ __forceinline__ void load_tensor_4d(uint32 destination, const TensorMap& map, uint32 barrier, int c0, int c1,
                                               int c2, int c3, uint64 hint) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint"
      " [%0], [%1, {%3, %4, %5, %6}], [%2], %7;"
      ::"r"(destination), "l"(&map), "r"(barrier), "r"(c0), "r"(c1), "r"(c2), "r"(c3), "l"(hint) : "memory");
}
__device__ __forceinline__ void load_tensor_5d(uint32 destination, const TensorMap& map, uint32 barrier, int c0, int c1,
                                               int c2, int c3, int c4, uint64 hint) {
  asm volatile(
      "cp.async.bulk.tensor.5d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint"
      " [%0], [%1, {%3, %4, %5, %6, %7}], [%2], %8;"
      ::"r"(destination), "l"(&map), "r"(barrier), "r"(c0), "r"(c1), "r"(c2), "r"(c3), "r"(c4), "l"(hint) : "memory");
}

// Without a hint, into all blocks of `blocks` (a bit each) of the cluster, at the same addresses, with a barrier in each.
__device__ __forceinline__ void load_tensor_4d_for(unsigned short blocks, uint32 destination, const TensorMap& map,
                                                   uint32 barrier, int c0, int c1, int c2, int c3) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster"
      " [%0], [%1, {%3, %4, %5, %6}], [%2], %7;"
      ::"r"(destination), "l"(&map), "r"(barrier), "r"(c0), "r"(c1), "r"(c2), "r"(c3), "h"(blocks) : "memory");
}

// Makes what other threads wrote to shared memory (cp.async, st) visible to the asynchronous proxy of wgmma.
__device__ __forceinline__ void fence_async_proxy() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// The same for global memory, between stores and TMA, on either side.
__device__ __forceinline__ void fence_async_proxy_global() { asm volatile("fence.proxy.async.global;" ::: "memory"); }

// --- wgmma bookkeeping, registers, barriers of a part of the block --------------------------------------------------------

__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int PENDING> __device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}
template <int COUNT> __device__ __forceinline__ void keep_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(COUNT));
}
template <int COUNT> __device__ __forceinline__ void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(COUNT));
}
// The thread's number in its warpgroup, read anew: what is computed from it would else occupy registers throughout.
__device__ __forceinline__ int thread_of_warpgroup() {
  int thread;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(thread));
  return thread % 128;
}
// A barrier of THREADS threads; the number is a constant, else all 16 would be reserved.
template <int BARRIER, int THREADS> __device__ __forceinline__ void sync_some() {
  asm volatile("bar.sync %0, %1;" ::"n"(BARRIER), "n"(THREADS) : "memory");
}

// --- results -------------------------------------------------------------------------------------------------------------

// Stores the transposes of four 8 x 8 matrices; lanes 8 i .. 8 i + 7 give the row addresses of matrix i.
__device__ __forceinline__ void store_matrix_x4_transposed(uint32 address, const uint32 (&m)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};"
               ::"r"(address), "r"(m[0]), "r"(m[1]), "r"(m[2]), "r"(m[3]) : "memory");
}
__device__ __forceinline__ uint32 pack_two(bf16, float low, float high) {
  uint32 packed;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  return packed;
}
__device__ __forceinline__ uint32 pack_two(fp16, float low, float high) {
  uint32 packed;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  return packed;
}
__device__ __forceinline__ uint4 load_shared_16(uint32 address) {
  uint4 value;
  asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
               : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w) : "r"(address) : "memory");
  return value;
}
__device__ __forceinline__ void store_global_16(void* address, uint4 value) {
  asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};"
               ::"l"(address), "r"(value.x), "r"(value.y), "r"(value.z), "r"(value.w) : "memory");
}
