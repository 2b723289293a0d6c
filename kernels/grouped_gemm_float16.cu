// The float16 kernels of grouped_gemm_mma.cuh; a file of its own so that types compile side by side.
#include "grouped_gemm_mma.cuh"

GROUPED_GEMM_MMA_ALL(grouped_gemm_mma_float16, fp16)
