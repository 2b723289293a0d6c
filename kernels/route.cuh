// route: logits of tokens -> their topk_ids and topk_weights; the block reads, a warp a token chooses and weighs. A token that
// is the only one of its block is chosen for by all its warps.
//
//   smem     a warp: see Row; at 1024 experts and top_k = 8 between 4 and 8 KiB
//
// The logits are read once: they may come as partial sums (see router_gemm.cu), which are added in order, the bias last.
// An expert is ranked by a 32-bit key that orders as its score does: NaN lowest, then -inf upward. A lane holds the keys of
// its own experts (lane, lane + 32, ...) in registers; the best lane's best is taken, among equals the lowest id, and that
// lane alone looks for its next one. So ids are distinct and in range for any input. Where no bias and no groups interfere
// the logit itself is ranked, since every scoring function is monotone: no tie that rounding of the scores would bring. The
// bias never reaches a weight: weights are computed from the logits. With an expert_table the ids of a token are looked up
// by its token id; those that name no expert get id -1, weight 0.
//
// With few tokens this code runs once, and a line of eight instructions takes longer to come than to run: loops stay loops
// unless they carry registers, and the whole block reads and scores the logits of even one token.
//
//   barrier           means
//   __syncthreads     the logits of the block's tokens are in shared memory, or no longer needed there; of a token alone also:
//                     its keys stand, its groups have been looked at, the ranks are claimed, the choices stand
//   __syncwarp        a warp shares its token with no other
#pragma once
#include "router.cuh"

namespace route {

// A token's part of shared memory.
struct Row {
  uint32* words;  // (max(top_k, num_groups)) keys of groups first, chosen ids later
  float* chosen;  // (top_k) logits of the choices, then their weights
  float* logits;  // (num_experts)
  uint32* keys;   // (num_experts, and up to 3 more) where ranks_apart(), and of a token alone; a multiple of 4 words behind smem

  __device__ __forceinline__ Row(const RouterLaunch& p, uint32* smem)
      : words(smem), chosen(reinterpret_cast<float*>(smem) + max(p.top_k, p.num_groups)), logits(chosen + p.top_k),
        keys(smem + ceil_div(max(p.top_k, p.num_groups) + p.top_k + p.num_experts, 4) * 4) {}
};

// Calls visit(t, e) for experts of `count` tokens, which are at most WARPS; all threads of the block share them.
template <int WARPS, typename Visit>
__device__ __forceinline__ void for_each_logit(const RouterLaunch& p, int count, Visit visit) {
  constexpr int THREADS = WARPS * WARP;
  int across = min(THREADS, ceil_div(p.num_experts, WARP) * WARP), down = THREADS / across;
  if ((int)threadIdx.x >= down * across) return;
#pragma unroll 1
  for (int t = threadIdx.x / across; t < count; t += down)
#pragma unroll 1
    for (int e = threadIdx.x % across; e < p.num_experts; e += across) visit(t, e);
}

constexpr int PARTS_AHEAD = 8;  // parts of a logit that are asked for before the first of them is added

// The sums of all parts into shared memory. A single part stays as it is: a sum would flush subnormals.
template <int WARPS, typename T>
__device__ __forceinline__ void load(const RouterLaunch& p, int64 first_token, int count, uint32* smem) {
  for_each_logit<WARPS>(p, count, [&](int t, int e) {
    const T* at = static_cast<const T*>(p.logits) + (first_token + t) * p.row_stride + e * p.col_stride;
    float value = to_float(*at);
    if (sizeof(T) == sizeof(float)) {  // parts are float32
#pragma unroll 1
      for (int first = 1; first < p.num_parts; first += PARTS_AHEAD) {
        float parts[PARTS_AHEAD];
#pragma unroll
        for (int i = 0; i < PARTS_AHEAD; ++i)
          if (first + i < p.num_parts) parts[i] = to_float(at[(first + i) * p.part_stride]);
#pragma unroll
        for (int i = 0; i < PARTS_AHEAD; ++i)
          if (first + i < p.num_parts) value += parts[i];
      }
    }
    Row(p, smem + t * p.words_per_warp).logits[e] = value;
  });
}

// What is to be done to a logit before anybody looks at it, by the thread that has loaded it; and keys that need no softmax.
template <int WARPS> __device__ __forceinline__ void finish(const RouterLaunch& p, int count, uint32* smem) {
  bool scores = ranks_apart(p) && !(p.scoring == SOFTMAX && p.select_by == SCORES);
  if (!scores && !p.router_bias && p.softcap == 0.0f) return;
  for_each_logit<WARPS>(p, count, [&](int t, int e) {
    Row row(p, smem + t * p.words_per_warp);
    float value = row.logits[e];
    if (p.router_bias) value += p.router_bias[e];
    if (p.softcap > 0.0f) value = p.softcap * tanhf(value / p.softcap);
    row.logits[e] = value;
    if (scores) row.keys[e] = ranked(p, e, ranking_score(p, value));
  });
}

// The choices of a token in shared memory; a lane has every 32nd.
struct ChoicesInShared {
  float* chosen;
  int count;
  template <typename Visit> __device__ __forceinline__ void each(Visit visit) const {
#pragma unroll 1
    for (int j = threadIdx.x % WARP; j < count; j += WARP) visit(chosen[j]);
  }
  __device__ __forceinline__ static float sum(float value) { return warp_sum(value); }
  __device__ __forceinline__ static float largest(float value) { return warp_max(value); }
};

// KEYS: experts of a lane, of which there are at most 32 KEYS in all.
template <int KEYS> struct Token : Row {
  const RouterLaunch& p;
  int lane = threadIdx.x % WARP;
  Softmax softmax;  // over all experts

  __device__ __forceinline__ Token(const RouterLaunch& launch, uint32* smem) : Row(launch, smem), p(launch) {}

  __device__ __forceinline__ bool exists(int expert) const { return expert >= 0 && expert < p.num_experts; }

  __device__ __forceinline__ void add_up_softmax() {
    int run = experts_of_lane(p.num_experts), begin = lane * run, end = min(begin + run, p.num_experts);
    softmax = {minus_infinity(), 0.0f};
#pragma unroll 1
    for (int e = lane; e < p.num_experts; e += WARP) softmax.largest = fmaxf(softmax.largest, logits[e]);
    softmax.largest = warp_max(softmax.largest);
#pragma unroll 1
    for (int e = begin; e < end; ++e) softmax.denominator += expf(logits[e] - softmax.largest);
    softmax.denominator = warp_sum(softmax.denominator);
  }

  __device__ __forceinline__ void rank() {
    look_at_all();
    if (!p.expert_table && p.num_groups > 1) drop_groups();
  }

  // The softmax over all experts, and keys that need it.
  __device__ __forceinline__ void look_at_all() {
    if (needs_whole_softmax(p)) add_up_softmax();
    if (p.expert_table || !ranks_apart(p) || p.scoring != SOFTMAX || p.select_by != SCORES) return;
#pragma unroll 1
    for (int e = lane; e < p.num_experts; e += WARP) keys[e] = ranked(p, e, softmax(logits[e]));
    __syncwarp();
  }

  // Keeps the top_groups best groups of num_experts / num_groups neighbours.
  __device__ __forceinline__ void drop_groups() {
    int size = p.num_experts / p.num_groups, share = 1;  // lanes that share a group
    while (2 * share * p.num_groups <= WARP) share *= 2;
    int steps = ceil_div(size, share);
#pragma unroll 1
    for (int base = 0; base < p.num_groups; base += WARP / share) {
      int group = base + lane / share;
      uint32 first = TAKEN, second = TAKEN;
      int step = group % steps;  // groups begin at different banks
#pragma unroll 1
      for (int i = 0; i < steps && group < p.num_groups; ++i) {
        int member = step * share + lane % share;
        uint32 key = member < size ? keys[group * size + member] : TAKEN;
        second = max(second, min(first, key));
        first = max(first, key);
        if (++step == steps) step = 0;
      }
#pragma unroll 1
      for (int lanes = 1; lanes < share; lanes *= 2) {
        uint32 other_first = __shfl_xor_sync(FULL_MASK, first, lanes);
        uint32 other_second = __shfl_xor_sync(FULL_MASK, second, lanes);
        second = max(min(first, other_first), max(second, other_second));
        first = max(first, other_first);
      }
      bool pair = p.group_score == GROUP_SUM_TOP2 && size > 1;
      if (group < p.num_groups && lane % share == 0)
        words[group] = key_of(pair ? score_of(first) + score_of(second) : score_of(first));
    }
    __syncwarp();
#pragma unroll 1
    for (int group = lane / share; group < p.num_groups; group += WARP / share) {
      uint32 own = words[group];
      int better = 0;
#pragma unroll 1
      for (int g = 0; g < p.num_groups; ++g) better += words[g] > own || (words[g] == own && g < group);
      if (better < p.top_groups) continue;
      for (int member = lane % share; member < size; member += share) keys[group * size + member] = key_of(p.dropped_value);
    }
    __syncwarp();
  }

  // A slot without an expert has the logit whose score is 0.
  __device__ __forceinline__ void look_up(int64 token) {
    int64 id = p.input_ids[token];
    bool known = id >= 0 && id < p.vocab_size;
#pragma unroll 1
    for (int j = lane; j < p.top_k; j += WARP) {
      int expert = known ? p.expert_table[id * p.top_k + j] : -1;
      words[j] = expert;
      chosen[j] = exists(expert) ? logits[expert] : minus_infinity();
    }
    __syncwarp();
  }

  __device__ __forceinline__ void choose() {
    uint32 own[KEYS], best;
    int at;
#pragma unroll
    for (int i = 0; i < KEYS; ++i) {
      int e = lane + i * WARP;
      own[i] = e >= p.num_experts ? TAKEN : ranks_apart(p) ? keys[e] : key_of(logits[e]);
    }
    auto look = [&] {
      best = TAKEN, at = 0;
#pragma unroll
      for (int i = 0; i < KEYS; ++i)
        if (own[i] > best) best = own[i], at = i;
    };
    look();
#pragma unroll 1
    for (int j = 0; j < p.top_k; ++j) {
      uint32 top = __reduce_max_sync(FULL_MASK, best);
      uint32 expert = __reduce_min_sync(FULL_MASK, best == top ? (uint32)(lane + at * WARP) : 0xffffffffu);
      if (expert % WARP == (uint32)lane) {
        words[j] = expert;
        chosen[j] = logits[expert];
#pragma unroll
        for (int i = 0; i < KEYS; ++i)
          if (i == at) own[i] = TAKEN;
        look();
      }
      __syncwarp();
    }
  }

  __device__ __forceinline__ void finish_choices(int64 token) {
    ChoicesInShared choices{chosen, p.top_k};
    weigh(p, choices, softmax);
#pragma unroll 1
    for (int j = lane; j < p.top_k; j += WARP) store(p, token, j, words[j], chosen[j]);
  }

  // Each choice is weighed among the experts near it that were not chosen before: one pass over the logits a choice.
  __device__ __forceinline__ void mix(int64 token) {
#pragma unroll 1
    for (int j = 0; j < p.top_k; ++j) {
      float own = chosen[j], sum = 0.0f;
#pragma unroll 1
      for (int e = lane; e < p.num_experts; e += WARP) {
        float rival = logits[e];
        bool left = !((own - rival) / fmaxf(fabsf(rival), own) > 2.0f * p.mixer_eps);
#pragma unroll 1
        for (int before = 0; before < j; ++before) left = left && e != words[before];
        if (left) sum += expf(rival - own);
      }
      sum = warp_sum(sum);
      if (lane == 0) store(p, token, j, words[j], 1.0f / sum);
    }
  }
};

// A token that is the only one of its block. A warp would take the best expert, then the next, each time with all lanes; here
// every thread finds out how many experts are better than its own, and every warp looks at groups of its own.
template <int KEYS, int WARPS> struct TokenAlone : Token<KEYS> {
  using Base = Token<KEYS>;
  using Base::p, Base::lane, Base::keys, Base::words, Base::chosen, Base::logits;
  int warp = threadIdx.x / WARP, expert = threadIdx.x;  // a thread has one
  bool has_expert = expert < p.num_experts;

  __device__ __forceinline__ TokenAlone(const RouterLaunch& launch, uint32* smem) : Base(launch, smem) {}
  __device__ __forceinline__ static bool serves(const RouterLaunch& p) {
    return p.num_experts <= WARPS * WARP && !p.expert_table;
  }

  // Of a token whose logits the threads have just read, each its expert's.
  __device__ __forceinline__ void route(int64 token) {
    bool apart = ranks_apart(p);
    if (!has_expert && expert < ceil_div(p.num_experts, 4) * 4) keys[expert] = TAKEN;
    if (!apart && has_expert) keys[expert] = key_of(logits[expert]);
    __syncthreads();  // logits and keys stand, but for those that a softmax gives
    if (warp == 0) this->look_at_all();
    if (p.num_groups > 1) drop_groups_together();
    __syncthreads();  // all keys stand
    choose_together();
    if (warp == 0) {
      if (p.scoring == SPARSE_MIXER) this->mix(token);
      else this->finish_choices(token);
    }
    __syncthreads();
  }

 private:
  // As drop_groups: a warp a group, then a thread an expert.
  __device__ __forceinline__ void drop_groups_together() {
    int size = p.num_experts / p.num_groups;
    bool pair = p.group_score == GROUP_SUM_TOP2 && size > 1;
    __syncthreads();  // keys that a softmax gives stand too
#pragma unroll 1
    for (int group = warp; group < p.num_groups; group += WARPS) {
      uint32 first = TAKEN, second = TAKEN;
#pragma unroll 1
      for (int member = lane; member < size; member += WARP) {
        uint32 key = keys[group * size + member];
        second = max(second, min(first, key));
        first = max(first, key);
      }
      uint32 best = __reduce_max_sync(FULL_MASK, first);
      int holder = __ffs(__ballot_sync(FULL_MASK, first == best)) - 1;
      uint32 next = __reduce_max_sync(FULL_MASK, lane == holder ? second : first);
      if (lane == 0) words[group] = key_of(pair ? score_of(best) + score_of(next) : score_of(best));
    }
    __syncthreads();  // all groups have been looked at
    int group = min(expert / size, p.num_groups - 1), better = 0;
    uint32 own = words[group];
#pragma unroll 1
    for (int g = 0; g < p.num_groups; ++g) better += words[g] > own || (words[g] == own && g < group);
    if (has_expert && better >= p.top_groups) keys[expert] = key_of(p.dropped_value);
    __syncthreads();  // nobody reads the keys of groups any more
  }

  // An expert is choice j if j are better. Equals, of which nobody knows at first, claim the same one, and count then how many
  // of them have a lower id.
  __device__ __forceinline__ void choose_together() {
    uint32 own = has_expert ? keys[expert] : 0xffffffffu;
    for (int j = expert; j < p.top_k; j += WARPS * WARP) words[j] = 0;
    int counts[4] = {};  // four sums, so that an addition need not wait for the one before
#pragma unroll 4
    for (int i = 0; i < ceil_div(p.num_experts, 4); ++i) {
      uint4 four = reinterpret_cast<const uint4*>(keys)[i];
      counts[0] += four.x > own, counts[1] += four.y > own, counts[2] += four.z > own, counts[3] += four.w > own;
    }
    int better = has_expert ? counts[0] + counts[1] + counts[2] + counts[3] : p.top_k;
    __syncthreads();  // nobody has claimed a place yet
    if (better < p.top_k) atomicAdd(reinterpret_cast<int*>(&words[better]), 1);
    __syncthreads();  // all places are claimed
    bool among_equals = better < p.top_k && words[better] > 1;
    __syncthreads();  // nobody reads the claims any more
    if (among_equals) {
#pragma unroll 1
      for (int e = 0; e < expert; ++e) better += keys[e] == own;
    }
    if (better < p.top_k) words[better] = expert, chosen[better] = logits[expert];
    __syncthreads();  // the choices stand
  }
};

template <int WARPS>
__device__ __forceinline__ void read(const RouterLaunch& launch, int64 first, int count, uint32* smem) {
  if (launch.logits_type == FLOAT32) load<WARPS, float>(launch, first, count, smem);
  else if (launch.logits_type == BFLOAT16) load<WARPS, bf16>(launch, first, count, smem);
  else load<WARPS, fp16>(launch, first, count, smem);
  finish<WARPS>(launch, count, smem);
}

// The ids and weights of tokens begin .. end - 1, written by the whole block.
template <int KEYS, int WARPS>
__device__ __forceinline__ void route_tokens(const RouterLaunch& launch, int64 begin, int64 end, uint32* smem) {
  int warp = threadIdx.x / WARP;
  if (end - begin == 1 && TokenAlone<KEYS, WARPS>::serves(launch)) {
    read<WARPS>(launch, begin, 1, smem);
    TokenAlone<KEYS, WARPS>(launch, smem).route(begin);
    return;
  }
#pragma unroll 1
  for (int64 first = begin; first < end; first += WARPS) {
    int count = end - first < WARPS ? (int)(end - first) : WARPS;
    read<WARPS>(launch, first, count, smem);
    __syncthreads();
    if (warp < count) {
      Token<KEYS> token(launch, smem + warp * launch.words_per_warp);
      token.rank();
      if (launch.expert_table) token.look_up(first + warp);
      else token.choose();
      if (launch.scoring == SPARSE_MIXER) token.mix(first + warp);
      else token.finish_choices(first + warp);
    }
    __syncthreads();
  }
}

}  // namespace route
