// lora_embedding: the kernels of the instruction set in use, and fp64 in loops that read like the formulas.
#include "lora_linear/embedding.h"

#include "common/instruction_set.h"

namespace pk {

PK_TABLE_IN_USE(lora_embedding)

namespace lora_embedding {

void gather_double(const Problem& p, int64_t begin, int64_t end) {
  for (int64_t m = begin * kUnit; m < end * kUnit && m < p.M; ++m) {
    double* const h = static_cast<double*>(p.h) + m * p.pitch + p.rank0;
    for (int64_t r = 0; r < p.R; ++r) h[r] = p.scaling * static_cast<const double*>(p.A)[r * p.V + p.ids[m]];
  }
}

void scatter_double(const Problem& p, int64_t begin, int64_t end) {
  each_run(p, begin, end, [&](int64_t v, int64_t first, int64_t last) {
    for (int64_t r = 0; r < p.R; ++r) {
      double sum = 0;
      for (int64_t i = first; i < last; ++i) {
        sum += static_cast<const double*>(p.ds)[p.order[i] * p.pitch + p.rank0 + r];
      }
      static_cast<double*>(p.dA)[r * p.V + v] = sum;
    }
  });
}

}  // namespace lora_embedding
}  // namespace pk
