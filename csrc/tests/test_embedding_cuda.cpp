// The kernels of lora_embedding against loops in double: every type, runs over several pieces, and ids that no table
// has. Needs a GPU, or the emulator.
#include "lora_linear/embedding_cuda.h"
#include "tests/device_array.h"
#include "tests/embedding_cases.h"

using namespace pk;
using namespace pk::lora_embedding;
using pk::test::Array;

namespace {

int failures = 0, runs = 0;

void compare(test::EmbeddingNumbers numbers, Dtype factors, bool with_unknown) {
  const Dtype wide = factors == Dtype::kFloat64 ? Dtype::kFloat64 : Dtype::kFloat32;
  const test::EmbeddingCase& c = numbers.c;
  if (with_unknown) {  // the first and the last place in the order
    const int64_t first = numbers.order.front(), last = numbers.order.back();
    for (const int64_t m : {first, last}) {
      for (int64_t r = 0; r < c.R; ++r) {
        numbers.h[m * c.R + r] = 0;
        if (numbers.ids[m] != c.padding) numbers.dA[r * c.V + numbers.ids[m]] -= numbers.ds[m * c.pitch + c.rank0 + r];
      }
    }
    numbers.ids[first] = -1;
    numbers.ids[last] = c.V;
  }
  Array<int64_t> ids(c.M), order(c.M);
  Array<char> A(numbers.A.size() * test::bytes_of(factors)), dA(numbers.A.size() * test::bytes_of(factors));
  Array<char> ds(numbers.ds.size() * test::bytes_of(wide)), h(numbers.ds.size() * test::bytes_of(wide));
  numbers.write_ids(ids.host());
  std::copy(numbers.order.begin(), numbers.order.end(), order.host());
  for (size_t i = 0; i < numbers.A.size(); ++i) {
    test::write(A.host(), factors, static_cast<int64_t>(i), numbers.A[i]);
    test::write(dA.host(), factors, static_cast<int64_t>(i), 0);
  }
  for (size_t i = 0; i < numbers.ds.size(); ++i) {
    test::write(ds.host(), wide, static_cast<int64_t>(i), numbers.ds[i]);
    test::write(h.host(), wide, static_cast<int64_t>(i), 7);
  }
  Problem p = numbers.problem(factors);
  p.ids = {ids.data(), c.wide};
  p.A = A.data();
  p.h = h.data();
  p.order = order.data();
  p.ds = ds.data();
  p.dA = dA.data();
  const bool is_double = factors == Dtype::kFloat64;
  ++runs;
  if (!test::ran([&] { return gather(p, is_double, nullptr); }) || !numbers.has_h(h.host(), wide, 7)) {
    numbers.print(test::kWhere, "gather", factors);
    ++failures;
  }
  Array<double> parts(pieces(c.M) * c.R);
  p.pieces = parts.data();
  if (!test::ran([&] { return sum_pieces(p, is_double, nullptr); }) ||
      !test::ran([&] { return scatter(p, is_double, nullptr); }) || !numbers.has_dA(dA.host(), factors)) {
    numbers.print(test::kWhere, "scatter", factors);
    ++failures;
  }
}

}  // namespace

int main() {
  if (!test::device_present()) {
    printf("gpu: no kernel of lora_embedding run: no device\n");
    return test::kSkipped;
  }
  for (const test::EmbeddingCase& c : test::embedding_cases()) {
    for (const Dtype factors : {Dtype::kFloat32, Dtype::kFloat16, Dtype::kBFloat16, Dtype::kFloat64}) {
      compare(test::EmbeddingNumbers(c), factors, false);
      if (c.M > 1) compare(test::EmbeddingNumbers(c), factors, true);
    }
  }
  printf("%s: lora_embedding: %d runs, %d failures\n", test::kWhere, runs, failures);
  return failures != 0;
}
