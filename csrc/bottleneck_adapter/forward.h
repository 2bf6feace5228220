// Forward units of bottleneck_adapter.
#pragma once

#include "bottleneck_adapter/tiles.h"

namespace pk::PK_ISA {

// to[j][i] = from[i][j] of a factor with `columns` columns, rows row0 ... row0 + rows; by way of tiles, since rows a
// power of two apart share few sets of L1.
static void transpose_rows(const Problem& p, const void* from, int64_t columns, int64_t row0, int64_t rows,
                           int64_t col0, int64_t cols, float* to, int64_t ld) {
  for (int64_t i = 0; i < rows; i += kRows) {
    const int64_t height = min(kRows, rows - i);
    for (int64_t j = 0; j < cols; j += kColumns) {
      const int64_t width = min(kColumns, cols - j);
      Tile tile;
      widen_tile(tile, p.factors, from, columns, row0 + i, height, col0 + j, width);
      transpose(tile.at[0], kPitch, height, width, to + j * ld + i, ld);
    }
  }
}

static void measure(const Problem& p, int64_t begin, int64_t end) {
  for (int64_t m = begin * kRows; m < min(end * kRows, p.M); ++m) {
    const Statistics s = statistics_of(p, m);
    p.statistics[2 * m] = s.mean;
    p.statistics[2 * m + 1] = s.reciprocal;
  }
}

// A^T in fp32, kColumns columns of A a unit.
static void pack(const Problem& p, int64_t begin, int64_t end) {
  const int64_t ld = pitch(p.E);
  for (int64_t k0 = begin * kColumns; k0 < min(end * kColumns, p.K); k0 += kColumns) {
    transpose_rows(p, p.A, p.K, 0, p.E, k0, min(kColumns, p.K - k0), p.packed_A + k0 * ld, ld);
  }
}

// c[i][j] += sum_k x[i][k] w[j][k] for few rows, of which the last three at most are taken eight columns at a time:
// four would wait for each other's sums.
static void few_dots(const Problem& p, float* c, int64_t ldc, int64_t rows, int64_t cols, const float* x, int64_t ldx,
                     const void* factor, int64_t at, int64_t ld, int64_t n) {
  constexpr int kAcross = 8;
  with_type(p.factors, [&](auto number) {
    const auto* w = static_cast<const decltype(number)*>(factor) + at;
    const int64_t tall = rows / 4 * 4, wide = cols / kAcross * kAcross;
    if (tall > 0) dots<false>(c, ldc, tall, cols, x, ldx, w, ld, n, 1.f);
    for (int64_t i = tall; i < rows; ++i) {
      for (int64_t j = 0; j < wide; j += kAcross) {
        float sums[kAcross];
        dots_tile<1, kAcross, false>(x + i * ldx, ldx, w + j * ld, ld, n, nullptr, sums);
        for (int64_t a = 0; a < kAcross; ++a) c[i * ldc + j + a] += sums[a];
      }
    }
    if (tall < rows && wide < cols) {
      dots<false>(c + tall * ldc + wide, ldc, rows - tall, cols - wide, x + tall * ldx, ldx, w + wide * ld, ld, n, 1.f);
    }
  });
}

// The rows' products with A, bottlenecks e0 ... e0 + width, a tile of n(x) at a time.
static void add_down(const Problem& p, WideTile& sums, int64_t row0, int64_t rows, int64_t e0, int64_t width) {
  if (few(p) && p.type == Dtype::kFloat32 && p.norm == Norm::kNone) {
    const float* const x = static_cast<const float*>(p.x) + row0 * p.x_stride;
    return few_dots(p, sums.at[0], kWidePitch, rows, width, x, p.x_stride, p.A, e0 * p.K, p.K, p.K);
  }
  for (int64_t k0 = 0; k0 < p.K; k0 += kColumns) {
    const int64_t cols = min(kColumns, p.K - k0);
    Tile x;
    widen_tile(x, p.type, p.x, p.x_stride, row0, rows, k0, cols);
    for (int64_t i = 0; p.norm != Norm::kNone && i < rows; ++i) {
      normalise(p, x.at[i], statistics_at(p, row0 + i), k0, cols, false);
    }
    if (few(p)) {
      few_dots(p, sums.at[0], kWidePitch, rows, width, x.at[0], kPitch, p.A, e0 * p.K + k0, p.K, cols);
    } else {
      product(sums.at[0], kWidePitch, rows, width, x.at[0], 1, kPitch, p.packed_A + k0 * pitch(p.E) + e0, pitch(p.E),
              cols);
    }
  }
}

// From one row of n(x) A^T, bottlenecks e0 ... e0 + width: h = that + a and u = drop_b(f(h)). `sums` may lie in h.
template <int kActivation>
PK_INLINE void store_h_and_u(const Problem& p, const float* sums, const float* bias, int64_t m, int64_t e0,
                             int64_t width, float gate) {
  const bool drops = !p.drops_output && p.dropout.active();
  float* const h = static_cast<float*>(p.h) + m * p.E + e0;
  float* const u = p.u + m * p.E + e0;
  uint32_t words[kMaskWords];
  if (drops) keep_words(words, p.dropout, m, e0 / 32, (width + 31) / 32);
  for (int64_t e = 0; e < width; e += kLanes) {
    const vf sum = load_n(sums + e, width - e) + load(bias + e);
    store_n(h + e, sum, width - e);
    vf value = activated<kActivation>(sum, nullptr);
    if (drops) value = keep(value, words[e / 32] >> (e % 32)) * p.dropout.scale;
    store_n(u + e, value * gate, width - e);
  }
}

// h = n(x) A^T + a and u = drop_b(f(h)) of the rows, bottlenecks e0 ... e0 + width.
static void shrink_unit(const Problem& p, int64_t row0, int64_t e0) {
  const int64_t rows = min(unit_rows(p), p.M - row0), width = min(bottleneck_width(p), p.E - e0);
  WideTile sums;
  float bias[kWidePitch];
  fill(bias, width, 0.f);
  if (p.a) widen_row(bias, p.factors, p.a, e0, width);
  for (int64_t i = 0; i < rows; ++i) fill(sums.at[i], width, 0.f);
  add_down(p, sums, row0, rows, e0, width);
  with_activation(p.activation, [&](auto activation) {
    for (int64_t i = 0; i < rows; ++i) {
      store_h_and_u<decltype(activation)::value>(p, sums.at[i], bias, row0 + i, e0, width, 1.f);
    }
  });
}

static void shrink(const Problem& p, int64_t begin, int64_t end) {
  const int64_t across = bottleneck_units(p);
  for (int64_t unit = begin; unit < end; ++unit) {
    shrink_unit(p, unit / across * unit_rows(p), unit % across * bottleneck_width(p));
  }
}

// y = r + g s drop_o(t) of the rows; tile: t, columns n0 ... n0 + cols. scale: s of the columns.
static void store_y(const Problem& p, Tile& tile, const float* scale, int64_t row0, int64_t rows, int64_t n0,
                    int64_t cols) {
  for (int64_t i = 0; i < rows; ++i) {
    float* const row = tile.at[i];
    float residual[kPitch];
    if (p.drops_output && p.dropout.active()) drop_row(p, row, row0 + i, n0, cols);
    widen_row(residual, p.type, p.residual, (row0 + i) * p.residual_stride + n0, cols);
    const float gate = p.gate ? number_at(p, p.gate, row0 + i) : 1.f;
    for (int64_t j = 0; j < cols; j += kLanes) {
      store(row + j, load(row + j) * load(scale + j) * gate + load(residual + j));
    }
    narrow_row(p.y, p.type, (row0 + i) * p.N + n0, row, cols);
  }
}

// Columns n0 ... n0 + kColumns of y for the rows first ... last. B^T of the columns, which few rows do not need, is
// packed on the stack: it stays in L2, lies on few pages, and they are there already.
static void expand_unit(const Problem& p, int64_t n0, int64_t first, int64_t last) {
  alignas(64) float b_t[kMostBottlenecks * kPitch];
  const int64_t cols = min(kColumns, p.N - n0);
  float bias[kPitch], scale[kPitch];
  fill(bias, cols, 0.f);
  if (p.b) widen_row(bias, p.factors, p.b, n0, cols);
  scale_row(p, scale, n0, cols);
  if (!few(p)) transpose_rows(p, p.B, p.E, n0, cols, 0, p.E, b_t, kPitch);
  for (int64_t row0 = first; row0 < last; row0 += kRows) {
    const int64_t rows = min(kRows, last - row0);
    const float* u = p.u + row0 * p.E;
    Tile tile;
    for (int64_t i = 0; i < rows; ++i) {
      for (int64_t j = 0; j < cols; j += kLanes) store(tile.at[i] + j, load(bias + j));
    }
    if (few(p)) {
      few_dots(p, tile.at[0], kPitch, rows, cols, u, p.E, p.B, n0 * p.E, p.E, p.E);
    } else {
      product(tile.at[0], kPitch, rows, cols, u, 1, p.E, b_t, kPitch, p.E);
    }
    store_y(p, tile, scale, row0, rows, n0, cols);
  }
}

static void expand(const Problem& p, int64_t begin, int64_t end) {
  const int64_t height = panel_rows(p), panels = blocks(p.M, height);
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t first = unit % panels * height;
    expand_unit(p, unit / panels * kColumns, first, min(p.M, first + height));
  }
}

}  // namespace pk::PK_ISA
