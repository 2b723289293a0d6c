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

__device__ __forceinline__ float phi(int name, float alpha, float g) {
  switch (name) {
    case SILU: return g / (1.0f + expf(-alpha * g));
    // erfc keeps the relative accuracy of the negative tail, where 1 + erf cancels.
    case GELU: return 0.5f * g * erfcf(-0.70710678118654752f * g);
    case GELU_TANH: return 0.5f * g * (1.0f + tanhf(0.79788456080286536f * (g + 0.044715f * g * g * g)));
    case RELU: return at_least(g, 0.0f);
    case RELU2: { float r = at_least(g, 0.0f); return r * r; }
    default: return g;
  }
}

__device__ __forceinline__ float activate(const Activation& act, float gate) {
  if (act.clamp == CLAMP_BEFORE) gate = at_most(gate, act.limit);
  float h = phi(act.name, act.alpha, gate);
  return act.clamp == CLAMP_AFTER ? at_most(h, act.limit) : h;
}

__device__ __forceinline__ float activate_gated(const Activation& act, float gate, float up) {
  if (act.clamp != CLAMP_NONE) up = at_least(at_most(up, act.limit), -act.limit);
  return activate(act, gate) * (up + act.up_offset);
}
