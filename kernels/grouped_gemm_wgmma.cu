// The kernel of grouped_gemm_wgmma.cuh for one type, one order of weights and one shape of tile, which cumoe/gpu/sources.py
// defines in front of this text: 28 units, so that they compile side by side.
#include "grouped_gemm_wgmma.cuh"

using UnitGemm = hopper::GroupedGemm<UNIT_TYPE, UNIT_SHAPE, UNIT_ORDER>;

extern "C" __global__ void __cluster_dims__(UnitGemm::CLUSTER, 1, 1)
    __launch_bounds__(UnitGemm::THREADS, UNIT_SHAPE::BLOCKS_PER_SM)
    UNIT_NAME(const __grid_constant__ WgmmaLaunch launch) { hopper::grouped_gemm<UNIT_TYPE, UNIT_SHAPE, UNIT_ORDER>(launch); }
