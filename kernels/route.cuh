// route: logits of tokens -> their topk_ids and topk_weights; the block reads, a warp a token chooses and weighs.
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
//   __syncthreads     the logits of the block's tokens are in shared memory, or no longer needed there
//   __syncwarp        a warp shares its token with no other
#pragma once
#include "types.cuh"

namespace route {

enum Scoring { SOFTMAX = 0, SIGMOID = 1, SQRT_SOFTPLUS = 2, SPARSE_MIXER = 3 };
enum SelectBy { SCORES = 0, LOGITS = 1 };
enum GroupScore { GROUP_MAX = 0, GROUP_SUM_TOP2 = 1 };
enum EpsilonMode { EPSILON_ADD = 0, EPSILON_CLAMP = 1 };
enum LogitsType { FLOAT32 = 0, BFLOAT16 = 1, FLOAT16 = 2 };

struct RouterLaunch {
  const void* logits;           // (num_parts, num_tokens, num_experts), to be added part by part
  const float* router_bias;     // (num_experts), added last, or null
  const float* selection_bias;  // (num_experts) or null
  const float* expert_scale;    // (num_experts) or null
  const int* expert_table;      // (vocab_size, top_k) or null
  const int* input_ids;         // (num_tokens), with a table
  int* topk_ids;                // (num_tokens, top_k)
  float* topk_weights;          // (num_tokens, top_k)
  int64 part_stride, row_stride, col_stride;
  int num_parts, num_tokens, num_experts, top_k;
  int scoring, select_by;
  int num_groups, top_groups, group_score;
  int renormalize;              // 0: no; 1 or 2: the order of the norm
  int epsilon_mode;
  float dropped_value;          // what experts of dropped groups are ranked with: -inf or 0
  float epsilon, scale, softcap;
  float mixer_eps;              // of SPARSE_MIXER
  int vocab_size;
  int words_per_warp;           // of shared memory
  int logits_type, padding;
};
static_assert(sizeof(RouterLaunch) == 168, "cumoe/gpu/route.py packs 168 bytes");

constexpr uint32 TAKEN = 0, NAN_KEY = 1;

__device__ __forceinline__ uint32 key_of(float score) {
  if (score != score) return NAN_KEY;
  uint32 bits = __float_as_uint(score);
  if (bits == 0x80000000u) bits = 0;  // -0 ties with +0
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}
__device__ __forceinline__ float score_of(uint32 key) {
  if (key == NAN_KEY) return __uint_as_float(0x7fc00000u);
  return __uint_as_float(key & 0x80000000u ? key & 0x7fffffffu : ~key);
}

// Whether experts are ranked by something else than their logits.
__device__ __forceinline__ bool ranks_apart(const RouterLaunch& p) { return p.selection_bias || p.num_groups > 1; }

// The key of an expert whose score, or logit, is `value`.
__device__ __forceinline__ uint32 ranked(const RouterLaunch& p, int expert, float value) {
  return key_of(p.selection_bias ? value + p.selection_bias[expert] : value);
}

// The score of a logit that needs no others.
__device__ __forceinline__ float score_alone(const RouterLaunch& p, float logit) {
  if (p.scoring == SIGMOID) return __fdividef(1.0f, 1.0f + expf(-logit));
  // Beyond 20 softplus is l or e^l up to e^-20 = 2e-9; below, the root is taken of e^l itself, which may underflow.
  if (logit < -20.0f) return expf(0.5f * logit);
  return sqrtf(logit > 20.0f ? logit : log1pf(expf(logit)));
}

// A token's part of shared memory.
struct Row {
  uint32* words;  // (max(top_k, num_groups)) keys of groups first, chosen ids later
  float* chosen;  // (top_k) logits of the choices, then their weights
  float* logits;  // (num_experts)
  uint32* keys;   // (num_experts) where ranks_apart()

  __device__ __forceinline__ Row(const RouterLaunch& p, uint32* smem)
      : words(smem), chosen(reinterpret_cast<float*>(smem) + max(p.top_k, p.num_groups)), logits(chosen + p.top_k),
        keys(reinterpret_cast<uint32*>(logits) + p.num_experts) {}
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

// The sums of all parts into shared memory. A single part stays as it is: a sum would flush subnormals.
template <int WARPS, typename T>
__device__ __forceinline__ void load(const RouterLaunch& p, int64 first_token, int count, uint32* smem) {
  for_each_logit<WARPS>(p, count, [&](int t, int e) {
    const T* at = static_cast<const T*>(p.logits) + (first_token + t) * p.row_stride + e * p.col_stride;
    float value = to_float(*at);
    if (sizeof(T) == sizeof(float)) {  // parts are float32
#pragma unroll 4
      for (int part = 1; part < p.num_parts; ++part) value += to_float(at[part * p.part_stride]);
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
    if (scores) row.keys[e] = ranked(p, e, p.select_by == LOGITS ? value : score_alone(p, value));
  });
}

// KEYS: experts of a lane, of which there are at most 32 KEYS in all.
template <int KEYS> struct Token : Row {
  const RouterLaunch& p;
  int lane = threadIdx.x % WARP;
  float largest = 0.0f, denominator = 1.0f;  // of the softmax over all experts, or over the choices

  __device__ __forceinline__ Token(const RouterLaunch& launch, uint32* smem) : Row(launch, smem), p(launch) {}

  __device__ __forceinline__ float score(float logit) const {
    return p.scoring == SOFTMAX ? expf(logit - largest) / denominator : score_alone(p, logit);
  }

  __device__ __forceinline__ bool exists(int expert) const { return expert >= 0 && expert < p.num_experts; }

  // Largest logit and sum of exponentials. NaN and -inf rows give NaN weights.
  __device__ __forceinline__ void softmax_over(const float* values, int n) {
    largest = __uint_as_float(0xff800000u);
#pragma unroll 1
    for (int i = lane; i < n; i += WARP) largest = fmaxf(largest, values[i]);
    largest = warp_max(largest);
    denominator = 0.0f;
#pragma unroll 1
    for (int i = lane; i < n; i += WARP) denominator += expf(values[i] - largest);
    denominator = warp_sum(denominator);
  }

  __device__ __forceinline__ void rank() {
    bool softmax = p.scoring == SOFTMAX && p.select_by == SCORES;
    if (softmax) softmax_over(logits, p.num_experts);
    if (p.expert_table || !ranks_apart(p)) return;
    if (softmax) {
#pragma unroll 1
      for (int e = lane; e < p.num_experts; e += WARP) keys[e] = ranked(p, e, score(logits[e]));
      __syncwarp();
    }
    if (p.num_groups > 1) drop_groups();
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
      chosen[j] = exists(expert) ? logits[expert] : __uint_as_float(0xff800000u);
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

  // Weights of the chosen experts. Renormalising a softmax without epsilon is the softmax over the chosen logits, which
  // needs no second division. Far below zero sigmoid(l) = e^l and sqrt(softplus(l)) = e^(l / 2), so that a renormalised
  // row keeps its ratios where the scores themselves would underflow to 0 / 0.
  __device__ __forceinline__ void weigh(int64 token) {
    bool exact_ratio = p.renormalize && p.epsilon == 0.0f;
    int order = p.renormalize;
    if (p.scoring == SOFTMAX && (p.select_by == LOGITS || exact_ratio)) {
      softmax_over(chosen, p.top_k);
      if (exact_ratio && order == 1) order = 0;
    }
    float shift = 0.0f, sum = 0.0f, norm = 1.0f;
    if (exact_ratio && p.scoring != SOFTMAX) {
      float top = __uint_as_float(0xff800000u);
#pragma unroll 1
      for (int j = lane; j < p.top_k; j += WARP) top = fmaxf(top, chosen[j]);
      top = warp_max(top);
      if (top < -40.0f) shift = top;
    }
#pragma unroll 1
    for (int j = lane; j < p.top_k; j += WARP) {
      float logit = chosen[j], power = p.scoring == SQRT_SOFTPLUS ? 0.5f : 1.0f;
      float weight = shift == 0.0f ? score(logit) : expf(power * (logit - shift));
      chosen[j] = weight;
      sum += order == 2 ? weight * weight : weight;
    }
    if (order) {
      sum = warp_sum(sum);
      if (order == 2) sum = sqrtf(sum);
      norm = p.epsilon_mode == EPSILON_ADD ? sum + p.epsilon : (sum < p.epsilon ? p.epsilon : sum);
    }
#pragma unroll 1
    for (int j = lane; j < p.top_k; j += WARP) store(token, j, order ? chosen[j] / norm : chosen[j]);
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
      if (lane == 0) store(token, j, 1.0f / sum);
    }
  }

  __device__ __forceinline__ void store(int64 token, int j, float weight) const {
    int expert = words[j];
    bool there = exists(expert);
    weight *= p.scale;
    if (p.expert_scale && there) weight *= p.expert_scale[expert];
    p.topk_ids[token * p.top_k + j] = there ? expert : -1;
    p.topk_weights[token * p.top_k + j] = there ? weight : 0.0f;
  }
};

// The ids and weights of tokens begin .. end - 1, written by the whole block.
template <int KEYS, int WARPS>
__device__ __forceinline__ void route_tokens(const RouterLaunch& launch, int64 begin, int64 end, uint32* smem) {
  int warp = threadIdx.x / WARP;
#pragma unroll 1
  for (int64 first = begin; first < end; first += WARPS) {
    int count = end - first < WARPS ? (int)(end - first) : WARPS;
    if (launch.logits_type == FLOAT32) load<WARPS, float>(launch, first, count, smem);
    else if (launch.logits_type == BFLOAT16) load<WARPS, bf16>(launch, first, count, smem);
    else load<WARPS, fp16>(launch, first, count, smem);
    finish<WARPS>(launch, count, smem);
    __syncthreads();
    if (warp < count) {
      Token<KEYS> token(launch, smem + warp * launch.words_per_warp);
      token.rank();
      if (launch.expert_table) token.look_up(first + warp);
      else token.choose();
      if (launch.scoring == SPARSE_MIXER) token.mix(first + warp);
      else token.weigh(first + warp);
    }
    __syncthreads();
  }
}

}  // namespace route
