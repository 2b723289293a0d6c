// The bfloat16 kernels of grouped_gemm_wgmma.cuh for inner_major weights; files of their own so that they compile side by side.
#include "grouped_gemm_wgmma.cuh"

GROUPED_GEMM_WGMMA_ALL(grouped_gemm_wgmma_bfloat16_inner_major, bf16, INNER_MAJOR)
