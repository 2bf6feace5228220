// The plain-core kernels of lora_linear against loops in double: every pair of dtypes, strides, masks, splits and
// ragged sizes; ordered sums, column sums, and the dropout mask bit by bit. Needs a GPU, or the emulator.
#include <cmath>
#include <cstdio>
#include <cstring>
#include <vector>

#include "common/dropout.h"
#include "lora_linear/lora_linear_cuda.h"
#include "tests/device_array.h"
#include "tests/typed_values.h"

using namespace pk;
using namespace pk::lora_linear;
using pk::test::Array;
using pk::test::bytes_of;
using pk::test::exact_value;
using pk::test::ran;
using pk::test::read;
using pk::test::write;

namespace {

constexpr uint64_t kSeed = 0x0123456789ABCDEFull;
int failures = 0, cases = 0;

void expect(bool condition, const char* what, int detail) {
  ++cases;
  if (condition) return;
  ++failures;
  printf("FAILED %s: %s %d\n", test::kWhere, what, detail);
}

// rows x cols values in memory of their own, by rows or by columns, with unused NaNs between them.
struct Matrix {
  int64_t rows, cols, outer;
  bool by_columns;
  Dtype type;
  Array<char> memory;

  Matrix(int64_t rows, int64_t cols, Dtype type, bool by_columns, int64_t first)
      : rows(rows),
        cols(cols),
        outer((by_columns ? rows : cols) + 3),
        by_columns(by_columns),
        type(type),
        memory(static_cast<size_t>(outer * (by_columns ? cols : rows) * bytes_of(type))) {
    memset(memory.host(), 0xFF, static_cast<size_t>(outer * (by_columns ? cols : rows) * bytes_of(type)));
    for (int64_t i = 0; i < rows; ++i) {
      for (int64_t j = 0; j < cols; ++j) write(memory.host(), type, place(i, j), exact_value(first + i * cols + j));
    }
  }
  int64_t place(int64_t i, int64_t j) const { return by_columns ? j * outer + i : i * outer + j; }
  double at(int64_t i, int64_t j) { return read(memory.host(), type, place(i, j)); }
  void set(int64_t i, int64_t j, double value) { write(memory.host(), type, place(i, j), value); }
  Strided strided() { return {memory.data(), type, by_columns ? 1 : outer, by_columns ? outer : 1}; }
};

struct Case {
  int64_t I, J, K;
  Dtype left, right;
  bool left_columns, right_columns;
  int splits;
  bool accumulate;
  Masked masked;
};

void product_is_a_product(const Case& c) {
  const double p = 0.3, scale = -1.5;
  const Keep keep = c.masked == Masked::kNone ? Keep{} : make_keep(p, 2);
  const Dropout dropout = make_dropout(p, kSeed, 2);
  Array<uint64_t> seed(1);
  seed[0] = kSeed;
  Matrix left(c.I, c.K, c.left, c.left_columns, 1), right(c.K, c.J, c.right, c.right_columns, 5);
  int64_t dropped = 0;  // a NaN that is dropped counts as 0
  while (dropped < c.K && kept(dropout, 0, static_cast<uint32_t>(dropped))) ++dropped;
  if (c.masked == Masked::kLeft && dropped < c.K) left.set(0, dropped, NAN);
  const bool wide = c.left == Dtype::kFloat64;
  const Dtype type = wide ? Dtype::kFloat64 : Dtype::kFloat32;
  const int64_t out_row = c.J + 2, out_split = c.I * out_row + 1;
  Array<char> out(static_cast<size_t>(c.splits * out_split * bytes_of(type)));
  for (int64_t i = 0; i < c.splits * out_split; ++i) write(out.host(), type, i, 3);
  const Product call{c.I,       c.J,      c.K,          left.strided(), right.strided(), out.data(), out_row,
                     out_split, c.splits, c.accumulate, scale,          c.masked,        keep,       seed.data()};
  bool right_result = ran([&] { return product(call, nullptr); });
  const double scale_of_kept = wide ? 65536. / keep.threshold : keep.scale;
  const auto drop = [&](Masked where, int64_t row, int64_t col, double value) {
    if (c.masked != where) return value;
    return kept(dropout, static_cast<uint32_t>(row), static_cast<uint32_t>(col)) ? value * scale_of_kept : 0.0;
  };
  for (int64_t i = 0; i < c.I; ++i) {
    for (int64_t j = 0; j < c.J; ++j) {
      double sum = 0, size = 0, got = 0;
      for (int64_t k = 0; k < c.K; ++k) {
        const double term = drop(Masked::kLeft, i, k, left.at(i, k)) * drop(Masked::kRight, k, j, right.at(k, j));
        sum += term;
        size += std::fabs(term);
      }
      sum = drop(Masked::kOut, i, j, scale * sum) + (c.accumulate ? 3 : 0);
      for (int s = 0; s < c.splits; ++s) got += read(out.host(), type, s * out_split + i * out_row + j);
      const double bound = (wide ? 0x1p-50 : 0x1p-21) * (2 * size + 4);  // a rounding here and there: see `scale`
      right_result = right_result && std::fabs(got - sum) <= bound;
    }
    right_result = right_result && read(out.host(), type, i * out_row + c.J) == 3;  // nothing written between rows
  }
  expect(right_result, "product", cases);
}

void products() {
  const Dtype types[] = {Dtype::kFloat32, Dtype::kFloat16, Dtype::kBFloat16};
  for (const Dtype left : types) {
    for (const Dtype right : types)
      product_is_a_product({5, 67, 33, left, right, false, true, 1, false, Masked::kLeft});
  }
  const Dtype single = Dtype::kFloat32, twice = Dtype::kFloat64;
  for (const Masked masked : {Masked::kNone, Masked::kLeft, Masked::kRight, Masked::kOut}) {
    for (const bool by_columns : {false, true}) {
      product_is_a_product({70, 65, 97, single, single, by_columns, !by_columns, 1, masked == Masked::kOut, masked});
      product_is_a_product({3, 130, 200, twice, twice, by_columns, by_columns, 3, false, masked});
    }
  }
  product_is_a_product({1, 1, 1, single, single, false, false, 1, true, Masked::kNone});
  product_is_a_product({2, 3, 40, single, single, false, false, 7, false, Masked::kLeft});  // more shares than terms
  expect(product_splits(1, 16, 4096) == 16 && product_splits(8192, 4096, 16) == 1, "splits", 0);
}

void sums_are_in_order() {
  for (const Dtype type : {Dtype::kFloat32, Dtype::kFloat16, Dtype::kBFloat16, Dtype::kFloat64}) {
    const Dtype in_type = type == Dtype::kFloat64 ? type : Dtype::kFloat32;
    for (const int splits : {0, 1, 5}) {
      const int64_t rows = 9, cols = 37, in_row = 41, in_split = 400, out_row = 50;
      Array<char> in(static_cast<size_t>(5 * in_split * bytes_of(in_type)));
      Array<char> out(static_cast<size_t>(rows * out_row * bytes_of(type)));
      for (int64_t i = 0; i < 5 * in_split; ++i) write(in.host(), in_type, i, exact_value(i));
      memset(out.host(), 0xFF, static_cast<size_t>(rows * out_row * bytes_of(type)));
      Matrix first(1, cols, Dtype::kBFloat16, false, 3), second(1, cols, in_type, false, 9);
      Sum call{in.data(), in_split, in_row, splits, out.data(), type, out_row, rows, cols, 0.5, 2, {}};
      call.vector[0] = {first.memory.data(), first.type, 1};
      call.vector[1] = {second.memory.data(), second.type, -2};
      bool right = ran([&] { return sum(call, nullptr); });
      for (int64_t i = 0; i < rows; ++i) {
        for (int64_t j = 0; j < cols; ++j) {
          double wanted = first.at(0, j) - 2 * second.at(0, j);
          for (int p = 0; p < splits; ++p) wanted += 0.5 * read(in.host(), in_type, p * in_split + i * in_row + j);
          const double got = read(out.host(), type, i * out_row + j);
          right = right && std::fabs(got - wanted) <= (type == Dtype::kBFloat16 ? 0x1p-8 * std::fabs(wanted) : 0);
        }
      }
      expect(right, "sum", splits);
    }
  }
  Array<float> parts(2 * 700), whole(700);  // rows side by side, taken for one
  for (int i = 0; i < 2 * 700; ++i) parts[i] = static_cast<float>(exact_value(i));
  const Sum call{parts.data(), 700, 7, 2, whole.data(), Dtype::kFloat32, 7, 100, 7, 1, 0, {}};
  bool right = ran([&] { return sum(call, nullptr); });
  for (int i = 0; i < 700; ++i) right = right && whole[i] == parts[i] + parts[700 + i];
  expect(right, "sum of neighbouring rows", 0);
}

void column_sums() {
  for (const Dtype type : {Dtype::kFloat32, Dtype::kFloat16, Dtype::kBFloat16, Dtype::kFloat64}) {
    for (const int64_t rows : {1, 77}) {
      Matrix in(rows, 70, type, false, 2);
      const Dtype out_type = type == Dtype::kFloat64 ? type : Dtype::kFloat32;
      Array<char> out(static_cast<size_t>(70 * bytes_of(out_type)));
      bool right = ran([&] { return column_sum(in.strided(), rows, 70, 0.25, out.data(), out_type, nullptr); });
      for (int64_t j = 0; j < 70; ++j) {
        double wanted = 0;
        for (int64_t i = 0; i < rows; ++i) wanted += in.at(i, j);
        right = right && read(out.host(), out_type, j) == 0.25 * wanted;
      }
      expect(right, "column_sum", static_cast<int>(rows));
    }
  }
}

void masks_are_bit_equal() {
  Array<uint64_t> seed(1);
  seed[0] = kSeed;
  for (const int64_t cols : {1, 32, 71}) {
    const int64_t rows = 5;
    Array<uint8_t> out(static_cast<size_t>(rows * cols));
    const Keep keep = make_keep(0.4, 3);
    bool right = ran([&] { return dropout_mask(out.data(), rows, cols, keep, seed.data(), nullptr); });
    const Dropout dropout = make_dropout(0.4, kSeed, 3);
    for (int64_t i = 0; i < rows * cols; ++i) {
      const bool wanted = kept(dropout, static_cast<uint32_t>(i / cols), static_cast<uint32_t>(i % cols));
      right = right && out[static_cast<size_t>(i)] == wanted;
    }
    expect(right, "dropout_mask", static_cast<int>(cols));
  }
}

}  // namespace

int main() {
  if (!test::device_present()) {
    printf("gpu: no plain-core kernel run: no device\n");
    return test::kSkipped;
  }
  products();
  sums_are_in_order();
  column_sums();
  masks_are_bit_equal();
  printf("%s: %d cases, %d failures\n", test::kWhere, cases, failures);
  return failures != 0;
}
