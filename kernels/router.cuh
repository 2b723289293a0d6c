// router: what all ways to route share: the launch struct, keys that order as scores do, the weights of the choices.
//
// Whatever of a token's result is rounded is computed here, in one order, so that a token has the same bits in every batch
// and in every kernel: the scores that experts are ranked by, the sums of a softmax, the weights.
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

__device__ __forceinline__ float minus_infinity() { return __uint_as_float(0xff800000u); }

// Whether experts are ranked by something else than their logits.
__device__ __forceinline__ bool ranks_apart(const RouterLaunch& p) { return p.selection_bias || p.num_groups > 1; }

// Whether weights are ratios that no epsilon disturbs: those of a softmax are then the softmax over the chosen logits.
__device__ __forceinline__ bool is_exact_ratio(const RouterLaunch& p) { return p.renormalize && p.epsilon == 0.0f; }

// Whether the softmax over all experts is looked at, by the ranks or by the weights.
__device__ __forceinline__ bool needs_whole_softmax(const RouterLaunch& p) {
  return p.scoring == SOFTMAX && p.select_by == SCORES && (ranks_apart(p) || !is_exact_ratio(p));
}

// The score of a logit that needs no others.
__device__ __forceinline__ float score_alone(const RouterLaunch& p, float logit) {
  if (p.scoring == SIGMOID) return __fdividef(1.0f, 1.0f + expf(-logit));
  // Beyond 20 softplus is l or e^l up to e^-20 = 2e-9; below, the root is taken of e^l itself, which may underflow.
  if (logit < -20.0f) return expf(0.5f * logit);
  return sqrtf(logit > 20.0f ? logit : log1pf(expf(logit)));
}

// The sigmoid that experts are ranked by, in four instructions; its relative error grows to 2e-6 at a logit of -30. Weights
// take the one above.
__device__ __forceinline__ float quick_sigmoid(float logit) {
  float divisor = 1.0f + exp2f(-1.4426950408889634f * logit);
#ifdef __CUDA_ARCH__
  float result;  // __fdividef multiplies by 1
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(divisor));
  return result;
#else
  return __fdividef(1.0f, divisor);
#endif
}

// What an expert with this logit is ranked by before the bias, where the logit itself does not do; no softmax.
__device__ __forceinline__ float ranking_score(const RouterLaunch& p, float logit) {
  if (p.select_by == LOGITS) return logit;
  return p.scoring == SIGMOID ? quick_sigmoid(logit) : score_alone(p, logit);
}

// The key of an expert whose score, or logit, is `value`.
__device__ __forceinline__ uint32 ranked(const RouterLaunch& p, int expert, float value) {
  return key_of(p.selection_bias ? value + p.selection_bias[expert] : value);
}

// The experts of a lane in sums over all of them: neighbours, 4, 8, 16 or 32.
__device__ __forceinline__ int experts_of_lane(int num_experts) {
  int run = 4;
  while (run * WARP < num_experts) run *= 2;
  return run;
}

// A softmax: of these logits, or of all that a warp has. NaN and -inf rows give NaN weights.
struct Softmax {
  float largest = 0.0f, denominator = 1.0f;
  __device__ __forceinline__ float operator()(float logit) const { return expf(logit - largest) / denominator; }
};

// Replaces the logits of a token's choices by their weights but for the scale. `choices` says which of them a lane has:
// each(visit) calls visit(value) for every one of the lane's, sum and largest add up what the lanes of the token have.
// Renormalising a softmax without epsilon is the softmax over the chosen logits, which needs no second division. Far below
// zero sigmoid(l) = e^l and sqrt(softplus(l)) = e^(l / 2), so that a renormalised row keeps its ratios where the scores
// themselves would underflow to 0 / 0.
template <typename Choices>
__device__ __forceinline__ void weigh(const RouterLaunch& p, Choices& choices, Softmax softmax) {
  bool exact_ratio = is_exact_ratio(p);
  int order = p.renormalize;
  float shift = 0.0f, sum = 0.0f, top = minus_infinity();
  if (p.scoring == SOFTMAX ? p.select_by == LOGITS || exact_ratio : exact_ratio) {
    choices.each([&](float& logit) { top = fmaxf(top, logit); });
    top = choices.largest(top);
  }
  if (p.scoring == SOFTMAX && (p.select_by == LOGITS || exact_ratio)) {
    softmax = {top, 0.0f};
    choices.each([&](float& logit) { softmax.denominator += expf(logit - top); });
    softmax.denominator = choices.sum(softmax.denominator);
    if (exact_ratio && order == 1) order = 0;
  } else if (p.scoring != SOFTMAX && exact_ratio && top < -40.0f) {
    shift = top;
  }
  choices.each([&](float& value) {
    float power = p.scoring == SQRT_SOFTPLUS ? 0.5f : 1.0f;
    if (shift != 0.0f) value = expf(power * (value - shift));
    else value = p.scoring == SOFTMAX ? softmax(value) : score_alone(p, value);
    sum += order == 2 ? value * value : value;
  });
  if (!order) return;
  sum = choices.sum(sum);
  if (order == 2) sum = sqrtf(sum);
  float norm = p.epsilon_mode == EPSILON_ADD ? sum + p.epsilon : (sum < p.epsilon ? p.epsilon : sum);
  choices.each([&](float& weight) { weight = weight / norm; });
}

// Writes choice j of a token; what exists no expert has id -1 and weight 0.
__device__ __forceinline__ void store(const RouterLaunch& p, int64 token, int j, int expert, float weight) {
  bool exists = expert >= 0 && expert < p.num_experts;
  weight *= p.scale;
  if (p.expert_scale && exists) weight *= p.expert_scale[expert];
  p.topk_ids[token * p.top_k + j] = exists ? expert : -1;
  p.topk_weights[token * p.top_k + j] = exists ? weight : 0.0f;
}

}  // namespace route
