// The kernels of bottleneck_adapter, and the expand of lora_linear that its forward goes through, against loops in
// double: every activation, dtypes, masks, splits, ragged sizes, what may be left out. Needs a GPU, or the emulator.
#include <cmath>
#include <cstdio>
#include <string>
#include <vector>

#include "common/activation.h"
#include "tests/bottleneck_adapter_cases.h"
#include "tests/device_array.h"
#include "tests/typed_values.h"

using namespace pk;
using namespace pk::bottleneck_adapter;
using pk::test::Array;
using pk::test::expect;
using pk::test::kDropout;
using pk::test::keeps;
using pk::test::kP;
using pk::test::kSeed;
using pk::test::ran;

namespace {

// Numbers of a dtype; what is not filled is NaN until a kernel writes it.
struct Values {
  Dtype type;
  Array<char> memory;

  Values(Dtype type, int64_t count, int64_t first = -1)
      : type(type), memory(static_cast<size_t>(count * test::bytes_of(type))) {
    memset(memory.host(), 0xFF, static_cast<size_t>(count * test::bytes_of(type)));
    for (int64_t i = 0; first >= 0 && i < count; ++i) test::write(memory.host(), type, i, test::exact_value(first + i));
  }
  void* data() { return memory.data(); }
  double operator[](int64_t i) { return test::read(memory.host(), type, i); }
  // Within a few roundings of sums as large as `size`.
  bool near(int64_t i, double wanted, double size = 8) {
    const double eps = type == Dtype::kFloat64   ? 0x1p-48
                       : type == Dtype::kFloat32 ? 0x1p-19
                       : type == Dtype::kFloat16 ? 0x1p-10
                                                 : 0x1p-7;
    return std::fabs((*this)[i] - wanted) <= eps * (std::fabs(wanted) + (test::bytes_of(type) > 2 ? size : 0x1p-6));
  }
};

double numeric_slope(int activation, double h) {
  const double step = 1e-5;
  return (activated(activation, h + step) - activated(activation, h - step)) / (2 * step);
}

// Rows of 3 parts, in their order, a gate or none, a mask or none.
void bottleneck(int activation, Dtype factors, bool optional) {
  const Dtype acc = factors == Dtype::kFloat64 ? factors : Dtype::kFloat32;
  const int64_t M = 19, E = 45, width = E + (optional ? 1 : 0);
  const int splits = 3;
  Array<uint64_t> seed(1);
  seed[0] = kSeed;
  const Keep keep = optional ? lora_linear::make_keep(kP, 0) : Keep{};
  Values parts(acc, splits * M * E, 3), bias(factors, E, 7), gate(factors, M, 2), h(acc, M * E), u(acc, M * width);
  const Activate call{parts.data(),
                      splits,
                      optional ? bias.data() : nullptr,
                      optional ? gate.data() : nullptr,
                      h.data(),
                      u.data(),
                      M,
                      E,
                      width,
                      activation,
                      keep,
                      seed.data()};
  bool right = ran([&] { return activate(factors, call, nullptr); });
  Values v(acc, splits * M * width, 11), scale(factors, 1, 6), dh(acc, M * E), dgate(factors, M);
  const Slope back{v.data(),
                   splits,
                   h.data(),
                   optional ? gate.data() : nullptr,
                   optional ? scale.data() : nullptr,
                   dh.data(),
                   dgate.data(),
                   M,
                   E,
                   width,
                   activation,
                   keep,
                   seed.data()};
  right = right && ran([&] { return slope(factors, back, nullptr); });
  for (int64_t m = 0; m < M; ++m) {
    double dot = 0;
    const double g = optional ? gate[m] : 1, s = optional ? scale[0] : 1;
    for (int64_t e = 0; e < width; ++e) {
      double sum = optional && e < E ? bias[e] : 0, v_sum = 0;
      for (int p = 0; p < splits; ++p) v_sum += s * v[(p * M + m) * width + e];
      if (e == E) {
        right = right && u[m * width + e] == g;
        dot += v_sum;
        continue;
      }
      for (int p = 0; p < splits; ++p) sum += parts[(p * M + m) * E + e];
      const double f = keeps(optional, m, e) ? activated(activation, sum) : 0;
      right = right && h[m * E + e] == sum && u.near(m * width + e, g * f);
      dot += v_sum * f;
      if (std::fabs(sum) < 1e-3) continue;  // a kink
      const double slope = keeps(optional, m, e) ? numeric_slope(activation, sum) * g * v_sum : 0;
      right = right && std::fabs(dh[m * E + e] - slope) <= 1e-4 * (1 + std::fabs(g * v_sum));
    }
    right = right && dgate.near(m, dot, 400);
  }
  expect(right, "activation " + std::to_string(activation) + " of dtype " + std::to_string(static_cast<int>(factors)));
}

// Both ways to y, from u B^T that the test computes or the kernel.
void output(Dtype x, Dtype factors, int64_t M, int64_t N, int64_t E, bool optional, bool per_channel) {
  const Dtype acc = factors == Dtype::kFloat64 ? factors : Dtype::kFloat32;
  const int64_t stride = N + 3;
  Array<uint64_t> seed(1);
  seed[0] = kSeed;
  Values u(acc, M * E, 1), B(factors, N * E, 5), bias(factors, N, 3), gate(factors, M, 4), scale(factors, N, 9),
      residual(x, M * stride, 8), sum(acc, M * N), y(x, M * N);
  Gated gated;
  gated.scaling = -1.5;
  gated.sum_scale = 1.25;
  if (optional)
    gated = {gate.data(), scale.data(), bias.data(), per_channel, -1.5, 1.25, lora_linear::make_keep(kP, 0)};
  std::vector<double> wanted(static_cast<size_t>(M * N)), size(wanted.size());
  for (int64_t m = 0; m < M; ++m) {
    for (int64_t n = 0; n < N; ++n) {
      double t = 0, terms = 0;
      for (int64_t e = 0; e < E; ++e) {
        t += u[m * E + e] * B[n * E + e];
        terms += std::fabs(u[m * E + e] * B[n * E + e]);
      }
      test::write(sum.memory.host(), acc, m * N + n, t);
      t = 1.25 * t + (optional ? bias[n] : 0);
      if (!keeps(optional, m, n)) t = 0;
      if (optional) t *= 65536. / kDropout.threshold * gate[m] * scale[per_channel ? n : 0];
      wanted[static_cast<size_t>(m * N + n)] = residual[m * stride + n] - 1.5 * t;
      size[static_cast<size_t>(m * N + n)] = 16 * (terms + 4);
    }
  }
  const auto check = [&](bool launched, const char* what) {
    for (int64_t i = 0; i < M * N; ++i) {
      launched = launched && y.near(i, wanted[static_cast<size_t>(i)], size[static_cast<size_t>(i)]);
    }
    expect(launched, std::string(what) + " of dtype " + std::to_string(static_cast<int>(x)));
  };
  const Finish call{sum.data(), residual.data(), stride, y.data(), M, N, gated, seed.data()};
  check(ran([&] { return finish(x, factors, call, nullptr); }), "finish");
  if (!lora_linear::has_mma_kernels(x, factors)) return;
  memset(y.memory.host(), 0xFF, static_cast<size_t>(M * N * test::bytes_of(x)));
  lora_linear::Expand expand{};
  expand.out = y.data();
  expand.M = M;
  expand.N = N;
  expand.low = static_cast<const float*>(static_cast<void*>(u.data()));
  expand.R = E;
  expand.seed = seed.data();
  expand.adapters.count = 1;
  expand.adapters.at[0] = {B.data(), nullptr, static_cast<int>(E), 0, 0, 1.f, Keep{}};
  expand.residual = residual.data();
  expand.residual_stride = stride;
  expand.is_gated = true;
  expand.gated = gated;
  check(ran([&] { return lora_linear::expand(x, factors, expand, nullptr); }), "gated expand");
}

void dropped_rows(Dtype x) {
  const int64_t M = 9, N = 531, stride = N + 4;
  Array<uint64_t> seed(1);
  seed[0] = kSeed;
  Values in(x, M * stride, 1), out(x, M * N);
  for (int64_t n = 0; n < N; ++n) {  // a NaN that is dropped counts as 0
    if (!keeps(true, 0, n)) memset(in.memory.host() + n * test::bytes_of(x), 0xFF, test::bytes_of(x));
  }
  bool right = ran([&] {
    return drop_rows(x, {in.data(), stride, M, N, lora_linear::make_keep(kP, 0), seed.data(), out.data()}, nullptr);
  });
  for (int64_t i = 0; i < M * N; ++i) {
    right = right && out[i] == (keeps(true, i / N, i % N) ? in[i / N * stride + i % N] : 0);
  }
  expect(right, "drop_rows");
}

void up_weights(Dtype factors, bool per_channel, bool biased) {
  const Dtype acc = factors == Dtype::kFloat64 ? factors : Dtype::kFloat32;
  const int64_t N = 13, E = 70, row = E + 1, split = N * row;
  const int splits = 2;
  Values D(acc, splits * split, 1), B(factors, N * E, 5), b(factors, N, 2), scale(factors, N, 8), dB(factors, N * E),
      db(factors, N), ds(acc, N), scaled(acc, N * E);
  const double weight_factor = 0.5, bias_factor = -2;
  const auto* const parts = static_cast<const char*>(D.data());
  const UpGradients call{{parts, split, row},
                         {biased ? parts + E * test::bytes_of(acc) : nullptr, split, row},
                         splits,
                         N,
                         E,
                         weight_factor,
                         bias_factor,
                         B.data(),
                         biased ? b.data() : nullptr,
                         scale.data(),
                         per_channel,
                         dB.data(),
                         biased ? db.data() : nullptr,
                         ds.data(),
                         acc};
  bool right = ran([&] { return up_gradients(factors, call, nullptr); });
  right = right && ran([&] { return scale_rows(factors, B.data(), scale.data(), N, E, scaled.data(), nullptr); });
  for (int64_t n = 0; n < N; ++n) {
    const double s = scale[per_channel ? n : 0], d = bias_factor * (D[n * row + E] + D[split + n * row + E]);
    double dot = biased ? b[n] * d : 0;
    for (int64_t e = 0; e < E; ++e) {
      const double sum = weight_factor * (D[n * row + e] + D[split + n * row + e]);
      dot += B[n * E + e] * sum;
      right = right && dB.near(n * E + e, s * sum) && scaled.near(n * E + e, scale[n] * B[n * E + e]);
    }
    right = right && ds.near(n, dot, 200) && (!biased || db.near(n, s * d));
  }
  expect(right, "up_gradients");
}

void down_weights(Dtype factors, bool affine) {
  const Dtype acc = factors == Dtype::kFloat64 ? factors : Dtype::kFloat32;
  const int64_t K = 70, E = 21;
  const int splits = 2;
  Values D(acc, splits * E * K, 1), da(acc, E, 3), A(factors, E * K, 5), w(factors, K, 2), b(factors, K, 8),
      dA(factors, E * K), dw(factors, K), db(factors, K);
  const DownGradients call{
      D.data(),  splits,    da.data(), E, K, A.data(), affine ? w.data() : nullptr, affine ? b.data() : nullptr,
      dA.data(), dw.data(), db.data()};
  bool right = ran([&] { return down_gradients(factors, call, nullptr); });
  for (int64_t k = 0; k < K; ++k) {
    double weight = 0, bias = 0;
    for (int64_t e = 0; e < E; ++e) {
      const double sum = D[e * K + k] + D[(E + e) * K + k];
      weight += A[e * K + k] * sum;
      bias += A[e * K + k] * da[e];
      right = right && dA.near(e * K + k, affine ? w[k] * sum + b[k] * da[e] : sum);
    }
    right = right && dw.near(k, weight, 100) && db.near(k, bias, 100);
  }
  expect(right, "down_gradients");
}

void column_sums(Dtype factors, int64_t rows, int64_t cols) {
  const Dtype acc = factors == Dtype::kFloat64 ? factors : Dtype::kFloat32;
  const int chunks = column_chunks(rows);
  Values in(acc, rows * cols, 1), out(acc, chunks * cols);
  bool right = ran([&] { return column_parts(factors, in.data(), rows, cols, out.data(), nullptr); });
  for (int64_t j = 0; j < cols; ++j) {
    double wanted = 0, got = 0;
    for (int64_t i = 0; i < rows; ++i) wanted += in[i * cols + j];
    for (int p = 0; p < chunks; ++p) got += out[p * cols + j];
    right = right && got == wanted;  // multiples of 1/8, all of them
  }
  expect(right, "column_parts of " + std::to_string(rows));
}

void norms(Dtype x, Dtype factors, bool centred, bool affine) {
  const Dtype acc = factors == Dtype::kFloat64 ? factors : Dtype::kFloat32;
  const int64_t M = 11, K = 77, stride = K + 2;
  const double eps = 1e-5;
  Values in(x, M * stride, 1), w(factors, K, 2), b(factors, K, 8), normed(acc, M * K), out(acc, M * K),
      reciprocal(acc, M), grad(acc, M * K, 4), residual(x, M * stride, 6), dx(x, M * K);
  void *const weight = affine ? w.data() : nullptr, *const bias = affine ? b.data() : nullptr;
  const Normalize plain{in.data(), stride, M, K, centred, eps, nullptr, nullptr, normed.data(), reciprocal.data()};
  const Normalize whole{in.data(), stride, M, K, centred, eps, weight, bias, out.data(), nullptr};
  const NormSlope back{grad.data(), normed.data(), reciprocal.data(), M,      K,
                       centred,     weight,        residual.data(),   stride, dx.data()};
  bool right = ran([&] {
    const cudaError_t first = normalize(x, factors, plain, nullptr), second = normalize(x, factors, whole, nullptr);
    return first != cudaSuccess ? first : second;
  });
  right = right && ran([&] { return norm_slope(x, factors, back, nullptr); });
  for (int64_t m = 0; m < M; ++m) {
    double mean = 0, squares = 0, q_mean = 0, along = 0;
    for (int64_t k = 0; centred && k < K; ++k) mean += in[m * stride + k] / K;
    for (int64_t k = 0; k < K; ++k) squares += std::pow(in[m * stride + k] - mean, 2) / K;
    const double r = 1 / std::sqrt(squares + eps);
    for (int64_t k = 0; k < K; ++k) {
      const double n = (in[m * stride + k] - mean) * r, q = grad[m * K + k] * (affine ? w[k] : 1);
      q_mean += centred ? q / K : 0;
      along += q * n / K;
      right = right && normed.near(m * K + k, n) && out.near(m * K + k, affine ? n * w[k] + b[k] : n);
    }
    right = right && reciprocal.near(m, r);
    for (int64_t k = 0; k < K; ++k) {
      const double n = (in[m * stride + k] - mean) * r, q = grad[m * K + k] * (affine ? w[k] : 1);
      right = right && dx.near(m * K + k, r * (q - q_mean - n * along) + residual[m * stride + k]);
    }
  }
  expect(right, "norm of dtype " + std::to_string(static_cast<int>(x)));
}

}  // namespace

int main() {
  if (!test::device_present()) {
    printf("gpu: no kernel of bottleneck_adapter run: no device\n");
    return test::kSkipped;
  }
  const Dtype single = Dtype::kFloat32, half = Dtype::kFloat16, brain = Dtype::kBFloat16, twice = Dtype::kFloat64;
  for (int activation = 0; activation < kActivations; ++activation) bottleneck(activation, single, true);
  for (const Dtype factors : {half, brain, twice}) bottleneck(kGelu, factors, true);
  bottleneck(kGeluTanh, twice, false);
  const Dtype pairs[][2] = {{brain, brain},  {half, half},     {brain, single}, {half, single},
                            {single, brain}, {single, single}, {twice, twice}};
  for (const auto& pair : pairs) {
    output(pair[0], pair[1], 70, 131, 37, true, true);
    output(pair[0], pair[1], 5, 136, 5, true, false);
    output(pair[0], pair[1], 5, 24, 16, false, false);
    for (const bool centred : {true, false}) norms(pair[0], pair[1], centred, centred);
  }
  for (const Dtype factors : {single, half, brain, twice}) {
    up_weights(factors, true, true);
    up_weights(factors, false, false);
    down_weights(factors, true);
    down_weights(factors, false);
    dropped_rows(factors);
  }
  for (const int64_t rows : {1, 128, 129, 9000}) column_sums(single, rows, 33);
  column_sums(twice, 200, 1);
  return test::said();
}
