// DoRA's kernels of the instruction set in use, by dtype.
#include "common/instruction_set.h"
#include "lora_linear/dora.h"

namespace pk {

PK_TABLE_IN_USE(dora)

namespace dora {

const Kernels& kernels(Dtype type) {
  const Table& t = table();
  return type == Dtype::kFloat16 ? t.float16 : type == Dtype::kBFloat16 ? t.bfloat16 : t.float32;
}

}  // namespace dora
}  // namespace pk
