// activation: h = phi(gate) * (up + up_offset), the non-linearity between the two grouped GEMMs.
//
// phi(g) is one of the words of cumoe.Activation, in the same order. A limit L clamps
//   before the activation:  h = phi(min(g, L)) * (clip(u, -L, L) + up_offset)      gpt-oss, DeepSeek-V4
//   after the activation:   h = min(phi(g), L) * (clip(u, -L, L) + up_offset)      Step-3.7
// Comparisons are written so that a NaN stays a NaN (fminf and fmaxf would drop it).
#pragma once
#include "types.cuh"

enum ActivationName { SILU = 0, GELU = 1, GELU_TANH = 2, RELU = 3, RELU2 = 4, IDENTITY = 5 };
enum Clamp { CLAMP_NONE = 0, CLAMP_BEFORE = 1, CLAMP_AFTER = 2 };

struct Activation {
  int name;         // ActivationName
  int clamp;        // Clamp
  float alpha;      // silu only: g * sigmoid(alpha * g)
  float limit;      // L
  float up_offset;  // 1 for gpt-oss
};

__device__ __forceinline__ float at_most(float value, float limit) { return value > limit ? limit : value; }
__device__ __forceinline__ float at_least(float value, float limit) { return value < limit ? limit : value; }

__device__ __forceinline__ float sigmoid(float value) { return 1.0f / (1.0f + expf(-value)); }

// All functions take N values at a time: the branches on the activation are taken once, and the N chains of exponentials
// and divisions overlap.
template <int N> __device__ __forceinline__ void phi(int name, float alpha, float (&g)[N]) {
  switch (name) {
    case SILU:
#pragma unroll
      for (int i = 0; i < N; ++i) g[i] = __fdividef(g[i], 1.0f + expf(-alpha * g[i]));
      break;
    case GELU:  // erfc keeps the relative accuracy of the negative tail, where 1 + erf cancels
#pragma unroll
      for (int i = 0; i < N; ++i) g[i] = 0.5f * g[i] * erfcf(-0.70710678118654752f * g[i]);
      break;
    case GELU_TANH:
#pragma unroll
      for (int i = 0; i < N; ++i)
        g[i] = 0.5f * g[i] * (1.0f + tanhf(0.79788456080286536f * (g[i] + 0.044715f * g[i] * g[i] * g[i])));
      break;
    case RELU:
#pragma unroll
      for (int i = 0; i < N; ++i) g[i] = at_least(g[i], 0.0f);
      break;
    case RELU2:
#pragma unroll
      for (int i = 0; i < N; ++i) g[i] = at_least(g[i], 0.0f) * at_least(g[i], 0.0f);
      break;
  }
}

// gate <- phi(gate), clamped
template <int N> __device__ __forceinline__ void activate(const Activation& act, float (&gate)[N]) {
  if (act.clamp == CLAMP_BEFORE) {
#pragma unroll
    for (int i = 0; i < N; ++i) gate[i] = at_most(gate[i], act.limit);
  }
  phi(act.name, act.alpha, gate);
  if (act.clamp == CLAMP_AFTER) {
#pragma unroll
    for (int i = 0; i < N; ++i) gate[i] = at_most(gate[i], act.limit);
  }
}

// gate <- phi(gate) * (up + up_offset), clamped
template <int N> __device__ __forceinline__ void activate_gated(const Activation& act, float (&gate)[N], float (&up)[N]) {
  activate(act, gate);
#pragma unroll
  for (int i = 0; i < N; ++i) {
    float u = act.clamp == CLAMP_NONE ? up[i] : at_least(at_most(up[i], act.limit), -act.limit);
    gate[i] *= u + act.up_offset;
  }
}
