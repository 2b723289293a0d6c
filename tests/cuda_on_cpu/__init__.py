"""The CUDA sources compiled for the CPU: a block's threads as fibers, under AddressSanitizer and UBSan.

What a run proves: indices, bounds, tails, alignment, poisoned memory that nobody wrote, barriers that not all threads
reach, arithmetic, and the launch code of the package (argument structs, grids, shared memory). What it does not: data
races beyond two orders of threads, memory order, wgmma and TMA, overlapping launches, speed.

    cuda_on_cpu.h, ptx.cuh, cuda_bf16.h, cuda_fp16.h   CUDA C++ for a C++ compiler
    block.h, block.cpp, fiber.h                        a thread block: barriers, collectives, shared memory, deadlocks
    build.py                                           kernels/ -> one library
    fake_cupy.py                                       what the package uses of CuPy, on that library
    plugin.py                                          pytest plugin: the package's GPU tests on all this
"""
