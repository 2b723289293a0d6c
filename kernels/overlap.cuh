// overlap: the kernels before and behind on the stream (programmatic dependent launch, sm_90 and later).
#pragma once

// Waits until the previous kernel has ended and its results are visible; nothing to wait for in an ordinary launch.
__device__ __forceinline__ void wait_for_previous_kernel() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Lets the next kernel start its blocks where there is room, once every block of this one has called it. A kernel calls it
// after its own wait: whatever is older than the previous kernel is then complete for the next one from its beginning.
__device__ __forceinline__ void launch_next_kernel() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
