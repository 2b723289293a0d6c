// block: see block.h.
#include "block.h"

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <deque>
#include <string>
#include <vector>
#if defined(__SSE__)
#include <immintrin.h>
#endif

#include "fiber.h"

cuda_on_cpu::Index threadIdx, blockIdx, blockDim, gridDim;

#if defined(__x86_64__) && !defined(CUDA_ON_CPU_UCONTEXT)
asm(R"(
.text
.globl cuda_on_cpu_switch
.type cuda_on_cpu_switch, @function
cuda_on_cpu_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size cuda_on_cpu_switch, .-cuda_on_cpu_switch
)");
#endif

namespace cuda_on_cpu {
namespace {

constexpr unsigned MAX_THREADS = 1024, WARP = 32;
constexpr size_t STACK_BYTES = 128 << 10;
constexpr int POISON = 0xff;

struct Copy {
  char* destination;
  const void* source;
  int bytes;
};

struct Thread {
  Fiber fiber;
  const char* waits_at = nullptr;  // null: it does not wait
  Site site{"", 0};
  bool ended = false;
  std::vector<Copy> copies;      // asked for and not landed, oldest first
  std::deque<size_t> group_sizes;  // of the committed ones
  size_t uncommitted = 0;
};

struct Meeting {  // of the lanes of a warp
  const char* name = nullptr;
  Site site{"", 0};
  uint32_t mask = 0, arrived = 0;
  void* arguments[WARP] = {};
};

struct Block {
  const char* kernel = "";
  void (*call)(const void*) = nullptr;
  const void* data = nullptr;
  std::vector<Thread> threads = std::vector<Thread>(MAX_THREADS);
  std::vector<Meeting> warps = std::vector<Meeting>(MAX_THREADS / WARP);
  std::deque<unsigned> ready;
  bool newest_first = false;
  unsigned num_threads = 0, living = 0;
  unsigned at_barrier = 0;
  Site barrier{"", 0};
  Fiber launcher;
  size_t shared_bytes = 0;
  char* shared = nullptr;
  std::vector<void**> static_memory;
  unsigned serial = 0;  // of the block, over all launches
  unsigned num_launches = 0;
  std::string error;
} block;

Thread& current() { return block.threads[threadIdx.x]; }

// Gives the processor to the next ready thread, or to the launcher if there is none.
void leave(Thread& self, bool for_good) {
  unsigned index = threadIdx.x;
  Fiber* next = &block.launcher;
  if (!block.ready.empty() && block.error.empty()) {
    unsigned chosen = block.newest_first ? block.ready.back() : block.ready.front();
    block.newest_first ? block.ready.pop_back() : block.ready.pop_front();
    threadIdx.x = chosen;
    next = &block.threads[chosen].fiber;
  }
  switch_fiber(self.fiber, *next, for_good);
  threadIdx.x = index;
}

void wait(const char* name, Site site) {
  Thread& self = current();
  self.waits_at = name, self.site = site;
  leave(self, false);
}

void release(unsigned thread) {
  block.threads[thread].waits_at = nullptr;
  block.ready.push_back(thread);
}

void open_barrier() {
  block.at_barrier = 0;
  for (unsigned t = 0; t < block.num_threads; ++t) {
    Thread& thread = block.threads[t];
    if (!thread.ended && t != threadIdx.x && thread.waits_at && !strcmp(thread.waits_at, "__syncthreads")) release(t);
  }
}

void land(Thread& self, size_t count) {
  for (size_t i = 0; i < count; ++i) {
    const Copy& copy = self.copies[i];
    memcpy(copy.destination, copy.source, copy.bytes);
    memset(copy.destination + copy.bytes, 0, 16 - copy.bytes);
  }
  self.copies.erase(self.copies.begin(), self.copies.begin() + count);
}

void run_thread() {
  // The first thread of a launch learns what stack it came from.
  bool first = !block.launcher.stack;
  const void* bottom = nullptr;
  size_t bytes = 0;
  __sanitizer_finish_switch_fiber(nullptr, &bottom, &bytes);
  if (first) block.launcher.stack = static_cast<char*>(const_cast<void*>(bottom)), block.launcher.bytes = bytes;
  block.call(block.data);
  Thread& self = current();
  land(self, self.copies.size());
  self.ended = true;
  --block.living;
  if (block.at_barrier && block.at_barrier == block.living) open_barrier();
  leave(self, true);
  abort();  // nobody enters an ended thread
}

const char* base_name(const char* path) {
  const char* slash = strrchr(path, '/');
  return slash ? slash + 1 : path;
}

std::string text_of(Site site) { return std::string(base_name(site.file)) + ":" + std::to_string(site.line); }

// "threads 0-31, 64 wait at __syncthreads, group.cu:96; threads 32-63 have ended"
std::string who_waits_where() {
  std::string text;
  std::vector<bool> told(block.num_threads);
  for (unsigned t = 0; t < block.num_threads; ++t) {
    if (told[t]) continue;
    const Thread& like = block.threads[t];
    auto same = [&](const Thread& other) {
      if (like.ended || other.ended) return like.ended == other.ended;
      return like.waits_at == other.waits_at && like.site == other.site;
    };
    std::string runs;
    for (unsigned begin = t; begin < block.num_threads; ++begin) {
      if (told[begin] || !same(block.threads[begin])) continue;
      unsigned end = begin;
      while (end < block.num_threads && !told[end] && same(block.threads[end])) told[end++] = true;
      runs += (runs.empty() ? "" : ", ") + std::to_string(begin);
      if (end - begin > 1) runs += "-" + std::to_string(end - 1);
    }
    text += "\n  threads " + runs;
    if (like.ended) text += " have ended";
    else if (!like.waits_at) text += " run";
    else text += std::string(" wait at ") + like.waits_at + ", " + text_of(like.site);
  }
  return text;
}

std::string where() { return std::string(block.kernel) + ", block " + std::to_string(blockIdx.x); }

void free_shared() {
  free(block.shared);
  block.shared = nullptr;
  for (void** memory : block.static_memory) free(*memory), *memory = nullptr;
  block.static_memory.clear();
}

void* poisoned(size_t bytes, size_t alignment) {
  void* memory = nullptr;
  if (posix_memalign(&memory, std::max(alignment, sizeof(void*)), bytes)) abort();
  return memset(memory, POISON, bytes);
}

void run_block() {
  ++block.serial;
  block.living = block.num_threads;
  block.at_barrier = 0;
  block.ready.clear();
  std::fill(block.warps.begin(), block.warps.end(), Meeting());
  for (unsigned t = 0; t < block.num_threads; ++t) {
    Thread& thread = block.threads[t];
    thread.ended = false, thread.waits_at = nullptr;
    thread.copies.clear(), thread.group_sizes.clear(), thread.uncommitted = 0;
    thread.fiber.start(STACK_BYTES, run_thread);
    block.ready.push_back(t);
  }
  unsigned first = block.newest_first ? block.num_threads - 1 : 0;
  block.newest_first ? block.ready.pop_back() : block.ready.pop_front();
  threadIdx.x = first;
  switch_fiber(block.launcher, block.threads[first].fiber);
  if (block.error.empty() && block.living > 0) block.error = where() + ": deadlock" + who_waits_where();
}

}  // namespace

void fail(const char* format, ...) {
  char text[512];
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(text, sizeof text, format, arguments);
  va_end(arguments);
  block.error = where() + ", thread " + std::to_string(threadIdx.x) + ": " + text + who_waits_where();
  leave(current(), false);
  abort();
}

void sync_threads(Site site) {
  if (block.at_barrier == 0) block.barrier = site;
  else if (!(block.barrier == site))
    fail("divergence: comes to __syncthreads at %s while others wait", text_of(site).c_str());
  if (++block.at_barrier == block.living) open_barrier();
  else wait("__syncthreads", site);
}

void collective(const char* name, uint32_t mask, void* arguments, Work work, Site site) {
  unsigned lane = threadIdx.x % WARP, first = threadIdx.x - lane;
  Meeting& warp = block.warps[threadIdx.x / WARP];
  if (!(mask >> lane & 1)) fail("divergence: the mask %08x of %s does not name its own lane", mask, name);
  if (!warp.arrived) {
    warp.name = name, warp.site = site, warp.mask = mask;
  } else if (strcmp(warp.name, name) || !(warp.site == site) || warp.mask != mask) {
    fail("divergence: comes to %s at %s with mask %08x while lanes of its warp wait with mask %08x", name,
         text_of(site).c_str(), mask, warp.mask);
  }
  warp.arguments[lane] = arguments;
  warp.arrived |= 1u << lane;
  if (warp.arrived != mask) return wait(name, site);
  void* lanes[WARP];
  for (unsigned l = 0; l < WARP; ++l) lanes[l] = mask >> l & 1 ? warp.arguments[l] : nullptr;
  if (work) work(lanes);
  warp.arrived = 0;
  for (unsigned l = 0; l < WARP; ++l)
    if (l != lane && lanes[l]) release(first + l);
}

char* dynamic_shared() { return block.shared; }

void* static_shared(void** memory, unsigned* serial, size_t bytes, size_t alignment) {
  if (*serial != block.serial) {
    *memory = poisoned(bytes, alignment);
    *serial = block.serial;
    block.static_memory.push_back(memory);
  }
  return *memory;
}

void copy_async(char* destination, const void* source, int bytes) {
  if (reinterpret_cast<uintptr_t>(destination) % 16 || reinterpret_cast<uintptr_t>(source) % 16)
    fail("misaligned cp.async from %p to %p", source, static_cast<void*>(destination));
  if (bytes < 0 || bytes > 16) fail("cp.async of %d bytes", bytes);
  memset(destination, POISON, 16);  // in flight: neither the old bytes nor the new ones
  current().copies.push_back({destination, source, bytes});
  ++current().uncommitted;
}

void copy_async_commit() {
  Thread& self = current();
  self.group_sizes.push_back(self.uncommitted);
  self.uncommitted = 0;
}

void copy_async_wait(int pending) {
  Thread& self = current();
  for (; self.group_sizes.size() > size_t(pending); self.group_sizes.pop_front())
    land(self, self.group_sizes.front());
}

const char* launch(const char* name, unsigned grid, unsigned num_threads, size_t shared_bytes,
                   void (*call)(const void*), const void* data) {
  block.kernel = name, block.call = call, block.data = data;
  block.num_threads = num_threads, block.shared_bytes = shared_bytes;
  block.newest_first = block.num_launches++ % 2;
  block.error.clear();
  block.launcher = Fiber();
  gridDim.x = grid, blockDim.x = num_threads;
#if defined(__SSE__)
  unsigned control = _mm_getcsr();
  _mm_setcsr(control | 0x8040);  // subnormals are zero, as CuPy's -ftz=true has it
#endif
  for (blockIdx.x = 0; blockIdx.x < grid && block.error.empty(); ++blockIdx.x) {
    block.shared = static_cast<char*>(poisoned(shared_bytes, 128));
    run_block();
    free_shared();
    if (!block.error.empty())
      for (Thread& thread : block.threads) thread.fiber.wipe();
  }
#if defined(__SSE__)
  _mm_setcsr(control);
#endif
  return block.error.empty() ? nullptr : block.error.c_str();
}

const char* refuse(const char* name, const char* what, size_t expected, size_t got) {
  block.error = std::string(name) + ": " + what;
  block.error += ": expected " + std::to_string(expected) + ", got " + std::to_string(got);
  return block.error.c_str();
}

}  // namespace cuda_on_cpu

// Device memory for the arrays of a test: exactly as long as asked for, poisoned.
extern "C" void* cuda_on_cpu_allocate(size_t bytes) { return cuda_on_cpu::poisoned(bytes, 256); }
extern "C" void cuda_on_cpu_free(void* memory) { free(memory); }
