// The CPU kernels of lora_embedding against loops in double, for every instruction set that this processor has: every
// type, runs over several units, and units in any order.
#include "common/instruction_set.h"
#include "tests/embedding_cases.h"

namespace {

using namespace pk;
using namespace pk::lora_embedding;

int failures = 0;

struct Numbers {
  Dtype type;
  std::vector<char> bytes;

  Numbers(Dtype type, size_t count) : type(type), bytes(count * test::bytes_of(type)) {}
  Numbers(Dtype type, const std::vector<double>& from) : Numbers(type, from.size()) {
    for (size_t i = 0; i < from.size(); ++i) test::write(bytes.data(), type, static_cast<int64_t>(i), from[i]);
  }
};

void compare(const char* set, const test::EmbeddingNumbers& numbers, Dtype factors, Phase gather, Phase scatter) {
  const Dtype wide = factors == Dtype::kFloat64 ? Dtype::kFloat64 : Dtype::kFloat32;
  const test::EmbeddingCase& c = numbers.c;
  std::vector<int64_t> ids(c.M);
  numbers.write_ids(ids.data());
  Numbers A(factors, numbers.A), ds(wide, numbers.ds), dA(factors, numbers.A.size()), h(wide, numbers.ds.size());
  Problem p = numbers.problem(factors);
  p.ids = {ids.data(), c.wide};
  p.A = A.bytes.data();
  p.h = h.bytes.data();
  p.order = numbers.order.data();
  p.ds = ds.bytes.data();
  p.dA = dA.bytes.data();
  for (int64_t unit = units(c.M); unit-- > 0;) {
    gather(p, unit, unit + 1);
    scatter(p, unit, unit + 1);
  }
  if (!numbers.has_h(h.bytes.data(), wide, 0)) {
    numbers.print(set, "gather", factors);
    ++failures;
  }
  if (!numbers.has_dA(dA.bytes.data(), factors)) {
    numbers.print(set, "scatter", factors);
    ++failures;
  }
}

}  // namespace

int main() {
  int sets = 0;
  for (const test::EmbeddingCase& c : test::embedding_cases()) {
    compare("fp64", test::EmbeddingNumbers(c), Dtype::kFloat64, gather_double, scatter_double);
  }
  for (const char* set : {"default", "avx2", "avx512", "avx512_bf16"}) {
    if (!use_instruction_set(set)) {
      std::printf("%s: not run, this processor or build lacks it\n", set);
      continue;
    }
    for (const test::EmbeddingCase& c : test::embedding_cases()) {
      const test::EmbeddingNumbers numbers(c);
      for (const Dtype factors : {Dtype::kFloat32, Dtype::kFloat16, Dtype::kBFloat16}) {
        compare(set, numbers, factors, table().gather, table().scatter);
      }
    }
    ++sets;
  }
  std::printf("lora_embedding: %d instruction sets, %d failures\n", sets, failures);
  return failures != 0 || sets == 0;
}
