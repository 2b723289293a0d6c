// The bfloat16 kernels of grouped_gemm_wgmma.cuh for row_major weights; files of their own so that they compile side by side.
#include "grouped_gemm_wgmma.cuh"

GROUPED_GEMM_WGMMA_ALL(grouped_gemm_wgmma_bfloat16_row_major, bf16, ROW_MAJOR)
