// The kernels of grouped_gemm_wgmma.cuh for one type, one order of weights and one shape of tile, which cumoe/gpu/sources.py
// defines in front of this text: 16 units, so that they compile side by side.
#include "grouped_gemm_wgmma.cuh"

#define UNIT_KERNELS(...) GROUPED_GEMM_WGMMA_PAIR(__VA_ARGS__)  // one more level, for the names to be replaced first
UNIT_KERNELS(UNIT_NAME, UNIT_TYPE, UNIT_SHAPE, UNIT_ORDER)
