// The float16 kernels of grouped_gemm_wgmma.cuh for inner_major weights; files of their own so that they compile side by side.
#include "grouped_gemm_wgmma.cuh"

GROUPED_GEMM_WGMMA_ALL(grouped_gemm_wgmma_float16_inner_major, fp16, INNER_MAJOR)
