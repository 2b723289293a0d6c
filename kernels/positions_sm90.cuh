// positions_sm90: which place in the order of all tiles a block, or a cluster of two, takes next; a warp of its own asks.
//
// With a counter in global memory whoever is free takes the next place. In a cluster the first block does, and tells the other
// one by mail: a word in that block's shared memory and two barriers, each of one arrival. Without a counter every block takes
// every n-th place.
//
//   barrier     lies in           a phase ends when
//   mail.sent   second block      it expects a position, and the first one's has come
//   mail.read   first block       the second one has read it
#pragma once
#include "ptx_sm90.cuh"

namespace hopper {

struct Mail { uint64 sent, read; int position; };

template <int CLUSTER> __device__ __forceinline__ int rank_in_cluster() { return blockIdx.x % CLUSTER; }
__device__ __forceinline__ uint32 in_other_block(uint32 address) { return in_block(address, blockIdx.x % 2 ^ 1); }

template <int CLUSTER> struct Positions {
  int* counter;
  Mail& mail;
  int value = (int)(blockIdx.x / CLUSTER) - (int)(gridDim.x / CLUSTER), taken = 0;

  __device__ __forceinline__ Positions(int* progress, Mail& of_block) : counter(progress), mail(of_block) {}

  // All lanes of the warp.
  __device__ __forceinline__ void advance() { ask(), take(); }

  // The two halves of it, between which there is time for other things: the counter is a trip to memory away.
  __device__ __forceinline__ void ask() {
    if (!counter) value += (int)(gridDim.x / CLUSTER);
    else if (rank_in_cluster<CLUSTER>() == 0 && threadIdx.x % WARP == 0) value = atomicAdd(counter, 1);
  }
  __device__ __forceinline__ void take() {
    int parity = taken++ % 2;
    if (!counter) return;
    if (rank_in_cluster<CLUSTER>() == 0) {
      if (CLUSTER > 1 && threadIdx.x % WARP == 0) send(parity);
      value = __shfl_sync(FULL_MASK, value, 0);
    } else {
      receive(parity);
    }
  }

 private:
  __device__ __forceinline__ void send(int parity) const {
    barrier_wait_for_cluster(shared_address(&mail.read), parity ^ 1);
    send_there(in_other_block(shared_address(&mail.position)), value, in_other_block(shared_address(&mail.sent)));
  }
  __device__ __forceinline__ void receive(int parity) {
    if (threadIdx.x % WARP == 0) {
      barrier_arrive_expect(shared_address(&mail.sent), sizeof(int));
      barrier_wait_for_cluster(shared_address(&mail.sent), parity);
      value = *static_cast<volatile int*>(&mail.position);
      barrier_release_there(in_other_block(shared_address(&mail.read)));
    }
    value = __shfl_sync(FULL_MASK, value, 0);
  }
};

}  // namespace hopper
