// group: a stable counting sort of the token slots by expert
//
//   permutation[r]          slot (token * top_k + j) of sorted row r; slots without an expert come last
//   inverse_permutation[s]  sorted row of slot s, or -1 for a slot without an expert (an id outside [0, num_experts))
//   expert_offsets[e]       first sorted row of expert e; [num_experts] = number of slots that have one
//
//   grid     group_count and group_place: the same blocks, each owns a run of `slots_per_block` slots
//   block    1024 threads, or 256 for at most 1024 slots and where shared memory is short; each warp owns a contiguous part
//            of the block's run, which it walks 32 slots at a time
//   smem     (WARPS + 2) x (num_experts + 1) counters: one histogram a warp, the block's first rows, and the rows of earlier
//            blocks; with 1024 experts 136 KiB for 32 warps, 40 KiB for 8
//
// One block needs no group_count: it is the only column of the matrix of counts. All positions follow from integer
// counts in slot order; there is no atomic, so the order is stable and the same on every run.
//
//   barrier       means
//   after count   the histograms of all warps are complete
//   after scan    every warp's histogram holds the row of its first slot of each expert
#include "overlap.cuh"
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

struct Run { int begin, end; };  // slots of this warp

template <int WARPS> __device__ __forceinline__ Run run_of_warp(const GroupLaunch& p) {
  int64 warp_slots = p.slots_per_block / WARPS;
  int64 begin = (int64)blockIdx.x * p.slots_per_block + threadIdx.x / WARP * warp_slots, end = begin + warp_slots;
  int64 last = p.num_slots;
  return {(int)(begin < last ? begin : last), (int)(end < last ? end : last)};
}

// Walks the warp's slots in order, 32 at a time: visit(valid, slot, bin, rank among the equals of these 32, number of
// equals) is called by all lanes together, and what it writes to shared memory is seen by the next 32.
template <int WARPS, typename Visit> __device__ __forceinline__ void walk(const GroupLaunch& p, Visit visit) {
  int lane = threadIdx.x % WARP;
  Run run = run_of_warp<WARPS>(p);
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
template <int WARPS> __device__ __forceinline__ void count(const GroupLaunch& p, int* histograms) {
  int num_bins = p.num_experts + 1;
  for (int i = threadIdx.x; i < WARPS * num_bins; i += WARPS * WARP) histograms[i] = 0;
  __syncthreads();
  int* histogram = histograms + threadIdx.x / WARP * num_bins;
  walk<WARPS>(p, [&](bool valid, int, int bin, int rank, int equals) { if (valid && rank == 0) histogram[bin] += equals; });
  __syncthreads();
}

template <int WARPS> __device__ __forceinline__ int block_total(const int* histograms, int num_bins, int bin) {
  int total = 0;
  for (int warp = 0; warp < WARPS; ++warp) total += histograms[warp * num_bins + bin];
  return total;
}

// This block's row of the matrix of counts.
template <int WARPS> __device__ __forceinline__ void publish(const GroupLaunch& p, const int* histograms) {
  int num_bins = p.num_experts + 1;
  for (int bin = threadIdx.x; bin < num_bins; bin += WARPS * WARP)
    p.counts[(int64)blockIdx.x * num_bins + bin] = block_total<WARPS>(histograms, num_bins, bin);
}

template <int WARPS>
__device__ __forceinline__ void place(const GroupLaunch& p, int* histograms, int* first_rows, int* earlier_rows) {
  constexpr int THREADS = WARPS * WARP;
  int num_bins = p.num_experts + 1, num_blocks = gridDim.x;
  launch_next_kernel();  // an ordinary launch: everything older is complete already
  count<WARPS>(p, histograms);
  // Rows of each bin in all blocks and in earlier ones, then the first row of each bin.
  for (int bin = threadIdx.x; bin < num_bins; bin += THREADS) {
    int total = 0, before = 0;
    if (num_blocks == 1) {
      total = block_total<WARPS>(histograms, num_bins, bin);
    } else {
#pragma unroll 8
      for (int block = 0; block < num_blocks; ++block) {
        int count = p.counts[(int64)block * num_bins + bin];
        total += count;
        if (block < (int)blockIdx.x) before += count;
      }
    }
    first_rows[bin] = total;
    earlier_rows[bin] = before;
  }
  __syncthreads();
  if (blockIdx.x == 0)
    for (int e = threadIdx.x; e < p.num_experts; e += THREADS) p.tokens_per_expert[e] = first_rows[e];
  for (int i = blockIdx.x * THREADS + threadIdx.x; i < p.num_progress; i += num_blocks * THREADS) p.progress[i] = 0;
  __syncthreads();
  exclusive_scan<THREADS>(first_rows, num_bins);
  if (blockIdx.x == 0)
    for (int bin = threadIdx.x; bin < num_bins; bin += THREADS) p.expert_offsets[bin] = first_rows[bin];
  // Turn each warp's count into the row of its first slot: rows of earlier blocks, then of earlier warps.
  for (int bin = threadIdx.x; bin < num_bins; bin += THREADS) {
    int row = first_rows[bin] + earlier_rows[bin];
    for (int warp = 0; warp < WARPS; ++warp) {
      int count = histograms[warp * num_bins + bin];
      histograms[warp * num_bins + bin] = row;
      row += count;
    }
  }
  __syncthreads();
  int* next_row = histograms + threadIdx.x / WARP * num_bins;
  walk<WARPS>(p, [&](bool valid, int slot, int bin, int rank, int equals) {
    int row = valid ? next_row[bin] + rank : 0;
    __syncwarp();  // every equal has read the row before the first of them moves it
    if (!valid) return;
    if (rank == 0) next_row[bin] += equals;
    p.permutation[row] = slot;
    p.inverse_permutation[slot] = bin < p.num_experts ? row : -1;
  });
}

}  // namespace group

#define GROUP_COUNT(NAME, WARPS)                                                                                   \
  extern "C" __global__ void __launch_bounds__(WARPS * WARP) NAME(const __grid_constant__ group::GroupLaunch launch) { \
    extern __shared__ int histograms[]; /* (WARPS, num_experts + 1) */                                            \
    group::count<WARPS>(launch, histograms);                                                                      \
    group::publish<WARPS>(launch, histograms);                                                                    \
  }
#define GROUP_PLACE(NAME, WARPS)                                                                                  \
  extern "C" __global__ void __launch_bounds__(WARPS * WARP) NAME(const __grid_constant__ group::GroupLaunch launch) { \
    extern __shared__ int histograms[]; /* (WARPS, num_experts + 1) counters, then twice (num_experts + 1) rows */    \
    int num_bins = launch.num_experts + 1;                                                                        \
    group::place<WARPS>(launch, histograms, histograms + WARPS * num_bins, histograms + (WARPS + 1) * num_bins);  \
  }

GROUP_COUNT(group_count, 32)
GROUP_COUNT(group_count_few, 8)
GROUP_PLACE(group_place, 32)
GROUP_PLACE(group_place_few, 8)
