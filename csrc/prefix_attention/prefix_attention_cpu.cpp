// The CPU kernels of prefix_attention for one instruction set: compiled once per set, with PK_ISA naming it.
#include "prefix_attention/backward.h"

namespace pk::PK_ISA {

extern const prefix_attention::Table prefix_attention_table;
const prefix_attention::Table prefix_attention_table = {prefix, own, prefix_backward, own_backward, gather};

}  // namespace pk::PK_ISA
