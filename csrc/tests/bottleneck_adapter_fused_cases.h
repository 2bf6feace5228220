// What the tests of bottleneck_adapter's whole forward share: a call with all options or none against loops in double,
// and where NaNs and infinities go.
#pragma once

#include <cmath>
#include <cstdio>
#include <string>
#include <utility>
#include <vector>

#include "common/activation.h"
#include "tests/bottleneck_adapter_cases.h"
#include "tests/device_array.h"
#include "tests/typed_values.h"

namespace pk::test {

using namespace pk::bottleneck_adapter;

// [rows][cols] numbers, rows `stride` apart; what lies between them, and what is not filled, is NaN.
struct Matrix {
  Dtype type;
  int64_t stride;
  Array<char> memory;

  Matrix(Dtype type, int64_t rows, int64_t cols, int64_t stride)
      : type(type), stride(stride), memory(static_cast<size_t>(rows * stride * bytes_of(type))) {
    memset(memory.host(), 0xFF, static_cast<size_t>(rows * stride * bytes_of(type)));
  }
  Matrix(Dtype type, int64_t rows, int64_t cols, int64_t stride, int64_t first, double factor = 1)
      : Matrix(type, rows, cols, stride) {
    for (int64_t i = 0; i < rows * cols; ++i) {
      write(memory.host(), type, i / cols * stride + i % cols, factor * exact_value(first + i));
    }
  }
  void* data() { return memory.data(); }
  void set(int64_t i, int64_t j, double value) { write(memory.host(), type, i * stride + j, value); }
  double at(int64_t i, int64_t j) { return read(memory.host(), type, i * stride + j); }
};

struct Sizes {
  int64_t M, K, E, N;
  int64_t gap;     // between the rows of x and of the residual
  int splits = 0;  // parts of x A^T that are given
};
struct Options {
  bool all, per_channel, drops_inside;  // all: biases, gate, scale and a mask
  int activation;
  double factor;         // of x and A
  bool outlier = false;  // u[m, 0] is 2^28 K / 2, and B[n, 0] is 0
};

// Of the whole forward, or of what comes behind a shrink.
using Launcher = cudaError_t (*)(Dtype, const Fused&, cudaStream_t);

// parts[p] = part p of x A^T.
inline lora_linear::Shrink shrink_of(const Sizes& s, Matrix& x, Matrix& A, Matrix& parts) {
  lora_linear::Shrink shrink{};
  shrink.x = x.data();
  shrink.x_stride = x.stride;
  shrink.M = s.M;
  shrink.K = s.K;
  shrink.h = static_cast<float*>(parts.data());
  shrink.R = s.E;
  shrink.splits = s.splits;
  shrink.adapters.count = 1;
  shrink.adapters.at[0] = {A.data(), nullptr, static_cast<int>(s.E), 0, 0, 1.f, Keep{}};
  return shrink;
}

// The first half of x meets the first row of A alone, the second half all others.
inline void put_outlier(const Sizes& s, Matrix& x, Matrix& A, Matrix& B) {
  for (int64_t k = 0; k < s.K; ++k) {
    const bool large = k < s.K / 2;
    for (int64_t m = 0; large && m < s.M; ++m) x.set(m, k, 0x1p14);
    for (int64_t e = 0; e < s.E; ++e) {
      if (large || e == 0) A.set(e, k, large && e == 0 ? 0x1p14 : 0);
    }
  }
  for (int64_t n = 0; n < s.N; ++n) B.set(n, 0, 0);
}

// h is rounded once: it has few bits. y has the rounding of its type, and of u and B to two parts.
inline void check(Dtype T, const Sizes& s, const Options& o, Launcher launch = fused) {
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
  const lora_linear::Shrink shrink = shrink_of(s, x, A, parts_of_h);
  if (o.outlier) put_outlier(s, x, A, B);
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
    return first != cudaSuccess ? first : launch(T, call, nullptr);
  });
  const double rounding = T == Dtype::kFloat16 ? 0x1p-11 : 0x1p-8, parts = 0x1p-15;
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

// A call without options on a positive A, with which an infinite row of x gives an infinite row of u.
struct Plain {
  Dtype T;
  Sizes sizes;
  Matrix x, A, B, residual, parts, h, y;
  Array<uint64_t> seed;
  Keep inside, outside;

  Plain(Dtype T, int splits, int64_t M = 66)
      : T(T),
        sizes{M, 136, 40, 72, 0, splits},
        x(T, sizes.M, sizes.K, sizes.K, 1),
        A(T, sizes.E, sizes.K, sizes.K),
        B(T, sizes.N, sizes.E, sizes.E, 7),
        residual(T, 1, sizes.N, sizes.N, 8),
        parts(Dtype::kFloat32, splits * sizes.M, sizes.E, sizes.E),
        h(Dtype::kFloat32, sizes.M, sizes.E, sizes.E),
        y(T, sizes.M, sizes.N, sizes.N),
        seed(1) {
    for (int64_t e = 0; e < sizes.E; ++e) {
      for (int64_t k = 0; k < sizes.K; ++k) A.set(e, k, static_cast<double>(1 + (e + k) % 5) / 8);
    }
    seed[0] = kSeed;
  }

  void fill(Matrix& matrix, int64_t row, bool infinite) {
    const uint16_t infinity = T == Dtype::kFloat16 ? 0x7C00 : 0x7F80, value = infinite ? infinity : 0xFFFF;
    for (int64_t i = 0; i < matrix.stride; ++i) memcpy(matrix.memory.host() + (row * matrix.stride + i) * 2, &value, 2);
  }

  void run(Launcher launch) {
    Fused call{};
    call.x = x.data();
    call.x_stride = sizes.K;
    call.M = sizes.M;
    call.K = sizes.K;
    call.A = A.data();
    call.E = sizes.E;
    call.B = B.data();
    call.N = sizes.N;
    call.residual = residual.data();
    call.residual_stride = 0;
    call.h = static_cast<float*>(h.data());
    call.y = y.data();
    call.activation = kSilu;
    call.keep = inside;
    call.gated.keep = outside;
    call.seed = seed.data();
    call.parts = sizes.splits ? static_cast<const float*>(parts.data()) : nullptr;
    call.splits = sizes.splits;
    const lora_linear::Shrink shrink = shrink_of(sizes, x, A, parts);
    expect(ran([&] {
             const cudaError_t first = sizes.splits ? lora_linear::shrink(T, T, shrink, nullptr) : cudaSuccess;
             return first != cudaSuccess ? first : launch(T, call, nullptr);
           }),
           "a launch");
  }

  // What holds of every element of a row of y.
  template <class Holds>
  bool all_of_y(int64_t m, const Holds& holds) {
    bool all = true;
    for (int64_t n = 0; n < sizes.N; ++n) all = all && holds(n, y.at(m, n));
    return all;
  }
};

inline std::string words_of(Dtype T, int splits) {
  return " (dtype " + std::to_string(static_cast<int>(T)) + ", splits " + std::to_string(splits) + ")";
}

inline void stays_in_its_row(Dtype T, int splits, Launcher launch = fused, int64_t M = 66) {
  Plain clean(T, splits, M), dirty(T, splits, M);
  const int64_t far = M - 2;
  dirty.fill(dirty.x, 3, false);
  dirty.fill(dirty.x, far, true);
  clean.run(launch);
  dirty.run(launch);
  bool others = true, hidden = true;
  for (int64_t m = 0; m < clean.sizes.M; ++m) {
    if (m != 3 && m != far)
      others = others && dirty.all_of_y(m, [&](int64_t n, double y) { return y == clean.y.at(m, n); });
  }
  for (int64_t e = 0; e < clean.sizes.E; ++e) {
    hidden = hidden && std::isnan(dirty.h.at(3, e)) && dirty.h.at(far, e) == INFINITY;
  }
  expect(others, "NaN and infinity stay in their rows" + words_of(T, splits));
  expect(hidden, "h of a row of NaN and of an infinite one" + words_of(T, splits));
  expect(dirty.all_of_y(3, [](int64_t, double y) { return std::isnan(y); }), "NaN is passed on" + words_of(T, splits));
  expect(dirty.all_of_y(far, [](int64_t, double y) { return !std::isfinite(y); }),
         "infinity is passed on" + words_of(T, splits));
}

// One NaN in every row of u, and a row of NaN before the mask of the output.
inline void a_dropped_nan_is_zero(Dtype T, int splits, Launcher launch = fused, int64_t M = 66) {
  const Keep keep = lora_linear::make_keep(kP, 0);
  Plain clean(T, splits, M), inside(T, splits, M), outside(T, splits, M);
  clean.inside = inside.inside = outside.outside = keep;
  inside.fill(inside.A, 7, false);
  outside.fill(outside.x, 3, false);
  clean.run(launch);
  inside.run(launch);
  outside.run(launch);
  bool right = true;
  int64_t dropped = 0;
  for (int64_t m = 0; m < clean.sizes.M; ++m) {
    const bool keeps_nan = keeps(true, m, 7);
    dropped += !keeps_nan;
    right = right && std::isnan(inside.h.at(m, 7)) &&
            inside.all_of_y(m, [&](int64_t n, double y) { return keeps_nan ? std::isnan(y) : y == clean.y.at(m, n); });
  }
  expect(right && dropped > 0 && dropped < clean.sizes.M, "a NaN in u" + words_of(T, splits));
  expect(
      outside.all_of_y(
          3, [&](int64_t n, double y) { return keeps(true, 3, n) ? std::isnan(y) : y == outside.residual.at(0, n); }),
      "a NaN before the output's mask" + words_of(T, splits));
}

}  // namespace pk::test
