// fiber: a call stack that can be left in the middle and entered again, and the switch between two of them.
//
// x86-64 saves the registers that a called function has to keep, nothing else: a switch costs a few nanoseconds. Other
// processors, and CUDA_ON_CPU_UCONTEXT, go through ucontext, which asks the kernel for the signal mask each time.
// AddressSanitizer is told of every switch, or it would take one stack's frames for damage of another.
#pragma once
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#include <sys/mman.h>

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#if !defined(__x86_64__) || defined(CUDA_ON_CPU_UCONTEXT)
#include <ucontext.h>
#endif

namespace cuda_on_cpu {

#if defined(__x86_64__) && !defined(CUDA_ON_CPU_UCONTEXT)
using Context = void*;  // the stack pointer; the registers lie on the stack
extern "C" void cuda_on_cpu_switch(Context* from, Context to);
inline void swap(Context& from, Context& to) { cuda_on_cpu_switch(&from, to); }

inline void prepare(Context& context, char* stack, size_t bytes, void (*entry)()) {
  auto top = reinterpret_cast<uintptr_t>(stack + bytes) & ~uintptr_t(15);
  auto words = reinterpret_cast<void**>(top);
  words[-1] = nullptr;  // where entry would return to: it never does
  words[-2] = reinterpret_cast<void*>(entry);
  for (int i = 3; i <= 8; ++i) words[-i] = nullptr;  // rbp, rbx, r12 to r15
  context = words - 8;
}
#else
using Context = ucontext_t;
inline void swap(Context& from, Context& to) { swapcontext(&from, &to); }

inline void prepare(Context& context, char* stack, size_t bytes, void (*entry)()) {
  getcontext(&context);
  context.uc_stack.ss_sp = stack;
  context.uc_stack.ss_size = bytes;
  context.uc_link = nullptr;
  makecontext(&context, entry, 0);
}
#endif

struct Fiber {
  Context context{};
  char* stack = nullptr;  // null: the stack of whoever launches
  size_t bytes = 0;
  void* fake_stack = nullptr;

  // Makes the next switch to this fiber call `entry`, which must leave by a switch that is its last.
  void start(size_t stack_bytes, void (*entry)()) {
    if (!stack) {
      constexpr size_t guard = 4096;  // overflows end in a fault, not in a neighbour
      void* memory = mmap(nullptr, stack_bytes + guard, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
      if (memory == MAP_FAILED || mprotect(memory, guard, PROT_NONE)) abort();
      stack = static_cast<char*>(memory) + guard;
      bytes = stack_bytes;
    }
    fake_stack = nullptr;
    __asan_unpoison_memory_region(stack + bytes - 4096, 4096);  // the frame of the last entry, which never returned
    prepare(context, stack, bytes, entry);
  }

  // Forgets what a fiber that was abandoned in the middle had marked as red zones.
  void wipe() { if (stack) __asan_unpoison_memory_region(stack, bytes); }
};

inline void switch_fiber(Fiber& from, Fiber& to, bool last = false) {
  __sanitizer_start_switch_fiber(last ? nullptr : &from.fake_stack, to.stack, to.bytes);
  swap(from.context, to.context);
  __sanitizer_finish_switch_fiber(from.fake_stack, nullptr, nullptr);
}

}  // namespace cuda_on_cpu
