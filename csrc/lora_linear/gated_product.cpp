// gated_product: the kernels of the instruction set in use, and fp64 in loops that read like the formulas.
#include "lora_linear/gated_product.h"

#include "common/instruction_set.h"

namespace pk {

PK_TABLE_IN_USE(gated_product)

namespace gated_product {
namespace {

int64_t last(const Problem& p, int64_t end) {
  return end * kUnit < p.n ? end * kUnit : p.n;
}
const double* doubles(const void* numbers) {
  return static_cast<const double*>(numbers);
}

}  // namespace

void forward_double(const Problem& p, int64_t begin, int64_t end) {
  for (int64_t i = begin * kUnit; i < last(p, end); ++i) {
    static_cast<double*>(p.y)[i] = activated(p.activation, doubles(p.gate)[i]) * doubles(p.up)[i];
  }
}

void backward_double(const Problem& p, int64_t begin, int64_t end) {
  for (int64_t i = begin * kUnit; i < last(p, end); ++i) {
    const double g = doubles(p.gate)[i], dy = doubles(p.dy)[i];
    static_cast<double*>(p.dgate)[i] = dy * doubles(p.up)[i] * slope_of(p.activation, g);
    static_cast<double*>(p.dup)[i] = dy * activated(p.activation, g);
  }
}

}  // namespace gated_product
}  // namespace pk
