// route: one token's logits -> its topk_ids and topk_weights, by a warp.
//
//   smem     a warp: num_experts logits, as many keys where something is added to what ranks, max(top_k, num_groups) words;
//            at 1024 experts and top_k = 8 between 4 and 8 KiB
//
// The logits are read once: they may come as partial sums (see router_gemm.cu), which are added in order, the bias last.
// An expert is ranked by a 32-bit key that orders as its score does: NaN lowest, then -inf upward. A lane keeps the best of
// its own experts (lane, lane + 32, ...) in registers; the best lane's is taken, among equals the lowest id, and that lane
// alone looks for its next one. So ids are distinct and in range for any input. Where no bias and no groups interfere the
// logit itself is ranked, since every scoring function is monotone: no tie that rounding of the scores would bring. The
// bias never reaches a weight: weights are computed from the logits. With an expert_table the ids of a token are looked up
// by its token id; those that name no expert get id -1, weight 0.
//
// barrier: __syncwarp only; a warp shares nothing with the others.
#pragma once
#include "types.cuh"

namespace route {

enum Scoring { SOFTMAX = 0, SIGMOID = 1, SQRT_SOFTPLUS = 2, SPARSE_MIXER = 3 };
enum SelectBy { SCORES = 0, LOGITS = 1 };
enum GroupScore { GROUP_MAX = 0, GROUP_SUM_TOP2 = 1 };
enum EpsilonMode { EPSILON_ADD = 0, EPSILON_CLAMP = 1 };

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
};
static_assert(sizeof(RouterLaunch) == 160, "cumoe/gpu/route.py packs 160 bytes");

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

// The `count` largest of n <= 1024 keys, one after the other, among equals the lowest index first: visit(i, index) is called
// by all lanes. key_at(index) is asked for again only by the lane whose key was taken.
template <typename KeyAt, typename Visit>
__device__ __forceinline__ void take_best(int n, int count, int lane, KeyAt key_at, Visit visit) {
  uint32 taken = 0, best_key, best_index;  // bit i: index lane + 32 i
  auto look = [&] {
    best_key = TAKEN, best_index = 0x7fffffffu;
#pragma unroll 4
    for (int i = 0, index = lane; index < n; ++i, index += WARP) {
      uint32 key = taken >> i & 1 ? TAKEN : key_at(index);
      if (key > best_key) best_key = key, best_index = (uint32)index;
    }
  };
  look();
#pragma unroll 1
  for (int i = 0; i < count; ++i) {
    uint32 top = __reduce_max_sync(FULL_MASK, best_key);
    uint32 index = __reduce_min_sync(FULL_MASK, best_key == top ? best_index : 0x7fffffffu);
    visit(i, (int)index);
    if ((int)index % WARP == lane) {
      taken |= 1u << index / WARP;
      look();
    }
    __syncwarp();
  }
}

struct Token {
  const RouterLaunch& p;
  float* logits;  // (num_experts)
  uint32* words;  // (max(top_k, num_groups)) group keys first, chosen ids later
  uint32* keys;   // (num_experts) where ranks_apart()
  int lane;
  float largest, denominator;  // of the softmax over all experts

  // Sums the parts of a row, several experts of a lane and four parts at a time on their way.
  template <typename T> __device__ __forceinline__ void load(const T* row) {
    constexpr int AHEAD = 8;
    for (int first = lane; first < p.num_experts; first += AHEAD * WARP) {
      float sum[AHEAD] = {};
#pragma unroll 4
      for (int part = 0; part < p.num_parts; ++part) {
#pragma unroll
        for (int i = 0; i < AHEAD; ++i) {
          int e = min(first + i * WARP, p.num_experts - 1);  // the last one again: no branch around a load
          float value = to_float(row[part * p.part_stride + e * p.col_stride]);
          sum[i] = part == 0 ? value : sum[i] + value;  // a single part stays as it is: a sum would flush subnormals
        }
      }
#pragma unroll
      for (int i = 0; i < AHEAD; ++i) {
        int e = first + i * WARP;
        if (e < p.num_experts) {
          float value = p.router_bias ? sum[i] + p.router_bias[e] : sum[i];
          logits[e] = p.softcap > 0.0f ? p.softcap * tanhf(value / p.softcap) : value;
        }
      }
    }
    __syncwarp();
  }

  __device__ __forceinline__ float logit(int expert) const { return logits[expert]; }

  // Whether experts are ranked by something else than their logits.
  __device__ __forceinline__ bool ranks_apart() const { return p.selection_bias || p.num_groups > 1; }

  // The score of a logit, or of a logit moved by `shift` when all chosen ones lie far below zero (see weigh).
  __device__ __forceinline__ float score(float logit) const {
    if (p.scoring == SOFTMAX) return expf(logit - largest) / denominator;
    if (p.scoring == SIGMOID) return 1.0f / (1.0f + expf(-logit));
    // Beyond 20 softplus is l or e^l up to e^-20 = 2e-9; below, the root is taken of e^l itself, which may underflow.
    if (logit < -20.0f) return expf(0.5f * logit);
    return sqrtf(logit > 20.0f ? logit : log1pf(expf(logit)));
  }

  __device__ __forceinline__ bool exists(int expert) const { return expert >= 0 && expert < p.num_experts; }

  // The logit of the j-th choice; a slot without an expert has the logit whose score is 0.
  __device__ __forceinline__ float chosen_logit(int j) const {
    return exists(words[j]) ? logit(words[j]) : __uint_as_float(0xff800000u);
  }

  // Largest logit and sum of exponentials over n items; item(i) gives a logit. NaN and -inf rows give NaN weights.
  template <typename Item> __device__ __forceinline__ void softmax_over(int n, Item item) {
    largest = __uint_as_float(0xff800000u);
    for (int i = lane; i < n; i += WARP) largest = fmaxf(largest, item(i));
    largest = warp_max(largest);
    denominator = 0.0f;
    for (int i = lane; i < n; i += WARP) denominator += expf(item(i) - largest);
    denominator = warp_sum(denominator);
  }

  __device__ __forceinline__ void rank() {
    if (p.scoring == SOFTMAX && p.select_by == SCORES) softmax_over(p.num_experts, [&](int e) { return logit(e); });
    if (p.expert_table || !ranks_apart()) return;
    for (int e = lane; e < p.num_experts; e += WARP) {
      float value = p.select_by == LOGITS ? logit(e) : score(logit(e));
      keys[e] = key_of(p.selection_bias ? value + p.selection_bias[e] : value);
    }
    __syncwarp();
    if (p.num_groups > 1) drop_groups();
  }

  // Keeps the top_groups best groups of num_experts / num_groups neighbours.
  __device__ __forceinline__ void drop_groups() {
    int size = p.num_experts / p.num_groups, share = 1;  // lanes that share a group
    while (2 * share * p.num_groups <= WARP) share *= 2;
    int steps = ceil_div(size, share);
    for (int base = 0; base < p.num_groups; base += WARP / share) {
      int group = base + lane / share;
      uint32 first = TAKEN, second = TAKEN;
      for (int i = 0; i < steps && group < p.num_groups; ++i) {
        int member = (i + group) % steps * share + lane % share;  // groups begin at different banks
        uint32 key = member < size ? keys[group * size + member] : TAKEN;
        if (key > first) { second = first; first = key; }
        else if (key > second) second = key;
      }
      for (int step = 1; step < share; step *= 2) {
        uint32 other_first = __shfl_xor_sync(FULL_MASK, first, step), other_second = __shfl_xor_sync(FULL_MASK, second, step);
        second = max(min(first, other_first), max(second, other_second));
        first = max(first, other_first);
      }
      bool pair = p.group_score == GROUP_SUM_TOP2 && size > 1;
      if (group < p.num_groups && lane % share == 0)
        words[group] = key_of(pair ? score_of(first) + score_of(second) : score_of(first));
    }
    __syncwarp();
    auto key_at = [&](int group) { return words[group]; };
    take_best(p.num_groups, p.top_groups, lane, key_at, [&](int, int group) {
      if (group % WARP == lane) words[group] = TAKEN;
    });
    for (int e = lane; e < p.num_experts; e += WARP)
      if (words[e / size] != TAKEN) keys[e] = key_of(p.dropped_value);
    __syncwarp();
  }

  __device__ __forceinline__ void look_up(int64 token) {
    int64 id = p.input_ids[token];
    bool known = id >= 0 && id < p.vocab_size;
    for (int j = lane; j < p.top_k; j += WARP) words[j] = known ? p.expert_table[id * p.top_k + j] : -1;
    __syncwarp();
  }

  __device__ __forceinline__ void choose() {
    auto visit = [&](int j, int expert) { if (lane == 0) words[j] = expert; };
    if (ranks_apart()) take_best(p.num_experts, p.top_k, lane, [&](int e) { return keys[e]; }, visit);
    else take_best(p.num_experts, p.top_k, lane, [&](int e) { return key_of(logits[e]); }, visit);
  }

  __device__ __forceinline__ float raw_weight(int j, float shift) const {
    float value = chosen_logit(j);
    if (shift == 0.0f) return score(value);
    return expf((p.scoring == SQRT_SOFTPLUS ? 0.5f : 1.0f) * (value - shift));
  }

  // Weights of the chosen experts. Renormalising a softmax without epsilon is the softmax over the chosen logits, which
  // needs no second division. Far below zero sigmoid(l) = e^l and sqrt(softplus(l)) = e^(l / 2), so that a renormalised
  // row keeps its ratios where the scores themselves would underflow to 0 / 0.
  __device__ __forceinline__ void weigh(int64 token) {
    bool exact_ratio = p.renormalize && p.epsilon == 0.0f;
    int order = p.renormalize;
    if (p.scoring == SOFTMAX && (p.select_by == LOGITS || exact_ratio)) {
      softmax_over(p.top_k, [&](int j) { return chosen_logit(j); });
      if (exact_ratio && order == 1) order = 0;
    }
    float shift = 0.0f;
    if (exact_ratio && p.scoring != SOFTMAX) {
      float top = __uint_as_float(0xff800000u);
      for (int j = lane; j < p.top_k; j += WARP) top = fmaxf(top, chosen_logit(j));
      top = warp_max(top);
      if (top < -40.0f) shift = top;
    }
    float norm = 1.0f;
    if (order) {
      float sum = 0.0f;
      for (int j = lane; j < p.top_k; j += WARP) {
        float weight = raw_weight(j, shift);
        sum += order == 2 ? weight * weight : weight;
      }
      sum = warp_sum(sum);
      if (order == 2) sum = sqrtf(sum);
      norm = p.epsilon_mode == EPSILON_ADD ? sum + p.epsilon : (sum < p.epsilon ? p.epsilon : sum);
    }
    for (int j = lane; j < p.top_k; j += WARP) store(token, j, raw_weight(j, shift) / norm);
  }

  // Each choice is weighed among the experts near it that were not chosen before: one pass over the logits a choice.
  __device__ __forceinline__ void mix(int64 token) {
    for (int j = 0; j < p.top_k; ++j) {
      float own = logit(words[j]), sum = 0.0f;
      for (int e = lane; e < p.num_experts; e += WARP) {
        float rival = logit(e);
        bool left = !((own - rival) / fmaxf(fabsf(rival), own) > 2.0f * p.mixer_eps);
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

// The token's ids and weights, written by the calling warp; `words` is its part of shared memory.
template <typename T> __device__ __forceinline__ void route_token(const RouterLaunch& launch, int64 token, uint32* words) {
  int picked = max(launch.top_k, launch.num_groups);
  float* logits = reinterpret_cast<float*>(words) + picked;
  Token row{launch, logits, words, words + picked + launch.num_experts, (int)threadIdx.x % WARP, 0.0f, 1.0f};
  row.load(static_cast<const T*>(launch.logits) + token * launch.row_stride);
  row.rank();
  if (launch.expert_table) row.look_up(token);
  else row.choose();
  if (launch.scoring == SPARSE_MIXER) row.mix(token);
  else row.weigh(token);
}

}  // namespace route
