// route_lanes: routing of many tokens, a warp a token at a time, in registers; the same bits as route.cuh.
//
//   lane     KEYS experts that are neighbours, lane * KEYS + i; they come 16 bytes at a time
//   batch    as many tokens one after the other as have room for their choices side by side in a warp: a segment of the next
//            power of two from top_k on each. The lanes of a batch weigh together
//   smem     a warp: the lists of its lanes, or for an odd token a Row of route.cuh
//
// From its keys a lane keeps the LIST best, in order. A choice is the largest head of all lists, and the lane that has it
// moves on. Which expert has that key the lanes find out afterwards, each for its own choice. Where that fails, because keys
// of two lanes tie or because a list came to its end (0.15 % of random tokens with 256 experts in 8 groups, 0.4 % with 10 of
// 512), the keys themselves are looked through. What remains is odd, and route.cuh routes it: keys of a lane or groups that
// tie, a zero (which may be -0), NaN, -inf.
//
// Between few experts a token is chosen from in less time than its logits take to come: those of TOKENS_AHEAD tokens are asked
// for beforehand. With more experts that is more work for the units that are short, and takes longer.
//
// An SM has half as many integer units as issue slots, so it is compares, selects and shifts that count: lists in shared
// memory move on by one load, where registers took four selects.
//
//   __syncwarp       the lists, the choices or an odd token's row are in shared memory, or no longer needed there
//
//   needs    float32 logits in rows of whole, aligned vectors; no table, softcap, mixer; groups of 1, 2, 4 ... lanes, dropped
//            at -inf; ranks by logits or sigmoids where a bias or groups interfere (cumoe/gpu/route_and_count.py)
#pragma once
#include "ptx.cuh"
#include "route.cuh"

namespace route {

constexpr int LIST = 4, VECTOR = 4;
constexpr int FEW_EXPERTS = 32, TOKENS_AHEAD = 4;
constexpr uint32 INFINITY_KEY = 0xff800000u, MINUS_INFINITY_KEY = 0x007fffffu, MINUS_ZERO_KEY = 0x7fffffffu;

// key_of for numbers but -0. NaN comes out above infinity, or below -inf if it has a sign.
__device__ __forceinline__ uint32 key_of_number(float score) {
  uint32 bits = __float_as_uint(score);
  return bits ^ (static_cast<uint32>(static_cast<int>(bits) >> 31) | 0x80000000u);
}

// Its inverse.
__device__ __forceinline__ float number_of(uint32 key) {
  return __uint_as_float(key ^ (~static_cast<uint32>(static_cast<int>(key) >> 31) | 0x80000000u));
}

__device__ __forceinline__ void larger_first(uint32& a, uint32& b) {
  uint32 larger = max(a, b);
  b = min(a, b), a = larger;
}

// The LIST largest keys, largest first: lists of four are sorted, and merged while they have the four best.
template <int KEYS> __device__ __forceinline__ void sort_best(const uint32 (&keys)[KEYS], uint32 (&list)[LIST]) {
#pragma unroll
  for (int first = 0; first < KEYS; first += LIST) {
    uint32 four[LIST];
#pragma unroll
    for (int i = 0; i < LIST; ++i) four[i] = keys[first + i];
    larger_first(four[0], four[1]), larger_first(four[2], four[3]);
    larger_first(four[0], four[2]), larger_first(four[1], four[3]);
    larger_first(four[1], four[2]);
#pragma unroll
    for (int i = 0; i < LIST; ++i) list[i] = first == 0 ? four[i] : max(list[i], four[LIST - 1 - i]);
    if (first == 0) continue;
    larger_first(list[0], list[2]), larger_first(list[1], list[3]);
    larger_first(list[0], list[1]), larger_first(list[2], list[3]);
  }
}

// The choices of a batch, one a lane at most; sums go over the lanes of a segment.
struct ChoicesInLanes {
  float value;
  bool there;
  int segment;
  template <typename Visit> __device__ __forceinline__ void each(Visit visit) {
    if (there) visit(value);
  }
  // As warp_sum adds, but for the zeros of other lanes.
  __device__ __forceinline__ float sum(float value) const {
#pragma unroll 1
    for (int step = segment / 2; step > 0; step /= 2) value += __shfl_xor_sync(FULL_MASK, value, step);
    return value;
  }
  __device__ __forceinline__ float largest(float value) const {
#pragma unroll 1
    for (int step = segment / 2; step > 0; step /= 2) value = fmaxf(value, __shfl_xor_sync(FULL_MASK, value, step));
    return value;
  }
};

// What depends on the router alone, for all tokens.
struct Lanes {
  int segment;        // lanes that have room for the choices of a token: 1, 2, 4 ... 32
  int per_group;      // lanes that share a group of experts, where there are several
  int by_sigmoids;    // experts are ranked by their sigmoids, else by their logits
  int whole_softmax;  // needs_whole_softmax
};

// What a lane knows of its choice.
struct Choice {
  uint32 key = TAKEN;
  int expert = 0;
  Softmax softmax;  // over all experts
};

// The logit of one expert: the sum of all parts, in order, and the bias.
__device__ __forceinline__ float logit_of(const RouterLaunch& p, int64 token, int expert) {
  const float* at = static_cast<const float*>(p.logits) + token * p.row_stride + expert;
  float value = *at;
#pragma unroll 4
  for (int part = 1; part < p.num_parts; ++part) value += at[part * p.part_stride];
  return p.router_bias ? value + p.router_bias[expert] : value;
}

// WHOLE: there are 32 KEYS experts, not fewer.
template <int KEYS, bool WHOLE> struct Router {
  static constexpr int VECTORS = KEYS / VECTOR, PARTS_AHEAD = 16 / KEYS;
  static constexpr uint32 STEP = WARP * sizeof(uint32), PLACES = (KEYS > LIST ? KEYS : LIST + 1) * STEP;  // bytes

  const RouterLaunch& p;
  const Lanes& lanes;
  uint32* smem;  // lists of the lanes, each with an end, or their keys; from PLACES on where the choices stand in them
  int lane = threadIdx.x % WARP;
  uint32 own_list = lane * sizeof(uint32);

  __device__ __forceinline__ bool exists(int i) const {
    return WHOLE || lane * KEYS + i / VECTOR * VECTOR < p.num_experts;
  }

  __device__ __forceinline__ uint32& at(uint32 byte) const {
    return *reinterpret_cast<uint32*>(reinterpret_cast<char*>(smem) + byte);
  }

  // The lane's part of a row.
  __device__ __forceinline__ void read(const float* row, float4 (&vectors)[VECTORS]) const {
#pragma unroll
    for (int v = 0; v < VECTORS; ++v) {
      if (!WHOLE) vectors[v] = {0.0f, 0.0f, 0.0f, 0.0f};
      if (exists(v * VECTOR)) vectors[v] = reinterpret_cast<const float4*>(row + lane * KEYS)[v];
    }
  }

  static constexpr bool ASKS = KEYS == VECTOR && !WHOLE;  // may have few experts
  // Lets a token's logits come to the L2.
  __device__ __forceinline__ void ask_for(const float* row) const {
    if (p.num_experts > FEW_EXPERTS || !exists(0)) return;
#pragma unroll 1
    for (int part = 0; part < p.num_parts; ++part, row += p.part_stride) prefetch_to_l2(row + lane * KEYS);
  }

  __device__ __forceinline__ static void add(float (&values)[KEYS], const float4 (&vectors)[VECTORS]) {
#pragma unroll
    for (int v = 0; v < VECTORS; ++v) {
      values[v * VECTOR] += vectors[v].x, values[v * VECTOR + 1] += vectors[v].y;
      values[v * VECTOR + 2] += vectors[v].z, values[v * VECTOR + 3] += vectors[v].w;
    }
  }

  // As logit_of.
  __device__ __forceinline__ void read_logits(const float* row, float (&values)[KEYS]) const {
    float4 vectors[VECTORS];
    read(row, vectors);
#pragma unroll
    for (int v = 0; v < VECTORS; ++v) {
      values[v * VECTOR] = vectors[v].x, values[v * VECTOR + 1] = vectors[v].y;
      values[v * VECTOR + 2] = vectors[v].z, values[v * VECTOR + 3] = vectors[v].w;
    }
    if (p.num_parts == 1 && !p.router_bias) return;
#pragma unroll 1
    for (int part = 1; part < p.num_parts; part += PARTS_AHEAD) {
      float4 ahead[PARTS_AHEAD][VECTORS];
#pragma unroll
      for (int i = 0; i < PARTS_AHEAD; ++i)
        if (part + i < p.num_parts) read(row += p.part_stride, ahead[i]);
#pragma unroll
      for (int i = 0; i < PARTS_AHEAD; ++i)
        if (part + i < p.num_parts) add(values, ahead[i]);
    }
    if (!p.router_bias) return;
    read(p.router_bias, vectors), add(values, vectors);
  }

  // As Token::add_up_softmax.
  __device__ __forceinline__ Softmax softmax_over(const float (&values)[KEYS]) const {
    Softmax softmax{minus_infinity(), 0.0f};
#pragma unroll
    for (int i = 0; i < KEYS; ++i)
      if (exists(i)) softmax.largest = fmaxf(softmax.largest, values[i]);
    softmax.largest = warp_max(softmax.largest);
#pragma unroll
    for (int i = 0; i < KEYS; ++i)
      if (exists(i)) softmax.denominator += expf(values[i] - softmax.largest);
    softmax.denominator = warp_sum(softmax.denominator);
    return softmax;
  }

  // Whether the lane's group is one of the top_groups best, by the two best keys of the lane; `odd` if groups tie.
  __device__ __forceinline__ bool is_kept(uint32 first, uint32 second, bool& odd) const {
#pragma unroll 1
    for (int step = 1; step < lanes.per_group; step *= 2) {
      uint32 other_first = __shfl_xor_sync(FULL_MASK, first, step), other_second = __shfl_xor_sync(FULL_MASK, second, step);
      second = max(min(first, other_first), max(second, other_second));
      first = max(first, other_first);
    }
    float score = number_of(first);
    if (p.group_score == GROUP_SUM_TOP2) score += number_of(second);  // a group has KEYS experts at least
    uint32 left = exists(0) ? key_of(score) : TAKEN;
#pragma unroll 2
    for (int g = 0; g < p.top_groups; ++g)
      if (left == __reduce_max_sync(FULL_MASK, left)) left = TAKEN;
    bool kept = exists(0) && left == TAKEN;
    uint32 lanes_kept = __ballot_sync(FULL_MASK, kept);
    odd = odd || __popc(lanes_kept) != p.top_groups * lanes.per_group;
    return kept;
  }

  // Takes the best top_k keys of all lists and notes where they stand; false if keys of several lanes tie, if a list that is
  // not all that the lane has came to its end, or if the token is odd.
  __device__ __forceinline__ bool take(const uint32 (&list)[LIST], bool kept, bool odd) const {
    constexpr uint32 END = LIST * STEP;
#pragma unroll
    for (int i = 0; i < LIST; ++i) at(own_list + i * STEP) = kept ? list[i] : TAKEN;
    at(own_list + END) = TAKEN;
    __syncwarp();  // the last lane's end is that of all
    uint32 place = own_list, head = kept ? list[0] : TAKEN;
#pragma unroll 4
    for (int j = 0; j < p.top_k; ++j) {
      if (head == __reduce_max_sync(FULL_MASK, head)) {
        uint32 taken = place;
        place = min(place + STEP, END + STEP - 4u);  // to its own end, or the last lane's if it is there
        head = at(place);
        atomicExch(&at(PLACES + j * sizeof(uint32)), taken);  // one of the lanes, where keys tie
      }
    }
    // Keys that tie have all moved on at once.
    uint32 steps = __reduce_add_sync(FULL_MASK, place - own_list);
    return !__any_sync(FULL_MASK, odd || steps != p.top_k * STEP || (KEYS > LIST && place >= END));
  }

  // The same from all keys, which a lane looks through for every choice; the lowest expert among equals, and experts in place
  // of places. False if a choice is no number or a zero.
  __device__ __forceinline__ bool take_from_all(const uint32 (&keys)[KEYS], bool kept) const {
    __syncwarp();
#pragma unroll
    for (int i = 0; i < KEYS; ++i) at(own_list + i * STEP) = kept ? keys[i] : TAKEN;
    bool odd = false;
#pragma unroll 1
    for (int j = 0; j < p.top_k; ++j) {
      uint32 head = TAKEN;
      int member = 0;
#pragma unroll 1
      for (int i = 0; i < KEYS; ++i) {
        uint32 key = at(own_list + i * STEP);
        if (key > head) head = key, member = i;
      }
      uint32 heads = __ballot_sync(FULL_MASK, head == __reduce_max_sync(FULL_MASK, head));
      if (lane != __ffs(heads) - 1) continue;
      odd = odd || is_no_number(head);
      at(own_list + member * STEP) = TAKEN;
      at(PLACES + j * sizeof(uint32)) = lane * KEYS + member;
    }
    return !__any_sync(FULL_MASK, odd);
  }

  // The choices of the token whose logits begin at `row`, into lanes first_lane, first_lane + 1 ...; false if it is odd, but
  // for what is_odd says.
  __device__ __forceinline__ bool choose(const float* row, int first_lane, Choice& choice) const {
    float values[KEYS];
    read_logits(row, values);
    int own = lane - first_lane;
    bool is_own = own >= 0 && own < p.top_k;
    if (lanes.whole_softmax) {
      Softmax softmax = softmax_over(values);
      if (is_own) choice.softmax = softmax;
    }
    if (lanes.by_sigmoids) {
#pragma unroll
      for (int i = 0; i < KEYS; ++i) values[i] = quick_sigmoid(values[i]);
    }
    if (p.selection_bias) {
      float4 vectors[VECTORS];
      read(p.selection_bias, vectors), add(values, vectors);
    }
    uint32 keys[KEYS], list[LIST];
#pragma unroll
    for (int i = 0; i < KEYS; ++i) keys[i] = exists(i) ? key_of_number(values[i]) : TAKEN;
    sort_best(keys, list);
    bool odd = list[0] > INFINITY_KEY, kept = p.num_groups == 1 || is_kept(list[0], list[1], odd);
    if (!take(list, kept, odd)) {
      if (__any_sync(FULL_MASK, odd) || !take_from_all(keys, kept)) return false;
      __syncwarp();
      if (is_own) choice.expert = at(PLACES + own * sizeof(uint32)), choice.key = INFINITY_KEY - own;  // unlike others
      __syncwarp();
      return true;
    }
    __syncwarp();
    uint32 place = own_list;
    if (is_own) place = at(PLACES + own * sizeof(uint32)), choice.key = at(place);
    int winner = place % STEP / sizeof(uint32), member = 0;
#pragma unroll
    for (int i = KEYS - 1; i >= 0; --i)
      if (__shfl_sync(FULL_MASK, keys[i], winner) == choice.key) member = i;
    if (is_own) choice.expert = winner * KEYS + member;
    __syncwarp();
    return true;
  }

  // NaN, -inf, or a zero that may be another's equal.
  __device__ __forceinline__ static bool is_no_number(uint32 key) {
    return key <= MINUS_INFINITY_KEY || key - MINUS_ZERO_KEY <= 1u;
  }

  // Whether the lane's choice makes its token odd; `is_first`: of the token.
  __device__ __forceinline__ static bool is_odd(const Choice& choice, bool is_first) {
    uint32 before = __shfl_up_sync(FULL_MASK, choice.key, 1);
    return is_no_number(choice.key) || (!is_first && choice.key == before);
  }

  // The choices of any token, through the warp's part of shared memory.
  __device__ __forceinline__ void choose_oddly(int64 token, int first_lane, Choice& choice) const {
    Token<KEYS> odd(p, smem);
    __syncwarp();
#pragma unroll 1
    for (int e = lane; e < p.num_experts; e += WARP) {
      float logit = logit_of(p, token, e);
      odd.logits[e] = logit;
      if (ranks_apart(p)) odd.keys[e] = ranked(p, e, ranking_score(p, logit));
    }
    __syncwarp();
    odd.rank();
    odd.choose();
    int own = lane - first_lane;
    if (own >= 0 && own < p.top_k) choice.expert = odd.words[own], choice.softmax = odd.softmax;
    __syncwarp();
  }
};

// The ids and weights of `num_tokens` tokens, written by a warp; visit(expert) is called for every choice.
template <int KEYS, bool WHOLE, typename Visit>
__device__ __forceinline__ void route_in_lanes(const RouterLaunch& p, const Lanes& lanes, int64 begin, int num_tokens,
                                               uint32* smem, Visit visit) {
  Router<KEYS, WHOLE> router{p, lanes, smem};
  int lane = threadIdx.x % WARP, of_a_batch = WARP / lanes.segment, j = lane % lanes.segment, own = lane / lanes.segment;
  const float* row = static_cast<const float*>(p.logits) + begin * p.row_stride;
  if constexpr (Router<KEYS, WHOLE>::ASKS) {
#pragma unroll 1
    for (int t = 0; t < min(TOKENS_AHEAD, num_tokens); ++t) router.ask_for(row + t * p.row_stride);
  }
#pragma unroll 1
  for (int first = 0; first < num_tokens; first += of_a_batch) {
    int count = min(of_a_batch, num_tokens - first);
    Choice choice;
    uint32 odd = 0;
#pragma unroll 1
    for (int t = 0; t < count; ++t, row += p.row_stride) {
      if (Router<KEYS, WHOLE>::ASKS && first + t + TOKENS_AHEAD < num_tokens) router.ask_for(row + TOKENS_AHEAD * p.row_stride);
      if (!router.choose(row, t * lanes.segment, choice)) odd |= 1u << t;
    }
    bool there = own < count && j < p.top_k;
    bool any = router.is_odd(choice, j == 0);
#pragma unroll 1
    for (uint32 of_lanes = __ballot_sync(FULL_MASK, there && any); of_lanes != 0; of_lanes &= of_lanes - 1)
      odd |= 1u << (__ffs(of_lanes) - 1) / lanes.segment;
#pragma unroll 1
    for (; odd != 0; odd &= odd - 1) {
      int t = __ffs(odd) - 1;
      router.choose_oddly(begin + first + t, t * lanes.segment, choice);
    }
    ChoicesInLanes choices{0.0f, there, lanes.segment};
    if (there) choices.value = logit_of(p, begin + first + own, choice.expert);
    weigh(p, choices, choice.softmax);
    if (!there) continue;
    store(p, begin + first + own, j, choice.expert, choices.value);
    visit(choice.expert);
  }
}

}  // namespace route
