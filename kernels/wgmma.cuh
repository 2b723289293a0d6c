// wgmma: d (64 x N, float32, in registers) += a (64 x 16, shared memory) b (16 x N, shared memory), 16-bit types.
//
//   a   64 weight rows. INNER_MAJOR: 64 inner positions a row; ROW_MAJOR: 64 weight rows an inner position (transposed).
//   b   N token rows of 64 inner positions
//   d   lane l of warp w holds weight rows 16 w + l / 4 (d[4 j], d[4 j + 1]) and + 8 (d[4 j + 2], d[4 j + 3]),
//       tokens 8 j + 2 (l % 4) and + 1
//
// Both operands lie in rows of 128 bytes whose 16-byte chunks are permuted (chunk c of row r at c ^ (r % 8)), 1024 bytes
// for eight rows; that is what TMA writes with its 128-byte swizzle. One array d serves every N: arrays of their own
// for each N would not fit into the registers.
#pragma once
#include "ptx_sm90.cuh"

// Descriptor of an operand at an address that is a multiple of 1024 plus the offset of the 16 inner positions.
__device__ __forceinline__ uint64 operand(uint32 address) {
  constexpr uint64 SWIZZLE_128B = 1ull << 62, EIGHT_ROWS = 1024 >> 4, UNUSED = 1;
  return SWIZZLE_128B | EIGHT_ROWS << 32 | UNUSED << 16 | (address & 0x3ffff) >> 4;
}

template <typename T, int N> struct Wgmma;

// Operand lists: %0 .. %(N / 2 - 1) are the accumulators.
#define WGMMA_D4(I) "+f"(d[I]), "+f"(d[I + 1]), "+f"(d[I + 2]), "+f"(d[I + 3])
#define WGMMA_LIST_8 WGMMA_D4(0)
#define WGMMA_LIST_16 WGMMA_LIST_8, WGMMA_D4(4)
#define WGMMA_LIST_24 WGMMA_LIST_16, WGMMA_D4(8)
#define WGMMA_LIST_32 WGMMA_LIST_24, WGMMA_D4(12)
#define WGMMA_LIST_40 WGMMA_LIST_32, WGMMA_D4(16)
#define WGMMA_LIST_48 WGMMA_LIST_40, WGMMA_D4(20)
#define WGMMA_LIST_56 WGMMA_LIST_48, WGMMA_D4(24)
#define WGMMA_LIST_64 WGMMA_LIST_56, WGMMA_D4(28)
#define WGMMA_LIST_72 WGMMA_LIST_64, WGMMA_D4(32)
#define WGMMA_LIST_80 WGMMA_LIST_72, WGMMA_D4(36)
#define WGMMA_LIST_88 WGMMA_LIST_80, WGMMA_D4(40)
#define WGMMA_LIST_96 WGMMA_LIST_88, WGMMA_D4(44)
#define WGMMA_LIST_104 WGMMA_LIST_96, WGMMA_D4(48)
#define WGMMA_LIST_112 WGMMA_LIST_104, WGMMA_D4(52)
#define WGMMA_LIST_120 WGMMA_LIST_112, WGMMA_D4(56)
#define WGMMA_LIST_128 WGMMA_LIST_120, WGMMA_D4(60)
#define WGMMA_LIST_136 WGMMA_LIST_128, WGMMA_D4(64)
#define WGMMA_LIST_144 WGMMA_LIST_136, WGMMA_D4(68)
#define WGMMA_LIST_152 WGMMA_LIST_144, WGMMA_D4(72)
#define WGMMA_LIST_160 WGMMA_LIST_152, WGMMA_D4(76)
#define WGMMA_LIST_168 WGMMA_LIST_160, WGMMA_D4(80)
#define WGMMA_LIST_176 WGMMA_LIST_168, WGMMA_D4(84)
#define WGMMA_LIST_184 WGMMA_LIST_176, WGMMA_D4(88)
#define WGMMA_LIST_192 WGMMA_LIST_184, WGMMA_D4(92)
#define WGMMA_NAMES_8 "%0, %1, %2, %3"
#define WGMMA_NAMES_16 WGMMA_NAMES_8 ", %4, %5, %6, %7"
#define WGMMA_NAMES_24 WGMMA_NAMES_16 ", %8, %9, %10, %11"
#define WGMMA_NAMES_32 WGMMA_NAMES_24 ", %12, %13, %14, %15"
#define WGMMA_NAMES_40 WGMMA_NAMES_32 ", %16, %17, %18, %19"
#define WGMMA_NAMES_48 WGMMA_NAMES_40 ", %20, %21, %22, %23"
#define WGMMA_NAMES_56 WGMMA_NAMES_48 ", %24, %25, %26, %27"
#define WGMMA_NAMES_64 WGMMA_NAMES_56 ", %28, %29, %30, %31"
#define WGMMA_NAMES_72 WGMMA_NAMES_64 ", %32, %33, %34, %35"
#define WGMMA_NAMES_80 WGMMA_NAMES_72 ", %36, %37, %38, %39"
#define WGMMA_NAMES_88 WGMMA_NAMES_80 ", %40, %41, %42, %43"
#define WGMMA_NAMES_96 WGMMA_NAMES_88 ", %44, %45, %46, %47"
#define WGMMA_NAMES_104 WGMMA_NAMES_96 ", %48, %49, %50, %51"
#define WGMMA_NAMES_112 WGMMA_NAMES_104 ", %52, %53, %54, %55"
#define WGMMA_NAMES_120 WGMMA_NAMES_112 ", %56, %57, %58, %59"
#define WGMMA_NAMES_128 WGMMA_NAMES_120 ", %60, %61, %62, %63"
#define WGMMA_NAMES_136 WGMMA_NAMES_128 ", %64, %65, %66, %67"
#define WGMMA_NAMES_144 WGMMA_NAMES_136 ", %68, %69, %70, %71"
#define WGMMA_NAMES_152 WGMMA_NAMES_144 ", %72, %73, %74, %75"
#define WGMMA_NAMES_160 WGMMA_NAMES_152 ", %76, %77, %78, %79"
#define WGMMA_NAMES_168 WGMMA_NAMES_160 ", %80, %81, %82, %83"
#define WGMMA_NAMES_176 WGMMA_NAMES_168 ", %84, %85, %86, %87"
#define WGMMA_NAMES_184 WGMMA_NAMES_176 ", %88, %89, %90, %91"
#define WGMMA_NAMES_192 WGMMA_NAMES_184 ", %92, %93, %94, %95"

// A, B, P, O: numbers of the operands after the accumulators.
#define WGMMA_SHAPE(T, TYPE, N, A, B, P, O)                                                                     \
  template <> struct Wgmma<T, N> {                                                                              \
    template <int TRANSPOSED, int CAPACITY>                                                                     \
    __device__ __forceinline__ static void multiply(float (&d)[CAPACITY], uint64 a, uint64 b, int accumulate) { \
      static_assert(CAPACITY >= N / 2, "N / 2 accumulators a lane");                                            \
      asm volatile("{.reg .pred p; setp.ne.b32 p, %" #P ", 0;\n"                                                \
                   "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE                              \
                   " {" WGMMA_NAMES_##N "}, %" #A ", %" #B ", p, 1, 1, %" #O ", 0;}"                            \
                   : WGMMA_LIST_##N : "l"(a), "l"(b), "r"(accumulate), "n"(TRANSPOSED));                        \
    }                                                                                                           \
  };
#define WGMMA_SHAPES(T, TYPE)               \
  WGMMA_SHAPE(T, TYPE, 8, 4, 5, 6, 7)       \
  WGMMA_SHAPE(T, TYPE, 16, 8, 9, 10, 11)    \
  WGMMA_SHAPE(T, TYPE, 24, 12, 13, 14, 15)  \
  WGMMA_SHAPE(T, TYPE, 32, 16, 17, 18, 19)  \
  WGMMA_SHAPE(T, TYPE, 40, 20, 21, 22, 23)  \
  WGMMA_SHAPE(T, TYPE, 48, 24, 25, 26, 27)  \
  WGMMA_SHAPE(T, TYPE, 56, 28, 29, 30, 31)  \
  WGMMA_SHAPE(T, TYPE, 64, 32, 33, 34, 35)  \
  WGMMA_SHAPE(T, TYPE, 72, 36, 37, 38, 39)  \
  WGMMA_SHAPE(T, TYPE, 80, 40, 41, 42, 43)  \
  WGMMA_SHAPE(T, TYPE, 88, 44, 45, 46, 47)  \
  WGMMA_SHAPE(T, TYPE, 96, 48, 49, 50, 51)  \
  WGMMA_SHAPE(T, TYPE, 104, 52, 53, 54, 55) \
  WGMMA_SHAPE(T, TYPE, 112, 56, 57, 58, 59) \
  WGMMA_SHAPE(T, TYPE, 120, 60, 61, 62, 63) \
  WGMMA_SHAPE(T, TYPE, 128, 64, 65, 66, 67) \
  WGMMA_SHAPE(T, TYPE, 136, 68, 69, 70, 71) \
  WGMMA_SHAPE(T, TYPE, 144, 72, 73, 74, 75) \
  WGMMA_SHAPE(T, TYPE, 152, 76, 77, 78, 79) \
  WGMMA_SHAPE(T, TYPE, 160, 80, 81, 82, 83) \
  WGMMA_SHAPE(T, TYPE, 168, 84, 85, 86, 87) \
  WGMMA_SHAPE(T, TYPE, 176, 88, 89, 90, 91) \
  WGMMA_SHAPE(T, TYPE, 184, 92, 93, 94, 95) \
  WGMMA_SHAPE(T, TYPE, 192, 96, 97, 98, 99)

WGMMA_SHAPES(bf16, "bf16")
WGMMA_SHAPES(fp16, "f16")
