// The kernels of the instruction set in use, by dtype.
#include "common/instruction_set.h"
#include "lora_linear/lora_linear.h"

namespace pk {

PK_TABLE_IN_USE(lora_linear)

namespace lora_linear {

const Kernels* kernels(Dtype x, Dtype factors) {
  const Table& t = table();
  if (x == Dtype::kFloat32 && factors == Dtype::kFloat32) return &t.float32;
  if (x == Dtype::kFloat16 && factors == Dtype::kFloat16) return &t.float16;
  if (x == Dtype::kBFloat16 && factors == Dtype::kBFloat16) return &t.bfloat16;
  if (x == Dtype::kFloat16 && factors == Dtype::kFloat32) return &t.float16_float32;
  if (x == Dtype::kBFloat16 && factors == Dtype::kFloat32) return &t.bfloat16_float32;
  return nullptr;
}

}  // namespace lora_linear
}  // namespace pk
