// The kernels of the instruction set in use, by dtype.
#include "batched_lora/batched_lora.h"
#include "common/instruction_set.h"

namespace pk {

PK_TABLE_IN_USE(batched_lora)

namespace batched_lora {

const Kernels* kernels(Dtype x, Dtype pages) {
  const Table& t = table();
  if (x == Dtype::kFloat32 && pages == Dtype::kFloat32) return &t.float32;
  if (x == Dtype::kFloat16 && pages == Dtype::kFloat16) return &t.float16;
  if (x == Dtype::kBFloat16 && pages == Dtype::kBFloat16) return &t.bfloat16;
  if (x == Dtype::kFloat16 && pages == Dtype::kFloat32) return &t.float16_float32;
  if (x == Dtype::kBFloat16 && pages == Dtype::kFloat32) return &t.bfloat16_float32;
  return nullptr;
}

}  // namespace batched_lora
}  // namespace pk
