// The CPU kernels of lora_linear against double loops, for every instruction set that this processor has: ragged sizes,
// few and many rows, both layouts of W, dropout, two adapters on one member; and Philox's known answers.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <string>
#include <vector>

#include "common/instruction_set.h"
#include "lora_linear/lora_linear.h"

namespace {

using namespace pk;
using namespace pk::lora_linear;

int failures = 0;

void expect(bool holds, const std::string& what) {
  if (holds) return;
  std::printf("FAILED: %s\n", what.c_str());
  ++failures;
}

// Values in [-1, 1) that fp16 and bf16 hold exactly, so that all dtypes share one expected result.
class Values {
 public:
  float next() {
    state_ = state_ * 6364136223846793005ull + 1442695040888963407ull;
    return static_cast<float>(static_cast<int>(state_ >> 57) - 64) / 64.f;
  }

 private:
  uint64_t state_ = 1;
};

int size_of(Dtype type) {
  return type == Dtype::kFloat32 ? 4 : 2;
}

// A matrix stored as `type`, with a guard after its end that no kernel may touch.
class Matrix {
 public:
  Matrix(Dtype type, int64_t count) : type_(type), count_(count), bytes_(count * size_of(type) + kGuard, kPattern) {}

  void* data() { return bytes_.data(); }
  void fill(Values& values) {
    for (int64_t i = 0; i < count_; ++i) set(i, values.next());
  }
  double at(int64_t i) const {
    const char* from = bytes_.data() + i * size_of(type_);
    if (type_ == Dtype::kFloat16) return half(from);
    uint32_t bits = 0;  // bf16 is the upper half of an fp32
    std::memcpy(type_ == Dtype::kFloat32 ? reinterpret_cast<char*>(&bits) : reinterpret_cast<char*>(&bits) + 2, from,
                size_of(type_));
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
  }
  bool guard_holds() const {
    for (size_t i = bytes_.size() - kGuard; i < bytes_.size(); ++i) {
      if (bytes_[i] != kPattern) return false;
    }
    return true;
  }

 private:
  static constexpr int kGuard = 64;
  static constexpr char kPattern = 0x7B;

  static double half(const char* from) {
    uint16_t bits;
    std::memcpy(&bits, from, sizeof bits);
    const int exponent = bits >> 10 & 31, fraction = bits & 1023;
    const double magnitude = exponent == 0 ? std::ldexp(fraction, -24) : std::ldexp(1024 + fraction, exponent - 25);
    return bits >> 15 ? -magnitude : magnitude;
  }
  void set(int64_t i, float value) {
    char* to = bytes_.data() + i * size_of(type_);
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    if (type_ == Dtype::kFloat32) std::memcpy(to, &bits, 4);
    if (type_ == Dtype::kBFloat16) std::memcpy(to, reinterpret_cast<char*>(&bits) + 2, 2);
    if (type_ == Dtype::kFloat16) {
      int exponent;
      const float fraction = std::frexp(std::fabs(value), &exponent);  // value is 0 or a multiple of 1/64: normal
      const int field = value == 0 ? 0 : ((exponent + 14) << 10) + static_cast<int>(fraction * 2048) - 1024;
      const uint16_t half_bits = static_cast<uint16_t>(field | (value < 0 ? 0x8000 : 0));
      std::memcpy(to, &half_bits, 2);
    }
  }

  Dtype type_;
  int64_t count_;
  std::vector<char> bytes_;
};

struct Case {
  int64_t M, K, N, R;
  Dtype type, factors;
  double p;
  bool transposed;        // W stored [K, N]
  bool residual = false;  // lora_add: in place of W
};

std::string name_of(const Case& c) {
  static const char* const types[] = {"fp32", "fp16", "bf16", "fp64"};
  char text[160];
  std::snprintf(text, sizeof text, "%s M=%d K=%d N=%d R=%d %s/%s p=%g%s%s: ", instruction_set_name(), int(c.M),
                int(c.K), int(c.N), int(c.R), types[int(c.type)], types[int(c.factors)], c.p,
                c.transposed ? " W [K, N]" : "", c.residual ? " residual" : "");
  return text;
}

// One member with two adapters of rank R and R + 1; the problem and all that it points to.
struct Bench {
  static constexpr int kAdapters = 2;

  explicit Bench(const Case& c)
      : x(c.type, c.M * c.K),
        w(c.type, c.N * c.K),
        bias(c.type, c.N),
        dy(c.type, c.M * c.N),
        y(c.type, c.M * c.N),
        before(c.type, c.M * (c.N + 3)),
        dx(c.type, c.M * c.K),
        dbias(c.type, c.N) {
    Values values;
    for (Matrix* m : {&x, &w, &bias, &dy, &before}) m->fill(values);
    problem.M = c.M;
    problem.K = c.K;
    member.N = c.N;
    member.weight = w.data();
    member.weight_n = c.transposed ? 1 : c.K;
    member.weight_k = c.transposed ? c.N : 1;
    member.bias = bias.data();
    member.y = y.data();
    member.residual = c.residual ? before.data() : nullptr;
    member.residual_stride = c.N + 3;
    member.dy = dy.data();
    member.dy_stride = c.N;
    member.dbias = dbias.data();
    for (int l = 0; l < kAdapters; ++l) add_adapter(c, l, values);
    member.R = problem.R;
    problem.G = 1;
    problem.L = kAdapters;
    problem.member = &member;
    problem.adapter = adapter;
    problem.x = x.data();
    problem.x_stride = c.K;
    problem.dx = dx.data();
    problem.base = c.M <= kFewRows && !c.residual;
    h.resize(c.M * problem.R);
    problem.h = h.data();
    ds.resize(ds_scratch(problem));
    problem.ds = ds.data();
    problem.ds_part = ds_parts(problem) > 1 ? problem.ds + c.M * problem.R : problem.ds;
    scratch.resize(member_scratch(problem) + x_pass_scratch(problem));
    problem.scratch = scratch.data();
  }

  void run(const Case& c) {
    const Kernels& k = *kernels(c.type, c.factors);
    k.shrink(problem, 0, row_units(c.M) * problem.L);
    make_slices(problem.base && member.weight_k != 1, c.K, c.N);
    k.stream_y(problem, 0, stream_y_units(problem));
    k.expand(problem, 0, member_units(problem));
    const int64_t panel = ds_parts(problem) > 1 ? 2 * kRowBlock : c.M;  // small, so that there are several
    for (problem.panel0 = 0; problem.panel0 < c.M; problem.panel0 = problem.panel1) {
      problem.panel1 = std::min(c.M, problem.panel0 + panel);
      k.dy_pass(problem, 0, member_units(problem));
      if (problem.ds_part != problem.ds) k.sum_ds(problem, 0, row_units(problem.panel1 - problem.panel0));
    }
    make_slices(problem.base && member.weight_n != 1, c.N, c.K);
    k.stream_dx(problem, 0, stream_dx_units(problem));
    k.x_pass(problem, 0, blocks(c.K));
  }

  void add_adapter(const Case& c, int l, Values& values) {
    const int64_t R = c.R + l;
    for (int64_t count : {R * c.K, c.N * R, c.N, R * c.K, c.N * R, c.N}) factors[l].emplace_back(c.factors, count);
    for (int i = 0; i < 3; ++i) factors[l][i].fill(values);
    Adapter& a = adapter[l];
    a = {};
    a.R = R;
    a.rank0 = problem.R;
    a.A = factors[l][0].data();
    a.B = factors[l][1].data();
    a.bias = factors[l][2].data();
    a.dA = factors[l][3].data();
    a.dB = factors[l][4].data();
    a.dbias = factors[l][5].data();
    a.scaling = l == 0 ? 0.5 : -2.0;
    a.dropout = make_dropout(c.p, 0x0123456789ABCDEFull, static_cast<uint32_t>(l));
    problem.R += R;
  }

  void make_slices(bool wanted, int64_t length, int64_t columns) {
    streamed.assign(slices(length) * problem.M * pitch(columns), NAN);
    member.streamed = wanted ? streamed.data() : nullptr;
  }

  Matrix x, w, bias, dy, y, before, dx, dbias;
  std::vector<Matrix> factors[kAdapters];  // A, B, bias, dA, dB, dbias
  Problem problem{};
  Member member{};
  Adapter adapter[kAdapters];
  std::vector<float> h, ds, scratch, streamed;
};

// The formulas, element by element.
class Expected {
 public:
  Expected(const Case& c, Bench& b) : c_(c), b_(b) {
    for (int l = 0; l < Bench::kAdapters; ++l) {
      const Adapter& a = b.adapter[l];
      h[l].resize(c.M * a.R);
      ds[l].resize(c.M * a.R);
      for (int64_t m = 0; m < c.M; ++m) {
        for (int64_t r = 0; r < a.R; ++r) {
          double sum = 0, gradient = 0;
          for (int64_t k = 0; k < c.K; ++k)
            sum += keep(l, m, k) * b.x.at(m * c.K + k) * b.factors[l][0].at(r * c.K + k);
          for (int64_t n = 0; n < c.N; ++n) gradient += b.dy.at(m * c.N + n) * b.factors[l][1].at(n * a.R + r);
          h[l][m * a.R + r] = a.scaling * sum;
          ds[l][m * a.R + r] = a.scaling * gradient;
        }
      }
    }
  }

  double keep(int l, int64_t m, int64_t k) const {
    const Dropout& d = b_.adapter[l].dropout;
    if (!d.active()) return 1;
    return kept(d, static_cast<uint32_t>(m), static_cast<uint32_t>(k)) ? 65536.0 / d.threshold : 0;
  }
  double weight(int64_t n, int64_t k) const { return b_.w.at(n * b_.member.weight_n + k * b_.member.weight_k); }

  double y(int64_t m, int64_t n) const {
    double sum = b_.bias.at(n) + (c_.residual ? b_.before.at(m * (c_.N + 3) + n) : 0);
    for (int64_t k = 0; b_.problem.base && k < c_.K; ++k) sum += b_.x.at(m * c_.K + k) * weight(n, k);
    for (int l = 0; l < Bench::kAdapters; ++l) {
      const int64_t R = b_.adapter[l].R;
      sum += b_.adapter[l].scaling * b_.factors[l][2].at(n);
      for (int64_t r = 0; r < R; ++r) sum += h[l][m * R + r] * b_.factors[l][1].at(n * R + r);
    }
    return sum;
  }
  double dx(int64_t m, int64_t k) const {
    double sum = 0;
    for (int64_t n = 0; b_.problem.base && n < c_.N; ++n) sum += b_.dy.at(m * c_.N + n) * weight(n, k);
    for (int l = 0; l < Bench::kAdapters; ++l) {
      const int64_t R = b_.adapter[l].R;
      for (int64_t r = 0; r < R; ++r) sum += keep(l, m, k) * ds[l][m * R + r] * b_.factors[l][0].at(r * c_.K + k);
    }
    return sum;
  }
  double dA(int l, int64_t r, int64_t k) const {
    double sum = 0;
    for (int64_t m = 0; m < c_.M; ++m) sum += ds[l][m * b_.adapter[l].R + r] * keep(l, m, k) * b_.x.at(m * c_.K + k);
    return sum;
  }
  double dB(int l, int64_t n, int64_t r) const {
    double sum = 0;
    for (int64_t m = 0; m < c_.M; ++m) sum += b_.dy.at(m * c_.N + n) * h[l][m * b_.adapter[l].R + r];
    return sum;
  }
  double column_sum(int64_t n) const {
    double sum = 0;
    for (int64_t m = 0; m < c_.M; ++m) sum += b_.dy.at(m * c_.N + n);
    return sum;
  }

  std::vector<double> h[Bench::kAdapters], ds[Bench::kAdapters];

 private:
  const Case& c_;
  Bench& b_;
};

// Every element of a [rows, cols] result; the error allowed is relative to the largest of them.
template <class F>
void compare(const Case& c, const char* what, const Matrix& got, Dtype type, int64_t rows, int64_t cols, F expected) {
  double error = 0, largest = 1;
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t j = 0; j < cols; ++j) {
      const double want = expected(i, j), difference = std::fabs(got.at(i * cols + j) - want);
      largest = std::fmax(largest, std::fabs(want));
      if (!(difference <= error)) error = difference;  // NaN counts
    }
  }
  const double epsilon = type == Dtype::kFloat32 ? 1e-5 : type == Dtype::kFloat16 ? 1e-3 : 8e-3;
  char text[96];
  std::snprintf(text, sizeof text, "%s: error %g of %g", what, error, largest);
  expect(error <= epsilon * largest, name_of(c) + text);
  expect(got.guard_holds(), name_of(c) + what + ": written past its end");
}

void test_case(const Case& c) {
  Bench b(c);
  b.run(c);
  const Expected e(c, b);
  compare(c, "y", b.y, c.type, c.M, c.N, [&](int64_t m, int64_t n) { return e.y(m, n); });
  compare(c, "dx", b.dx, c.type, c.M, c.K, [&](int64_t m, int64_t k) { return e.dx(m, k); });
  compare(c, "dbias", b.dbias, c.type, 1, c.N, [&](int64_t, int64_t n) { return e.column_sum(n); });
  for (int l = 0; l < Bench::kAdapters; ++l) {
    const Adapter& a = b.adapter[l];
    compare(c, "dA", b.factors[l][3], c.factors, a.R, c.K, [&](int64_t r, int64_t k) { return e.dA(l, r, k); });
    compare(c, "dB", b.factors[l][4], c.factors, c.N, a.R, [&](int64_t n, int64_t r) { return e.dB(l, n, r); });
    compare(c, "lora_bias gradient", b.factors[l][5], c.factors, 1, c.N,
            [&](int64_t, int64_t n) { return a.scaling * e.column_sum(n); });
  }
}

void test_kernels() {
  using D = Dtype;
  const std::pair<D, D> pairs[] = {{D::kFloat32, D::kFloat32},
                                   {D::kFloat16, D::kFloat16},
                                   {D::kBFloat16, D::kBFloat16},
                                   {D::kFloat16, D::kFloat32},
                                   {D::kBFloat16, D::kFloat32}};
  struct {
    int64_t M, K, N, R;
  } const sizes[] = {{1, 1, 1, 1},     {1, 70, 300, 8},  {3, 33, 35, 16},   {5, 300, 67, 3}, {16, 67, 31, 17},
                     {17, 40, 270, 5}, {37, 131, 70, 9}, {16, 1100, 24, 4}, {67, 35, 300, 3}};
  for (const auto& [type, factors] : pairs) {
    for (const auto& s : sizes) {
      for (double p : {0.0, 0.3}) {
        for (bool transposed : {false, true}) test_case({s.M, s.K, s.N, s.R, type, factors, p, transposed});
        test_case({s.M, s.K, s.N, s.R, type, factors, p, false, true});
      }
    }
  }
}

void test_mask() {
  const Dropout dropout = make_dropout(0.4, 0xFEDCBA9876543210ull, 3);
  constexpr int64_t kRows = 5, kCols = 1061;
  std::vector<uint8_t> mask(kRows * kCols);
  table().mask(mask.data(), kRows, kCols, dropout);
  bool same = true;
  for (int64_t i = 0; i < kRows * kCols; ++i) {
    same = same && mask[i] == kept(dropout, static_cast<uint32_t>(i / kCols), static_cast<uint32_t>(i % kCols));
  }
  expect(same, std::string(instruction_set_name()) + ": dropout mask differs from its definition");
}

// Salmon et al., Random123, kat_vectors: philox4x32, 7 and 10 rounds.
void test_philox() {
  struct {
    int rounds;
    uint32_t counter[4], key[2], result[4];
  } const answers[] = {
      {7, {0, 0, 0, 0}, {0, 0}, {0x5f6fb709, 0x0d893f64, 0x4f121f81, 0x4f730a48}},
      {10, {0, 0, 0, 0}, {0, 0}, {0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8}},
      {10,
       {0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344},
       {0xa4093822, 0x299f31d0},
       {0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1}},
  };
  for (const auto& answer : answers) {
    Philox4 counter;
    std::memcpy(counter.word, answer.counter, sizeof counter.word);
    const uint64_t key = answer.key[0] | static_cast<uint64_t>(answer.key[1]) << 32;
    const Philox4 got = philox(key, counter, answer.rounds);
    expect(std::memcmp(got.word, answer.result, sizeof got.word) == 0,
           "philox4x32-" + std::to_string(answer.rounds) + ": not the known answer");
  }
}

}  // namespace

int main() {
  test_philox();
  int sets = 0;
  for (const char* set : {"default", "avx2", "avx512", "avx512_bf16"}) {
    if (!use_instruction_set(set)) {
      std::printf("%s: not run, this processor or build lacks it\n", set);
      continue;
    }
    test_kernels();
    test_mask();
    ++sets;
  }
  std::printf("lora_linear: %d instruction sets, %d failures\n", sets, failures);
  return failures == 0 ? 0 : 1;
}
