// The CPU kernels of bottleneck_adapter for one instruction set: compiled once per set, with PK_ISA naming it.
#include "bottleneck_adapter/backward.h"
#include "bottleneck_adapter/forward.h"

namespace pk::PK_ISA {

extern const bottleneck_adapter::Table bottleneck_adapter_table;
const bottleneck_adapter::Table bottleneck_adapter_table = {pack, shrink, expand,  widen, slope,
                                                            up,   down,   norm_dx, sums,  gather};

}  // namespace pk::PK_ISA
