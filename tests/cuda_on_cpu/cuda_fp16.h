// cuda_fp16: the stored type and its two conversions, by the compiler's own 16-bit type: the nearest, ties to even.
#pragma once
#include <cstdint>
#include <cstring>

struct __half { uint16_t bits; };

inline float __half2float(__half value) {
  _Float16 number;
  memcpy(&number, &value.bits, 2);
  return float(number);
}

inline __half __float2half_rn(float value) {
  _Float16 number = _Float16(value);
  __half result;
  memcpy(&result.bits, &number, 2);
  return result;
}
