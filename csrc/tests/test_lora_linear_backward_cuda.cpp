// expand, dy_pass and x_pass of lora_linear against double loops, in the emulator and, by the same program, on a GPU:
// ragged sizes and ranks, unaligned rows, several adapters with masks of their own, what is not wanted left out, and
// NaNs that dropout or another row must hide. Emulated launches take their schedules and copy timings in turn.
#include <cmath>
#include <cstdio>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "lora_linear/lora_linear_cuda.h"
#include "tests/device_array.h"
#ifdef EMULATOR_BUILD
#include "emulator/emulator.h"
#endif

using namespace pk;
using namespace pk::lora_linear;
using namespace pk::test;

namespace {

int failures = 0, launches = 0;

void next_schedule() {
#ifdef EMULATOR_BUILD
  constexpr emulator::Copies kCopies[] = {emulator::Copies::kLate, emulator::Copies::kEarly, emulator::Copies::kRandom};
  emulator::set_schedule({static_cast<uint64_t>(launches), kCopies[launches % 3]});
#endif
  ++launches;
}

struct Types {
  Dtype x, factors;
  const char* name;
};
constexpr Types kTypes[] = {{Dtype::kBFloat16, Dtype::kBFloat16, "bf16"},
                            {Dtype::kFloat16, Dtype::kFloat16, "fp16"},
                            {Dtype::kBFloat16, Dtype::kFloat32, "bf16/fp32"}};

// Of the terms' absolute sum: what fp32 sums lose, and, unless the product is exact, what 16-bit parts do.
double part_error(const Types& types, bool exact, int64_t terms) {
  if (exact) return 0x1p-22 * (1 + static_cast<double>(terms) / 16);
  return types.x == Dtype::kFloat16 ? 0x1p-18 : 0x1p-14;
}

class Values {
 public:
  explicit Values(uint64_t seed) : state_(seed * 2 + 1) {}
  double whole_bits() { return static_cast<double>(static_cast<int>(next() >> 57) - 64) / 64; }  // exact in 16 bits
  double fp32() { return static_cast<float>(static_cast<double>(static_cast<int64_t>(next())) * 0x1p-63); }

 private:
  uint64_t next() { return state_ = state_ * 6364136223846793005ull + 1442695040888963407ull; }
  uint64_t state_;
};

// A matrix with rows `stride` apart whose first element lies `offset` elements into the allocation, which ends with the
// last row: AddressSanitizer sees what is read or written past it. It starts full of NaN.
class Matrix {
 public:
  Matrix(Dtype type, int64_t rows, int64_t cols, int64_t stride, int64_t offset = 0)
      : rows(rows), cols(cols), stride(stride), type_(type), bytes_(type == Dtype::kFloat32 ? 4 : 2), offset_(offset) {
    const size_t size = (offset + (rows > 0 ? (rows - 1) * stride + cols : 0)) * bytes_;
    memory_ = std::make_unique<Array<unsigned char>>(size);
    memset(memory_->host(), 0xFF, size);
  }
  Matrix(Dtype type, int64_t rows, int64_t cols) : Matrix(type, rows, cols, cols) {}

  void* data() { return memory_->data() + offset_ * bytes_; }
  void* host() { return place(0, 0); }
  float* floats() { return static_cast<float*>(data()); }
  void fill(Values& values, double largest = 1) {
    for (int64_t i = 0; i < rows; ++i) {
      for (int64_t j = 0; j < cols; ++j) {
        set(i, j, largest * (type_ == Dtype::kFloat32 ? values.fp32() : values.whole_bits()));
      }
    }
  }
  double at(int64_t i, int64_t j) const {
    uint32_t bits = 0;  // bf16 is the upper half of an fp32
    memcpy(type_ == Dtype::kBFloat16 ? reinterpret_cast<char*>(&bits) + 2 : reinterpret_cast<char*>(&bits), place(i, j),
           bytes_);
    if (type_ == Dtype::kFloat16) {
      const int exponent = bits >> 10 & 31, fraction = bits & 1023;
      if (exponent == 31) return NAN;
      const double magnitude = exponent == 0 ? std::ldexp(fraction, -24) : std::ldexp(1024 + fraction, exponent - 25);
      return bits >> 15 ? -magnitude : magnitude;
    }
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
  }
  // `value` is one that the type holds, and no subnormal.
  void set(int64_t i, int64_t j, double value) {
    const float rounded = static_cast<float>(value);
    uint32_t bits;
    memcpy(&bits, &rounded, sizeof bits);
    if (type_ == Dtype::kBFloat16) bits >>= 16;
    if (type_ == Dtype::kFloat16) {
      int exponent = 0;
      const double fraction = std::frexp(std::fabs(value), &exponent);
      const int field = value == 0 ? 0 : ((exponent + 14) << 10) + static_cast<int>(fraction * 2048) - 1024;
      bits = std::isnan(value) ? 0x7FFF : static_cast<uint32_t>(field | (value < 0 ? 0x8000 : 0));
    }
    memcpy(place(i, j), &bits, bytes_);
  }

  int64_t rows, cols, stride;

 private:
  unsigned char* place(int64_t i, int64_t j) const { return memory_->host() + (offset_ + i * stride + j) * bytes_; }
  Dtype type_;
  size_t bytes_;
  int64_t offset_;
  std::unique_ptr<Array<unsigned char>> memory_;
};

// Columns of `low` that belong to no adapter lie before, between and behind those of the adapters.
struct Case {
  int64_t M, N;
  std::vector<int> ranks;
  double p;              // of the first adapter; the others' are 0, p / 2, 0, p / 3 ...
  int64_t pad = 0;       // rows of dy and x lie this much further apart
  int64_t offset = 0;    // and start so many elements into their memory
  double low = 1;        // the largest of low
  float scaling = 0.5f;  // of the first adapter; each of the others' is larger by 1
};

std::string name_of(const char* what, const Types& types, const Case& c) {
  char text[160];
  snprintf(text, sizeof text, "%s: %s %s M=%d N=%d p=%g pad=%d R=", kWhere, what, types.name, int(c.M), int(c.N), c.p,
           int(c.pad));
  std::string name = text;
  for (const int R : c.ranks) name += std::to_string(R) + " ";
  return name;
}

class Compare {
 public:
  explicit Compare(std::string name) : name_(std::move(name)) {}
  ~Compare() {
    if (wrong_ == 0) return;
    ++failures;
    printf("FAILED %s: %d wrong, the first %s\n", name_.c_str(), wrong_, first_);
  }
  template <class Launch>
  void launched(const Launch& launch) {
    if (!ran(launch)) fail("launch", 0, 0, 0, 0);
  }
  void close(const char* what, int64_t i, int64_t j, double got, double expected, double allowed) {
    const bool right = std::isnan(expected) ? std::isnan(got) : std::fabs(got - expected) <= allowed;
    if (!right) fail(what, i, j, got, expected);
  }

 private:
  void fail(const char* what, int64_t i, int64_t j, double got, double expected) {
    if (wrong_++ == 0) {
      snprintf(first_, sizeof first_, "%s(%d, %d) = %.9g, not %.9g", what, int(i), int(j), got, expected);
    }
  }
  std::string name_;
  int wrong_ = 0;
  char first_[160];
};

struct Problem {
  Problem(const Types& types, const Case& c, bool across) : seed(1) {
    Values values(c.M * 31 + c.N);
    seed[0] = 0x123456789ABCDEFull + c.N;
    R = 1;
    adapters.count = static_cast<int>(c.ranks.size());
    for (int l = 0; l < adapters.count; ++l) {
      const int rank = c.ranks[l];
      const double p = l == 0 ? c.p : l % 2 ? 0 : c.p / (l / 2 + 1);
      factors.emplace_back(types.factors, across ? rank : c.N, across ? c.N : rank);
      biases.emplace_back(types.factors, 1, c.N);
      factors.back().fill(values);
      biases.back().fill(values);
      CudaAdapter& adapter = adapters.at[l];
      adapter = {factors[l].data(), l % 2 ? nullptr : biases[l].data(), rank, R, 0, c.scaling + l, make_keep(p, l + 3)};
      R += rank + l % 2;
    }
    R += 1;
    low = std::make_unique<Matrix>(Dtype::kFloat32, c.M, R);
    low->fill(values, c.low);
    wide = std::make_unique<Matrix>(types.x, c.M, c.N, c.N + c.pad, c.offset);  // dy or x
    wide->fill(values);
    bias = std::make_unique<Matrix>(types.x, 1, c.N);
    bias->fill(values);
  }
  bool is_kept(int l, int64_t m, int64_t n) {
    const Keep& keep = adapters.at[l].keep;
    return kept({seed[0], keep.stream, keep.threshold, keep.scale}, static_cast<uint32_t>(m), static_cast<uint32_t>(n));
  }

  Adapters adapters;
  int R;
  std::vector<Matrix> factors, biases;
  std::unique_ptr<Matrix> low, wide, bias;
  Array<uint64_t> seed;
};

void expand_is_right(const Types& types, const Case& c, bool across, const std::string& onto, bool with_bias) {
  Compare compare(name_of(across ? "expand across" : "expand", types, c) + onto);
  const bool accumulate = onto == "accumulate", residual = onto == "residual";
  Problem problem(types, c, across);
  if (c.M > 1 && !c.ranks.empty()) problem.low->set(c.M / 2, problem.adapters.at[0].rank0, NAN);
  Matrix out(types.x, c.M, c.N), before(types.x, c.M, c.N, residual ? c.N + 5 : c.N);
  Values values(7);
  before.fill(values);
  if (accumulate) memcpy(out.host(), before.host(), c.M * c.N * 2);
  for (int l = 0; !with_bias && l < problem.adapters.count; ++l) problem.adapters.at[l].bias = nullptr;
  next_schedule();
  const Expand call{out.data(),
                    c.M,
                    c.N,
                    problem.low->floats(),
                    problem.R,
                    with_bias ? problem.bias->data() : nullptr,
                    across,
                    accumulate,
                    c.p > 0 ? problem.seed.data() : nullptr,
                    problem.adapters,
                    residual ? before.data() : nullptr,
                    before.stride};
  compare.launched([&] { return expand(types.x, types.factors, call, nullptr); });
  for (int64_t m = 0; m < c.M; ++m) {
    for (int64_t n = 0; n < c.N; ++n) {
      double sum = (onto != "" ? before.at(m, n) : 0) + (with_bias ? problem.bias->at(0, n) : 0), size = std::fabs(sum);
      for (int l = 0; l < problem.adapters.count; ++l) {
        const CudaAdapter& adapter = problem.adapters.at[l];
        if (adapter.bias) sum += adapter.scaling * problem.biases[l].at(0, n);
        size += adapter.scaling;
        if (!problem.is_kept(l, m, n)) continue;
        for (int r = 0; r < adapter.R; ++r) {
          const double factor = across ? problem.factors[l].at(r, n) : problem.factors[l].at(n, r);
          const double term = adapter.keep.scale * problem.low->at(m, adapter.rank0 + r) * factor;
          sum += term;
          size += std::fabs(term);
        }
      }
      const double ulp = types.x == Dtype::kBFloat16 ? 0x1p-8 : 0x1p-10;
      compare.close("out", m, n, out.at(m, n), sum, std::fabs(sum) * ulp + size * part_error(types, false, 0));
    }
  }
}

// Parts of a result, added.
double parts_at(const Matrix& parts, int count, int64_t i, int64_t j) {
  double sum = 0;
  for (int part = 0; part < count; ++part) sum += parts.at(part * (parts.rows / count) + i, j);
  return sum;
}

void dy_pass_is_right(const Types& types, const Case& c, bool wants_ds, bool wants_dB) {
  Compare compare(name_of("dy pass", types, c) + (wants_ds ? "ds " : "") + (wants_dB ? "dB" : ""));
  Problem problem(types, c, false);
  Matrix& dy = *problem.wide;
  if (!wants_dB && c.M > 1) dy.set(c.M / 2, 0, NAN);  // stays in its row of ds
  const int col_blocks = dy_column_blocks(c.N);
  Matrix ds(Dtype::kFloat32, col_blocks * c.M, problem.R);
  std::vector<Matrix> dB;
  std::vector<int> chunks;
  DyPass call = {dy.data(),
                 dy.stride,
                 c.M,
                 c.N,
                 wants_dB ? problem.low->floats() : nullptr,
                 wants_ds ? ds.floats() : nullptr,
                 problem.R,
                 {},
                 problem.adapters};
  for (int l = 0; l < call.adapters.count; ++l) {
    chunks.push_back(dy_row_chunks(c.M, c.N));
    dB.emplace_back(Dtype::kFloat32, chunks[l] * c.N, c.ranks[l]);
    if (wants_dB && l != 2) call.dB[l] = dB[l].floats();
    if (!wants_ds) call.adapters.at[l].factor = nullptr;
  }
  next_schedule();
  compare.launched([&] { return dy_pass(types.x, types.factors, call, nullptr); });
  std::vector<int> owner(problem.R, -1);
  for (int l = 0; l < call.adapters.count; ++l) {
    for (int r = 0; r < c.ranks[l]; ++r) owner[call.adapters.at[l].rank0 + r] = l;
  }
  for (int64_t m = 0; m < c.M; ++m) {
    for (int column = 0; column < problem.R; ++column) {
      double sum = 0, size = 0;
      const int l = owner[column];
      for (int64_t n = 0; l >= 0 && n < c.N; ++n) {
        const CudaAdapter& adapter = call.adapters.at[l];
        const double term = adapter.scaling * dy.at(m, n) * problem.factors[l].at(n, column - adapter.rank0);
        sum += term;
        size += std::fabs(term);
      }
      if (l < 0 || !wants_ds) sum = NAN;  // untouched
      compare.close("ds", m, column, parts_at(ds, col_blocks, m, column), sum, size * part_error(types, true, c.N));
    }
  }
  const bool fp32 = types.factors == Dtype::kFloat32;
  for (int l = 0; l < call.adapters.count; ++l) {
    for (int64_t n = 0; n < c.N; ++n) {
      for (int r = 0; r < c.ranks[l]; ++r) {
        double sum = 0, size = 0;
        for (int64_t m = 0; m < c.M; ++m) {
          const double term = dy.at(m, n) * problem.low->at(m, call.adapters.at[l].rank0 + r);
          sum += term;
          size += std::fabs(term);
        }
        if (!call.dB[l]) sum = NAN;
        compare.close("dB", n, r, parts_at(dB[l], chunks[l], n, r), sum, size * part_error(types, fp32, c.M));
      }
    }
  }
}

void x_pass_is_right(const Types& types, const Case& c) {
  Compare compare(name_of("x pass", types, c));
  Problem problem(types, c, true);
  Matrix& x = *problem.wide;
  for (int64_t m = 0; c.ranks.size() == 1 && m < c.M; ++m) {
    for (int64_t k = 0; k < c.N; ++k) {
      if (!problem.is_kept(0, m, k)) x.set(m, k, NAN);
    }
  }
  std::vector<Matrix> dA;
  std::vector<int> chunks;
  XPass call = {x.data(),
                x.stride,
                c.M,
                c.N,
                problem.low->floats(),
                problem.R,
                {},
                c.p > 0 ? problem.seed.data() : nullptr,
                problem.adapters};
  for (int l = 0; l < call.adapters.count; ++l) {
    chunks.push_back(x_row_chunks(c.M, c.N));
    dA.emplace_back(Dtype::kFloat32, chunks[l] * c.ranks[l], c.N);
    call.dA[l] = dA[l].floats();
    call.adapters.at[l].factor = nullptr;
  }
  next_schedule();
  compare.launched([&] { return x_pass(types.x, types.factors, call, nullptr); });
  const bool fp32 = types.factors == Dtype::kFloat32;
  for (int l = 0; l < call.adapters.count; ++l) {
    const CudaAdapter& adapter = call.adapters.at[l];
    for (int64_t k = 0; k < c.N; ++k) {
      std::vector<double> sum(adapter.R), size(adapter.R);
      for (int64_t m = 0; m < c.M; ++m) {
        if (!problem.is_kept(l, m, k)) continue;
        for (int r = 0; r < adapter.R; ++r) {
          const double term = adapter.keep.scale * problem.low->at(m, adapter.rank0 + r) * x.at(m, k);
          sum[r] += term;
          size[r] += std::fabs(term);
        }
      }
      for (int r = 0; r < adapter.R; ++r) {
        compare.close("dA", r, k, parts_at(dA[l], chunks[l], r, k), sum[r], size[r] * part_error(types, fp32, c.M));
      }
    }
  }
}

}  // namespace

int main() {
  if (!device_present()) {
    printf("gpu: 0 of 3 kernels run: no device\n");
    return kSkipped;
  }
  const Case kExpand[] = {{70, 150, {5}, 0.5}, {1, 8, {1}, 0},          {64, 256, {16}, 0.1}, {65, 131, {16, 33}, 0.3},
                          {33, 96, {70}, 0.2}, {130, 40, {4, 8, 1}, 0}, {20, 24, {}, 0}};
  const Case kPass[] = {{70, 150, {5}, 0.5, 2, 0},
                        {1, 8, {1}, 0},
                        {64, 512, {16}, 0.1, 8, 0},
                        {150, 530, {16, 33}, 0.3, 6, 0},
                        {33, 96, {70}, 0.2, 7, 1},
                        {130, 1032, {4, 8, 1, 3}, 0.4, 0, 0},
                        {17, 40, {16, 20, 16}, 0.5, 0, 8},
                        {48, 37, {8, 8}, 0, 0, 3},
                        {40, 90, {5, 20}, 0.1, 0, 0, 1.3e5, 15.5f}};
  for (const Types& types : kTypes) {
    for (const Case& c : kExpand) {
      const Case kept_all{c.M, c.N, c.ranks, 0};
      expand_is_right(types, kept_all, false, "", true);
      expand_is_right(types, kept_all, false, "residual", c.M % 2 == 0);
      expand_is_right(types, c, true, c.M % 2 == 0 ? "accumulate" : "", false);
    }
    for (const Case& c : kPass) {
      dy_pass_is_right(types, c, true, true);
      x_pass_is_right(types, c);
    }
    dy_pass_is_right(types, kPass[3], true, false);
    dy_pass_is_right(types, kPass[3], false, true);
    dy_pass_is_right(types, kPass[3], false, false);
  }
  printf("%s: %d launches, %d failures\n", kWhere, launches, failures);
  return failures != 0;
}
