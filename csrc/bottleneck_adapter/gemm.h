// Units of bottleneck_adapter whose products are a library's, for many rows of fp32 with no norm; what is not a product
// is done on what a GEMM has just made, or just before it adds to it. s of the channels is in B (packed_B), s of one
// number in the GEMM's alpha, g in u.
#pragma once

#include "bottleneck_adapter/backward.h"
#include "bottleneck_adapter/forward.h"

namespace pk::PK_ISA {

// Rows row0 ... row0 + rows and columns col0 ... col0 + cols of a matrix with rows `stride` apart.
static Matrix block(const void* data, int64_t stride, int64_t row0, int64_t rows, int64_t col0, int64_t cols) {
  return {static_cast<float*>(const_cast<void*>(data)) + row0 * stride + col0, rows, cols, stride, 1};
}
static Matrix transposed(const Matrix& m) {
  return {m.data, m.cols, m.rows, m.col_stride, m.row_stride};
}
static const void* scaled_B(const Problem& p) {
  return p.packed_B ? p.packed_B : p.B;
}
static float alpha_of(const Problem& p) {
  return p.packed_B ? 1.f : factor_of_scale(p);
}

// s B
static void scale_B(const Problem& p, int64_t begin, int64_t end) {
  const float* const B = static_cast<const float*>(p.B);
  float scale[kPitch];
  for (int64_t n0 = begin * kColumns; n0 < min(end * kColumns, p.N); n0 += kColumns) {
    const int64_t cols = min(kColumns, p.N - n0);
    scale_row(p, scale, n0, cols);
    for (int64_t n = n0; n < n0 + cols; ++n) {
      for (int64_t e = 0; e < p.E; e += kLanes) {
        store_n(p.packed_B + n * p.E + e, load_n(B + n * p.E + e, p.E - e) * scale[n - n0], p.E - e);
      }
    }
  }
}

// y = r + g s b of rows and columns.
static void start_y(const Problem& p, int64_t row0, int64_t rows, int64_t col0, int64_t cols) {
  float bias[kGemmColumns], scale[kGemmColumns];
  fill(bias, cols, 0.f);
  if (p.b) widen_row(bias, p.factors, p.b, col0, cols);
  scale_row(p, scale, col0, cols);
  for (int64_t j = 0; j < cols; j += kLanes) store(bias + j, load(bias + j) * load(scale + j));
  for (int64_t m = row0; m < row0 + rows; ++m) {
    const float* const r = static_cast<const float*>(p.residual) + m * p.residual_stride + col0;
    float* const y = static_cast<float*>(p.y) + m * p.N + col0;
    const float gate = p.gate ? number_at(p, p.gate, m) : 1.f;
    for (int64_t j = 0; j < cols; j += kLanes) {
      store_n(y + j, load_n(r + j, cols - j) + load(bias + j) * gate, cols - j);
    }
  }
}

// f(first row, rows, first column, columns) of the units begin ... end of a matrix cut into blocks.
template <class F>
PK_INLINE void each_block(int64_t begin, int64_t end, int64_t rows, int64_t height, int64_t cols, int64_t width,
                          const F& f) {
  const int64_t across = blocks(cols, width);
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t row0 = unit / across * height, col0 = unit % across * width;
    f(row0, min(height, rows - row0), col0, min(width, cols - col0));
  }
}

static void gemm_shrink(const Problem& p, int64_t begin, int64_t end) {
  each_block(
      begin, end, p.M, low_rows(p), p.E, low_columns(p), [&](int64_t m0, int64_t rows, int64_t e0, int64_t cols) {
        const Matrix h = block(p.h, p.E, m0, rows, e0, cols);
        p.gemm(h, block(p.x, p.x_stride, m0, rows, 0, p.K), transposed(block(p.A, p.K, e0, cols, 0, p.K)), 1.f, false);
        float bias[kMostBottlenecks];
        fill(bias, cols, 0.f);
        if (p.a) widen_row(bias, p.factors, p.a, e0, cols);
        with_activation(p.activation, [&](auto activation) {
          for (int64_t i = 0; i < rows; ++i) {
            const float gate = p.gate ? number_at(p, p.gate, m0 + i) : 1.f;
            store_h_and_u<decltype(activation)::value>(p, h.data + i * p.E, bias, m0 + i, e0, cols, gate);
          }
        });
      });
}

static void gemm_expand(const Problem& p, int64_t begin, int64_t end) {
  each_block(begin, end, p.M, kGemmRows, p.N, kGemmColumns, [&](int64_t m0, int64_t rows, int64_t n0, int64_t cols) {
    start_y(p, m0, rows, n0, cols);
    p.gemm(block(p.y, p.N, m0, rows, n0, cols), block(p.u, p.E, m0, rows, 0, p.E),
           transposed(block(scaled_B(p), p.E, n0, cols, 0, p.E)), alpha_of(p), true);
  });
}

static void gemm_slope(const Problem& p, int64_t begin, int64_t end) {
  each_block(begin, end, p.M, low_rows(p), p.E, low_columns(p),
             [&](int64_t m0, int64_t rows, int64_t e0, int64_t cols) {
               const Matrix v = block(p.dh, p.E, m0, rows, e0, cols);
               if (wants_dh(p)) {
                 p.gemm(v, block(p.dy, p.dy_stride, m0, rows, 0, p.N), block(scaled_B(p), p.E, 0, p.N, e0, cols),
                        alpha_of(p), false);
               }
               with_activation(p.activation, [&](auto activation) {
                 for (int64_t i = 0; i < rows; ++i) {
                   slope_row<decltype(activation)::value>(p, v.data + i * p.E, m0 + i, e0, cols);
                 }
               });
             });
}

// d^T (g u), into dB with s or into the room of the units of `up`.
static void gemm_dB(const Problem& p, int64_t begin, int64_t end) {
  const bool ends = gemm_ends_dB(p);
  const Matrix u = block(p.u, p.E, 0, p.M, 0, p.E);
  const int64_t width = ends ? kGemmColumns : kColumns;
  for (int64_t n0 = begin * kGemmColumns; n0 < min(end * kGemmColumns, p.N); n0 += width) {
    const int64_t cols = min(width, p.N - n0);
    const Matrix d = transposed(block(p.dy, p.dy_stride, 0, p.M, n0, cols));
    float* const room = p.sums + n0 / kColumns * up_floats(p) + kPitch;
    if (ends) {
      p.gemm(block(p.dB, p.E, n0, cols, 0, p.E), d, u, factor_of_scale(p), false);
    } else {
      p.gemm(block(room, pitch(p.E), 0, cols, 0, p.E), d, u, 1.f, false);
    }
  }
}

static void gemm_dx(const Problem& p, int64_t begin, int64_t end) {
  each_block(begin, end, p.M, kGemmRows, p.K, kGemmColumns, [&](int64_t m0, int64_t rows, int64_t k0, int64_t cols) {
    const Matrix dx = block(p.dx, p.K, m0, rows, k0, cols), dy = block(p.dy, p.dy_stride, m0, rows, k0, cols);
    for (int64_t i = 0; p.serial && i < rows; ++i) {
      __builtin_memcpy(dx.data + i * p.K, dy.data + i * p.dy_stride, cols * sizeof(float));
    }
    p.gemm(dx, block(p.dh, p.E, m0, rows, 0, p.E), block(p.A, p.K, 0, p.E, k0, cols), 1.f, p.serial);
  });
}

static void gemm_dA(const Problem& p, int64_t begin, int64_t end) {
  const Matrix dh = transposed(block(p.dh, p.E, 0, p.M, 0, p.E));
  each_block(begin, end, 1, 1, p.K, kGemmColumns, [&](int64_t, int64_t, int64_t k0, int64_t cols) {
    p.gemm(block(p.dA, p.K, 0, p.E, k0, cols), dh, block(p.x, p.x_stride, 0, p.M, k0, cols), 1.f, false);
  });
}

}  // namespace pk::PK_ISA
