// group: the parts of a stable counting sort of the token slots by expert.
//
//   permutation[r]          slot (token * top_k + j) of sorted row r; slots without an expert come last
//   inverse_permutation[s]  sorted row of slot s, or -1 for a slot without an expert (an id outside [0, num_experts))
//   expert_offsets[e]       first sorted row of expert e; [num_experts] = number of slots that have one
//
//   counts   a row for each run of slots_per_row slots: how many of them have a bin. A block places the slots of
//            rows_per_block of them; a block that places all needs none
//   block    WARPS warps, each with a contiguous part of the block's slots, which it walks 32 at a time
//   smem     counting: a histogram. Placing: a histogram a warp, the slots of all blocks by bin, and those of earlier blocks
//
// All positions follow from integer counts in slot order; no atomic decides about one, so the order is stable and the same
// on every run.
//
//   barrier       means
//   after zeros   the histograms are empty
//   after count   the histograms of all warps are complete, and so are the totals
//   after scan    every warp's histogram holds the row of its first slot of each expert
#pragma once
#include "scan.cuh"

namespace group {

constexpr int AHEAD = 4;   // ids that a lane has asked for before it looks at the first
constexpr int VECTOR = 4;  // counts that a thread reads at a time

struct GroupLaunch {
  const int* topk_ids;       // (num_slots)
  int* permutation;          // (num_slots)
  int* inverse_permutation;  // (num_slots)
  int* expert_offsets;       // (num_experts + 1)
  int* tokens_per_expert;    // (num_experts)
  int* counts;               // (num_rows, row_vectors() * VECTOR), 16-byte aligned; unused where one block places all
  int* progress;             // (num_progress) set to zero for the grouped GEMM that follows
  int num_slots, num_experts, slots_per_row, num_progress;
  int num_rows, rows_per_block;
};
static_assert(sizeof(GroupLaunch) == 80, "cumoe/gpu/group.py packs 80 bytes");

__device__ __forceinline__ int num_bins(const GroupLaunch& p) { return p.num_experts + 1; }
__device__ __forceinline__ int row_vectors(const GroupLaunch& p) { return ceil_div(num_bins(p), VECTOR); }

// The bin of a slot: its expert, or one past the last for a slot without an expert.
__device__ __forceinline__ int bin_of(const GroupLaunch& p, int expert) {
  return expert >= 0 && expert < p.num_experts ? expert : p.num_experts;
}

struct Run { int begin, end; };  // of slots

// The slots of `num_rows` rows from `row` on.
__device__ __forceinline__ Run run_of_rows(const GroupLaunch& p, int row, int num_rows) {
  int64 begin = (int64)row * p.slots_per_row, end = begin + (int64)num_rows * p.slots_per_row;
  return {(int)(begin < p.num_slots ? begin : p.num_slots), (int)(end < p.num_slots ? end : p.num_slots)};
}

template <int WARPS> __device__ __forceinline__ Run run_of_warp(Run block) {
  int slots = ceil_div(block.end - block.begin, WARPS), warp = threadIdx.x / WARP;
  int64 begin = block.begin + (int64)warp * slots, end = begin + slots;
  return {(int)(begin < block.end ? begin : block.end), (int)(end < block.end ? end : block.end)};
}

// AHEAD x 32 neighbouring slots of a warp.
struct Batch {
  int bins[AHEAD];       // of the lane's slots; -1 past the end
  uint32 equals[AHEAD];  // lanes with the same bin

  // From the slot `first` of the run on.
  __device__ __forceinline__ void read(const GroupLaunch& p, Run run, int first) {
#pragma unroll
    for (int i = 0; i < AHEAD; ++i) {
      int offset = first + i * WARP + threadIdx.x % WARP;
      bins[i] = offset < run.end - run.begin ? bin_of(p, p.topk_ids[run.begin + offset]) : -1;
    }
  }
  __device__ __forceinline__ void match() {
#pragma unroll
    for (int i = 0; i < AHEAD; ++i) equals[i] = __match_any_sync(FULL_MASK, bins[i]);
  }
  // Of the lane among its equals.
  __device__ __forceinline__ int rank(int i) const { return __popc(equals[i] & ((1u << threadIdx.x % WARP) - 1)); }
};

// histogram[bin] <- 0, for all bins that a row of counts has; the whole block, which meets at a barrier then.
__device__ __forceinline__ void clear(const GroupLaunch& p, int* histogram) {
  for (int bin = threadIdx.x; bin < row_vectors(p) * VECTOR; bin += blockDim.x) histogram[bin] = 0;
  __syncthreads();  // the histogram is empty
}
__device__ __forceinline__ void count(const GroupLaunch& p, int* histogram, int expert) {
  atomicAdd(&histogram[bin_of(p, expert)], 1);
}
// The histogram of a row of counts, which is complete after a barrier; the whole block.
__device__ __forceinline__ void publish(const GroupLaunch& p, int row, const int* histogram) {
  int length = row_vectors(p) * VECTOR;
  __syncthreads();  // the histogram is complete
  for (int bin = threadIdx.x; bin < length; bin += blockDim.x) p.counts[(int64)row * length + bin] = histogram[bin];
}

// Counts the slots of a row from their ids.
template <int WARPS> __device__ __forceinline__ void count_row(const GroupLaunch& p, int row, int* histogram) {
  Run run = run_of_rows(p, row, 1);
  clear(p, histogram);
#pragma unroll 4
  for (int64 slot = run.begin + (int64)threadIdx.x; slot < run.end; slot += WARPS * WARP)
    count(p, histogram, p.topk_ids[slot]);
  publish(p, row, histogram);
}

// How many slots of all rows have a bin, and of the rows before the first of this block: four arrays, one for each place in a
// vector, so that the lanes of a warp add in different banks.
struct Totals {
  int* words;
  int vectors;
  __device__ __forceinline__ int& all(int bin) const { return words[bin % VECTOR * vectors + bin / VECTOR]; }
  __device__ __forceinline__ int& earlier(int bin) const { return words[(VECTOR + bin % VECTOR) * vectors + bin / VECTOR]; }
};

// Adds up the counts, which may come in any order; several threads share a vector of bins.
template <int WARPS> __device__ __forceinline__ void add_up(const GroupLaunch& p, int first_row, Totals totals) {
  constexpr int THREADS = WARPS * WARP;
  int vectors = totals.vectors, sharers = max(1, THREADS / vectors), own = (int)threadIdx.x / vectors;
  if (own >= sharers) return;
  for (int vector = threadIdx.x % vectors; vector < vectors; vector += THREADS) {
    const int4* column = reinterpret_cast<const int4*>(p.counts) + vector;
    int4 all{0, 0, 0, 0}, earlier{0, 0, 0, 0};
#pragma unroll 8
    for (int row = own; row < p.num_rows; row += sharers) {
      int4 here = column[(int64)row * vectors];
      all.x += here.x, all.y += here.y, all.z += here.z, all.w += here.w;
      if (row < first_row) earlier.x += here.x, earlier.y += here.y, earlier.z += here.z, earlier.w += here.w;
    }
    int* at = totals.words + vector;
    atomicAdd(at, all.x), atomicAdd(at + vectors, all.y), atomicAdd(at + 2 * vectors, all.z), atomicAdd(at + 3 * vectors, all.w);
    at += VECTOR * vectors;
    if (own >= first_row) continue;  // all zeros
    atomicAdd(at, earlier.x), atomicAdd(at + vectors, earlier.y);
    atomicAdd(at + 2 * vectors, earlier.z), atomicAdd(at + 3 * vectors, earlier.w);
  }
}

constexpr int FEW_WARPS = 8, MAX_RANKED = 64;

// Places at most MAX_RANKED slots, all there are: a thread has a slot and an expert, or some, and counts in one go what stands
// before the one and before the other.
template <int WARPS> __device__ __forceinline__ void rank_all(const GroupLaunch& p, int* bins) {
  constexpr int THREADS = WARPS * WARP;
  static_assert(MAX_RANKED <= THREADS, "a thread has one slot");
  int slot = threadIdx.x, bin = slot < p.num_slots ? bin_of(p, p.topk_ids[slot]) : -1;
  if (bin >= 0) bins[slot] = bin;
#pragma unroll 1
  for (int i = threadIdx.x; i < p.num_progress; i += THREADS) p.progress[i] = 0;
  __syncthreads();  // the bins are there
#pragma unroll 1
  for (int e = threadIdx.x; e < max(p.num_experts, p.num_slots); e += THREADS) {
    int before = 0, own = 0, row = 0;
#pragma unroll 8
    for (int s = 0; s < p.num_slots; ++s) {
      int other = bins[s];
      before += other < e, own += other == e, row += other < bin + (s < slot);
    }
    if (e < p.num_experts) {
      p.expert_offsets[e] = before;
      p.tokens_per_expert[e] = own;
      if (e == p.num_experts - 1) p.expert_offsets[p.num_experts] = before + own;
    }
    if (e == slot && bin >= 0) {
      p.permutation[row] = slot;
      p.inverse_permutation[slot] = bin < p.num_experts ? row : -1;
    }
  }
}

// A block that places, alone or with others.
template <int WARPS> struct Placing {
  static constexpr int THREADS = WARPS * WARP;

  const GroupLaunch& p;
  int* histograms;  // (WARPS, num_bins)
  int first_row;    // of the block's rows of counts
  bool alone;       // this block places all slots

  __device__ __forceinline__ Totals totals() const { return {histograms + WARPS * num_bins(p), row_vectors(p)}; }

  // Before anything is read.
  __device__ __forceinline__ void prepare() const {
    int words = WARPS * num_bins(p) + (alone ? 0 : 2 * VECTOR * row_vectors(p));
#pragma unroll 1
    for (int i = threadIdx.x; i < words; i += THREADS) histograms[i] = 0;
    __syncthreads();  // the histograms are empty
  }

  __device__ __forceinline__ void run() const {
    int* own = histograms + threadIdx.x / WARP * num_bins(p);
    Run run = run_of_warp<WARPS>(alone ? Run{0, p.num_slots} : run_of_rows(p, first_row, p.rows_per_block));
    int num_slots = run.end - run.begin;
    bool is_first = alone || first_row == 0;
    Batch batch;
    batch.read(p, run, 0);
    if (!alone) add_up<WARPS>(p, first_row, totals());
#pragma unroll 1
    for (int first = 0; first < num_slots; first += AHEAD * WARP) {
      if (first > 0) batch.read(p, run, first);
      batch.match();
#pragma unroll
      for (int i = 0; i < AHEAD; ++i) {
        if (batch.bins[i] >= 0 && batch.rank(i) == 0) own[batch.bins[i]] += __popc(batch.equals[i]);
        __syncwarp();
      }
    }
    int block = alone ? 0 : blockIdx.x, num_blocks = alone ? 1 : gridDim.x;  // alone, it may be any of the grid
#pragma unroll 1
    for (int i = block * THREADS + threadIdx.x; i < p.num_progress; i += num_blocks * THREADS) p.progress[i] = 0;
    __syncthreads();  // the histograms of all warps and the totals are complete
    find_rows(is_first);
    __syncthreads();  // every warp knows its first rows
    bool again = num_slots > AHEAD * WARP;
#pragma unroll 1
    for (int first = 0; first < num_slots; first += AHEAD * WARP) {
      if (again) batch.read(p, run, first), batch.match();
#pragma unroll
      for (int i = 0; i < AHEAD; ++i) {
        int bin = batch.bins[i], rank = batch.rank(i), row = bin >= 0 ? own[bin] + rank : 0;
        __syncwarp();  // every equal has read the row before the first of them moves it
        if (bin >= 0) {
          if (rank == 0) own[bin] += __popc(batch.equals[i]);
          int slot = run.begin + first + i * WARP + (int)threadIdx.x % WARP;
          p.permutation[row] = slot;
          p.inverse_permutation[slot] = bin < p.num_experts ? row : -1;
        }
        __syncwarp();
      }
    }
  }

  // Turns each warp's count into the row of its first slot: rows of smaller bins, of earlier blocks, of earlier warps. A
  // thread has a run of bins.
  __device__ __forceinline__ void find_rows(bool is_first) const {
    int bins = num_bins(p), own = ceil_div(bins, THREADS), begin = min((int)threadIdx.x * own, bins), end = min(begin + own, bins);
    int sum = 0;
    for (int bin = begin; bin < end; ++bin) sum += total_of(bin);
    int offset = sum_of_earlier_threads<THREADS>(sum);
    for (int bin = begin; bin < end; ++bin) {
      int total = total_of(bin), row = offset + (alone ? 0 : totals().earlier(bin));
      if (is_first) {
        p.expert_offsets[bin] = offset;
        if (bin < p.num_experts) p.tokens_per_expert[bin] = total;
      }
      offset += total;
      int counts[8];  // read ahead: a store would hold up the next load
#pragma unroll 1
      for (int first = 0; first < WARPS; first += 8) {
        int* at = histograms + first * bins + bin;
#pragma unroll
        for (int i = 0; i < 8; ++i) counts[i] = at[i * bins];
#pragma unroll
        for (int i = 0; i < 8; ++i) at[i * bins] = row, row += counts[i];
      }
    }
  }

  __device__ __forceinline__ int total_of(int bin) const {
    if (!alone) return totals().all(bin);
    int total = 0;
#pragma unroll
    for (int warp = 0; warp < WARPS; ++warp) total += histograms[warp * num_bins(p) + bin];
    return total;
  }
};

// Places all slots by one block.
template <int WARPS> __device__ __forceinline__ void place_all(const GroupLaunch& p, int* histograms) {
  if (p.num_slots <= MAX_RANKED) {
    rank_all<WARPS>(p, histograms);
    return;
  }
  Placing<WARPS> placing{p, histograms, 0, true};
  placing.prepare();
  placing.run();
}

}  // namespace group
