// The CPU kernels of lora_embedding for one instruction set: compiled once per set, with PK_ISA naming it. Columns of A
// are as far apart as the table is long, so numbers are fetched one by one and converted as vectors.
#include "common/vec.h"
#include "lora_linear/embedding.h"

namespace pk::PK_ISA {
namespace {

using lora_embedding::each_run;
using lora_embedding::kUnit;
using lora_embedding::Problem;

template <class F>
void gather_as(const Problem& p, int64_t begin, int64_t end) {
  const float scaling = static_cast<float>(p.scaling);
  const int64_t last = end * kUnit < p.M ? end * kUnit : p.M;
  for (int64_t m = begin * kUnit; m < last; m += kLanes) {
    const int64_t rows = last - m < kLanes ? last - m : kLanes;
    int64_t column[kLanes];
    for (int64_t i = 0; i < rows; ++i) column[i] = p.ids[m + i];
    float* const h = static_cast<float*>(p.h) + m * p.pitch + p.rank0;
    for (int64_t r = 0; r < p.R; ++r) {
      const F* const row = static_cast<const F*>(p.A) + r * p.V;
      F narrow[kLanes] = {};
      for (int64_t i = 0; i < rows; ++i) narrow[i] = row[column[i]];
      const vf values = load(narrow) * scaling;
      for (int64_t i = 0; i < rows; ++i) h[i * p.pitch + r] = values[i];
    }
  }
}

template <class F>
void scatter_as(const Problem& p, int64_t begin, int64_t end) {
  each_run(p, begin, end, [&](int64_t v, int64_t first, int64_t last) {
    for (int64_t r = 0; r < p.R; r += kLanes) {
      const int64_t ranks = p.R - r < kLanes ? p.R - r : kLanes;
      const float* const ds = static_cast<const float*>(p.ds) + p.rank0 + r;
      vf sum = load_n(ds + p.order[first] * p.pitch, ranks);
      for (int64_t i = first + 1; i < last; ++i) sum += load_n(ds + p.order[i] * p.pitch, ranks);
      F narrow[kLanes];
      store(narrow, sum);
      for (int64_t i = 0; i < ranks; ++i) static_cast<F*>(p.dA)[(r + i) * p.V + v] = narrow[i];
    }
  });
}

void gather(const Problem& p, int64_t begin, int64_t end) {
  if (p.factors == Dtype::kFloat32) return gather_as<float>(p, begin, end);
  if (p.factors == Dtype::kBFloat16) return gather_as<bf16>(p, begin, end);
  gather_as<fp16>(p, begin, end);
}

void scatter(const Problem& p, int64_t begin, int64_t end) {
  if (p.factors == Dtype::kFloat32) return scatter_as<float>(p, begin, end);
  if (p.factors == Dtype::kBFloat16) return scatter_as<bf16>(p, begin, end);
  scatter_as<fp16>(p, begin, end);
}

}  // namespace

extern const lora_embedding::Table lora_embedding_table;
const lora_embedding::Table lora_embedding_table = {gather, scatter};

}  // namespace pk::PK_ISA
