// route: router logits (num_tokens, num_experts) -> topk_ids, topk_weights (num_tokens, top_k)
//
//   grid     one warp a token, 4 warps a block
//   smem     a warp: num_experts keys + max(top_k, num_groups) words; at 1024 experts and top_k = 1024 8 KiB
//
// An expert is ranked by a 32-bit key that orders as its score does: NaN lowest, then -inf upward, 0 = taken. The best
// key and, among equals, the lowest id win (key and ~id packed in 64 bits), so ids are distinct and in range for any
// input. Where no bias and no groups interfere the logit itself is ranked, since every scoring function is monotone:
// no tie that rounding of the scores would bring. The bias never reaches a weight: weights are computed from the logits.
// With an expert_table the ids of a token are looked up by its token id; those that name no expert get id -1, weight 0.
//
// barrier: __syncwarp only; a warp shares nothing with the others.
#include "types.cuh"

namespace route {

enum Scoring { SOFTMAX = 0, SIGMOID = 1, SQRT_SOFTPLUS = 2, SPARSE_MIXER = 3 };
enum SelectBy { SCORES = 0, LOGITS = 1 };
enum GroupScore { GROUP_MAX = 0, GROUP_SUM_TOP2 = 1 };
enum EpsilonMode { EPSILON_ADD = 0, EPSILON_CLAMP = 1 };

struct RouterLaunch {
  const void* logits;
  const float* selection_bias;  // (num_experts) or null
  const float* expert_scale;    // (num_experts) or null
  const int* expert_table;      // (vocab_size, top_k) or null
  const int* input_ids;         // (num_tokens), with a table
  int* topk_ids;                // (num_tokens, top_k)
  float* topk_weights;          // (num_tokens, top_k)
  int64 row_stride, col_stride;
  int num_tokens, num_experts, top_k;
  int scoring, select_by;
  int num_groups, top_groups, group_score;
  int renormalize;              // 0: no; 1 or 2: the order of the norm
  int epsilon_mode;
  float dropped_value;          // what experts of dropped groups are ranked with: -inf or 0
  float epsilon, scale, softcap;
  float mixer_eps;              // of SPARSE_MIXER
  int words;                    // shared words a warp, beside the keys
  int vocab_size, padding;
};
static_assert(sizeof(RouterLaunch) == 144, "cumoe/gpu/route.py packs 144 bytes");

constexpr int WARPS = 4;
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

// Index of the largest of n keys in shared memory, the lowest index among equals; the same in every lane.
__device__ __forceinline__ int best(const uint32* keys, int n, int lane) {
  uint64 top = 0;
  for (int i = lane; i < n; i += WARP) {
    uint64 candidate = ((uint64)keys[i] << 32) | (uint32)~i;
    if (candidate > top) top = candidate;
  }
#pragma unroll
  for (int step = WARP / 2; step > 0; step /= 2) {
    uint64 other = __shfl_xor_sync(FULL_MASK, top, step);
    if (other > top) top = other;
  }
  return (int)~(uint32)top;
}

template <typename T> struct Token {
  const RouterLaunch& p;
  const T* logits;
  uint32* keys;   // (num_experts)
  uint32* words;  // (max(top_k, num_groups)) group keys first, chosen ids later
  int lane;
  float largest, denominator;  // of the softmax over all experts

  __device__ __forceinline__ float logit(int expert) const {
    float value = to_float(logits[expert * p.col_stride]);
    return p.softcap > 0.0f ? p.softcap * tanhf(value / p.softcap) : value;
  }

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
    bool by_logits = p.select_by == LOGITS || (!p.selection_bias && p.num_groups == 1);
    if (p.scoring == SOFTMAX && p.select_by == SCORES) softmax_over(p.num_experts, [&](int e) { return logit(e); });
    if (p.expert_table) return;
    for (int e = lane; e < p.num_experts; e += WARP) {
      float value = by_logits ? logit(e) : score(logit(e));
      keys[e] = key_of(p.selection_bias ? value + p.selection_bias[e] : value);
    }
    __syncwarp();
    if (p.num_groups > 1) drop_groups();
  }

  // Keeps the top_groups best groups of num_experts / num_groups neighbours; a lane scores a group at a time.
  __device__ __forceinline__ void drop_groups() {
    int size = p.num_experts / p.num_groups;
    for (int group = lane; group < p.num_groups; group += WARP) {
      uint32 first = TAKEN, second = TAKEN;
      for (int e = group * size; e < (group + 1) * size; ++e) {
        uint32 key = keys[e];
        if (key > first) { second = first; first = key; }
        else if (key > second) second = key;
      }
      bool pair = p.group_score == GROUP_SUM_TOP2 && size > 1;
      words[group] = key_of(pair ? score_of(first) + score_of(second) : score_of(first));
    }
    __syncwarp();
    for (int i = 0; i < p.top_groups; ++i) {
      int group = best(words, p.num_groups, lane);
      __syncwarp();
      if (lane == 0) words[group] = TAKEN;
      __syncwarp();
    }
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
    for (int j = 0; j < p.top_k; ++j) {
      int expert = best(keys, p.num_experts, lane);
      __syncwarp();
      if (lane == 0) { words[j] = expert; keys[expert] = TAKEN; }
      __syncwarp();
    }
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

template <typename T> __device__ __forceinline__ void route(const RouterLaunch& launch) {
  extern __shared__ uint32 dynamic_smem[];
  int warp = threadIdx.x / WARP;
  int64 token = (int64)blockIdx.x * WARPS + warp;
  if (token >= launch.num_tokens) return;
  uint32* keys = dynamic_smem + warp * (launch.num_experts + launch.words);
  const T* logits = static_cast<const T*>(launch.logits) + token * launch.row_stride;
  Token<T> row{launch, logits, keys, keys + launch.num_experts, (int)threadIdx.x % WARP, 0.0f, 1.0f};
  row.rank();
  if (launch.expert_table) row.look_up(token);
  else row.choose();
  if (launch.scoring == SPARSE_MIXER) row.mix(token);
  else row.weigh(token);
}

}  // namespace route

#define ROUTE(NAME, T)                                                                       \
  extern "C" __global__ void __launch_bounds__(WARP * route::WARPS, 8)                       \
      NAME(const __grid_constant__ route::RouterLaunch launch) { route::route<T>(launch); }

ROUTE(route_float32, float)
ROUTE(route_bfloat16, bf16)
ROUTE(route_float16, fp16)
