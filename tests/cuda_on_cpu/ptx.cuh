// ptx: kernels/ptx.cuh by its meaning in the PTX manual, lane by lane.
//
// A shared-memory address is an offset into the block's dynamic shared memory.
#pragma once
#include "types.cuh"

inline uint32 shared_address(const void* pointer) {
  return uint32(static_cast<const char*>(pointer) - cuda_on_cpu::dynamic_shared());
}

inline void prefetch_to_l2(const void* address) { (void)*static_cast<const volatile char*>(address); }

inline void copy_async_16(uint32 destination, const void* source, int bytes) {
  cuda_on_cpu::copy_async(cuda_on_cpu::dynamic_shared() + destination, source, bytes);
}
inline void copy_async_commit() { cuda_on_cpu::copy_async_commit(); }
template <int PENDING> inline void copy_async_wait() { cuda_on_cpu::copy_async_wait(PENDING); }

namespace cuda_on_cpu {
struct MatrixRows {
  uint32 address;    // of a row of 16 bytes: lanes 8 i .. 8 i + 7 give those of matrix i
  uint32 result[4];  // of matrix i: row lane / 4, columns 2 (lane % 4) and + 1
  bool transposed;
};

inline void load_matrices(void* const* lanes) {
  auto lane = [&](int l) { return static_cast<MatrixRows*>(lanes[l]); };
  for (int i = 0; i < 4; ++i) {
    uint16_t matrix[8][8];
    for (int row = 0; row < 8; ++row) {
      uint32 address = lane(8 * i + row)->address;
      if (address % 16) fail("misaligned ldmatrix at shared-memory address %u", address);
      memcpy(matrix[row], dynamic_shared() + address, 16);
    }
    for (int l = 0; l < 32; ++l) {
      int row = l / 4, column = l % 4 * 2;
      bool turned = lane(l)->transposed;
      uint32 low = turned ? matrix[column][row] : matrix[row][column];
      uint32 high = turned ? matrix[column + 1][row] : matrix[row][column + 1];
      lane(l)->result[i] = low | high << 16;
    }
  }
}

inline void load_matrix(uint32 (&first)[2], uint32 (&second)[2], uint32 address, bool transposed, Site site) {
  MatrixRows own{address, {}, transposed};
  collective("ldmatrix", FULL_MASK, &own, load_matrices, site);
  first[0] = own.result[0], first[1] = own.result[1], second[0] = own.result[2], second[1] = own.result[3];
}

template <typename T> struct MmaLane {
  float* d;              // rows lane / 4 and + 8, columns 2 (lane % 4) and + 1
  const uint32 (*a)[2];  // [k half][row half]: rows as above, inner positions 8 k_half + 2 (lane % 4) and + 1
  const uint32* b;       // [k half]: column lane / 4, inner positions as above
};

template <typename T> float half_of(uint32 bits, int high) {
  uint16_t half = uint16_t(high ? bits >> 16 : bits);
  T value;
  memcpy(static_cast<void*>(&value), &half, 2);
  return to_float(value);
}

// 16-bit factors have exact float32 products; they are added in the order of the inner dimension. Most of the time of a
// tensor core layer goes here, into arrays of fixed size: compiled for speed, unlike what is under test.
template <typename T>
__attribute__((optimize("O3"), no_sanitize("address", "undefined"))) void multiply_matrices(void* const* lanes) {
  static float a[16][16], b[16][8], d[16][8];  // one mma at a time
  auto lane = [&](int l) { return static_cast<MmaLane<T>*>(lanes[l]); };
  for (int l = 0; l < 32; ++l)
    for (int high = 0; high < 2; ++high)
      for (int half = 0; half < 2; ++half) {
        int inner = 8 * half + l % 4 * 2 + high;
        for (int rows = 0; rows < 2; ++rows) a[l / 4 + 8 * rows][inner] = half_of<T>(lane(l)->a[half][rows], high);
        b[inner][l / 4] = half_of<T>(lane(l)->b[half], high);
        d[l / 4 + 8 * half][l % 4 * 2 + high] = lane(l)->d[2 * half + high];
      }
  for (int row = 0; row < 16; ++row)
    for (int inner = 0; inner < 16; ++inner)
      for (int column = 0; column < 8; ++column) d[row][column] += a[row][inner] * b[inner][column];
  for (int l = 0; l < 32; ++l)
    for (int i = 0; i < 4; ++i) lane(l)->d[i] = d[l / 4 + i / 2 * 8][l % 4 * 2 + i % 2];
}
}  // namespace cuda_on_cpu

inline void load_matrix_x4(uint32 (&first)[2], uint32 (&second)[2], uint32 address, CUDA_ON_CPU_SITE) {
  cuda_on_cpu::load_matrix(first, second, address, false, {file, line});
}
inline void load_matrix_x4_transposed(uint32 (&first)[2], uint32 (&second)[2], uint32 address, CUDA_ON_CPU_SITE) {
  cuda_on_cpu::load_matrix(first, second, address, true, {file, line});
}

template <typename T>
inline void mma_16816(T, float (&d)[4], const uint32 (&a)[2][2], const uint32 (&b)[2], CUDA_ON_CPU_SITE) {
  cuda_on_cpu::MmaLane<T> own{d, a, b};
  cuda_on_cpu::collective("mma", FULL_MASK, &own, cuda_on_cpu::multiply_matrices<T>, {file, line});
}
