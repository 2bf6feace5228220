// DoRA's CUDA kernels against loops in double, on numbers whose sums are exact: every dtype, W by rows and by columns,
// rows that lie on vectors and others, mixed batches with ids that are out of range. Needs a GPU, or the emulator.
#include <cmath>
#include <cstdio>
#include <cstring>
#include <vector>

#include "lora_linear/dora_cuda.h"
#include "lora_linear/lora_linear_cuda.h"
#include "tests/device_array.h"
#include "tests/typed_values.h"

using namespace pk;
using pk::test::Array;
using pk::test::bytes_of;
using pk::test::exact_value;
using pk::test::ran;
using pk::test::read;
using pk::test::write;

namespace {

constexpr Dtype kTypes[] = {Dtype::kFloat32, Dtype::kFloat16, Dtype::kBFloat16, Dtype::kFloat64};
int failures = 0, cases = 0;

void expect(bool condition, const char* what) {
  ++cases;
  if (condition) return;
  ++failures;
  printf("FAILED %s: %s, case %d\n", test::kWhere, what, cases);
}

Dtype wide(Dtype type) {
  return type == Dtype::kFloat64 ? type : Dtype::kFloat32;
}

// Half of the distance between neighbours at 1, to which a result is rounded.
double rounding(Dtype type) {
  return type == Dtype::kBFloat16 ? 0x1p-8 : type == Dtype::kFloat16 ? 0x1p-11 : 0;
}

// Numbers of a type, `outer` apart from row to row; NaN between the rows, and everywhere at first.
struct Matrix {
  int64_t rows, cols, outer;
  Dtype type;
  Array<char> memory;

  Matrix(int64_t rows, int64_t cols, Dtype type, int64_t gap = 0)
      : rows(rows),
        cols(cols),
        outer(cols + gap),
        type(type),
        memory(static_cast<size_t>(rows * outer * bytes_of(type))) {
    memset(memory.host(), 0xFF, static_cast<size_t>(rows * outer * bytes_of(type)));
  }
  Matrix& fill(int64_t first) {
    for (int64_t i = 0; i < rows * cols; ++i) set(i / cols, i % cols, exact_value(first + i));
    return *this;
  }
  void set(int64_t i, int64_t j, double value) { write(memory.host(), type, i * outer + j, value); }
  double at(int64_t i, int64_t j) { return read(memory.host(), type, i * outer + j); }
  void* data() const { return memory.data(); }
};

double product(Matrix& a, int64_t i, Matrix& b, int64_t j) {
  double sum = 0;
  for (int64_t k = 0; k < a.cols; ++k) sum += a.at(i, k) * b.at(j, k);
  return sum;
}

void rows_of_the_norm(int64_t N, int64_t K, int64_t R, Dtype type, Dtype factors, bool across) {
  Matrix W(N, K, type, 3), columns(K, N, type, 5), A(R, K, factors), low(N, R, wide(type)), squares(1, N, wide(type));
  W.fill(1);
  A.fill(7);
  for (int64_t i = 0; i < N * K; ++i) columns.set(i % K, i / K, W.at(i / K, i % K));
  const dora_cuda::NormRows call{across ? columns.data() : W.data(),
                                 type,
                                 across ? 1 : W.outer,
                                 across ? columns.outer : 1,
                                 A.data(),
                                 factors,
                                 N,
                                 K,
                                 R,
                                 low.data(),
                                 squares.data()};
  bool right = ran([&] { return dora_cuda::norm_rows(call, nullptr); });
  for (int64_t n = 0; n < N; ++n) {
    right = right && squares.at(0, n) == product(W, n, W, n);
    for (int64_t r = 0; r < R; ++r) right = right && low.at(n, r) == product(W, n, A, r);
  }
  expect(right, "norm_rows");
}

// The squares that a shrink gives beside h.
void squares_of_a_shrink(int64_t M, int64_t K, int64_t R, int splits, Dtype type, int64_t gap) {
  Matrix x(M, K, type, gap), A(R, K, type), h(splits * M, R, Dtype::kFloat32), squares(splits, M, Dtype::kFloat32);
  x.fill(1);
  A.fill(7);
  lora_linear::Adapters adapters;
  adapters.count = 1;
  adapters.at[0] = {A.data(), nullptr, static_cast<int>(R), 0, 0, 1, lora_linear::Keep{}};
  const lora_linear::Shrink call{x.data(), x.outer, M,       K,        static_cast<float*>(h.data()),
                                 R,        splits,  nullptr, adapters, static_cast<float*>(squares.data())};
  bool right = ran([&] { return lora_linear::shrink(type, type, call, nullptr); });
  for (int64_t m = 0; m < M; ++m) {
    double sum = 0;
    for (int p = 0; p < splits; ++p) sum += squares.at(p, m);
    right = right && sum == product(x, m, x, m);
  }
  expect(right, "squares of a shrink");
}

void finish_of_the_norm(Dtype factors) {
  const int64_t N = 11, R = 37;
  const int splits = 2;
  const Dtype type = wide(factors);
  Matrix low(splits * N, R, type), squares(splits, N, type), cross(N, R, type), B(N, R, factors), norm(1, N, type);
  low.fill(1);
  cross.fill(5);
  B.fill(9);
  squares.fill(3);
  for (int64_t n = 0; n < N; ++n) squares.set(0, n, n == 4 ? NAN : n % 2 ? -1e6 : 1000);
  const dora_cuda::NormFinish call{low.data(), squares.data(), splits, 0.5, cross.data(), B.data(), N, R, norm.data()};
  bool right = ran([&] { return dora_cuda::norm_finish(factors, call, nullptr); });
  for (int64_t n = 0; n < N; ++n) {
    double square = squares.at(0, n) + squares.at(1, n);
    for (int64_t r = 0; r < R; ++r) square += B.at(n, r) * (0.5 * (low.at(n, r) + low.at(N + n, r)) + cross.at(n, r));
    const double wanted = square < 0 ? 0 : std::sqrt(square), got = norm.at(0, n);
    right = right && (n == 4 ? std::isnan(got) : std::fabs(got - wanted) <= 0x1p-23 * wanted);
  }
  expect(right, "norm_finish");
}

// A batch of M rows, alone (adapters = 0) or mixed.
struct Batch {
  int64_t M, N, L;
  Dtype type;
  Matrix z, magnitude, norm;
  Array<int32_t> ids;
  bool mixed;

  Batch(int64_t M, int64_t N, int64_t adapters, Dtype type, Dtype factors, int64_t gap)
      : M(M),
        N(N),
        L(adapters ? adapters : 1),
        type(type),
        z(M, N, type, gap),
        magnitude(L, N, factors),
        norm(L, N, wide(type)),
        ids(static_cast<size_t>(M)),
        mixed(adapters > 0) {
    z.fill(1);
    magnitude.fill(5);
    for (int64_t i = 0; i < L * N; ++i) norm.set(i / N, i % N, i % 3 ? 2 : 0.5);  // what divides exactly
    for (int64_t m = 0; m < M; ++m) ids[static_cast<size_t>(m)] = static_cast<int32_t>(m * 7 % (L + 3) - 2);
  }
  int64_t adapter(int64_t m) {
    const int64_t id = mixed ? ids[static_cast<size_t>(m)] : 0;
    return id >= 0 && id < L ? id : -1;
  }
  double gain(int64_t m, int64_t n) {
    return adapter(m) < 0 ? 1 : magnitude.at(adapter(m), n) / norm.at(adapter(m), n);
  }
  dora_cuda::Gains gains() { return {magnitude.data(), magnitude.type, norm.data(), mixed ? ids.data() : nullptr, L}; }
};

void scaled(Batch (*batch_of)(), bool added) {
  Batch batch = batch_of();
  const int64_t M = batch.M, N = batch.N;
  Matrix bias(1, N, batch.type), residual(M, N, batch.type, 8), y(M, N, batch.type);
  bias.fill(11);
  residual.fill(13);
  const dora_cuda::Scale call{batch.z.data(),
                              batch.z.outer,
                              M,
                              N,
                              batch.gains(),
                              added ? bias.data() : nullptr,
                              added ? residual.data() : nullptr,
                              residual.outer,
                              y.data()};
  bool right = ran([&] { return dora_cuda::scale(batch.type, call, nullptr); });
  for (int64_t m = 0; m < M; ++m) {
    for (int64_t n = 0; n < N; ++n) {
      const double wanted = batch.gain(m, n) * batch.z.at(m, n) + (added ? bias.at(0, n) + residual.at(m, n) : 0);
      right = right && std::fabs(y.at(m, n) - wanted) <= rounding(batch.type) * std::fabs(wanted);
    }
  }
  expect(right, "scale");
}

// `which`: a bit each for dz, dm, db.
void scaled_backward(Batch (*batch_of)(), int which) {
  Batch batch = batch_of();
  const int64_t M = batch.M, N = batch.N, L = batch.L, chunks = dora_cuda::row_chunks(M, L);
  const int64_t parts = chunks * dora_cuda::owners(batch.gains());
  Matrix dy(M, N, batch.type, 8), dz(M, N, batch.type), dm(chunks * L, N, wide(batch.type)),
      db(parts, N, wide(batch.type));
  dy.fill(17);
  dora_cuda::ScaleBackward call{dy.data(), dy.outer,      nullptr, batch.z.outer, M,
                                N,         batch.gains(), nullptr, nullptr,       nullptr};
  if (which & 1) call.dz = dz.data();
  if (which & 2) {
    call.z = batch.z.data();
    call.dm = dm.data();
  }
  if (which & 4) call.db = db.data();
  bool right = ran([&] { return dora_cuda::scale_backward(batch.type, call, nullptr); });
  std::vector<double> wanted_dm(static_cast<size_t>(L * N)), wanted_db(static_cast<size_t>(N));
  for (int64_t m = 0; m < M; ++m) {
    for (int64_t n = 0; n < N; ++n) {
      const double d = dy.at(m, n), wanted = batch.gain(m, n) * d;
      const double error = which & 1 ? std::fabs(dz.at(m, n) - wanted) : 0;
      right = right && error <= rounding(batch.type) * std::fabs(wanted);
      wanted_db[static_cast<size_t>(n)] += d;
      const int64_t l = batch.adapter(m);
      if (l >= 0) wanted_dm[static_cast<size_t>(l * N + n)] += d * batch.z.at(m, n) / batch.norm.at(l, n);
    }
  }
  for (int64_t n = 0; n < N; ++n) {
    double sum = 0;
    for (int64_t p = 0; p < parts; ++p) sum += db.at(p, n);
    right = right && (!(which & 4) || sum == wanted_db[static_cast<size_t>(n)]);
    for (int64_t l = 0; l < L; ++l) {
      sum = 0;
      for (int64_t p = 0; p < chunks; ++p) sum += dm.at(p * L + l, n);
      right = right && (!(which & 2) || sum == wanted_dm[static_cast<size_t>(l * N + n)]);
    }
  }
  expect(right, "scale_backward");
}

template <Dtype kType, Dtype kFactors>
void batches() {
  using Make = Batch (*)();
  const Make makes[] = {
      [] { return Batch(1, 1, 0, kType, kFactors, 0); },     // one number
      [] { return Batch(70, 264, 0, kType, kFactors, 8); },  // vectors
      [] { return Batch(70, 131, 0, kType, kFactors, 0); },  // no vectors
      [] { return Batch(300, 72, 3, kType, kFactors, 8); },  // adapters, two chunks of rows
      [] { return Batch(21, 37, 20, kType, kFactors, 3); },  // as many adapters as rows
  };
  for (const Make make : makes) {
    for (const bool added : {false, true}) scaled(make, added);
    for (const int which : {1, 2, 4, 7}) scaled_backward(make, which);
  }
}

}  // namespace

int main() {
  if (!test::device_present()) {
    printf("gpu: no kernel of DoRA run: no device\n");
    return test::kSkipped;
  }
  for (const Dtype type : kTypes) {
    const bool is_wide = type == Dtype::kFloat64;
    for (const Dtype factors : {is_wide ? type : Dtype::kFloat32, is_wide ? type : Dtype::kFloat16}) {
      for (const bool across : {false, true}) {
        rows_of_the_norm(1, 1, 1, type, factors, across);
        rows_of_the_norm(37, 67, 5, type, factors, across);
        rows_of_the_norm(20, 100, 70, type, factors, across);
      }
    }
    finish_of_the_norm(type);
  }
  for (const Dtype type : {Dtype::kBFloat16, Dtype::kFloat16}) {
    squares_of_a_shrink(1, 40, 3, 1, type, 0);
    squares_of_a_shrink(37, 67, 5, 1, type, 3);     // no vectors
    squares_of_a_shrink(70, 136, 16, 2, type, 8);   // vectors, in two pieces
    squares_of_a_shrink(70, 136, 130, 1, type, 8);  // several blocks of ranks, of which one sums
    squares_of_a_shrink(8200, 64, 8, 1, type, 8);   // blocks of 64 rows
  }
  batches<Dtype::kFloat32, Dtype::kBFloat16>();
  batches<Dtype::kFloat16, Dtype::kFloat32>();
  batches<Dtype::kBFloat16, Dtype::kBFloat16>();
  batches<Dtype::kFloat64, Dtype::kFloat64>();
  printf("%s: %d cases, %d failures\n", test::kWhere, cases, failures);
  return failures != 0;
}
