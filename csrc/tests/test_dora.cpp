// DoRA's CPU kernels against its fp64 loops, for every instruction set that this processor has: W by rows and by
// columns, ragged sizes, strided rows, mixed batches, several chunks of rows, and each gradient alone. Sums are exact
// on these numbers, so that only what is rounded to 16 bits, and the root, may differ.
#include <cmath>
#include <cstdio>
#include <cstring>
#include <string>
#include <vector>

#include "common/instruction_set.h"
#include "lora_linear/dora.h"
#include "tests/typed_values.h"

using namespace pk;
using pk::test::bytes_of;
using pk::test::exact_value;
using pk::test::read;
using pk::test::write;

namespace {

constexpr Dtype kTypes[] = {Dtype::kFloat32, Dtype::kFloat16, Dtype::kBFloat16};
int failures = 0, cases = 0;

void expect(bool holds, const std::string& what) {
  ++cases;
  if (holds) return;
  std::printf("FAILED: %s: %s, case %d\n", instruction_set_name(), what.c_str(), cases);
  ++failures;
}

// Half of the distance between neighbours at 1, to which a result is rounded.
double rounding(Dtype type) {
  return type == Dtype::kBFloat16 ? 0x1p-8 : type == Dtype::kFloat16 ? 0x1p-11 : 0;
}

// Numbers of a type, rows `outer` apart; NaN wherever nothing was set, and behind the last row.
struct Matrix {
  int64_t rows, cols, outer;
  Dtype type;
  std::vector<char> memory;

  Matrix(int64_t rows, int64_t cols, Dtype type, int64_t gap = 0)
      : rows(rows),
        cols(cols),
        outer(cols + gap),
        type(type),
        memory(static_cast<size_t>((rows * outer + kGuard) * bytes_of(type)), static_cast<char>(0xFF)) {}

  Matrix& fill(int64_t first) {
    for (int64_t i = 0; i < rows * cols; ++i) set(i / cols, i % cols, exact_value(first + i));
    return *this;
  }
  // The same numbers in fp64, rows side by side.
  Matrix doubled() const {
    Matrix out(rows, cols, Dtype::kFloat64);
    for (int64_t i = 0; i < rows * cols; ++i) out.set(i / cols, i % cols, at(i / cols, i % cols));
    return out;
  }
  void set(int64_t i, int64_t j, double value) { write(memory.data(), type, i * outer + j, value); }
  double at(int64_t i, int64_t j) const { return read(memory.data(), type, i * outer + j); }
  void* data() { return memory.data(); }
  float* floats() { return reinterpret_cast<float*>(memory.data()); }

  bool is_near(const Matrix& wanted, double error) const {
    bool near = true;
    for (int64_t i = 0; i < rows; ++i) {
      for (int64_t j = 0; j < cols; ++j) {
        near = near && std::fabs(at(i, j) - wanted.at(i, j)) <= error * std::fabs(wanted.at(i, j));
      }
    }
    for (int64_t i = 0; i < kGuard; ++i) near = near && std::isnan(read(memory.data(), type, rows * outer + i));
    return near;
  }

 private:
  static constexpr int64_t kGuard = 64;
};

void norm_is_the_norm(int64_t N, int64_t K, int64_t R, Dtype type, bool across) {
  Matrix W = across ? Matrix(K, N, type, 5) : Matrix(N, K, type, 3), A(R, K, Dtype::kFloat32), B(N, R, Dtype::kFloat32),
         gram(R, R, Dtype::kFloat32), norm(1, N, Dtype::kFloat32), wanted(1, N, Dtype::kFloat64);
  W.fill(1);
  A.fill(7);
  B.fill(9);
  Matrix W64 = W.doubled(), A64 = A.doubled(), B64 = B.doubled();
  dora::Norm exact{N,          K,          R,   Dtype::kFloat64, W64.data(),   across ? 1 : K, across ? N : 1,
                   A64.data(), B64.data(), 0.5, nullptr,         wanted.data()};
  dora::norm_double(exact);
  dora::Norm p{N,        K,        R,   type,          W.data(),   across ? 1 : W.outer, across ? W.outer : 1,
               A.data(), B.data(), 0.5, gram.floats(), norm.data()};
  dora::table().gram(p, 0, dora::blocks(R, dora::kRows));
  dora::kernels(type).rows(p, 0, dora::blocks(N, dora::kRows));
  expect(norm.is_near(wanted, 0x1p-22), "norm");
}

// A batch of M rows: alone (adapters = 0) or mixed, with a bias and a residual.
struct Batch {
  int64_t M, N, L;
  Matrix z, dy, residual, bias, magnitude, norm, gain, dm_parts, db_parts;
  std::vector<int32_t> ids;
  dora::Scale p{};

  Batch(int64_t M, int64_t N, int64_t adapters, Dtype type, int64_t gap)
      : M(M),
        N(N),
        L(adapters ? adapters : 1),
        z(M, N, type, gap),
        dy(M, N, type, gap),
        residual(M, N, type, gap),
        bias(1, N, type),
        magnitude(L, N, type == Dtype::kFloat64 ? type : Dtype::kFloat32),
        norm(L, N, magnitude.type),
        gain(L, N, Dtype::kFloat32),
        dm_parts(dora::blocks(M, dora::chunk_rows(L)) * L, N, Dtype::kFloat32),
        db_parts(dora::blocks(M, dora::chunk_rows(L)), N, Dtype::kFloat32) {
    z.fill(1);
    dy.fill(3);
    residual.fill(5);
    bias.fill(7);
    magnitude.fill(9);
    for (int64_t i = 0; i < L * N; ++i) norm.set(i / N, i % N, i % 3 ? 2 : 0.5);  // what divides exactly
    for (int64_t m = 0; m < M; ++m) ids.push_back(static_cast<int32_t>(m * 7 % (L + 1) - 1));
    p = {M, N, L, type, magnitude.data(), norm.data(), adapters ? ids.data() : nullptr, gain.floats()};
    p.z = z.data();
    p.z_stride = z.outer;
    p.residual = residual.data();
    p.residual_stride = residual.outer;
    p.bias = bias.data();
    p.dy = dy.data();
    p.dy_stride = dy.outer;
    p.dm_parts = dm_parts.floats();
    p.db_parts = db_parts.floats();
  }
};

void scale_is_a_scale(int64_t M, int64_t N, int64_t adapters, Dtype type) {
  Batch batch(M, N, adapters, type, 3), exact(M, N, adapters, Dtype::kFloat64, 0);
  Matrix y(M, N, type), wanted(M, N, Dtype::kFloat64);
  exact.p.y = wanted.data();
  dora::scale_double(exact.p);
  batch.p.y = y.data();
  const int64_t across = dora::blocks(N, dora::kColumns);
  dora::table().gains(batch.p, 0, batch.L * across);
  dora::kernels(type).scale(batch.p, 0, dora::blocks(M, dora::kRows) * across);
  expect(y.is_near(wanted, rounding(type)), "scale");
}

// `which`: a bit each for dz, dm, db.
void backward_is_its_gradient(int64_t M, int64_t N, int64_t adapters, Dtype type, int which) {
  Batch batch(M, N, adapters, type, 3), exact(M, N, adapters, Dtype::kFloat64, 0);
  const int64_t L = batch.L, across = dora::blocks(N, dora::kColumns);
  Matrix dz(M, N, type), dm(L, N, Dtype::kFloat32), db(1, N, Dtype::kFloat32);
  Matrix dz64(M, N, Dtype::kFloat64), dm64(L, N, Dtype::kFloat64), db64(1, N, Dtype::kFloat64);
  exact.p.dz = dz64.data();
  exact.p.dm = dm64.data();
  exact.p.db = db64.data();
  dora::backward_double(exact.p);
  if (which & 1) batch.p.dz = dz.data();
  if (which & 2) batch.p.dm = dm.data();
  if (which & 4) batch.p.db = db.data();
  if (batch.p.dz) dora::table().gains(batch.p, 0, L * across);
  dora::kernels(type).backward(batch.p, 0, dora::row_chunks(batch.p) * across);
  dora::table().sums(batch.p, 0, across);
  if (which & 1) expect(dz.is_near(dz64, rounding(type)), "dz");
  if (which & 2) expect(dm.is_near(dm64, 0), "dm");
  if (which & 4) expect(db.is_near(db64, 0), "db");
}

void everything() {
  for (const Dtype type : kTypes) {
    for (const bool across : {false, true}) {
      norm_is_the_norm(1, 1, 1, type, across);
      norm_is_the_norm(37, 67, 5, type, across);
      norm_is_the_norm(20, 1100, 33, type, across);
      norm_is_the_norm(3, 40, 512, type, across);
    }
    for (const int64_t adapters : {0, 3, 40}) {
      scale_is_a_scale(1, 1, adapters, type);
      scale_is_a_scale(37, 67, adapters, type);
      scale_is_a_scale(20, 600, adapters, type);
      for (const int which : {1, 2, 4, 7}) backward_is_its_gradient(37, 67, adapters, type, which);
      backward_is_its_gradient(1200, 530, adapters, type, 7);  // several chunks, two blocks of columns
    }
  }
}

}  // namespace

int main() {
  for (const char* name : {"default", "avx2", "avx512", "avx512_bf16"}) {
    if (use_instruction_set(name)) {
      everything();
    } else {
      std::printf("%s: not run, this processor or build lacks it\n", name);
    }
  }
  std::printf("%d cases, %d failures\n", cases, failures);
  return failures != 0 || cases == 0;
}
