// The fused forward of bottleneck_adapter, whole and behind a shrink, against loops in double: rows, columns and
// bottlenecks around the tiles, rows that no vector fits, all options and none, masks, and what fp16 cannot hold. Needs
// a GPU, or the emulator.
#include <cmath>
#include <cstdio>
#include <string>
#include <vector>

#include "bottleneck_adapter/bottleneck_adapter_cuda.h"
#include "common/activation.h"
#include "tests/device_array.h"
#include "tests/typed_values.h"

using namespace pk;
using namespace pk::bottleneck_adapter;
using pk::test::Array;
using pk::test::ran;

namespace {

constexpr uint64_t kSeed = 0x0123456789ABCDEFull;
constexpr double kP = 0.3;
const Dropout kDropout = make_dropout(kP, kSeed, 0);
int failures = 0, cases = 0;

void expect(bool holds, const std::string& what) {
  ++cases;
  if (holds) return;
  ++failures;
  printf("FAILED %s: %s\n", test::kWhere, what.c_str());
}

// [rows][cols] numbers, rows `stride` apart; what lies between them, and what is not filled, is NaN.
struct Matrix {
  Dtype type;
  int64_t stride;
  Array<char> memory;

  Matrix(Dtype type, int64_t rows, int64_t cols, int64_t stride)
      : type(type), stride(stride), memory(static_cast<size_t>(rows * stride * test::bytes_of(type))) {
    memset(memory.host(), 0xFF, static_cast<size_t>(rows * stride * test::bytes_of(type)));
  }
  Matrix(Dtype type, int64_t rows, int64_t cols, int64_t stride, int64_t first, double factor = 1)
      : Matrix(type, rows, cols, stride) {
    for (int64_t i = 0; i < rows * cols; ++i) {
      test::write(memory.host(), type, i / cols * stride + i % cols, factor * test::exact_value(first + i));
    }
  }
  void* data() { return memory.data(); }
  double at(int64_t i, int64_t j) { return test::read(memory.host(), type, i * stride + j); }
};

struct Sizes {
  int64_t M, K, E, N;
  int64_t gap;     // between the rows of x and of the residual
  int splits = 0;  // parts of x A^T that are given
};
struct Options {
  bool all, per_channel, drops_inside;  // all: biases, gate, scale and a mask
  int activation;
  double factor;  // of x and A
};

bool keeps(bool drops, int64_t m, int64_t n) {
  return !drops || kept(kDropout, static_cast<uint32_t>(m), static_cast<uint32_t>(n));
}

// h is rounded once: it has few bits. y has the rounding of its type, and of u to two parts.
void check(Dtype T, const Sizes& s, const Options& o) {
  const int64_t M = s.M, K = s.K, E = s.E, N = s.N;
  Matrix x(T, M, K, K + s.gap, 1, o.factor), A(T, E, K, K, 5, o.factor), a(T, 1, E, E, 3), B(T, N, E, E, 7),
      b(T, 1, N, N, 2), gate(T, 1, M, M, 4), scale(T, 1, N, N, 9), residual(T, M, N, N + s.gap, 8),
      h(Dtype::kFloat32, M, E, E), y(T, M, N, N);
  Array<uint64_t> seed(1);
  seed[0] = kSeed;
  const bool inside = o.all && o.drops_inside, outside = o.all && !o.drops_inside;
  const Keep keep = lora_linear::make_keep(kP, 0);
  const double scaling = -1.5 / (o.factor * o.factor), sum_scale = inside ? 65536. / kDropout.threshold : 1;
  Gated gated;
  gated.scaling = scaling;
  gated.sum_scale = sum_scale;
  if (o.all) gated = {gate.data(), scale.data(), b.data(), o.per_channel, scaling, sum_scale, outside ? keep : Keep{}};
  Matrix parts_of_h(Dtype::kFloat32, s.splits * M, E, E);
  lora_linear::Shrink shrink{};
  shrink.x = x.data();
  shrink.x_stride = x.stride;
  shrink.M = M;
  shrink.K = K;
  shrink.h = static_cast<float*>(parts_of_h.data());
  shrink.R = E;
  shrink.splits = s.splits;
  shrink.adapters.count = 1;
  shrink.adapters.at[0] = {A.data(), nullptr, static_cast<int>(E), 0, 0, 1.f, Keep{}};
  const Fused call{x.data(),
                   x.stride,
                   M,
                   K,
                   A.data(),
                   o.all ? a.data() : nullptr,
                   E,
                   B.data(),
                   N,
                   residual.data(),
                   residual.stride,
                   static_cast<float*>(h.data()),
                   y.data(),
                   o.activation,
                   inside ? keep : Keep{},
                   gated,
                   seed.data(),
                   s.splits ? static_cast<const float*>(parts_of_h.data()) : nullptr,
                   s.splits};
  bool right = ran([&] {
    const cudaError_t first = s.splits ? lora_linear::shrink(T, T, shrink, nullptr) : cudaSuccess;
    return first != cudaSuccess ? first : fused(T, call, nullptr);
  });
  const double rounding = T == Dtype::kFloat16 ? 0x1p-11 : 0x1p-8, parts = T == Dtype::kFloat16 ? 0x1p-18 : 0x1p-15;
  std::vector<double> u(static_cast<size_t>(E));
  for (int64_t m = 0; m < M; ++m) {
    for (int64_t e = 0; e < E; ++e) {
      double sum = o.all ? a.at(0, e) : 0;
      for (int64_t k = 0; k < K; ++k) sum += x.at(m, k) * A.at(e, k);
      right = right && std::fabs(h.at(m, e) - sum) <= 0x1p-24 * std::fabs(sum);
      u[static_cast<size_t>(e)] = keeps(inside, m, e) ? activated(o.activation, sum) : 0;
    }
    for (int64_t n = 0; n < N; ++n) {
      double t = 0, size = 4;
      for (int64_t e = 0; e < E; ++e) {
        t += u[static_cast<size_t>(e)] * B.at(n, e);
        size += std::fabs(u[static_cast<size_t>(e)] * B.at(n, e));
      }
      const double factor = scaling * (o.all ? gate.at(0, m) * scale.at(0, o.per_channel ? n : 0) : 1) *
                            (outside ? 65536. / kDropout.threshold : 1);
      t = keeps(outside, m, n) ? sum_scale * t + (o.all ? b.at(0, n) : 0) : 0;
      const double wanted = residual.at(m, n) + factor * t;
      right =
          right && std::fabs(y.at(m, n) - wanted) <= rounding * std::fabs(wanted) + parts * std::fabs(factor) * size;
    }
  }
  expect(right, "M " + std::to_string(M) + ", K " + std::to_string(K) + ", E " + std::to_string(E) + ", N " +
                    std::to_string(N) + ", activation " + std::to_string(o.activation) + " of dtype " +
                    std::to_string(static_cast<int>(T)));
}

// A NaN, and a row whose u is infinite, stay in their rows.
void stays_in_its_row(Dtype T) {
  const int64_t M = 66, K = 24, E = 40, N = 72;
  const auto bits = [&](bool dirty) {
    Matrix x(T, M, K, K, 1), A(T, E, K, K, 5), B(T, N, E, E, 7), h(Dtype::kFloat32, M, E, E), y(T, M, N, N);
    for (int64_t k = 0; dirty && k < K; ++k) {
      const uint16_t infinity = T == Dtype::kFloat16 ? 0x7C00 : 0x7F80;
      memset(x.memory.host() + (3 * K + k) * 2, 0xFF, 2);
      memcpy(x.memory.host() + (64 * K + k) * 2, &infinity, 2);
    }
    Fused call{};
    call.x = x.data();
    call.x_stride = K;
    call.residual_stride = 0;
    call.M = M;
    call.K = K;
    call.A = A.data();
    call.E = E;
    call.B = B.data();
    call.N = N;
    call.h = static_cast<float*>(h.data());
    call.y = y.data();
    call.activation = kSilu;
    Matrix residual(T, 1, N, N, 8);
    call.residual = residual.data();
    expect(ran([&] { return fused(T, call, nullptr); }), "a launch");
    return std::vector<char>(y.memory.host(), y.memory.host() + M * N * 2);
  };
  const std::vector<char> clean = bits(false), dirty = bits(true);
  bool right = true;
  for (int64_t i = 0; i < M * N * 2; ++i) {
    const int64_t m = i / 2 / N;
    right = right && (m == 3 || m == 64 || clean[static_cast<size_t>(i)] == dirty[static_cast<size_t>(i)]);
  }
  expect(right, "NaN stays in its row");
}

}  // namespace

int main() {
  if (!test::device_present()) {
    printf("gpu: the fused kernel of bottleneck_adapter was not run: no device\n");
    return test::kSkipped;
  }
  for (const Dtype T : {Dtype::kBFloat16, Dtype::kFloat16}) {
    check(T, {1, 1, 1, 1, 0}, {false, false, false, kRelu, 1});
    check(T, {63, 67, 5, 65, 3}, {true, true, true, kGelu, 1});
    check(T, {64, 64, 64, 64, 8}, {false, false, false, kSilu, 1});
    check(T, {65, 136, 65, 131, 8}, {true, false, false, kGeluTanh, 1});
    check(T, {130, 72, 24, 72, 0}, {true, true, false, kSigmoid, 1});
    check(T, {9, 264, 129, 24, 8}, {true, true, true, kLeakyRelu, 1});
    check(T, {65, 192, 256, 136, 8}, {true, true, true, kTanh, 1});
    check(T, {5, 128, 33, 40, 1}, {false, false, false, kIdentity, 1});
    check(T, {66, 64, 72, 65, 8}, {true, true, true, kIdentity, 256});  // |h| far beyond 65504
    check(T, {3, 72, 8, 16, 0}, {false, false, false, kRelu, 0x1p-6});
    check(T, {1, 72, 40, 136, 8, 3}, {true, true, true, kGelu, 1});
    check(T, {16, 67, 5, 65, 0, 1}, {true, false, false, kRelu, 1});
    check(T, {66, 64, 256, 24, 8, 2}, {false, false, false, kTanh, 1});
    check(T, {5, 64, 128, 131, 8, 2}, {true, true, true, kIdentity, 256});
    stays_in_its_row(T);
  }
  printf("%s: %d cases, %d failures\n", test::kWhere, cases, failures);
  return failures != 0;
}
