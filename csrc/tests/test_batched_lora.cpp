// The CPU kernels of batched_lora's inference form against double loops, for every instruction set that this processor
// has: two slices, mixed ranks, LoRA and bottlenecks, biases, gains, scattered pages, NaN wherever nothing may be read;
// each row bit-equal to the row alone, however the work is cut; and every number of a route or table that must be
// refused.
#include <algorithm>
#include <array>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <string>
#include <vector>

#include "batched_lora/batched_lora.h"
#include "common/activation.h"
#include "common/instruction_set.h"

namespace {

using namespace pk;
using namespace pk::batched_lora;

int failures = 0;

void expect(bool holds, const std::string& what) {
  if (holds) return;
  std::printf("FAILED: %s: %s\n", instruction_set_name(), what.c_str());
  ++failures;
}

uint32_t random_bits() {
  static uint64_t state = 1;
  state = state * 6364136223846793005ull + 1442695040888963407ull;
  return static_cast<uint32_t>(state >> 33);
}

// Multiples of 1/64 in [-1, 1) and NaN, which all three dtypes hold exactly.
constexpr uint32_t kNaN = 0x7FC00000u;
float random_value() {
  return static_cast<float>(static_cast<int>(random_bits() % 128) - 64) / 64.f;
}

// A matrix stored as `type`.
class Matrix {
 public:
  Matrix() = default;
  Matrix(Dtype type, int64_t count) : type_(type), bytes_(count * size()) {
    for (int64_t i = 0; i < count; ++i) set(i, kNaN);
  }

  void* data() { return bytes_.data(); }
  int64_t size() const { return type_ == Dtype::kFloat32 ? 4 : 2; }
  void set(int64_t i, float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    set(i, bits);
  }
  void randomize(int64_t first, int64_t count) {
    for (int64_t i = first; i < first + count; ++i) set(i, random_value());
  }
  double at(int64_t i) const {
    const char* from = bytes_.data() + i * size();
    uint32_t bits = 0;
    if (type_ == Dtype::kFloat16) {
      uint16_t half;
      std::memcpy(&half, from, 2);
      const int exponent = half >> 10 & 31, fraction = half & 1023;
      if (exponent == 31) return NAN;
      const double size = exponent ? std::ldexp(1024 + fraction, exponent - 25) : std::ldexp(fraction, -24);
      return half >> 15 ? -size : size;
    }
    std::memcpy(reinterpret_cast<char*>(&bits) + 4 - size(), from, size());
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
  }
  bool row_equals(const Matrix& other, int64_t row, int64_t other_row, int64_t cols) const {
    const int64_t bytes = cols * size();
    return std::memcmp(bytes_.data() + row * bytes, other.bytes_.data() + other_row * bytes, bytes) == 0;
  }

 private:
  void set(int64_t i, uint32_t bits) {
    char* to = bytes_.data() + i * size();
    if (type_ != Dtype::kFloat16) {
      std::memcpy(to, reinterpret_cast<char*>(&bits) + 4 - size(), size());
      return;
    }
    const int exponent = static_cast<int>(bits >> 23 & 255) - 112;  // normal in fp16, or zero
    const bool zero = (bits & 0x7FFFFFFFu) == 0;
    const uint16_t half = bits == kNaN ? 0x7E00
                          : zero       ? 0
                                       : (bits >> 16 & 0x8000) | exponent << 10 | (bits >> 13 & 1023);
    std::memcpy(to, &half, 2);
  }

  Dtype type_ = Dtype::kFloat32;
  std::vector<char> bytes_;
};

std::vector<int32_t> make_route(const std::vector<int32_t>& ids, int64_t slots) {
  const int64_t M = ids.size();
  std::vector<int32_t> route(route_size(M, slots)), order;
  int32_t* tile = route.data() + kRouteHeader + 2 * M;
  const int32_t end = static_cast<int32_t>(slots);
  for (int32_t slot = 0; slot <= end; ++slot) {
    int32_t rows = 0;
    for (int32_t row = 0; row < M; ++row) {
      if (ids[row] != (slot == end ? -1 : slot)) continue;
      if (slot < end && rows % kTile == 0) {
        tile = route.data() + kRouteHeader + 2 * M + route[kTilesUsed]++ * kTileFields;
        tile[kTileAdapter] = slot;
        tile[kTileFirst] = static_cast<int32_t>(order.size());
      }
      if (slot < end) ++tile[kTileRows], ++route[kRowsRouted], ++rows;
      order.push_back(row);
    }
  }
  route[kRouteRows] = static_cast<int32_t>(M);
  route[kRouteAdapters] = end;
  std::copy(ids.begin(), ids.end(), route.begin() + kRouteHeader);
  std::copy(order.begin(), order.end(), route.begin() + kRouteHeader + M);
  return route;
}

struct Sizes {
  int64_t M, K, N;
  Dtype type, pages;
};

constexpr int64_t kSlices = 2, kPages = 96, kT = 5;
const int64_t kRanks[] = {1, 3, 8, 9, 17, 0, 40, 4};  // of the slots, in the first slice; the second has them reversed
constexpr int64_t kSlots = sizeof kRanks / sizeof kRanks[0];

// A pool, x and y; run() gives y for some rows of x.
struct Bench {
  explicit Bench(const Sizes& s) : sizes(s), x(s.type, s.M * s.K), pages_in(s.pages, kPages * kPageRows * s.K) {
    x.randomize(0, s.M * s.K);
    for (int64_t g = 0; g < kSlices; ++g) {
      y[g] = Matrix(s.type, s.M * columns(g));
      y[g].randomize(0, s.M * columns(g));
      pages_out[g] = Matrix(s.pages, kPages * kPageRows * columns(g));
      fill_table(g);
      for (int64_t slot = 0; slot < kSlots; ++slot) scaling[g][slot] = slot % 2 ? 0.5f : -1.25f;
    }
    fill_down_bias();
    for (int64_t i = 0; i < s.M; ++i) ids.push_back(static_cast<int32_t>(random_bits() % (kSlots + 1)) - 1);
  }

  int64_t columns(int64_t g) const { return sizes.N + 3 * g; }
  int64_t rank(int64_t g, int64_t slot) const { return kRanks[g ? kSlots - 1 - slot : slot]; }

  // Pages in a scattered order, each used once per factor; what is past a rank stays NaN.
  void fill_table(int64_t g) {
    table[g].assign(kSlots * (kTablePages + 2 * kT), -7);
    int32_t next = static_cast<int32_t>(g);
    for (int64_t slot = 0; slot < kSlots; ++slot) {
      int32_t* row = table[g].data() + slot * (kTablePages + 2 * kT);
      row[kTableRank] = static_cast<int32_t>(rank(g, slot));
      for (int64_t r = 0; r < row[kTableRank]; ++r) {
        const int64_t q = kTablePages + r / kPageRows;
        if (r % kPageRows == 0) {
          row[q] = next = (next + 38) % kPages;
          row[q + kT] = (next + 50) % kPages;
        }
        pages_in.randomize((row[q] * kPageRows + r % kPageRows) * sizes.K, sizes.K);
        pages_out[g].randomize((row[q + kT] * kPageRows + r % kPageRows) * columns(g), columns(g));
      }
      row[kTableBias] = slot % 3 ? -1 : static_cast<int32_t>(slot * kPageRows + 7);
      row[kTableGain] = slot % 2 ? -1 : static_cast<int32_t>(slot * kPageRows + 6);
      row[kTableActivation] = static_cast<int32_t>(slot % 3 ? slot % kActivations : kIdentity);
      for (const int32_t other : {row[kTableBias], row[kTableGain]}) {
        if (other >= 0) pages_out[g].randomize(other * columns(g), columns(g));
      }
    }
  }

  // Of the second slice alone; past a rank, NaN.
  void fill_down_bias() {
    down_bias.assign(kSlots * kT * kPageRows, NAN);
    for (int64_t slot = 0; slot < kSlots; ++slot) {
      for (int64_t r = 0; r < rank(1, slot); ++r) down_bias[slot * kT * kPageRows + r] = slot % 4 ? random_value() : 0;
    }
  }

  // y of the rows `chosen`, in that order; the work is cut into ranges of `step` units; parts as given, or as chosen.
  std::vector<Matrix> run(const std::vector<int64_t>& chosen, int64_t step, int64_t parts = 0) {
    const int64_t M = chosen.size();
    std::vector<int32_t> chosen_ids;
    Matrix rows(sizes.type, M * sizes.K);
    std::vector<Matrix> out;
    Slice slices[kSlices];
    for (int64_t g = 0; g < kSlices; ++g) out.emplace_back(sizes.type, M * columns(g));
    for (int64_t i = 0; i < M; ++i) {
      chosen_ids.push_back(ids[chosen[i]]);
      copy_row(rows, i, x, chosen[i], sizes.K);
      for (int64_t g = 0; g < kSlices; ++g) copy_row(out[g], i, y[g], chosen[i], columns(g));
    }
    for (int64_t g = 0; g < kSlices; ++g) {
      slices[g] = {columns(g), pages_out[g].data(),           kPages, out[g].data(), columns(g), table[g].data(), kT,
                   scaling[g], g ? down_bias.data() : nullptr};
    }
    const std::vector<int32_t> route = make_route(chosen_ids, kSlots);
    Problem p{M, sizes.K, kSlices, kSlots, slices, rows.data(), sizes.K, pages_in.data(), kPages, route.data()};
    Work work;
    const std::string wrong = make_work(p, parts, work);
    expect(wrong.empty(), wrong);
    std::vector<float> h(work.h_floats, NAN);
    p.use(work, h.data());
    const Kernels& k = *kernels(sizes.type, sizes.pages);
    const auto phase = [&](Phase run_units, int64_t units) {
      for (int64_t unit = 0; unit < units; unit += step) run_units(p, unit, std::min(units, unit + step));
    };
    phase(k.shrink, work.shrink_units);
    phase(k.sum, p.pieces);
    phase(k.activate, p.pieces);
    phase(k.expand, work.expand_units);
    return out;
  }

  static void copy_row(Matrix& to, int64_t i, Matrix& from, int64_t j, int64_t cols) {
    const int64_t bytes = cols * from.size();
    std::memcpy(static_cast<char*>(to.data()) + i * bytes, static_cast<char*>(from.data()) + j * bytes, bytes);
  }

  // One row of y by the formula, and the size of the terms behind each element.
  void expected(int64_t g, int64_t row, std::vector<double>& want, std::vector<double>& size) const {
    const int64_t N = columns(g);
    want.clear();
    for (int64_t n = 0; n < N; ++n) want.push_back(y[g].at(row * N + n));
    size.assign(N, 0);
    if (ids[row] < 0 || rank(g, ids[row]) == 0) return;
    const int32_t* entry = table[g].data() + ids[row] * (kTablePages + 2 * kT);
    const double s = scaling[g][ids[row]];
    for (int64_t r = 0; r < entry[kTableRank]; ++r) {
      const int64_t q = kTablePages + r / kPageRows, within = r % kPageRows;
      double h = 0, h_size = 0;
      for (int64_t k = 0; k < sizes.K; ++k) {
        const double term = x.at(row * sizes.K + k) * pages_in.at((entry[q] * kPageRows + within) * sizes.K + k);
        h += term;
        h_size += std::fabs(term);
      }
      if (g) h += down_bias[ids[row] * kT * kPageRows + r];
      h = activated(entry[kTableActivation], h);
      for (int64_t n = 0; n < N; ++n) {
        const double b = s * pages_out[g].at((entry[q + kT] * kPageRows + within) * N + n);
        want[n] += h * b;
        size[n] += (h_size + 1) * std::fabs(b);
      }
    }
    for (int64_t n = 0; entry[kTableGain] >= 0 && n < N; ++n) {
      const double gain = 1 + pages_out[g].at(entry[kTableGain] * N + n);
      want[n] *= gain;
      size[n] = (size[n] + 1) * (1 + std::fabs(gain));
    }
    for (int64_t n = 0; entry[kTableBias] >= 0 && n < N; ++n) {
      want[n] += s * pages_out[g].at(entry[kTableBias] * N + n);
      size[n] += 2;
    }
  }

  Sizes sizes;
  Matrix x, pages_in, pages_out[kSlices], y[kSlices];
  std::vector<int32_t> table[kSlices], ids;
  std::vector<float> down_bias;
  float scaling[kSlices][kSlots];
};

void test_sizes(const Sizes& s) {
  static const char* const types[] = {"fp32", "fp16", "bf16"};
  char name[96];
  std::snprintf(name, sizeof name, "M=%d K=%d N=%d %s/%s: ", int(s.M), int(s.K), int(s.N), types[int(s.type)],
                types[int(s.pages)]);
  Bench b(s);
  std::vector<int64_t> all, backwards;
  for (int64_t i = 0; i < s.M; ++i) all.push_back(i), backwards.insert(backwards.begin(), i);
  const std::vector<Matrix> got = b.run(all, 1 << 30);
  const double epsilon = s.type == Dtype::kFloat32 ? 1e-6 : s.type == Dtype::kFloat16 ? 1e-3 : 8e-3;
  for (int64_t g = 0; g < kSlices; ++g) {
    for (int64_t row = 0; row < s.M; ++row) {
      std::vector<double> want, size;
      b.expected(g, row, want, size);
      for (int64_t n = 0; n < b.columns(g); ++n) {
        const double error = std::fabs(got[g].at(row * b.columns(g) + n) - want[n]);
        if (!(error <= epsilon * std::fabs(want[n]) + 1e-5 * size[n])) {
          return expect(false, std::string(name) + "wrong y");
        }
      }
    }
  }
  const auto same = [&](const std::vector<Matrix>& other, int64_t row, int64_t other_row, const char* what) {
    for (int64_t g = 0; g < kSlices; ++g) {
      expect(other[g].row_equals(got[g], other_row, row, b.columns(g)), std::string(name) + what);
    }
  };
  for (int64_t parts : {int64_t{1}, ceil_div(s.K, kChunk)}) {
    const std::vector<Matrix> cut = b.run(all, 1, parts), reversed = b.run(backwards, 3, parts);
    for (int64_t row = 0; row < s.M; ++row) {
      same(cut, row, row, "other bits for other units");
      same(reversed, row, s.M - 1 - row, "other bits in another order");
      same(b.run({row}, 2, parts), row, 0, "other bits alone");
    }
  }
}

void test_kernels() {
  using D = Dtype;
  const std::pair<D, D> pairs[] = {{D::kFloat32, D::kFloat32},
                                   {D::kFloat16, D::kFloat16},
                                   {D::kBFloat16, D::kBFloat16},
                                   {D::kFloat16, D::kFloat32},
                                   {D::kBFloat16, D::kFloat32}};
  for (const auto& [type, pages] : pairs) {
    for (const auto& [M, K, N] : {std::array<int64_t, 3>{1, 1, 1},
                                  {9, 70, 33},
                                  {40, 31, 7},
                                  {200, 64, 40},
                                  {7, 512, 515},
                                  {33, 1300, 600},
                                  {64, 24, 4300}}) {
      test_sizes({M, K, N, type, pages});
    }
  }
}

// One wrong number at a time.
void test_refusals() {
  Bench b({20, 8, 8, Dtype::kFloat32, Dtype::kFloat32});
  b.ids.assign(20, 6);
  Slice slice = {8, b.pages_out[0].data(), kPages, b.y[0].data(), 8, b.table[0].data(), kT, b.scaling[0]};
  std::vector<int32_t> route = make_route(b.ids, kSlots);
  Problem p{20, 8, 1, kSlots, &slice, b.x.data(), 8, b.pages_in.data(), kPages, route.data()};
  int32_t* order = route.data() + kRouteHeader + 20;
  int32_t* row = b.table[0].data() + 6 * (kTablePages + 2 * kT);
  Work work;
  expect(make_work(p, 0, work).empty(), "a good problem refused");
  const auto refused = [&](int32_t& number, int32_t value, const char* words) {
    const int32_t before = number;
    number = value;
    const std::string text = make_work(p, 0, work);
    expect(text.find(words) != std::string::npos, std::string("not refused with '") + words + "': " + text);
    number = before;
  };
  refused(route[kRouteRows], 19, "route must be made for 20 rows");
  refused(route[kRouteAdapters], 9, "route must be made for 20 rows and 8 adapters, got 20 and 9");
  for (int32_t tiles : {-1, 10}) refused(route[kTilesUsed], tiles, "route must use 0 to 9 tiles");
  for (int32_t value : {-1, 20, order[1]}) refused(order[0], value, "twice or out of range");
  for (int32_t value : {-1, 8}) refused(order[20 + kTileAdapter], value, "outside its rows or adapters");
  for (int32_t value : {-1, 5}) refused(order[20 + kTileFirst], value, "outside its rows or adapters");
  for (int32_t value : {0, 17}) refused(order[20 + kTileRows], value, "outside its rows or adapters");
  for (int32_t value : {-1, 41}) refused(row[kTableRank], value, "table[0] must have ranks from 0 to 40");
  for (int32_t value : {-2, 768}) refused(row[kTableBias], value, "table[0] must have bias rows from -1 to 767");
  for (int32_t value : {-2, 768}) refused(row[kTableGain], value, "table[0] must have gain rows from -1 to 767");
  for (int32_t value : {-1, 8}) refused(row[kTableActivation], value, "table[0] must have activations from 0 to 7");
  for (int32_t value : {-1, 96}) {
    refused(row[kTablePages + 4], value, "table[0] must name pages from 0 to 95 of pages_in");
    refused(row[kTablePages + kT], value, "table[0] must name pages from 0 to 95 of pages_out");
  }
}

}  // namespace

int main() {
  for (const char* set : {"default", "avx2", "avx512", "avx512_bf16"}) {
    if (!use_instruction_set(set)) {
      std::printf("%s: not available here\n", set);
      continue;
    }
    test_kernels();
    std::printf("%s: done\n", set);
  }
  test_refusals();
  return failures ? 1 : 0;
}
