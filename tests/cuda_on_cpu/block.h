// block: one thread block on the CPU. Its threads are fibers that run one at a time, from one barrier to the next.
//
//   order       blocks one after another; within a block the thread that became ready first runs next, in every
//               second launch the one that became ready last: what leans on an order of threads shows in one of them
//   barrier     complete when every living thread waits at it, all at the same line of the source
//   collective  complete when every lane that the mask names has come, with the same mask at the same line; the last
//               one does the work for all. A warp has one at a time: disjoint masks side by side are refused
//   errors      a launch whose living threads all wait ends with a message that says who waits where; likewise a
//               barrier or collective that two groups of threads reach at different lines
//   memory      __shared__ variables and dynamic shared memory are allocated a block, exactly as long as declared or
//               launched, and begin as 0xff bytes: NaN as a float
#pragma once
#include <cstddef>
#include <cstdint>
#include <cstring>

namespace cuda_on_cpu {

struct Index { unsigned x = 0, y = 0, z = 0; };

struct Site {
  const char* file;
  int line;
  friend bool operator==(const Site& a, const Site& b) { return a.line == b.line && !strcmp(a.file, b.file); }
};

// Ends the launch with a message; does not return to the kernel.
[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));

void sync_threads(Site site);

// The lanes' own arguments, null for lanes that the mask does not name.
using Work = void (*)(void* const* lanes);
void collective(const char* name, uint32_t mask, void* arguments, Work work, Site site);

char* dynamic_shared();
void* static_shared(void** memory, unsigned* serial, size_t bytes, size_t alignment);

// What stands for `__shared__ T name`: one object for all threads of a block, a new one for the next block.
template <typename T> struct StaticShared {
  void* memory = nullptr;
  unsigned serial = 0;  // of the block that the memory is for
  T& of_block() { return *static_cast<T*>(static_shared(&memory, &serial, sizeof(T), alignof(T))); }
};

// cp.async: what a thread has asked for lands when it waits for the group, not earlier.
void copy_async(char* destination, const void* source, int bytes);
void copy_async_commit();
void copy_async_wait(int pending);

// Runs `call(data)` for every thread; returns null, or what went wrong.
const char* launch(const char* name, unsigned grid, unsigned block, size_t shared_bytes, void (*call)(const void*),
                   const void* data);
const char* refuse(const char* name, const char* what, size_t expected, size_t got);

template <typename Argument> struct Kernel {
  void (*function)(Argument);
  Argument argument;
};

// The launch of a kernel whose argument Python has packed; refuses what the driver would refuse, and another struct.
template <typename Argument>
const char* launch_packed(const char* name, void (*function)(Argument), unsigned max_block, unsigned grid,
                          unsigned block, size_t shared_bytes, const void* packed, size_t packed_bytes) {
  if (packed_bytes != sizeof(Argument)) return refuse(name, "bytes of the argument", sizeof(Argument), packed_bytes);
  if (block == 0 || block > max_block) return refuse(name, "threads a block, at most", max_block, block);
  if (grid == 0) return refuse(name, "blocks, at least", 1, grid);
  Kernel<Argument> kernel{function, {}};
  memcpy(static_cast<void*>(&kernel.argument), packed, packed_bytes);
  auto call = [](const void* data) {
    auto kernel = static_cast<const Kernel<Argument>*>(data);
    kernel->function(kernel->argument);
  };
  return launch(name, grid, block, shared_bytes, call, &kernel);
}

}  // namespace cuda_on_cpu

extern cuda_on_cpu::Index threadIdx, blockIdx, blockDim, gridDim;
