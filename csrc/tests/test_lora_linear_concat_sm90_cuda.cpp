// concat_operands and concat_gemm of lora_linear against loops in double, in the emulator and, by the same program, on
// a GPU of sm_90: both directions, ragged sizes, several members and adapters, several tiles a block, tiles of both
// widths, single blocks and clusters of two, masks, biases, NaNs that stay in their row. All sums are exact in fp32, so
// that a result is the nearest of its dtype: what needs a second bf16 part, of low at even ranks and of the factor at
// odd ones, meets what needs one. Where they are not exact, all tiles must give the same bits.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "lora_linear/lora_linear_cuda.h"
#include "tests/device_array.h"
#include "tests/typed_values.h"

#ifdef EMULATOR_BUILD
#include "emulator/emulator.h"
#endif

using namespace pk;
using namespace pk::lora_linear;
using pk::test::Array;
using pk::test::bytes_of;
using pk::test::exact_value;
using pk::test::ran;
using pk::test::read;
using pk::test::write;

namespace {

struct Types {
  Dtype x, factors;
};
constexpr Types kTypes[] = {
    {Dtype::kBFloat16, Dtype::kBFloat16}, {Dtype::kFloat16, Dtype::kFloat16}, {Dtype::kBFloat16, Dtype::kFloat32}};
constexpr int kStream = 3;
constexpr float kScaling[] = {0.5f, -1.5f};  // of even and odd adapters
int failures = 0, compared = 0, launches = 0;

void expect(bool holds, const std::string& what) {
  if (holds) return;
  ++failures;
  printf("FAILED %s: %s\n", test::kWhere, what.c_str());
}

// Every launch under another order of threads and blocks, and another timing of copies.
void next_schedule() {
#ifdef EMULATOR_BUILD
  constexpr emulator::Copies kCopies[] = {emulator::Copies::kLate, emulator::Copies::kEarly, emulator::Copies::kRandom};
  emulator::set_schedule({static_cast<uint64_t>(launches), kCopies[launches % 3]});
#endif
  ++launches;
}

// Rows `gap` elements apart; NaN between the rows, and everywhere at first.
struct Matrix {
  int64_t rows, cols, stride;
  Dtype type;
  Array<char> memory;

  Matrix(Dtype type, int64_t rows, int64_t cols, int64_t gap = 0)
      : rows(rows), cols(cols), stride(cols + gap), type(type), memory(size()) {
    memset(memory.host(), 0xFF, size());
  }
  void set(int64_t i, int64_t j, double value) { write(memory.host(), type, i * stride + j, value); }
  void* data() const { return memory.data(); }
  Matrix& fill(int64_t first, bool exact = true) {
    for (int64_t i = 0; i < rows * cols; ++i) {
      set(i / cols, i % cols, exact ? exact_value(first + i) : std::sin(static_cast<double>(first + i)));
    }
    return *this;
  }
  std::vector<double> values() {
    const char* const from = memory.host();
    std::vector<double> all(rows * cols);
    for (int64_t i = 0; i < rows * cols; ++i) all[i] = read(from, type, i / cols * stride + i % cols);
    return all;
  }

 private:
  size_t size() const { return static_cast<size_t>(rows * stride * bytes_of(type)); }
};
using Matrices = std::vector<std::unique_ptr<Matrix>>;

struct Case {
  int64_t I, J;
  std::vector<int64_t> columns;  // of the members
  std::vector<int> ranks;
  int blocks = 2;
  double p = 0;  // across: of the one adapter
  int gap = 0;   // between rows of left and right; a multiple of 8
  bool biased = false, accumulate = false;
  bool exact = true;  // or else nothing is compared
};

struct Tiles {
  int cluster, width;  // of ConcatGemm
};
constexpr Tiles kTiles[] = {{1, 128}, {1, 256}, {2, 128}, {2, 256}};

class Problem {
 public:
  Problem(const Case& c, const Types& types, bool across, const Tiles& tiles)
      : c_(c), types_(types), across_(across), out_(types.x, c.I, c.J), bias_(types.x, 1, c.J), seed_(1) {
    seed_[0] = 0x123456789ABCDEFull + c.J;
    if (c.accumulate) out_.fill(9);
    bias_.fill(5);
    add_members();
    add_adapters();
    gemm_.out = out_.data();
    gemm_.I = c.I;
    gemm_.J = c.J;
    gemm_.across = across;
    gemm_.accumulate = c.accumulate;
    gemm_.seed = seed_.data();
    gemm_.blocks = std::max(c.blocks, tiles.cluster);
    gemm_.cluster = tiles.cluster;
    gemm_.width = tiles.width;
    gemm_.keep = make_keep(c.p, kStream);
  }

  Problem& run() {
    const std::vector<double> before = out_.values();
    const int64_t P = concat_columns(types_.factors, operands_.adapters), stride = concat_stride(P);
    Matrix left(Dtype::kBFloat16, c_.I, stride), biases(Dtype::kFloat32, 1, c_.J);
    Matrix right(Dtype::kBFloat16, across_ ? P : c_.J, across_ ? c_.J : stride);
    operands_.left = left.data();
    operands_.right = right.data();
    operands_.biases = c_.biased ? static_cast<float*>(biases.data()) : nullptr;
    gemm_.biases = operands_.biases;
    gemm_.adapters = {left.data(), right.data(), stride, across_ ? c_.J : stride, P};
    expect(has_concat_gemm(types_.x, gemm_), name() + "has no kernel");
    next_schedule();
    expect(ran([&] {
             const cudaError_t error = concat_operands(types_.x, types_.factors, operands_, nullptr);
             return error == cudaSuccess ? concat_gemm(types_.x, gemm_, nullptr) : error;
           }),
           name() + "launch");
    if (c_.exact) compare(before);
    return *this;
  }
  std::vector<double> out() { return out_.values(); }

 private:
  void add_members() {
    for (size_t g = 0; g < c_.columns.size(); ++g) {
      const int64_t columns = c_.columns[g];
      left_.push_back(std::make_unique<Matrix>(types_.x, c_.I, columns, c_.gap));
      right_.push_back(std::make_unique<Matrix>(types_.x, across_ ? columns : c_.J, across_ ? c_.J : columns, c_.gap));
      left_[g]->fill(1 + 11 * g, c_.exact);
      right_[g]->fill(3 + 17 * g, c_.exact);
      gemm_.member[gemm_.members++] = {left_[g]->data(), right_[g]->data(), left_[g]->stride, right_[g]->stride,
                                       columns};
    }
    left_[0]->set(c_.I / 2, 0, NAN);
  }

  // Columns of low before, between and behind the adapters' belong to no one.
  void add_adapters() {
    int64_t R = 1;
    for (const int rank : c_.ranks) R += rank + 1;
    low_ = std::make_unique<Matrix>(Dtype::kFloat32, c_.I, R);
    Adapters& adapters = operands_.adapters;
    int rank0 = 1;
    for (const int rank : c_.ranks) {
      const int l = adapters.count++;
      factors_.push_back(std::make_unique<Matrix>(types_.factors, across_ ? rank : c_.J, across_ ? c_.J : rank));
      adapter_bias_.push_back(std::make_unique<Matrix>(types_.factors, 1, c_.J));
      adapter_bias_[l]->fill(13 * l);
      adapters.at[l] = {factors_[l]->data(),
                        c_.biased && l % 2 == 0 ? adapter_bias_[l]->data() : nullptr,
                        rank,
                        rank0,
                        0,
                        kScaling[l % 2],
                        {}};
      for (int r = 0; r < rank; ++r) fill_rank(l, r, rank0 + r);
      rank0 += rank + 1;
    }
    if (!c_.ranks.empty()) low_->set(c_.I - 1, 1, NAN);
    operands_.low = static_cast<const float*>(low_->data());
    operands_.I = c_.I;
    operands_.J = c_.J;
    operands_.R = R;
    operands_.across = across_;
    operands_.bias = bias_.data();
  }
  void fill_rank(int l, int r, int64_t column) {
    const bool wide_factor = r % 2 && types_.factors != Dtype::kBFloat16;
    for (int64_t i = 0; i < c_.I; ++i) {
      low_->set(i, column, exact_value(i + 7 * r) / 4 + (wide_factor ? 0 : exact_value(3 * i + r) / 128));
    }
    for (int64_t j = 0; j < c_.J; ++j) {
      const double value = exact_value(5 * j + r) / 4 + (wide_factor ? exact_value(j + 2 * r) / 128 : 0);
      factors_[l]->set(across_ ? r : j, across_ ? j : r, value);
    }
  }

  void compare(const std::vector<double>& before) {
    std::vector<double> want(c_.I * c_.J);
    for (size_t l = 0; l < c_.ranks.size(); ++l) {
      const CudaAdapter& adapter = operands_.adapters.at[l];
      add_product(want, low_->values(), operands_.R, adapter.rank0, adapter.R, factors_[l]->values());
    }
    if (c_.p > 0) mask(want);
    for (size_t g = 0; g < c_.columns.size(); ++g) {
      add_product(want, left_[g]->values(), c_.columns[g], 0, c_.columns[g], right_[g]->values());
    }
    const std::vector<double> got = out_.values(), bias = bias_.values();
    int wrong = 0;
    for (int64_t i = 0; i < c_.I * c_.J; ++i) {
      if (c_.accumulate) want[i] += before[i];
      if (c_.biased) want[i] += bias[i % c_.J];
      for (size_t l = 0; c_.biased && l < c_.ranks.size(); l += 2) {
        want[i] += kScaling[0] * read(adapter_bias_[l]->memory.host(), types_.factors, i % c_.J);
      }
      if (!is_nearest(got[i], want[i]) && wrong++ == 0) {
        printf("(%d, %d) = %.9g, not %.9g\n", int(i / c_.J), int(i % c_.J), got[i], want[i]);
      }
      ++compared;
    }
    expect(wrong == 0, name() + std::to_string(wrong) + " wrong");
  }

  // to [I, J] += left [I, first ... first + columns of stride] right.
  void add_product(std::vector<double>& to, const std::vector<double>& left, int64_t stride, int64_t first,
                   int64_t columns, const std::vector<double>& right) const {
    for (int64_t i = 0; i < c_.I; ++i) {
      for (int64_t k = 0; k < columns; ++k) {
        const double value = left[i * stride + first + k];
        for (int64_t j = 0; j < c_.J; ++j) to[i * c_.J + j] += value * right[across_ ? k * c_.J + j : j * columns + k];
      }
    }
  }
  void mask(std::vector<double>& sums) {
    const Dropout dropout = make_dropout(c_.p, seed_[0], kStream);
    for (int64_t i = 0; i < c_.I * c_.J; ++i) {
      const bool keeps = kept(dropout, static_cast<uint32_t>(i / c_.J), static_cast<uint32_t>(i % c_.J));
      sums[i] = keeps ? sums[i] * dropout.scale : 0;
    }
  }
  bool is_nearest(double got, double want) const {
    if (std::isnan(want)) return std::isnan(got);
    if (want == 0) return got == 0;
    const int digits = types_.x == Dtype::kBFloat16 ? 8 : 11;
    return std::fabs(got - want) <= std::ldexp(0.5, std::ilogb(want) - digits + 1);
  }
  std::string name() const {
    char text[160];
    snprintf(text, sizeof text,
             "%s I=%d J=%d C=%d G=%d L=%d blocks=%d/%d width=%d p=%g types %d/%d: ", across_ ? "dx" : "y", int(c_.I),
             int(c_.J), int(c_.columns[0]), int(c_.columns.size()), int(c_.ranks.size()), gemm_.blocks, gemm_.cluster,
             gemm_.width, c_.p, int(types_.x), int(types_.factors));
    return text;
  }

  const Case& c_;
  const Types types_;
  const bool across_;
  Matrix out_, bias_;
  Array<uint64_t> seed_;
  Matrices left_, right_, factors_, adapter_bias_;
  std::unique_ptr<Matrix> low_;
  ConcatOperands operands_{};
  ConcatGemm gemm_{};
};

void forward_is_right(const Tiles& tiles) {
  const Case cases[] = {
      {136, 264, {72}, {8}, 2, 0, 8, true},            // ragged everywhere, several tiles a block
      {136, 248, {200}, {16, 3}, 1, 0, 0, true},       // one block; the ring goes round more than once
      {128, 8, {8}, {1}, 2},                           // less than a stage, one tile: the second block has none
      {130, 16, {64}, {128}},                          // adapters of several stages
      {140, 40, {16}, {1, 8, 64, 5}, 2, 0, 16, true},  // of several kinds
  };
  for (const Types& types : kTypes) {
    for (const Case& c : cases) Problem(c, types, false, tiles).run();
  }
  Problem({2184, 24, {8}, {2}, 5}, kTypes[0], false, tiles).run();  // tiles in two groups, one of them not whole
  Problem({2048, 16, {8}, {1}, 5}, kTypes[0], false, tiles).run();
}

void backward_is_right(const Tiles& tiles) {
  const Case cases[] = {
      {136, 264, {72, 16, 136}, {8, 5}, 2, 0, 8},  // three members
      {264, 248, {40}, {16}, 1, 0.5},              // three rows; masks made behind a tile of few stages
      {392, 136, {200, 104}, {3}, 2, 0.75},        // masks made meanwhile
      {130, 72, {24}, {}, 2, 0, 0, false, true},   // onto what is there, without adapters
      {128, 128, {64}, {64}, 1, 0, 0, false, true},
  };
  for (const Types& types : kTypes) {
    for (const Case& c : cases) Problem(c, types, true, tiles).run();
  }
}

void pairs_of_blocks_are_right() {
  const Tiles chosen = {0, 0}, pairs = {2, 0};
  Problem({520, 264, {72, 328}, {5}, 5, 0.5}, kTypes[0], true, pairs).run();  // two clusters, nine tiles
  Problem({520, 264, {392}, {16, 3}, 5}, kTypes[1], false, pairs).run();
  Problem({300, 8, {72}, {3}, 4}, kTypes[0], false, chosen).run();
}

// The members' sums are inexact: their order shows.
void all_tiles_give_the_same_bits() {
#ifdef EMULATOR_BUILD
  const Case c{264, 264, {136, 72}, {5}, 2, 0, 0, false, false, false};
#else
  const Case c{1032, 1032, {4104, 1032}, {5}, 132, 0, 0, false, false, false};
#endif
  for (const bool across : {false, true}) {
    const std::vector<double> first = Problem(c, kTypes[1], across, kTiles[0]).run().out();
    for (const Tiles& tiles : kTiles) {
      const std::vector<double> out = Problem(c, kTypes[1], across, tiles).run().out();
      expect(memcmp(out.data(), first.data(), out.size() * sizeof(double)) == 0, across ? "bits, dx" : "bits, y");
    }
  }
}

void tiles_are_chosen_by_turns() {
  ConcatGemm call{};
  const auto chosen = [&](int64_t I, int64_t J, int blocks) {
    call.I = I;
    call.J = J;
    call.blocks = blocks;
    return std::pair(concat_cluster(call), concat_width(call));
  };
  expect(chosen(8192, 4096, 132) == std::pair(2, 256), "1024 wide tiles on 132 blocks");
  expect(chosen(128, 4096, 132) == std::pair(1, 128), "one row of tiles");
  expect(chosen(129, 4096, 132) == std::pair(2, 128), "two rows of tiles");
  expect(chosen(384, 44 * 128, 132) == std::pair(1, 128), "132 narrow tiles in three rows");
  expect(chosen(8192, 4096, 1) == std::pair(1, 256), "one block");
  expect(chosen(128, 1152, 1).second == 128, "nine narrow tiles or five wide ones");
  expect(chosen(128, 1280, 1).second == 256, "ten narrow tiles or five wide ones");
}

void limits_are_as_said() {
  alignas(16) char memory[16];  // never read
  ConcatGemm call{};
  call.out = memory;
  call.I = 128;
  call.J = 8;
  call.members = 1;
  call.blocks = 1;
  call.member[0] = {memory, memory, 16, 16, 16};
  const auto refuses = [&](const char* what, auto change) {
    ConcatGemm changed = call;
    change(changed);
    expect(!has_concat_gemm(Dtype::kBFloat16, changed), what);
    expect(concat_gemm(Dtype::kBFloat16, changed, nullptr) != cudaSuccess, what);
  };
  expect(has_concat_gemm(Dtype::kBFloat16, call), "smallest case");
  expect(!has_concat_gemm(Dtype::kFloat32, call), "fp32");
  refuses("127 rows", [](ConcatGemm& c) { c.I = 127; });
  refuses("J=12", [](ConcatGemm& c) { c.J = 12; });
  refuses("no member", [](ConcatGemm& c) { c.members = 0; });
  refuses("five members", [](ConcatGemm& c) { c.members = 5; });
  refuses("two blocks of one", [](ConcatGemm& c) { c.cluster = 2; });
  refuses("a cluster of three", [](ConcatGemm& c) { c.blocks = c.cluster = 3; });
  refuses("192 columns", [](ConcatGemm& c) { c.width = 192; });
  refuses("stride 20", [](ConcatGemm& c) { c.member[0].left_stride = 20; });
  refuses("rows in one place", [](ConcatGemm& c) { c.member[0].left_stride = 0; });
  refuses("unaligned", [](ConcatGemm& c) { c.member[0].right = static_cast<const char*>(c.member[0].right) + 8; });
  call.keep = make_keep(0.5, 0);
  expect(concat_gemm(Dtype::kBFloat16, call, nullptr) != cudaSuccess, "a mask on y");
  Adapters adapters;
  adapters.count = 2;
  adapters.at[0].R = 3;
  adapters.at[1].R = 16;
  expect(concat_columns(Dtype::kBFloat16, adapters) == 38 && concat_columns(Dtype::kFloat32, adapters) == 57,
         "columns");
}

}  // namespace

int main() {
  limits_are_as_said();
  tiles_are_chosen_by_turns();
  if (!test::sm90_present()) {
    printf("gpu: 0 kernels of lora_linear for sm_90 run: no such device\n");
    return failures != 0 ? 1 : test::kSkipped;
  }
  constexpr int kRounds = 3;
  for (int round = 0; round < kRounds; ++round) {
    for (const Tiles& tiles : kTiles) {
      forward_is_right(tiles);
      backward_is_right(tiles);
    }
    pairs_of_blocks_are_right();
  }
  expect(launches / kRounds % 3 != 0, "every problem meets every timing of copies");
  all_tiles_give_the_same_bits();
  printf("%s: %d launches, %d elements compared, %d failures\n", test::kWhere, launches, compared, failures);
  return failures != 0;
}
