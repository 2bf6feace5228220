// Backward units of bottleneck_adapter. d = drop_o(dy), v = (d . s) B, dh = f'(h) . drop_b(g v).
#pragma once

#include "bottleneck_adapter/tiles.h"

namespace pk::PK_ISA {

// Rows of a factor or its gradient that a product with few rows takes at a time, where it lies: rows a power of two
// apart share few sets of the caches.
constexpr int64_t kStrip = 12;

// B in fp32.
static void widen(const Problem& p, int64_t begin, int64_t end) {
  const int64_t last = min(end * kColumns, p.N);
  float row[kMostBottlenecks + kLanes];
  for (int64_t n = begin * kColumns; n < last; ++n) {
    widen_row(row, p.factors, p.B, n * p.E, p.E);
    narrow_row(p.packed_B, Dtype::kFloat32, n * p.E, row, p.E);
  }
}

// v of the rows, bottlenecks e0 ... e0 + width; of the first bottlenecks' units also the part d (s . b) of dg.
static void add_v(const Problem& p, WideTile& v, int64_t row0, int64_t rows, int64_t e0, int64_t width) {
  const float* B = p.packed_B ? p.packed_B : static_cast<const float*>(p.B);
  const bool of_bias = p.dgate && p.b && e0 == 0;
  vf gate_sums[kRows] = {};
  for (int64_t n0 = 0; n0 < p.N; n0 += kColumns) {
    const int64_t cols = min(kColumns, p.N - n0);
    Tile d;
    float scale[kPitch], bias[kPitch];
    load_dy(p, d, row0, rows, n0, cols);
    scale_row(p, scale, n0, cols);
    if (of_bias) widen_row(bias, p.factors, p.b, n0, cols);
    for (int64_t i = 0; i < rows; ++i) {
      for (int64_t j = 0; j < cols; j += kLanes) {
        const vf scaled = load(d.at[i] + j) * load(scale + j);
        store(d.at[i] + j, scaled);
        if (of_bias) gate_sums[i] += first_of(scaled * load(bias + j), cols - j);
      }
    }
    const int64_t strip = few(p) ? kStrip : cols;
    for (int64_t n = 0; n < cols; n += strip) {
      product(v.at[0], kWidePitch, rows, width, d.at[0] + n, 1, kPitch, B + (n0 + n) * p.E + e0, p.E,
              min(strip, cols - n));
    }
  }
  const int64_t parts = bottleneck_units(p);
  for (int64_t i = 0; p.dgate && e0 == 0 && i < rows; ++i) {
    p.partial[(row0 + i) * (parts + 1) + parts] = sum_of_lanes(gate_sums[i]);
  }
}

// One row of u g, dh and the row's part of dg = rowsum(v . u), from v.
template <int kActivation>
PK_INLINE float slope_row(const Problem& p, const float* v, int64_t m, int64_t e0, int64_t width) {
  const bool drops = !p.drops_output && p.dropout.active();
  uint32_t words[kMaskWords];
  if (drops) keep_words(words, p.dropout, m, e0 / 32, (width + 31) / 32);
  const float gate = p.gate ? number_at(p, p.gate, m) : 1.f;
  const float* h = static_cast<const float*>(p.h) + m * p.E + e0;
  vf gate_sum{};
  for (int64_t e = 0; e < width; e += kLanes) {
    vf slope, u = activated<kActivation>(load_n(h + e, width - e), &slope);
    const vf reached = wants_dh(p) || p.dgate ? load_n(v + e, width - e) : vf{};  // else there is no v
    vf gated = reached * gate;
    if (drops) {
      u = keep(u, words[e / 32] >> (e % 32)) * p.dropout.scale;
      gated = keep(gated, words[e / 32] >> (e % 32)) * p.dropout.scale;
    }
    if (p.dgate) gate_sum += first_of(reached * u, width - e);
    if (wants_up(p)) store_n(p.u + m * p.E + e0 + e, u * gate, width - e);
    if (wants_dh(p)) store_n(p.dh + m * p.E + e0 + e, slope * gated, width - e);
  }
  return sum_of_lanes(gate_sum);
}

static void slope_unit(const Problem& p, int64_t row0, int64_t e0) {
  const int64_t rows = min(unit_rows(p), p.M - row0), width = min(bottleneck_width(p), p.E - e0);
  const int64_t parts = bottleneck_units(p);
  WideTile v;
  for (int64_t i = 0; i < rows; ++i) fill(v.at[i], width, 0.f);
  if (wants_dh(p) || p.dgate) add_v(p, v, row0, rows, e0, width);
  with_activation(p.activation, [&](auto activation) {
    for (int64_t i = 0; i < rows; ++i) {
      const float sum = slope_row<decltype(activation)::value>(p, v.at[i], row0 + i, e0, width);
      if (p.dgate) p.partial[(row0 + i) * (parts + 1) + e0 / bottleneck_width(p)] = sum;
    }
  });
}

static void slope(const Problem& p, int64_t begin, int64_t end) {
  const int64_t across = bottleneck_units(p);
  for (int64_t unit = begin; unit < end; ++unit) {
    slope_unit(p, unit / across * unit_rows(p), unit % across * bottleneck_width(p));
  }
}

// ds of the columns n0 ... n0 + cols: scaling (rowsum(B . (d^T (g u))) + b . colsum(g d)). up: d^T (g u), rows ld
// apart.
static void scale_gradient(const Problem& p, float* out, const float* up, int64_t ld, const float* column_sums,
                           int64_t n0, int64_t cols) {
  float bias[kPitch];
  fill(bias, cols, 0.f);
  if (p.b) widen_row(bias, p.factors, p.b, n0, cols);
  for (int64_t n = 0; n < cols; ++n) {
    vf sum{};
    for (int64_t e0 = 0; e0 < p.E; e0 += kColumns) {
      const int64_t width = min(kColumns, p.E - e0);
      float row[kPitch];
      widen_row(row, p.factors, p.B, (n0 + n) * p.E + e0, width);
      for (int64_t e = 0; e < width; e += kLanes)
        sum += first_of(load(row + e) * load_n(up + n * ld + e0 + e, width - e), width - e);
    }
    out[n] = static_cast<float>(p.scaling) * (sum_of_lanes(sum) + bias[n] * column_sums[n]);
  }
}

// scaled: dB is done.
static void store_up(const Problem& p, const float* column_sums, float* up, int64_t ld, int64_t unit, int64_t cols,
                     bool scaled) {
  const int64_t n0 = unit * kColumns;
  float row[kPitch], scale[kPitch];
  if (p.dscale) {
    scale_gradient(p, row, up, ld, column_sums, n0, cols);
    if (p.scales == 1) {
      vf sum{};
      for (int64_t j = 0; j < cols; j += kLanes) sum += first_of(load(row + j), cols - j);
      p.partial[p.M * (bottleneck_units(p) + 1) + unit] = sum_of_lanes(sum);
    } else {
      narrow_row(p.dscale, p.factors, n0, row, cols);
    }
  }
  scale_row(p, scale, n0, cols);
  if (p.db) {
    for (int64_t j = 0; j < cols; j += kLanes) store(row + j, load(column_sums + j) * load(scale + j));
    narrow_row(p.db, p.factors, n0, row, cols);
  }
  for (int64_t n = 0; p.dB && !scaled && n < cols; ++n) {
    float* const to = up + n * ld;
    for (int64_t e = 0; e < p.E; e += kLanes) store_n(to + e, load_n(to + e, p.E - e) * scale[n], p.E - e);
    if (to != static_cast<float*>(p.dB) + (n0 + n) * p.E) narrow_row(p.dB, p.factors, (n0 + n) * p.E, to, p.E);
  }
}

// dB = s . (d^T (g u)), db = s . colsum(g d) and ds of kColumns columns. sums: [kPitch] and [kColumns][pitch(E)].
static void up_unit(const Problem& p, int64_t unit, float* sums) {
  const int64_t n0 = unit * kColumns, cols = min(kColumns, p.N - n0);
  const bool wants_sums = p.db || (p.dscale && p.b);
  // Few rows write dB once, and whole vectors end where its rows do.
  const bool in_place = few(p) && p.dB && p.factors == Dtype::kFloat32 && p.E % (2 * kLanes) == 0;
  float* const up = in_place ? static_cast<float*>(p.dB) + n0 * p.E : sums + kPitch;
  const int64_t ld = in_place ? p.E : pitch(p.E), strip = in_place ? kStrip : cols;
  const bool scaled = in_place ? !p.dscale : gemm_ends_dB(p);
  float scale[kPitch];
  scale_row(p, scale, n0, cols);
  fill(sums, cols, 0.f);
  const bool adds = wants_up(p) && !p.gemm;
  for (int64_t row0 = 0; (adds || wants_sums) && row0 < p.M; row0 += kRows) {
    const int64_t rows = min(kRows, p.M - row0);
    Tile d;
    load_dy(p, d, row0, rows, n0, cols);
    for (int64_t n = 0; adds && n < cols; n += strip) {
      const int64_t last = min(n + strip, cols);
      for (int64_t i = n; row0 == 0 && i < last; ++i) fill(up + i * ld, p.E, 0.f);
      product(up + n * ld, ld, last - n, p.E, d.at[0] + n, kPitch, 1, p.u + row0 * p.E, p.E, rows);
      for (int64_t i = n; scaled && i < last; ++i) {
        for (int64_t e = 0; e < p.E; e += kLanes) store(up + i * ld + e, load(up + i * ld + e) * scale[i]);
      }
    }
    for (int64_t i = 0; wants_sums && i < rows; ++i) {
      const float gate = p.gate ? number_at(p, p.gate, row0 + i) : 1.f;
      for (int64_t j = 0; j < cols; j += kLanes) store(sums + j, load(sums + j) + load(d.at[i] + j) * gate);
    }
  }
  store_up(p, sums, up, ld, unit, cols, scaled);
}

static void up(const Problem& p, int64_t begin, int64_t end) {
  for (int64_t unit = begin; unit < end; ++unit) up_unit(p, unit, p.sums + unit * up_floats(p));
}

// Writes a row of dx of columns k0 ... k0 + cols, with dy where x is the residual too.
static void store_dx(const Problem& p, float* row, int64_t m, int64_t k0, int64_t cols) {
  if (p.serial) {
    float dy[kPitch];
    widen_row(dy, p.type, p.dy, m * p.dy_stride + k0, cols);
    for (int64_t j = 0; j < cols; j += kLanes) store(row + j, load(row + j) + load(dy + j));
  }
  narrow_row(p.dx, p.type, m * p.K + k0, row, cols);
}

// out = dh A goes into dx, or before a norm's slope into `raw`; its sums over the rows are the norm's gradients.
// norm_sums: [2][kPitch]. x: normalised, without weight and bias.
static void store_out(const Problem& p, Tile& out, const Tile& x, float* norm_sums, int64_t row0, int64_t rows,
                      int64_t k0, int64_t cols) {
  float weight[kPitch];
  fill(weight, cols, 1.f);
  if (p.norm_weight) widen_row(weight, p.factors, p.norm_weight, k0, cols);
  for (int64_t i = 0; i < rows; ++i) {
    float* const row = out.at[i];
    for (int64_t j = 0; p.dnorm_weight && j < cols; j += kLanes) {
      store(norm_sums + j, load(norm_sums + j) + load(row + j) * load(x.at[i] + j));
    }
    for (int64_t j = 0; p.dnorm_bias && j < cols; j += kLanes) {
      store(norm_sums + kPitch + j, load(norm_sums + kPitch + j) + load(row + j));
    }
    if (!p.dx) continue;
    if (p.norm == Norm::kNone) {
      store_dx(p, row, row0 + i, k0, cols);
      continue;
    }
    for (int64_t j = 0; j < cols; j += kLanes) store(row + j, load(row + j) * load(weight + j));
    narrow_row(p.raw, Dtype::kFloat32, (row0 + i) * p.K + k0, row, cols);
  }
}

// n(x) of the rows, columns k0 ... k0 + cols, without the norm's weight and bias if `plain`.
static void load_x(const Problem& p, Tile& x, int64_t row0, int64_t rows, int64_t k0, int64_t cols, bool plain) {
  widen_tile(x, p.type, p.x, p.x_stride, row0, rows, k0, cols);
  for (int64_t i = 0; p.norm != Norm::kNone && i < rows; ++i) {
    normalise(p, x.at[i], statistics_at(p, row0 + i), k0, cols, plain);
  }
}

// dA = dh^T n(x), dh A and the norm's gradients of kColumns columns. sums: [2 + 2 E][kPitch].
static void down_unit(const Problem& p, int64_t k0, float* sums) {
  const int64_t cols = min(kColumns, p.K - k0);
  const bool in_place = few(p) && p.factors == Dtype::kFloat32;  // few rows read A once, and write dA once
  const bool whole = in_place && p.dA && cols == kColumns;       // whole vectors end where the unit does
  float *const norm_sums = sums, *const packed = sums + 2 * kPitch;
  float* const dA = whole ? static_cast<float*>(p.dA) + k0 : packed + p.E * kPitch;
  const int64_t ld = whole ? p.K : kPitch, strip = in_place ? kStrip : p.E;
  const float* const A = in_place ? static_cast<const float*>(p.A) + k0 : packed;
  for (int64_t e = 0; wants_out(p) && !in_place && e < p.E; ++e) {
    widen_row(packed + e * kPitch, p.factors, p.A, e * p.K + k0, cols);
  }
  fill(norm_sums, 2 * kPitch, 0.f);
  for (int64_t row0 = 0; row0 < p.M; row0 += kRows) {
    const int64_t rows = min(kRows, p.M - row0);
    const float* const dh = p.dh + row0 * p.E;
    Tile x, out;
    if (wants_out(p)) {
      if (p.dnorm_weight) load_x(p, x, row0, rows, k0, cols, true);
      for (int64_t i = 0; i < rows; ++i) fill(out.at[i], cols, 0.f);
      for (int64_t e = 0; e < p.E; e += strip) {
        const int64_t ldA = in_place ? p.K : kPitch;
        product(out.at[0], kPitch, rows, cols, dh + e, 1, p.E, A + e * ldA, ldA, min(strip, p.E - e));
      }
      store_out(p, out, x, norm_sums, row0, rows, k0, cols);
    }
    if (p.dA) {
      load_x(p, x, row0, rows, k0, cols, false);
      for (int64_t e = 0; e < p.E; e += strip) {
        const int64_t last = min(e + strip, p.E);
        for (int64_t i = e; row0 == 0 && i < last; ++i) fill(dA + i * ld, cols, 0.f);
        product(dA + e * ld, ld, last - e, cols, dh + e, p.E, 1, x.at[0], kPitch, rows);
      }
    }
  }
  for (int64_t e = 0; p.dA && !whole && e < p.E; ++e) narrow_row(p.dA, p.factors, e * p.K + k0, dA + e * ld, cols);
  if (p.dnorm_weight) narrow_row(p.dnorm_weight, p.factors, k0, norm_sums, cols);
  if (p.dnorm_bias) narrow_row(p.dnorm_bias, p.factors, k0, norm_sums + kPitch, cols);
}

static void down(const Problem& p, int64_t begin, int64_t end) {
  for (int64_t unit = begin; unit < end; ++unit) {
    down_unit(p, unit * kColumns, p.sums + unit * down_floats(p));
  }
}

// dx = (o - mean(o) - n mean(o n)) / deviation [+ dy] of one row; o: raw, n: x normalised; no mean(o) for an rms_norm.
static void norm_dx_row(const Problem& p, int64_t m) {
  const Statistics s = statistics_at(p, m);
  const float* const raw = p.raw + m * p.K;
  float x[kPitch], out[kPitch];
  vf sums{}, products{};
  const auto load_row = [&](int64_t k0, int64_t cols) {
    widen_row(x, p.type, p.x, m * p.x_stride + k0, cols);
    normalise(p, x, s, k0, cols, true);
    widen_row(out, Dtype::kFloat32, raw, k0, cols);
  };
  for (int64_t k0 = 0; k0 < p.K; k0 += kColumns) {
    const int64_t cols = min(kColumns, p.K - k0);
    load_row(k0, cols);
    for (int64_t j = 0; j < cols; j += kLanes) {
      sums += first_of(load(out + j), cols - j);
      products += first_of(load(out + j) * load(x + j), cols - j);
    }
  }
  const float K = static_cast<float>(p.K), product = sum_of_lanes(products) / K;
  const float mean = p.norm == Norm::kLayer ? sum_of_lanes(sums) / K : 0.f;
  for (int64_t k0 = 0; k0 < p.K; k0 += kColumns) {
    const int64_t cols = min(kColumns, p.K - k0);
    load_row(k0, cols);
    for (int64_t j = 0; j < cols; j += kLanes) {
      store(out + j, (load(out + j) - mean - load(x + j) * product) * s.reciprocal);
    }
    store_dx(p, out, m, k0, cols);
  }
}

static void norm_dx(const Problem& p, int64_t begin, int64_t end) {
  const int64_t last = min(end * kRows, p.M);
  for (int64_t m = begin * kRows; m < last; ++m) norm_dx_row(p, m);
}

// da = colsum(dh)
static void sums(const Problem& p, int64_t begin, int64_t end) {
  for (int64_t e0 = begin * kColumns; e0 < min(end * kColumns, p.E); e0 += kColumns) {
    const int64_t width = min(kColumns, p.E - e0);
    float row[kPitch];
    fill(row, width, 0.f);
    for (int64_t m = 0; m < p.M; ++m) {
      for (int64_t e = 0; e < width; e += kLanes) {
        store(row + e, load(row + e) + load_n(p.dh + m * p.E + e0 + e, width - e));
      }
    }
    narrow_row(p.da, p.factors, e0, row, width);
  }
}

// dg of its parts, and ds of its parts where it is one number.
static void gather(const Problem& p, int64_t, int64_t) {
  const int64_t parts = bottleneck_units(p) + 1, columns = blocks(p.N, kColumns);
  const auto add_up = [&](void* out, int64_t at, const float* from, int64_t count) {
    float sum[kLanes] = {};
    for (int64_t i = 0; i < count; ++i) sum[0] += from[i];
    narrow_row(out, p.factors, at, sum, 1);
  };
  for (int64_t m = 0; p.dgate && m < p.M; ++m) add_up(p.dgate, m, p.partial + m * parts, parts);
  if (p.dscale && p.scales == 1) add_up(p.dscale, 0, p.partial + p.M * parts, columns);
}

}  // namespace pk::PK_ISA
