// The CPU kernels of gated_product against its fp64 loops, for every instruction set that this processor has: every
// activation and type, sizes around a vector and a unit, and units in any order.
#include <cmath>
#include <cstdio>
#include <string>
#include <vector>

#include "common/instruction_set.h"
#include "lora_linear/gated_product.h"
#include "tests/typed_values.h"

namespace {

using namespace pk;
using namespace pk::gated_product;

int failures = 0;

// Numbers of a type; what no kernel has written is NaN, and so is the guard behind the end, which none may touch.
struct Numbers {
  static constexpr int64_t kGuard = 32;
  Dtype type;
  int64_t count;
  std::vector<char> bytes;

  Numbers(Dtype type, int64_t count, int64_t first = -1)
      : type(type), count(count), bytes(static_cast<size_t>((count + kGuard) * test::bytes_of(type)), '\xFF') {
    for (int64_t i = 0; first >= 0 && i < count; ++i) test::write(bytes.data(), type, i, test::exact_value(first + i));
  }
  double operator[](int64_t i) const { return test::read(bytes.data(), type, i); }
  bool guard_holds() const {
    for (int64_t i = count; i < count + kGuard; ++i) {
      if (!std::isnan((*this)[i])) return false;
    }
    return true;
  }
};

struct Run {
  Numbers gate, up, dy, y, dgate, dup;
  Problem problem;

  Run(Dtype type, int64_t n, int activation)
      : gate(type, n, 1), up(type, n, 5), dy(type, n, 8), y(type, n), dgate(type, n), dup(type, n) {
    problem = {n,
               type,
               activation,
               gate.bytes.data(),
               up.bytes.data(),
               y.bytes.data(),
               dy.bytes.data(),
               dgate.bytes.data(),
               dup.bytes.data()};
  }
};

bool near(const Numbers& found, const Numbers& wanted, double eps) {
  for (int64_t i = 0; i < found.count; ++i) {
    if (!(std::fabs(found[i] - wanted[i]) <= eps * (1 + std::fabs(wanted[i])))) return false;
  }
  return found.guard_holds();
}

void compare(Dtype type, int64_t n, int activation, double eps) {
  Run run(type, n, activation), exact(Dtype::kFloat64, n, activation);
  forward_double(exact.problem, 0, units(n));
  backward_double(exact.problem, 0, units(n));
  for (int64_t unit = units(n); unit-- > 0;) {
    table().forward(run.problem, unit, unit + 1);
    table().backward(run.problem, unit, unit + 1);
  }
  const bool right = near(run.y, exact.y, eps) && near(run.dgate, exact.dgate, eps) && near(run.dup, exact.dup, eps);
  if (right) return;
  std::printf("FAILED: %s: activation %d, type %d, n = %lld\n", instruction_set_name(), activation,
              static_cast<int>(type), static_cast<long long>(n));
  ++failures;
}

}  // namespace

int main() {
  int sets = 0;
  for (const char* set : {"default", "avx2", "avx512", "avx512_bf16"}) {
    if (!use_instruction_set(set)) {
      std::printf("%s: not run, this processor or build lacks it\n", set);
      continue;
    }
    for (const int activation : {kSilu, kGelu, kGeluTanh, kRelu}) {
      for (const int64_t n : {int64_t{1}, int64_t{3}, int64_t{16}, int64_t{17}, kUnit, kUnit + 1, 2 * kUnit - 1}) {
        compare(Dtype::kFloat32, n, activation, 0x1p-21);
        compare(Dtype::kBFloat16, n, activation, 0x1p-8);
        compare(Dtype::kFloat16, n, activation, 0x1p-11);
      }
    }
    ++sets;
  }
  std::printf("gated_product: %d instruction sets, %d failures\n", sets, failures);
  return failures != 0 || sets == 0;
}
