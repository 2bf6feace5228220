// The CPU kernels of bottleneck_adapter for one instruction set: compiled once per set, with PK_ISA naming it.
#include "bottleneck_adapter/backward.h"
#include "bottleneck_adapter/forward.h"
#include "bottleneck_adapter/gemm.h"

namespace pk::PK_ISA {

extern const bottleneck_adapter::Table bottleneck_adapter_table;
const bottleneck_adapter::Table bottleneck_adapter_table = {
    measure, pack,   shrink,  expand,      widen,       slope,      up,      down,    norm_dx,
    sums,    gather, scale_B, gemm_shrink, gemm_expand, gemm_slope, gemm_dB, gemm_dx, gemm_dA};

}  // namespace pk::PK_ISA
