// The forward kernels of lora_linear against double loops, in the emulator and, by the same program, on a GPU: ragged
// sizes, several adapters of different ranks, members and splits, dropout, unaligned rows, NaNs that stay in place.
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

constexpr uint64_t kSeed = 0x0123456789ABCDEFull;
constexpr Dtype kPairs[][2] = {
    {Dtype::kBFloat16, Dtype::kBFloat16}, {Dtype::kFloat16, Dtype::kFloat16}, {Dtype::kBFloat16, Dtype::kFloat32}};
int failures = 0, compared = 0;

void expect(bool holds, const std::string& what) {
  if (holds) return;
  ++failures;
  printf("FAILED %s: %s\n", kWhere, what.c_str());
}

// In [-1, 1), all 24 bits of an fp32 used; what a matrix makes of them is up to its type.
class Values {
 public:
  float next() {
    state_ = state_ * 6364136223846793005ull + 1442695040888963407ull;
    return static_cast<float>(static_cast<int32_t>(state_ >> 40) - (1 << 23)) / (1 << 23);
  }

 private:
  uint64_t state_ = 1;
};

uint16_t half_bits(float value) {
  if (value != value) return 0x7E00;
  int exponent;
  const float fraction = std::frexp(std::fabs(value), &exponent);
  if (exponent < -13) return 0;  // no subnormals: values of the tests need none
  const int field = ((exponent + 14) << 10) + static_cast<int>(fraction * 2048) - 1024;
  return static_cast<uint16_t>(field | (value < 0 ? 0x8000 : 0));
}

double from_half(uint16_t bits) {
  const int exponent = bits >> 10 & 31, fraction = bits & 1023;
  if (exponent == 31) return fraction ? std::nan("") : HUGE_VAL;
  const double magnitude = exponent == 0 ? std::ldexp(fraction, -24) : std::ldexp(1024 + fraction, exponent - 25);
  return bits >> 15 ? -magnitude : magnitude;
}

// Elements of any of the three types, the first one `offset` elements from a multiple of 16 bytes.
class Matrix {
 public:
  Matrix(Dtype type, int64_t count, int offset = 0)
      : type_(type), offset_(offset), bytes_((count + offset) * size()), count_(count) {
    memset(bytes_.host(), 0x7B, (count + offset) * size());
  }
  void fill(Values& values) {
    for (int64_t i = 0; i < count_; ++i) set(i, values.next());
  }
  void* data() { return bytes_.data() + offset_ * size(); }
  void set(int64_t i, float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    const uint16_t narrow = type_ == Dtype::kFloat16 ? half_bits(value) : static_cast<uint16_t>(bits >> 16);
    memcpy(bytes_.host() + (i + offset_) * size(),
           type_ == Dtype::kFloat32 ? static_cast<void*>(&bits) : (void*)&narrow, size());
  }
  double at(int64_t i) {
    const unsigned char* from = bytes_.host() + (i + offset_) * size();
    uint16_t narrow;
    memcpy(&narrow, from, 2);
    if (type_ == Dtype::kFloat16) return from_half(narrow);
    uint32_t bits = static_cast<uint32_t>(narrow) << 16;
    if (type_ == Dtype::kFloat32) memcpy(&bits, from, 4);
    float value;
    memcpy(&value, &bits, 4);
    return value;
  }

 private:
  int64_t size() const { return type_ == Dtype::kFloat32 ? 4 : 2; }

  Dtype type_;
  int offset_;
  Array<unsigned char> bytes_;
  int64_t count_;
};
using Matrices = std::vector<std::unique_ptr<Matrix>>;

// NaN only where NaN is wanted; else an error within `relative` of the value and 2e-6 of `size`, the sum of the
// magnitudes of the terms.
bool close(double got, double want, double size, double relative) {
  ++compared;
  if (want != want) return got != got;
  return std::fabs(got - want) <= relative * std::fabs(want) + 2e-6 * size;
}

struct Sum {
  double value = 0, size = 0;
  void add(double term) {
    value += term;
    size += std::fabs(term);
  }
};

struct Given {  // an adapter of a case
  int R, member;
  double p;
};

struct ShrinkCase {
  int64_t M, K;
  std::vector<Given> adapters;
  int splits = 1;
  int offset = 0, gap = 0;  // elements before x and every A; between rows of x
};

std::string name_of(const ShrinkCase& c, const Dtype (&pair)[2]) {
  char text[120];
  snprintf(text, sizeof text, "shrink M=%d K=%d L=%d splits=%d types %d/%d: ", int(c.M), int(c.K),
           int(c.adapters.size()), c.splits, int(pair[0]), int(pair[1]));
  return text;
}

// Some columns of h, between and behind the adapters', belong to no one and must stay as they were.
constexpr int kFree = 3;
constexpr float kUntouched = -77.f;

void test_shrink(const ShrinkCase& c, const Dtype (&pair)[2]) {
  Values values;
  const int64_t stride = c.K + c.gap;
  Matrix x(pair[0], c.M * stride, c.offset);
  x.fill(values);
  if (c.M > 1) x.set((c.M - 2) * stride + c.K / 2, NAN);
  for (int64_t m = 0; m < c.M; ++m) {
    for (int64_t k = c.K; k < stride; ++k) x.set(m * stride + k, NAN);
  }
  Matrices factors;
  Array<uint64_t> seed(1);
  seed[0] = kSeed;
  Shrink call = {x.data(), stride, c.M, c.K, nullptr, 0, c.splits, seed.data(), {}};
  for (const Given& given : c.adapters) {
    const int l = call.adapters.count++;
    factors.push_back(std::make_unique<Matrix>(pair[1], given.R * c.K, c.offset));
    factors[l]->fill(values);
    call.adapters.at[l] = {factors[l]->data(),       nullptr, given.R, static_cast<int>(call.R), 0, l % 2 ? -0.5f : 2.f,
                           make_keep(given.p, 5 + l)};
    call.R += given.R + kFree;
  }
  Array<float> h(c.splits * c.M * call.R);
  for (int64_t i = 0; i < c.splits * c.M * call.R; ++i) h[i] = kUntouched;
  call.h = h.data();
  bool right = ran([&] { return shrink(pair[0], pair[1], call, nullptr); });
  for (int64_t m = 0; m < c.M; ++m) {
    for (int l = 0; l < call.adapters.count; ++l) {
      const CudaAdapter& adapter = call.adapters.at[l];
      const Dropout dropout = make_dropout(c.adapters[l].p, kSeed, 5 + l);
      for (int r = 0; r < adapter.R + kFree; ++r) {
        Sum sum;
        for (int64_t k = 0; r < adapter.R && k < c.K; ++k) {
          if (!kept(dropout, static_cast<uint32_t>(m), static_cast<uint32_t>(k))) continue;
          sum.add(x.at(m * stride + k) * factors[l]->at(r * c.K + k) * adapter.scaling * dropout.scale);
        }
        double got = 0;
        for (int s = 0; s < c.splits; ++s) got += h[(s * c.M + m) * call.R + adapter.rank0 + r];
        right = right && (r < adapter.R ? close(got, sum.value, sum.size, 0) : got == c.splits * kUntouched);
      }
    }
  }
  expect(right, name_of(c, pair));
}

struct FewRowsCase {
  int64_t M, K;
  std::vector<int64_t> N;
  std::vector<Given> adapters;
  int splits = 1;
  int gap = 0;            // between rows of x and W; a multiple of 8
  bool in_place = false;  // parts are h
};

// A shrink and the few rows kernel behind it, which overlaps it: y and h from x. NaN in x must stay in its row.
class FewRowsTest {
 public:
  FewRowsTest(const FewRowsCase& c, const Dtype (&pair)[2])
      : c_(c), pair_(pair), x_(pair[0], c.M * (c.K + c.gap)), seed_(1) {
    x_.fill(values_);
    if (c.M > 2) x_.set(c.K / 2, NAN);
    seed_[0] = kSeed;
    for (const Given& given : c.adapters) add_adapter(given);
    for (int64_t N : c.N) add_member(N);
    parts_ = std::make_unique<Array<float>>(c.splits * c.M * call_.R);
    h_ = std::make_unique<Array<float>>(c.M * call_.R);
    call_.x = x_.data();
    call_.x_stride = c.K + c.gap;
    call_.M = c.M;
    call_.K = c.K;
    call_.parts = parts_->data();
    call_.splits = c.splits;
    call_.h = c.in_place ? parts_->data() : h_->data();
  }

  void run() {
    expect(has_few_rows_kernel(pair_[0], pair_[1], call_), name() + "has no kernel");
    Shrink before = {call_.x, call_.x_stride, c_.M,         c_.K,          parts_->data(),
                     call_.R, c_.splits,      seed_.data(), call_.adapters};
    for (int l = 0; l < call_.adapters.count; ++l) before.adapters.at[l].factor = A_[l]->data();
    const bool right = ran([&] {
      const cudaError_t error = shrink(pair_[0], pair_[1], before, nullptr);
      return error == cudaSuccess ? few_rows(pair_[0], pair_[1], call_, nullptr) : error;
    });
    expect(right, name() + "launch");
    h_is_the_sum();
    for (int g = 0; g < call_.members; ++g) y_is_right(g);
  }

 private:
  void add_adapter(const Given& given) {
    const int l = call_.adapters.count++;
    for (Matrices* to : {&A_, &B_, &bias_}) {
      const int64_t count = to == &A_ ? given.R * c_.K : to == &B_ ? given.R * c_.N[given.member] : c_.N[given.member];
      to->push_back(std::make_unique<Matrix>(pair_[1], count));
      to->back()->fill(values_);
    }
    call_.adapters.at[l] = {B_[l]->data(),
                            l % 2 ? nullptr : bias_[l]->data(),
                            given.R,
                            static_cast<int>(call_.R),
                            given.member,
                            l % 2 ? -0.5f : 2.f,
                            make_keep(given.p, l)};
    call_.R += given.R;
  }
  void add_member(int64_t N) {
    const int g = call_.members++;
    W_.push_back(std::make_unique<Matrix>(pair_[0], N * (c_.K + c_.gap)));
    member_bias_.push_back(std::make_unique<Matrix>(pair_[0], N));
    y_.push_back(std::make_unique<Matrix>(pair_[0], c_.M * N));
    W_[g]->fill(values_);
    member_bias_[g]->fill(values_);
    call_.member[g] = {W_[g]->data(), c_.K + c_.gap, N, g % 2 ? nullptr : member_bias_[g]->data(), y_[g]->data()};
  }
  std::string name() const {
    char text[120];
    snprintf(text, sizeof text, "few rows M=%d K=%d G=%d N=%d L=%d splits=%d types %d/%d: ", int(c_.M), int(c_.K),
             int(c_.N.size()), int(c_.N[0]), int(c_.adapters.size()), c_.splits, int(pair_[0]), int(pair_[1]));
    return text;
  }
  float h(int64_t i) { return (*(c_.in_place ? parts_ : h_))[i]; }
  void h_is_the_sum() {
    bool right = true;
    for (int64_t i = 0; i < c_.M * call_.R; ++i) {
      float sum = 0;
      for (int s = 0; s < c_.splits; ++s) sum += (*parts_)[s * c_.M * call_.R + i];
      right = right && (h(i) == sum || (h(i) != h(i) && sum != sum));
    }
    expect(right, name() + "h");
  }
  void y_is_right(int g) {
    const FewRowsMember& member = call_.member[g];
    const double epsilon = pair_[0] == Dtype::kFloat16 ? 1. / 2048 : 1. / 256;
    bool right = true;
    for (int64_t m = 0; m < c_.M; ++m) {
      for (int64_t n = 0; n < member.N; ++n) {
        Sum sum;
        for (int64_t k = 0; k < c_.K; ++k) sum.add(x_.at(m * call_.x_stride + k) * W_[g]->at(n * call_.x_stride + k));
        if (member.bias) sum.add(member_bias_[g]->at(n));
        for (int l = 0; l < call_.adapters.count; ++l) {
          const CudaAdapter& adapter = call_.adapters.at[l];
          if (adapter.member != g) continue;
          if (adapter.bias) sum.add(adapter.scaling * bias_[l]->at(n));
          for (int r = 0; r < adapter.R; ++r) {
            sum.add(static_cast<double>(h(m * call_.R + adapter.rank0 + r)) * B_[l]->at(n * adapter.R + r));
          }
        }
        right = right && close(y_[g]->at(m * member.N + n), sum.value, sum.size, epsilon);
      }
    }
    expect(right, name() + "y of member " + std::to_string(g));
  }

  const FewRowsCase& c_;
  const Dtype (&pair_)[2];
  Values values_;
  Matrix x_;
  Array<uint64_t> seed_;
  FewRows call_{};
  Matrices A_, B_, bias_, W_, member_bias_, y_;
  std::unique_ptr<Array<float>> parts_, h_;
};

// Runs f under several orders of threads and arrivals of copies, where those can be chosen.
template <class F>
void each_schedule(F f) {
#ifdef EMULATOR_BUILD
  using emulator::Copies;
  const emulator::Schedule schedules[] = {
      {0, Copies::kLate}, {1, Copies::kEarly}, {2, Copies::kRandom}, {3, Copies::kLate}};
  for (const emulator::Schedule& schedule : schedules) {
    emulator::set_schedule(schedule);
    f();
  }
  emulator::set_schedule({});
#else
  f();
#endif
}

void shrink_is_right() {
  const ShrinkCase cases[] = {
      {1, 1, {{1, 0, 0}}},
      {1, 1024, {{16, 0, 0}}, 4},
      {3, 72, {{8, 0, 0.5}, {3, 0, 0}}},
      {17, 136, {{5, 0, 0.3}, {9, 0, 0.3}, {16, 0, 0.9}}, 2},
      {33, 200, {{64, 0, 0.1}}},
      {40, 64, {{1, 0, 0}, {2, 0, 0}, {65, 0, 0.2}, {8, 0, 0}}},
      {16, 640, {{4, 0, 0.1}}, 7},
      {20, 96, {{12, 0, 0.25}}, 1, 8, 8},
      {5, 67, {{7, 0, 0.4}, {8, 0, 0}}, 2},
      {34, 80, {{6, 0, 0.4}}, 1, 1, 3},
      {16, 64, {{512, 0, 0}}},
  };
  for (const auto& pair : kPairs) {
    for (const ShrinkCase& c : cases) test_shrink(c, pair);
    each_schedule([&] { test_shrink(cases[3], pair); });
  }
  each_schedule([&] { test_shrink(cases[8], kPairs[0]); });
  std::vector<Given> many(32, Given{4, 0, 0.5});
  test_shrink({2, 48, many}, kPairs[0]);
  test_shrink({8100, 40, {{9, 0, 0.5}}}, kPairs[2]);  // rows by 64
}

void few_rows_is_right() {
  const FewRowsCase cases[] = {
      {1, 8, {1}, {}},
      {1, 1032, {40}, {{16, 0, 0}}, 4},
      {16, 296, {16, 9, 23}, {{16, 0, 0}, {3, 1, 0}, {8, 2, 0}}, 2},
      {7, 64, {30}, {{5, 0, 0.2}, {100, 0, 0}}, 1, 8},
      {9, 40, {8, 8}, {{4, 0, 0}, {4, 0, 0}}, 1, 0, true},
      {2, 16, {4100}, {{2, 0, 0}}},
      {16, 16, {8170}, {{2, 0, 0}}},
  };
  for (const auto& pair : kPairs) {
    for (int i = 0; i < 5; ++i) FewRowsTest(cases[i], pair).run();
    each_schedule([&] { FewRowsTest(cases[2], pair).run(); });
  }
  for (int i = 5; i < 7; ++i) FewRowsTest(cases[i], kPairs[i - 5]).run();
}

void limits_are_as_said() {
  Matrix x(Dtype::kBFloat16, 64), w(Dtype::kBFloat16, 64);
  FewRows call{};
  call.x = x.data();
  call.x_stride = call.K = 8;
  call.M = call.members = 1;
  call.member[0] = {w.data(), 8, 1, nullptr, nullptr};
  const auto has = [&] { return has_few_rows_kernel(Dtype::kBFloat16, Dtype::kBFloat16, call); };
  expect(has(), "few rows: smallest case");
  call.M = 17;
  expect(!has(), "few rows: 17 rows");
  call.M = 1;
  call.K = 7;
  expect(!has(), "few rows: K=7");
  call.K = 8;
  call.member[0].weight_stride = 9;
  expect(!has(), "few rows: stride 9");
  call.member[0] = {static_cast<char*>(w.data()) + 2, 8, 1, nullptr, nullptr};
  expect(!has(), "few rows: unaligned W");
  expect(!has_mma_kernels(Dtype::kFloat32, Dtype::kFloat32) && !has_mma_kernels(Dtype::kFloat16, Dtype::kBFloat16),
         "has_mma_kernels");
  expect(shrink_splits(8192, 4096, 16) == 1 && shrink_splits(1, 4096, 16) == 16 && shrink_splits(1, 40, 16) == 1 &&
             shrink_splits(512, 4096, 16) > 1,
         "shrink_splits");
}

}  // namespace

int main() {
  if (!device_present()) {
    printf("gpu: 0 forward kernels of lora_linear run: no device\n");
    return kSkipped;
  }
  limits_are_as_said();
  shrink_is_right();
  few_rows_is_right();
  printf("%s: %d elements compared, %d failures\n", kWhere, compared, failures);
  return failures != 0;
}
