// The kernels of gated_product against loops in double: every activation and type, sizes around a vector and a block,
// matrices that begin at a multiple of 16 bytes and such that do not. Needs a GPU, or the emulator.
#include <cmath>
#include <cstdio>

#include "common/activation.h"
#include "lora_linear/gated_product_cuda.h"
#include "tests/device_array.h"
#include "tests/typed_values.h"

using namespace pk;
using namespace pk::gated_product;
using pk::test::Array;

namespace {

int failures = 0;
long long compared = 0;

// Numbers of a type, `shift` of them past where an allocation begins; what is not filled is NaN until a kernel writes
// it.
struct Values {
  Dtype type;
  int64_t count;
  int shift;
  Array<char> memory;

  Values(Dtype type, int64_t count, int shift, int64_t first = -1)
      : type(type), count(count), shift(shift), memory(static_cast<size_t>((count + shift) * test::bytes_of(type))) {
    memset(memory.host(), 0xFF, static_cast<size_t>((count + shift) * test::bytes_of(type)));
    for (int64_t i = 0; first >= 0 && i < count; ++i) {
      test::write(memory.host(), type, i + shift, test::exact_value(first + i));
    }
  }
  void* data() { return memory.data() + shift * test::bytes_of(type); }
  double operator[](int64_t i) { return test::read(memory.host(), type, i + shift); }
  bool near(int64_t i, double wanted) {
    const double eps = type == Dtype::kFloat64   ? 0x1p-49
                       : type == Dtype::kFloat32 ? 0x1p-20
                       : type == Dtype::kFloat16 ? 0x1p-11
                                                 : 0x1p-8;
    ++compared;
    return std::fabs((*this)[i] - wanted) <= eps * (1 + std::fabs(wanted));
  }
};

void compare(Dtype type, int64_t n, int activation, int shift) {
  Values gate(type, n, shift, 1), up(type, n, shift, 5), dy(type, n, shift, 8), y(type, n, shift),
      dgate(type, n, shift), dup(type, n, shift);
  const Product forward{n, gate.data(), up.data(), y.data(), activation};
  bool right = test::ran([&] { return product(type, forward, nullptr); });
  const Gradients backward{n, dy.data(), gate.data(), up.data(), dgate.data(), dup.data(), activation};
  right = right && test::ran([&] { return gradients(type, backward, nullptr); });
  for (int64_t i = 0; right && i < n; ++i) {
    const double f = activated(activation, gate[i]), slope = slope_of(activation, gate[i]);
    right = y.near(i, f * up[i]) && dup.near(i, dy[i] * f) && dgate.near(i, dy[i] * up[i] * slope);
  }
  if (right) return;
  printf("FAILED %s: activation %d, type %d, n = %lld, shifted by %d\n", test::kWhere, activation,
         static_cast<int>(type), static_cast<long long>(n), shift);
  ++failures;
}

}  // namespace

int main() {
  if (!test::device_present()) {
    printf("gpu: no kernel of gated_product run: no device\n");
    return test::kSkipped;
  }
  for (const Dtype type : {Dtype::kFloat32, Dtype::kFloat16, Dtype::kBFloat16, Dtype::kFloat64}) {
    for (const int activation : {kSilu, kGelu, kGeluTanh, kRelu}) {
      for (const int64_t n : {1, 7, 8, 9, 257, 2048, 2049, 4103}) {
        compare(type, n, activation, 0);
        compare(type, n, activation, 1);
      }
    }
  }
  printf("%s: gated_product: %lld numbers compared, %d failures\n", test::kWhere, compared, failures);
  return failures != 0;
}
