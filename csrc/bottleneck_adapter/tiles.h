// What the units of bottleneck_adapter share: numbers of a type known at run time as rows of fp32, and tiles of x, dy
// and their like of up to kRows rows and kColumns columns, rows kPitch apart. A row has room for whole vectors.
#pragma once

#include "bottleneck_adapter/bottleneck_adapter.h"
#include "common/activation_vec.h"
#include "common/dropout_mask.h"
#include "common/products.h"

namespace pk::PK_ISA {

using namespace bottleneck_adapter;

struct Tile {
  alignas(64) float at[kRows][kPitch];
};
struct WideTile {
  alignas(64) float at[kRows][kWidePitch];
};

// c[i][j] += sum_n p[n * ldn + i * ldi] v[n * ldv + j], all in fp32.
PK_INLINE void product(float* c, int64_t ldc, int64_t rows, int64_t cols, const float* p, int64_t ldn, int64_t ldi,
                       const float* v, int64_t ldv, int64_t n) {
  outer<false, kTallest>(c, ldc, rows, cols, p, ldn, ldi, v, ldv, n);
}

// f(a number of the type)
template <class F>
PK_INLINE void with_type(Dtype type, const F& f) {
  if (type == Dtype::kFloat16) return f(fp16{});
  if (type == Dtype::kBFloat16) return f(bf16{});
  f(float{});
}

PK_INLINE void fill(float* row, int64_t count, float value) {
  for (int64_t j = 0; j < count; j += kLanes) store(row + j, vf{} + value);
}

// to[0 ... count) = from[at ... at + count)
static void widen_row(float* to, Dtype type, const void* from, int64_t at, int64_t count) {
  with_type(type, [&](auto number) {
    const auto* row = static_cast<const decltype(number)*>(from) + at;
    for (int64_t j = 0; j < count; j += kLanes) store(to + j, load_n(row + j, count - j));
  });
}

// The other way: exactly `count` numbers are written.
static void narrow_row(void* to, Dtype type, int64_t at, const float* from, int64_t count) {
  with_type(type, [&](auto number) {
    auto* row = static_cast<decltype(number)*>(to) + at;
    for (int64_t j = 0; j < count; j += kLanes) store_n(row + j, load(from + j), count - j);
  });
}

// One number of the factors' type.
PK_INLINE float number_at(const Problem& p, const void* from, int64_t at) {
  float lanes[kLanes];
  widen_row(lanes, p.factors, from, at, 1);
  return lanes[0];
}

PK_INLINE float sum_of_lanes(vf v) {
  float lanes[kLanes], sum = 0;
  store(lanes, v);
  for (int i = 0; i < kLanes; ++i) sum += lanes[i];
  return sum;
}

// The lanes of v that count, the others 0: rows of a tile end in undefined numbers.
PK_INLINE vf first_of(vf v, int64_t count) {
  return count >= kLanes ? v : keep(v, (1u << count) - 1);
}

// -- the norm ---------------------------------------------------------------------------------------------------------

struct Statistics {
  float mean, reciprocal;
};

// Mean and reciprocal deviation of a row of x; the deviation is that of the centred row.
static Statistics statistics_of(const Problem& p, int64_t m) {
  float row[kPitch];
  float mean = 0;
  const auto each = [&](auto add) __attribute__((always_inline)) {
    vf sum{};
    for (int64_t k = 0; k < p.K; k += kColumns) {
      const int64_t cols = min(p.K - k, kColumns);
      widen_row(row, p.type, p.x, m * p.x_stride + k, cols);
      for (int64_t j = 0; j < cols; j += kLanes) sum += first_of(add(load(row + j)), cols - j);
    }
    return sum_of_lanes(sum) / static_cast<float>(p.K);
  };
  if (p.norm == Norm::kLayer) mean = each([](vf v) { return v; });
  const float square = each([&](vf v) { return (v - mean) * (v - mean); });
  return {mean, static_cast<float>(1 / __builtin_sqrt(static_cast<double>(square) + p.eps))};
}

PK_INLINE Statistics statistics_at(const Problem& p, int64_t m) {
  return {p.statistics[2 * m], p.statistics[2 * m + 1]};
}

// A row of n(x), columns k0 ... k0 + cols, without the norm's weight and bias if `plain`.
PK_INLINE void normalise(const Problem& p, float* row, Statistics s, int64_t k0, int64_t cols, bool plain) {
  float weight[kPitch], bias[kPitch];
  const bool weighted = !plain && p.norm_weight, biased = !plain && p.norm_bias;
  if (weighted) widen_row(weight, p.factors, p.norm_weight, k0, cols);
  if (biased) widen_row(bias, p.factors, p.norm_bias, k0, cols);
  for (int64_t j = 0; j < cols; j += kLanes) {
    vf v = (load(row + j) - s.mean) * s.reciprocal;
    if (weighted) v *= load(weight + j);
    if (biased) v += load(bias + j);
    store(row + j, v);
  }
}

// -- tiles ------------------------------------------------------------------------------------------------------------

static void widen_tile(Tile& tile, Dtype type, const void* from, int64_t stride, int64_t row0, int64_t rows,
                       int64_t col0, int64_t cols) {
  for (int64_t i = 0; i < rows; ++i) widen_row(tile.at[i], type, from, (row0 + i) * stride + col0, cols);
}

// What is one number in s.
PK_INLINE float factor_of_scale(const Problem& p) {
  const float scaling = static_cast<float>(p.scaling);
  return p.scales == 1 ? scaling * number_at(p, p.scale, 0) : scaling;
}

// s of the columns n0 ... n0 + cols.
PK_INLINE void scale_row(const Problem& p, float* row, int64_t n0, int64_t cols) {
  const float scaling = static_cast<float>(p.scaling);
  if (p.scales <= 1) return fill(row, cols, factor_of_scale(p));
  widen_row(row, p.factors, p.scale, n0, cols);
  for (int64_t j = 0; j < cols; j += kLanes) store(row + j, load(row + j) * scaling);
}

// row <- drop(row) of columns col0 ... col0 + cols of row m, col0 a multiple of 32. Dropped elements count as 0 even if
// they are NaN.
PK_INLINE void drop_row(const Problem& p, float* row, int64_t m, int64_t col0, int64_t cols) {
  for (int64_t k = 0; k < cols; k += kDotChunk) {
    const int64_t count = min(cols - k, kDotChunk);
    uint32_t words[kMaskWords];
    keep_words(words, p.dropout, m, (col0 + k) / 32, (count + 31) / 32);
    for (int64_t j = 0; j < count; j += kLanes) {
      store(row + k + j, keep(load(row + k + j), words[j / 32] >> (j % 32)) * p.dropout.scale);
    }
  }
}

// d = drop_o(dy), columns n0 ... n0 + cols.
static void load_dy(const Problem& p, Tile& tile, int64_t row0, int64_t rows, int64_t n0, int64_t cols) {
  widen_tile(tile, p.type, p.dy, p.dy_stride, row0, rows, n0, cols);
  if (!p.drops_output || !p.dropout.active()) return;
  for (int64_t i = 0; i < rows; ++i) drop_row(p, tile.at[i], row0 + i, n0, cols);
}

}  // namespace pk::PK_ISA
