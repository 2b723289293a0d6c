// cuda_on_cpu: the words of CUDA C++ that the kernels use, for a C++ compiler.
//
// __shared__ variables cannot be expressed by a macro, since an extern one has no size: build.py rewrites their
// declarations. A kernel's launch bounds and argument are found by build.py in the preprocessed text, where
// CUDA_ON_CPU_LIST leaves the three words that mark them as they are.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

#include "block.h"

#define __device__
#define __forceinline__ inline
#ifndef CUDA_ON_CPU_LIST
#define __global__
#define __launch_bounds__(...)
#define __grid_constant__
#endif

#define CUDA_ON_CPU_KERNEL(NAME, ARGUMENT, ...)                                                                   \
  extern "C" const size_t argument_bytes_##NAME = sizeof(ARGUMENT);                                                \
  extern "C" const char* launch_##NAME(unsigned grid, unsigned block, size_t shared_bytes, const void* packed,     \
                                       size_t packed_bytes) {                                                      \
    constexpr unsigned max_block = cuda_on_cpu::first(__VA_ARGS__);                                                \
    return cuda_on_cpu::launch_packed<ARGUMENT>(#NAME, NAME, max_block, grid, block, shared_bytes, packed,         \
                                                packed_bytes);                                                     \
  }

namespace cuda_on_cpu {
template <typename... Others> constexpr unsigned first(unsigned value, Others...) { return value; }

template <typename T> struct Lane { T value, result; int source; };

// Every lane receives the value of its source lane; one that the mask does not name gives poison: CUDA leaves it open.
template <typename T> T shuffle(const char* name, unsigned mask, T value, int source, Site site) {
  Lane<T> own{value, value, source};
  collective(name, mask, &own, [](void* const* lanes) {
    for (int l = 0; l < 32; ++l) {
      auto lane = static_cast<Lane<T>*>(lanes[l]);
      if (!lane) continue;
      auto source = static_cast<Lane<T>*>(lanes[lane->source & 31]);
      if (source) lane->result = source->value;
      else memset(static_cast<void*>(&lane->result), 0xff, sizeof(T));
    }
  }, site);
  return own.result;
}

// Every lane receives the lanes whose values satisfy accept(own value, other value).
template <typename T, typename Accept>
unsigned lanes_that(const char* name, unsigned mask, T value, Accept, Site site) {
  struct Vote { T value; unsigned accepted; } own{value, 0};
  collective(name, mask, &own, [](void* const* lanes) {
    auto vote = [&](int l) { return static_cast<Vote*>(lanes[l]); };
    for (int l = 0; l < 32; ++l)
      for (int other = 0; other < 32; ++other)
        if (vote(l) && vote(other) && Accept()(vote(l)->value, vote(other)->value)) vote(l)->accepted |= 1u << other;
  }, site);
  return own.accepted;
}
struct Equal { template <typename T> bool operator()(T a, T b) const { return a == b; } };
struct Set { bool operator()(bool, bool other) const { return other; } };

inline unsigned lane() { return threadIdx.x % 32; }
}  // namespace cuda_on_cpu

// Barriers and collectives know the line that calls them.
#define CUDA_ON_CPU_SITE const char *file = __builtin_FILE(), int line = __builtin_LINE()

inline void __syncthreads(CUDA_ON_CPU_SITE) { cuda_on_cpu::sync_threads({file, line}); }
inline void __syncwarp(unsigned mask = 0xffffffffu, CUDA_ON_CPU_SITE) {
  int nothing = 0;
  cuda_on_cpu::collective("__syncwarp", mask, &nothing, nullptr, {file, line});
}
template <typename T> T __shfl_sync(unsigned mask, T value, int source, CUDA_ON_CPU_SITE) {
  return cuda_on_cpu::shuffle("__shfl_sync", mask, value, source, {file, line});
}
template <typename T> T __shfl_xor_sync(unsigned mask, T value, int step, CUDA_ON_CPU_SITE) {
  return cuda_on_cpu::shuffle("__shfl_xor_sync", mask, value, (int)cuda_on_cpu::lane() ^ step, {file, line});
}
template <typename T> T __shfl_up_sync(unsigned mask, T value, unsigned step, CUDA_ON_CPU_SITE) {
  unsigned lane = cuda_on_cpu::lane();
  return cuda_on_cpu::shuffle("__shfl_up_sync", mask, value, int(lane >= step ? lane - step : lane), {file, line});
}
template <typename T> T __shfl_down_sync(unsigned mask, T value, unsigned step, CUDA_ON_CPU_SITE) {
  unsigned lane = cuda_on_cpu::lane();
  int source = int(lane + step < 32 ? lane + step : lane);
  return cuda_on_cpu::shuffle("__shfl_down_sync", mask, value, source, {file, line});
}
template <typename T> unsigned __match_any_sync(unsigned mask, T value, CUDA_ON_CPU_SITE) {
  return cuda_on_cpu::lanes_that("__match_any_sync", mask, value, cuda_on_cpu::Equal(), {file, line});
}
inline unsigned __ballot_sync(unsigned mask, bool value, CUDA_ON_CPU_SITE) {
  return cuda_on_cpu::lanes_that("__ballot_sync", mask, value, cuda_on_cpu::Set(), {file, line});
}
inline bool __any_sync(unsigned mask, bool value, CUDA_ON_CPU_SITE) {
  return cuda_on_cpu::lanes_that("__any_sync", mask, value, cuda_on_cpu::Set(), {file, line}) != 0;
}

// Every lane receives the value that wins against all others.
namespace cuda_on_cpu {
template <typename Wins> unsigned reduce(const char* name, unsigned mask, unsigned value, Wins, Site site) {
  unsigned own = value;
  collective(name, mask, &own, [](void* const* lanes) {
    unsigned best = 0;
    bool any = false;
    for (int l = 0; l < 32; ++l)
      if (auto lane = static_cast<unsigned*>(lanes[l]))
        if (!any || Wins()(*lane, best)) best = *lane, any = true;
    for (int l = 0; l < 32; ++l)
      if (auto lane = static_cast<unsigned*>(lanes[l])) *lane = best;
  }, site);
  return own;
}
struct Larger { bool operator()(unsigned a, unsigned b) const { return a > b; } };
struct Smaller { bool operator()(unsigned a, unsigned b) const { return a < b; } };
}  // namespace cuda_on_cpu
inline unsigned __reduce_max_sync(unsigned mask, unsigned value, CUDA_ON_CPU_SITE) {
  return cuda_on_cpu::reduce("__reduce_max_sync", mask, value, cuda_on_cpu::Larger(), {file, line});
}
inline unsigned __reduce_min_sync(unsigned mask, unsigned value, CUDA_ON_CPU_SITE) {
  return cuda_on_cpu::reduce("__reduce_min_sync", mask, value, cuda_on_cpu::Smaller(), {file, line});
}
inline unsigned __reduce_add_sync(unsigned mask, unsigned value, CUDA_ON_CPU_SITE) {
  unsigned own = value;
  cuda_on_cpu::collective("__reduce_add_sync", mask, &own, [](void* const* lanes) {
    unsigned sum = 0;
    for (int l = 0; l < 32; ++l)
      if (auto lane = static_cast<unsigned*>(lanes[l])) sum += *lane;
    for (int l = 0; l < 32; ++l)
      if (auto lane = static_cast<unsigned*>(lanes[l])) *lane = sum;
  }, {file, line});
  return own;
}

// Threads run one at a time.
inline int atomicAdd(int* address, int value) { int old = *address; *address += value; return old; }
inline unsigned atomicExch(unsigned* address, unsigned value) { unsigned old = *address; *address = value; return old; }
inline void __threadfence() {}
template <typename T> T __ldcs(const T* address) { return *address; }

inline int __popc(unsigned value) { return __builtin_popcount(value); }
inline int __ffs(unsigned value) { return __builtin_ffs(static_cast<int>(value)); }
inline float __uint_as_float(unsigned bits) { float value; memcpy(&value, &bits, 4); return value; }
inline unsigned __float_as_uint(float value) { unsigned bits; memcpy(&bits, &value, 4); return bits; }

// The quick division: 0 for a finite dividend and a divisor beyond 2^126.
inline float __fdividef(float a, float b) { return std::fabs(b) > 0x1p126f ? a * 0.0f : a / b; }

inline int min(int a, int b) { return a < b ? a : b; }
inline int max(int a, int b) { return a > b ? a : b; }
inline unsigned min(unsigned a, unsigned b) { return a < b ? a : b; }
inline unsigned max(unsigned a, unsigned b) { return a > b ? a : b; }

struct alignas(8) float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
struct alignas(16) int4 { int x, y, z, w; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
inline float2 make_float2(float x, float y) { return {x, y}; }

// Last: the standard headers spell an attribute like this.
#define __noinline__ __attribute__((noinline))
