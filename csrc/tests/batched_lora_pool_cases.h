// What the tests of batched_lora's kernels over a pool share: cases and their layouts in memory, a run of one by either
// path, double loops to compare it with, NaN wherever nothing is read. What a row gets must have the same bits alone,
// among others, in any slot, from any pages, with h in parts or whole or in no memory.
#pragma once

#include <cmath>
#include <cstdio>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "batched_lora/batched_lora_cuda.h"
#include "common/activation.h"
#include "tests/device_array.h"

#ifdef EMULATOR_BUILD
#include "emulator/emulator.h"
#endif

namespace pk::test {

using namespace pk::batched_lora;

struct Pair {
  Dtype x, pages;
};

inline int failures = 0, compared = 0;

inline void expect(bool holds, const std::string& what) {
  if (holds) return;
  ++failures;
  printf("FAILED %s: %s\n", kWhere, what.c_str());
}

// Multiples of 1/64 in [-1, 1), which all types hold; the same for the same place, wherever it is stored.
inline double value_at(int64_t a, int64_t b, int64_t c, int64_t d) {
  uint64_t state = 0x9E3779B97F4A7C15ull;
  for (const int64_t part : {a, b, c, d}) state = (state ^ static_cast<uint64_t>(part)) * 6364136223846793005ull + 1;
  return static_cast<double>(static_cast<int>(state >> 40 & 127) - 64) / 64;
}

// Elements of any type, NaN until they are set, the first one `offset` elements from a multiple of 16 bytes.
class Matrix {
 public:
  Matrix(Dtype type, int64_t count, int offset = 0)
      : type_(type), offset_(offset), count_(count), bytes_((count + offset + 1) * size()) {
    for (int64_t i = -offset; i <= count; ++i) set(i, NAN);
  }
  void* data() { return bytes_.data() + offset_ * size(); }
  int64_t size() const { return type_ == Dtype::kFloat64 ? 8 : type_ == Dtype::kFloat32 ? 4 : 2; }
  int64_t count() const { return count_; }
  const unsigned char* bytes(int64_t i) { return bytes_.host() + (i + offset_) * size(); }

  void set(int64_t i, double value) {
    unsigned char* const to = bytes_.host() + (i + offset_) * size();
    if (type_ == Dtype::kFloat64) return void(memcpy(to, &value, 8));
    const float narrow = static_cast<float>(value);
    uint32_t bits;
    memcpy(&bits, &narrow, 4);
    if (value != value) bits = 0x7FC00000u;
    if (type_ == Dtype::kFloat32) return void(memcpy(to, &bits, 4));
    const int exponent = static_cast<int>(bits >> 23 & 255) - 112;  // of fp16; what is set is normal, zero or NaN
    const uint32_t half = value == 0 ? 0 : (bits >> 16 & 0x8000) | exponent << 10 | (bits >> 13 & 1023);
    const uint16_t stored = type_ == Dtype::kBFloat16 ? bits >> 16 : value != value ? 0x7E00 : half;
    memcpy(to, &stored, 2);
  }
  double at(int64_t i) {
    if (type_ == Dtype::kFloat64) {
      double value;
      memcpy(&value, bytes(i), 8);
      return value;
    }
    uint16_t half;
    memcpy(&half, bytes(i), 2);
    if (type_ == Dtype::kFloat16) {
      const int exponent = half >> 10 & 31, fraction = half & 1023;
      if (exponent == 31) return NAN;
      const double size = exponent ? std::ldexp(1024 + fraction, exponent - 25) : std::ldexp(fraction, -24);
      return half >> 15 ? -size : size;
    }
    uint32_t bits = static_cast<uint32_t>(half) << 16;
    if (type_ == Dtype::kFloat32) memcpy(&bits, bytes(i), 4);
    float value;
    memcpy(&value, &bits, 4);
    return value;
  }

 private:
  Dtype type_;
  int offset_;
  int64_t count_;
  Array<unsigned char> bytes_;
};

struct Case {
  const char* name;
  int64_t K;
  std::vector<int64_t> N;
  std::vector<std::vector<int>> ranks;  // [adapter][slice]
  std::vector<int64_t> rows;            // the adapter of each row, or -1
  int offset = 0, gap = 0;              // elements before x and every y; between their rows
};

// Shrink and expand, or pool_cluster.
enum Path { kTwoLaunches, kOneLaunch };

// y of the first slice may begin as x does, which may then lie there.
enum XPlace { kApart, kCopied, kInY };

// How a case is laid out. Nothing of it may change what a row gets.
struct Layout {
  std::vector<int64_t> chosen;  // rows of the case, in this order
  int64_t turn = 0;             // added to the number of an adapter, which gives its slot
  int64_t page_step = 7;        // between pages that are used one after another
  int parts = 0;                // of h; 0: as the launcher wishes
  Path path = kTwoLaunches;
  XPlace x = kApart;
};

constexpr int64_t kNaNAdapter = 1, kNaNRow = 2;  // in tests of NaN

class Run {
 public:
  Run(const Case& c, const Pair& pair, const Layout& layout, bool with_nan = false)
      : c_(c),
        pair_(pair),
        layout_(layout),
        with_nan_(with_nan),
        M_(static_cast<int64_t>(layout.chosen.size())),
        slots_(static_cast<int64_t>(c.ranks.size())),
        x_(pair.x, M_ * (c.K + c.gap), c.offset),
        ids_(M_ + 1),
        route_(route_size(M_, slots_)) {
    for (int64_t i = 0; i < M_; ++i) {
      const int64_t row = layout.chosen[i], adapter = c.rows[row];
      ids_[i] = static_cast<int32_t>(adapter < 0 ? adapter : slot_of(adapter));
      for (int64_t k = 0; k < c.K; ++k) x_.set(i * (c.K + c.gap) + k, x_value(row, k));
    }
    add_pool();
  }

  // All launches; false where one failed. field: of the route, to be changed behind the first.
  bool run(int field = -1) {
    bool right = ran([&] { return route({ids_.data(), false, M_, slots_, route_.data()}, nullptr); });
    if (field >= 0) ++route_[field];
    Pool call{M_,
              c_.K,
              slots_,
              layout_.x == kInY ? y_[0]->data() : x_.data(),
              c_.K + c_.gap,
              pages_in_->data(),
              route_.data(),
              slices(),
              {},
              nullptr,
              1};
    for (int g = 0; g < slices(); ++g) {
      call.slice[g] = {c_.N[g],       pages_out_[g]->data(), pages_,
                       y_[g]->data(), c_.N[g] + c_.gap,      table_[g]->data(),
                       T_[g],         scaling_.data(),       has_down_bias(g) ? down_bias_[g]->data() : nullptr};
    }
    if (layout_.path == kOneLaunch) {
      return ran([&] { return pool_cluster(pair_.x, call, nullptr); }) && right &&
             has_cluster_kernel(pair_.x, pair_.pages, call);
    }
    call.parts = layout_.parts ? layout_.parts : h_parts(call);
    Matrix h(wide_, call.parts * M_ * h_columns(call) + 1);
    call.h = h.data();
    return ran([&] {
             const cudaError_t shrunk = pool_shrink(pair_.x, pair_.pages, call, nullptr);
             return shrunk == cudaSuccess ? pool_expand(pair_.x, pair_.pages, call, nullptr) : shrunk;
           }) &&
           right;
  }

  // Row i of every y against double loops; whatever lies between the rows must be NaN still.
  bool row_is_right(int64_t i) {
    const int64_t row = layout_.chosen[i], adapter = c_.rows[row];
    bool right = true;
    for (int g = 0; g < slices(); ++g) {
      const int rank = adapter < 0 ? 0 : c_.ranks[adapter][g];
      std::vector<double> h(rank), sizes(rank);
      for (int r = 0; r < rank; ++r) {
        for (int64_t k = 0; k < c_.K; ++k) {
          const double term = x_value(row, k) * A_value(g, adapter, r, k);
          h[r] += term;
          sizes[r] += std::fabs(term);
        }
        h[r] = activated(activation(adapter), h[r] + (has_down_bias(g) ? down_bias_value(g, adapter, r) : 0));
        sizes[r] += 1;
      }
      for (int64_t n = 0; n < c_.N[g] + c_.gap; ++n) {
        const double before = n < c_.N[g] ? y_value(row, g, n) : NAN;
        const double bias = rank && has_bias(adapter) ? bias_value(g, adapter, n) : 0;
        const double gain = rank && has_gain(adapter) ? 1 + gain_value(g, adapter, n) : 1;
        double sum = 0, size = std::fabs(bias);
        for (int r = 0; r < rank; ++r) {
          sum += h[r] * B_value(g, adapter, r, n);
          size += sizes[r] * std::fabs(B_value(g, adapter, r, n));
        }
        const double s = rank ? scale(adapter) : 0, want = rank ? gain * (before + s * sum) + s * bias : before;
        size = (1 + std::fabs(gain)) * (1 + std::fabs(s) * size);
        right = right && close(y_[g]->at(i * (c_.N[g] + c_.gap) + n), want, size, rank > 0);
      }
    }
    return right;
  }

  bool same_row(int64_t i, Run& other, int64_t j) {
    bool same = true;
    for (int g = 0; g < slices(); ++g) {
      const int64_t stride = c_.N[g] + c_.gap, bytes = c_.N[g] * y_[g]->size();
      same = same && memcmp(y_[g]->bytes(i * stride), other.y_[g]->bytes(j * stride), bytes) == 0;
    }
    return same;
  }

  int64_t M() const { return M_; }
  std::string name() const {
    return std::string(c_.name) + ", types " + std::to_string(int(pair_.x)) + "/" + std::to_string(int(pair_.pages));
  }

 private:
  int slices() const { return static_cast<int>(c_.N.size()); }
  int64_t slot_of(int64_t adapter) const { return (adapter + layout_.turn) % slots_; }
  static bool has_bias(int64_t adapter) { return adapter % 3 == 0; }
  static bool has_gain(int64_t adapter) { return adapter % 2 == 0; }
  bool has_down_bias(int g) const { return (g + c_.K) % 2 == 1; }
  static int activation(int64_t adapter) { return static_cast<int>(adapter % kActivations); }
  static double scale(int64_t adapter) { return adapter % 2 ? -0.75 : 1.5; }
  double x_value(int64_t row, int64_t k) const {
    return with_nan_ && row == kNaNRow && k == c_.K / 2 ? NAN : value_at(1, row, k, 0);
  }
  double y_value(int64_t row, int g, int64_t n) const {
    return g == 0 && layout_.x != kApart ? x_value(row, n) : value_at(8, row, g, n);
  }
  double A_value(int g, int64_t adapter, int r, int64_t k) const {
    return with_nan_ && adapter == kNaNAdapter ? NAN : value_at(2 + 16 * g, adapter, r, k);
  }
  double B_value(int g, int64_t adapter, int r, int64_t n) const { return value_at(3 + 16 * g, adapter, r, n); }
  double bias_value(int g, int64_t adapter, int64_t n) const { return value_at(4 + 16 * g, adapter, 0, n); }
  double gain_value(int g, int64_t adapter, int64_t n) const { return value_at(5 + 16 * g, adapter, 0, n); }
  double down_bias_value(int g, int64_t adapter, int r) const { return value_at(6 + 16 * g, adapter, r, 0); }

  bool close(double got, double want, double size, bool changed) const {
    ++compared;
    if (want != want) return got != got;
    const double epsilon[] = {1. / (1 << 23), 1. / 2048, 1. / 256, 1. / (int64_t{1} << 52)};
    if (!changed) return got == want;
    const double sums = pair_.x == Dtype::kFloat64 ? 1e-14 : 2e-6;
    return std::fabs(got - want) <= epsilon[static_cast<int>(pair_.x)] * std::fabs(want) + sums * size;
  }

  // Pages of both factors, each used once and in a scattered order; all else of them is NaN.
  void add_pool() {
    pages_ = 3;
    for (const auto& ranks : c_.ranks) {
      for (const int rank : ranks) pages_ += ceil_div(rank, kPageRows) + 2;
    }
    while (pages_ % layout_.page_step == 0) ++pages_;
    pages_in_ = std::make_unique<Matrix>(pair_.pages, pages_ * kPageRows * c_.K);
    int64_t next = 1;
    const auto new_page = [&] { return next = (next + layout_.page_step) % pages_; };
    for (int g = 0; g < slices(); ++g) {
      int most = 1;
      for (const auto& ranks : c_.ranks) most = ranks[g] > most ? ranks[g] : most;
      T_.push_back(ceil_div(most, kPageRows) + g % 2);
      const int64_t width = kTablePages + 2 * T_[g], N = c_.N[g], stride = N + c_.gap;
      table_.push_back(std::make_unique<Array<int32_t>>(slots_ * width));
      pages_out_.push_back(std::make_unique<Matrix>(pair_.pages, pages_ * kPageRows * N));
      down_bias_.push_back(std::make_unique<Matrix>(wide_, slots_ * T_[g] * kPageRows));
      y_.push_back(std::make_unique<Matrix>(pair_.x, M_ * stride, c_.offset));
      for (int64_t adapter = 0; adapter < slots_; ++adapter) {
        int32_t* const entry = table_[g]->host() + slot_of(adapter) * width;
        for (int64_t i = 0; i < width; ++i) entry[i] = -7;
        entry[kTableRank] = c_.ranks[adapter][g];
        for (int r = 0; r < entry[kTableRank]; ++r) {
          int32_t* const page = entry + kTablePages + r / kPageRows;
          if (r % kPageRows == 0) page[0] = page[T_[g]] = static_cast<int32_t>(new_page());
          const int64_t place = page[0] * kPageRows + r % kPageRows;
          for (int64_t k = 0; k < c_.K; ++k) pages_in_->set(place * c_.K + k, A_value(g, adapter, r, k));
          for (int64_t n = 0; n < N; ++n) pages_out_[g]->set(place * N + n, B_value(g, adapter, r, n));
          down_bias_[g]->set(slot_of(adapter) * T_[g] * kPageRows + r, down_bias_value(g, adapter, r));
        }
        const int32_t bias = has_bias(adapter) ? static_cast<int32_t>(new_page() * kPageRows + 5) : -1;
        const int32_t gain = has_gain(adapter) ? static_cast<int32_t>(new_page() * kPageRows + 3) : -1;
        entry[kTableBias] = bias;
        entry[kTableGain] = gain;
        entry[kTableActivation] = activation(adapter);
        for (int64_t n = 0; n < N && bias >= 0; ++n) pages_out_[g]->set(bias * N + n, bias_value(g, adapter, n));
        for (int64_t n = 0; n < N && gain >= 0; ++n) pages_out_[g]->set(gain * N + n, gain_value(g, adapter, n));
      }
      for (int64_t i = 0; i < M_; ++i) {
        for (int64_t n = 0; n < N; ++n) y_[g]->set(i * stride + n, y_value(layout_.chosen[i], g, n));
      }
    }
    for (int64_t adapter = 0; adapter < slots_; ++adapter) scaling_.set(slot_of(adapter), scale(adapter));
  }

  const Case& c_;
  const Pair& pair_;
  const Layout layout_;
  const bool with_nan_;
  const int64_t M_, slots_;
  Matrix x_;
  Array<int32_t> ids_, route_;
  int64_t pages_ = 0;
  std::vector<int64_t> T_;
  std::unique_ptr<Matrix> pages_in_;
  std::vector<std::unique_ptr<Matrix>> pages_out_, y_, down_bias_;
  std::vector<std::unique_ptr<Array<int32_t>>> table_;
  const Dtype wide_ = pair_.x == Dtype::kFloat64 ? Dtype::kFloat64 : Dtype::kFloat32;
  Matrix scaling_{wide_, slots_};
};

inline std::vector<int64_t> all_rows(const Case& c) {
  std::vector<int64_t> rows(c.rows.size());
  for (size_t i = 0; i < rows.size(); ++i) rows[i] = static_cast<int64_t>(i);
  return rows;
}

// Adapters 0, 1, ..., none, 0, ... in turn.
inline std::vector<int64_t> in_turn(int64_t M, int64_t adapters) {
  std::vector<int64_t> rows(M);
  for (int64_t i = 0; i < M; ++i) rows[i] = i % (adapters + 1) == adapters ? -1 : i % (adapters + 1);
  return rows;
}

inline const std::vector<std::vector<int>> kMixed = {{8, 2, 5}, {20, 9, 1}, {0, 0, 0}, {0, 1, 16}, {1, 17, 70}};
inline void rows_are_right(const Case& c, const Pair& pair, Path path = kTwoLaunches, bool with_nan = false) {
  Run run(c, pair, {all_rows(c), 0, 7, 0, path}, with_nan);
  bool right = run.run();
  for (int64_t i = 0; i < run.M(); ++i) right = run.row_is_right(i) && right;
  expect(right, run.name() + (with_nan ? ", with NaN" : ""));
}

// A route that was made for something else names no rows and no slots that must exist.
inline void other_routes_add_nothing(const Case& c, const Pair& pair, Path path = kTwoLaunches) {
  for (const int field : {kRouteRows, kRouteAdapters}) {
    Run run(c, pair, {all_rows(c), 0, 7, 0, path}), untouched(c, pair, {all_rows(c)});
    bool right = run.run(field);
    for (int64_t i = 0; i < run.M(); ++i) right = right && run.same_row(i, untouched, i);
    expect(right, run.name() + ": a route for something else");
  }
}

// `layout` gives every row the bits that it has in the whole batch.
inline void bits_are_the_same(const Case& c, const Pair& pair, Run& whole, const Layout& layout, const char* what) {
  Run run(c, pair, layout);
  bool right = run.run();
  for (int64_t i = 0; i < run.M(); ++i) right = right && run.same_row(i, whole, layout.chosen[i]);
  expect(right, run.name() + ": other bits " + what);
}

template <class F>
void each_schedule(F f) {
#ifdef EMULATOR_BUILD
  using emulator::Copies;
  const emulator::Schedule schedules[] = {{1, Copies::kEarly}, {2, Copies::kRandom}, {3, Copies::kLate}};
  for (const emulator::Schedule& schedule : schedules) {
    emulator::set_schedule(schedule);
    f();
  }
  emulator::set_schedule({});
#else
  f();
#endif
}

}  // namespace pk::test
