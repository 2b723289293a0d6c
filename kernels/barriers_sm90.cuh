// barriers_sm90: where the warps of a block of the Hopper grouped GEMM meet, and how each keeps its place in the two rings.
//
// What ends a phase of each barrier stands in the card of grouped_gemm_wgmma.cuh.
#pragma once
#include "positions_sm90.cuh"
#include "tiles_sm90.cuh"

namespace hopper {

template <typename Shape> struct Barriers {
  static constexpr int RING = Shape::RING, CONSUMER_WARPS = Shape::CONSUMERS * WARPGROUP / WARP;

  uint64 full_[MAX_STAGES], empty_[MAX_STAGES], placed_[RING], told_[RING], done_[RING], free_[RING], wanted_;
  Mail mail;

  __device__ __forceinline__ uint32 full(int stage) const { return shared_address(&full_[stage]); }
  __device__ __forceinline__ uint32 empty(int stage) const { return shared_address(&empty_[stage]); }
  __device__ __forceinline__ uint32 placed(int place) const { return shared_address(&placed_[place]); }
  __device__ __forceinline__ uint32 told(int place) const { return shared_address(&told_[place]); }
  __device__ __forceinline__ uint32 done(int place) const { return shared_address(&done_[place]); }
  __device__ __forceinline__ uint32 free(int place) const { return shared_address(&free_[place]); }
  __device__ __forceinline__ uint32 wanted() const { return shared_address(&wanted_); }

  // One thread; the others have to be told.
  __device__ __forceinline__ void begin(int num_stages) const {
    for (int i = 0; i < num_stages; ++i) {
      barrier_init(full(i), 2 + TOKEN_THREADS);
      barrier_init(empty(i), CONSUMER_WARPS * Shape::CLUSTER);
    }
    for (int i = 0; i < RING; ++i) {
      barrier_init(placed(i), 1);
      barrier_init(told(i), WARP);
      barrier_init(done(i), TOKEN_THREADS + CONSUMER_WARPS * WARP);
      barrier_init(free(i), 1);
    }
    barrier_init(wanted(), 1);
    barrier_init(shared_address(&mail.sent), 1);
    barrier_init(shared_address(&mail.read), 1);
    barrier_init_fence();
  }
};

// A place in the ring of tiles, and the parity of the round: both follow from the number of the block's tile.
template <int RING> struct Turn {
  int tile = 0;
  __device__ __forceinline__ int place() const { return tile % RING; }
  __device__ __forceinline__ int parity() const { return tile / RING % 2; }
};

// The same in the ring of stages, whose length is not a power of two; in one register.
struct Cursor {
  int twice_at_plus_parity = 0;
  __device__ __forceinline__ int at() const { return twice_at_plus_parity >> 1; }
  __device__ __forceinline__ int parity() const { return twice_at_plus_parity & 1; }
  __device__ __forceinline__ void advance(int length) {
    twice_at_plus_parity += 2;
    if (at() == length) twice_at_plus_parity = parity() ^ 1;
  }
};

}  // namespace hopper
