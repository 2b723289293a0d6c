// group: the parts of a stable counting sort of the token slots by expert.
//
//   permutation[r]          slot (token * top_k + j) of sorted row r; slots without an expert come last
//   inverse_permutation[s]  sorted row of slot s, or -1 for a slot without an expert (an id outside [0, num_experts))
//   expert_offsets[e]       first sorted row of expert e; [num_experts] = number of slots that have one
//
//   block    WARPS warps; a block owns a run of slots_per_block slots and each warp a contiguous part of it, which it walks
//            32 slots at a time
//   smem     (WARPS + 2) x (num_experts + 1) counters: one histogram a warp, the block's first rows, and the rows of earlier
//            blocks; with 1024 experts 136 KiB for 32 warps, 40 KiB for 8
//
// One block needs no matrix of counts: it is its only column. All positions follow from integer counts in slot order; no
// atomic decides about one, so the order is stable and the same on every run.
//
//   barrier       means
//   after count   the histograms of all warps are complete
//   after scan    every warp's histogram holds the row of its first slot of each expert
#pragma once
#include "scan.cuh"

namespace group {

constexpr int AHEAD = 4;  // ids that a lane has asked for before it looks at the first

struct GroupLaunch {
  const int* topk_ids;       // (num_slots)
  int* permutation;          // (num_slots)
  int* inverse_permutation;  // (num_slots)
  int* expert_offsets;       // (num_experts + 1)
  int* tokens_per_expert;    // (num_experts)
  int* counts;               // (num_blocks, num_experts + 1), unused with one block
  int* progress;             // (num_progress) set to zero for the grouped GEMM that follows
  int num_slots, num_experts, slots_per_block, num_progress;
};
static_assert(sizeof(GroupLaunch) == 72, "cumoe/gpu/group.py packs 72 bytes");

// The bin of a slot: its expert, or one past the last for a slot without an expert.
__device__ __forceinline__ int bin_of(const GroupLaunch& p, int slot) {
  int expert = p.topk_ids[slot];
  return expert >= 0 && expert < p.num_experts ? expert : p.num_experts;
}

struct Part { int block, num_blocks; };  // of the slots: this block's, of how many
struct Run { int begin, end; };          // slots of this warp

template <int WARPS> __device__ __forceinline__ Run run_of_warp(const GroupLaunch& p, Part part) {
  int64 warp_slots = ceil_div(p.slots_per_block, WARPS), last = ((int64)part.block + 1) * p.slots_per_block;
  int64 begin = (int64)part.block * p.slots_per_block + threadIdx.x / WARP * warp_slots, end = begin + warp_slots;
  if (last > p.num_slots) last = p.num_slots;
  return {(int)(begin < last ? begin : last), (int)(end < last ? end : last)};
}

// Walks the warp's slots in order, 32 at a time: visit(valid, slot, bin, rank among the equals of these 32, number of
// equals) is called by all lanes together, and what it writes to shared memory is seen by the next 32.
template <int WARPS, typename Visit> __device__ __forceinline__ void walk(const GroupLaunch& p, Part part, Visit visit) {
  int lane = threadIdx.x % WARP;
  Run run = run_of_warp<WARPS>(p, part);
  int num_slots = run.end - run.begin;
  for (int first = 0; first < num_slots; first += AHEAD * WARP) {
    int bins[AHEAD];
#pragma unroll
    for (int i = 0; i < AHEAD; ++i) {
      int offset = first + i * WARP + lane;
      bins[i] = offset < num_slots ? bin_of(p, run.begin + offset) : -1;
    }
#pragma unroll
    for (int i = 0; i < AHEAD; ++i) {
      uint32 equals = __match_any_sync(FULL_MASK, bins[i]);
      int rank = __popc(equals & ((1u << lane) - 1));
      visit(bins[i] >= 0, run.begin + first + i * WARP + lane, bins[i], rank, __popc(equals));
      __syncwarp();
    }
  }
}

// (WARPS, num_bins) histograms of the warps' runs.
template <int WARPS> __device__ __forceinline__ void count(const GroupLaunch& p, Part part, int* histograms) {
  int num_bins = p.num_experts + 1;
#pragma unroll 1
  for (int i = threadIdx.x; i < WARPS * num_bins; i += WARPS * WARP) histograms[i] = 0;
  __syncthreads();
  int* histogram = histograms + threadIdx.x / WARP * num_bins;
  walk<WARPS>(p, part, [&](bool valid, int, int bin, int rank, int equals) {
    if (valid && rank == 0) histogram[bin] += equals;
  });
  __syncthreads();
}

template <int WARPS> __device__ __forceinline__ int block_total(const int* histograms, int num_bins, int bin) {
  int total = 0;
#pragma unroll 8
  for (int warp = 0; warp < WARPS; ++warp) total += histograms[warp * num_bins + bin];
  return total;
}

// This block's row of the matrix of counts.
template <int WARPS> __device__ __forceinline__ void publish(const GroupLaunch& p, Part part, const int* histograms) {
  int num_bins = p.num_experts + 1;
  for (int bin = threadIdx.x; bin < num_bins; bin += WARPS * WARP)
    p.counts[(int64)part.block * num_bins + bin] = block_total<WARPS>(histograms, num_bins, bin);
}

// totals[bin] and earlier[bin] <- how many slots of all blocks and of those before this one have the bin. Integers may be
// added in any order; several threads share a bin where there are fewer bins than threads.
template <int WARPS>
__device__ __forceinline__ void add_up(const GroupLaunch& p, Part part, const int* histograms, int* totals, int* earlier) {
  constexpr int THREADS = WARPS * WARP;
  int num_bins = p.num_experts + 1;
  for (int bin = threadIdx.x; bin < num_bins; bin += THREADS) {
    totals[bin] = part.num_blocks == 1 ? block_total<WARPS>(histograms, num_bins, bin) : 0;
    earlier[bin] = 0;
  }
  __syncthreads();  // begun with the only block, or with nothing
  if (part.num_blocks == 1) return;
  int sharers = max(1, THREADS / num_bins), own = (int)threadIdx.x / num_bins;
  for (int bin = threadIdx.x % num_bins; own < sharers && bin < num_bins; bin += THREADS) {
    int total = 0, before = 0;
#pragma unroll 8
    for (int block = own; block < part.num_blocks; block += sharers) {
      int count = p.counts[(int64)block * num_bins + bin];
      total += count;
      if (block < part.block) before += count;
    }
    atomicAdd(&totals[bin], total);
    atomicAdd(&earlier[bin], before);
  }
  __syncthreads();  // all counts are in
}

constexpr int FEW_WARPS = 8, MAX_RANKED = 64;

// Places at most MAX_RANKED slots, all there are: whoever is there counts what stands before a slot, or before an expert.
template <int WARPS> __device__ __forceinline__ void rank_all(const GroupLaunch& p, int* bins) {
  constexpr int THREADS = WARPS * WARP;
  int slot = threadIdx.x;
  if (slot < p.num_slots) bins[slot] = bin_of(p, slot);
#pragma unroll 1
  for (int i = threadIdx.x; i < p.num_progress; i += THREADS) p.progress[i] = 0;
  __syncthreads();  // the bins are there
  if (slot < p.num_slots) {
    int bin = bins[slot], row = 0;
#pragma unroll 4
    for (int s = 0; s < p.num_slots; ++s) row += bins[s] < bin || (bins[s] == bin && s < slot);
    p.permutation[row] = slot;
    p.inverse_permutation[slot] = bin < p.num_experts ? row : -1;
  }
#pragma unroll 1
  for (int e = threadIdx.x; e <= p.num_experts; e += THREADS) {
    int before = 0, own = 0;
#pragma unroll 4
    for (int s = 0; s < p.num_slots; ++s) before += bins[s] < e, own += bins[s] == e;
    p.expert_offsets[e] = before;
    if (e < p.num_experts) p.tokens_per_expert[e] = own;
  }
}

// Counts and places the slots of this part. The first block also writes what describes all slots.
template <int WARPS> __device__ __forceinline__ void place(const GroupLaunch& p, Part part, int* histograms) {
  constexpr int THREADS = WARPS * WARP;
  int num_bins = p.num_experts + 1, *first_rows = histograms + WARPS * num_bins, *earlier_rows = first_rows + num_bins;
  if (WARPS == FEW_WARPS && p.num_slots <= MAX_RANKED) {
    rank_all<WARPS>(p, histograms);
    return;
  }
  count<WARPS>(p, part, histograms);
  add_up<WARPS>(p, part, histograms, first_rows, earlier_rows);
  if (part.block == 0)
#pragma unroll 1
    for (int e = threadIdx.x; e < p.num_experts; e += THREADS) p.tokens_per_expert[e] = first_rows[e];
#pragma unroll 1
  for (int i = part.block * THREADS + threadIdx.x; i < p.num_progress; i += part.num_blocks * THREADS) p.progress[i] = 0;
  __syncthreads();  // the totals are read before the scan overwrites them
  exclusive_scan<THREADS>(first_rows, num_bins);
  if (part.block == 0)
#pragma unroll 1
    for (int bin = threadIdx.x; bin < num_bins; bin += THREADS) p.expert_offsets[bin] = first_rows[bin];
  // Turn each warp's count into the row of its first slot: rows of earlier blocks, then of earlier warps.
#pragma unroll 1
  for (int bin = threadIdx.x; bin < num_bins; bin += THREADS) {
    int row = first_rows[bin] + earlier_rows[bin], counts[8];  // read ahead: a store would hold up the next load
#pragma unroll 1
    for (int first = 0; first < WARPS; first += 8) {
      int* at = histograms + first * num_bins + bin;
#pragma unroll
      for (int i = 0; i < 8; ++i) counts[i] = at[i * num_bins];
#pragma unroll
      for (int i = 0; i < 8; ++i) at[i * num_bins] = row, row += counts[i];
    }
  }
  __syncthreads();  // every warp knows its first rows
  int* next_row = histograms + threadIdx.x / WARP * num_bins;
  walk<WARPS>(p, part, [&](bool valid, int slot, int bin, int rank, int equals) {
    int row = valid ? next_row[bin] + rank : 0;
    __syncwarp();  // every equal has read the row before the first of them moves it
    if (!valid) return;
    if (rank == 0) next_row[bin] += equals;
    p.permutation[row] = slot;
    p.inverse_permutation[slot] = bin < p.num_experts ? row : -1;
  });
}

}  // namespace group
