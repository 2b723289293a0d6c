// The float16 kernels of grouped_gemm_wgmma.cuh for row_major weights; files of their own so that they compile side by side.
#include "grouped_gemm_wgmma.cuh"

GROUPED_GEMM_WGMMA_ALL(grouped_gemm_wgmma_float16_row_major, fp16, ROW_MAJOR)
