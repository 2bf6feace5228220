// The units of batched_lora's inference form. T: type of x and y. F: type of the pages.
//
// What is added to a row has the same bits whatever else is in the batch, because each of its numbers is made by one
// sequence of fp32 operations that no loop around it changes:
//   h[i][r]  one vector of partial sums, filled by explicit FMAs (or bf16 dot instructions) in order of k within a
//   chunk,
//            then one tree over its lanes (lane_sums adds the same lanes in the same order at each place); chunks are
//            kChunk long wherever the work was cut, and are added in order of k. Then f(h + a), element by element;
//   y[i][n]  one lane, h[i][r] B^T[r][n] added by explicit FMAs in order of r, page after page; then the bias; then one
//            FMA with the scaling onto y. With a gain: that FMA without the bias gives t, then d t + t, then s b +
//            that, an FMA each. A stop in between keeps the whole fp32 value.
// So the number of rows and of columns that a register tile takes at a time (MI, NJ, CV) is free, and so are threads.
#pragma once

#include "batched_lora/batched_lora.h"
#include "common/activation_vec.h"
#include "common/products.h"

namespace pk::PK_ISA {

using batched_lora::kBlock;
using batched_lora::kChunk;
using batched_lora::kPageRows;
using batched_lora::kTile;
using batched_lora::Piece;
using batched_lora::Problem;
using batched_lora::Slice;

template <class F>
PK_INLINE const F* page(const void* pages, int64_t number, int64_t width) {
  return static_cast<const F*>(pages) + number * kPageRows * width;
}

// sums[i * NJ + j] = sum_k x[i][k] a[j][k], k < n.
template <int MI, int NJ, class T, class F>
PK_INLINE void chunk_tile(const T* const* x, const F* a, int64_t lda, int64_t n, float (&sums)[MI * NJ]) {
  vf acc[MI * NJ] = {};
  int64_t k = 0;
#if defined(__AVX512BF16__)
  if constexpr (kPairs<T, F>) {
    for (; k < n; k += 32) {
      const __mmask32 within = n - k >= 32 ? ~0u : (1u << (n - k)) - 1;
      __m512bh b[NJ];
      PK_UNROLL
      for (int j = 0; j < NJ; ++j) b[j] = (__m512bh)_mm512_maskz_loadu_epi16(within, a + j * lda + k);
      PK_UNROLL
      for (int i = 0; i < MI; ++i) {
        const __m512bh row = (__m512bh)_mm512_maskz_loadu_epi16(within, x[i] + k);
        PK_UNROLL
        for (int j = 0; j < NJ; ++j) acc[i * NJ + j] = (vf)_mm512_dpbf16_ps((__m512)acc[i * NJ + j], row, b[j]);
      }
    }
  }
#endif
  const auto step = [&](auto loaded) __attribute__((always_inline)) {
    vf b[NJ];
    PK_UNROLL
    for (int j = 0; j < NJ; ++j) b[j] = loaded(a + j * lda + k);
    PK_UNROLL
    for (int i = 0; i < MI; ++i) {
      const vf row = loaded(x[i] + k);
      PK_UNROLL
      for (int j = 0; j < NJ; ++j) acc[i * NJ + j] = fma(row, b[j], acc[i * NJ + j]);
    }
  };
  for (; k + kLanes <= n; k += kLanes) {
    step([](const auto* p) __attribute__((always_inline)) { return load(p); });
  }
  if (k < n) step([&](const auto* p) __attribute__((always_inline)) { return load_n(p, n - k); });
  PK_UNROLL
  for (int first = 0; first < MI * NJ; first += kLanes) {
    vf group[kLanes];
    PK_UNROLL
    for (int i = 0; i < kLanes; ++i) group[i] = first + i < MI * NJ ? acc[first + i] : vf{};
    store_n(sums + first, lane_sums(group), MI * NJ - first);
  }
}

// h[i * ldh + j] += sum over k < n <= kChunk of x[i][k] a[j][k], i < rows, j < ranks <= kPageRows.
template <class T, class F>
__attribute__((noinline)) void add_chunk(float* h, int64_t ldh, const T* const* x, int64_t rows, const F* a,
                                         int64_t lda, int64_t ranks, int64_t n) {
  constexpr int kMost = kLanes == 16 ? 16 : 8;  // accumulators: half of the registers
  const auto tile = [&](auto mi, auto nj, int64_t i0, int64_t j0) __attribute__((always_inline)) {
    constexpr int MI = decltype(mi)::value, NJ = decltype(nj)::value;
    float sums[MI * NJ];
    chunk_tile<MI, NJ>(x + i0, a + j0 * lda, lda, n, sums);
    PK_UNROLL
    for (int i = 0; i < MI; ++i) {
      PK_UNROLL
      for (int j = 0; j < NJ; ++j) h[(i0 + i) * ldh + j0 + j] += sums[i * NJ + j];
    }
  };
  const auto across = [&](auto mi, int64_t i) __attribute__((always_inline)) {
    constexpr int MI = decltype(mi)::value, kWide = kMost / MI < 8 ? kMost / MI : 8;
    for (int64_t j = 0; j < ranks;) {
      const int64_t left = ranks - j;
      if (left >= kWide) {
        tile(mi, Constant<kWide>{}, i, j);
        j += kWide;
      } else if (kWide > 4 && left >= 4) {
        tile(mi, Constant<4>{}, i, j);
        j += 4;
      } else {
        tile(mi, Constant<1>{}, i, j);
        j += 1;
      }
    }
  };
  for (int64_t i = 0; i < rows;) {
    if (rows - i >= 4) {
      across(Constant<4>{}, i);
      i += 4;
    } else if (rows - i >= 2) {
      across(Constant<2>{}, i);
      i += 2;
    } else {
      across(Constant<1>{}, i);
      i += 1;
    }
  }
}

// h of one piece for the rank rows of its page q; of all chunks, or of chunk `part` alone where h has parts.
template <class T, class F>
void shrink_unit(const Problem& p, const Piece& piece, int64_t q, int64_t part) {
  const int64_t ldh = piece.pages() * kPageRows, ranks = min(kPageRows, piece.rank - q * kPageRows);
  float* h = p.h + piece.h + part * piece.count * ldh + q * kPageRows;
  const F* a = page<F>(p.pages_in, piece.pages_A[q], p.K);
  const T* x[kTile];
  for (int64_t i = 0; i < piece.count; ++i) {
    for (int64_t j = 0; j < ranks; ++j) h[i * ldh + j] = 0.f;
  }
  const int64_t begin = part * kChunk, end = p.parts == 1 ? p.K : min(p.K, begin + kChunk);
  for (int64_t k = begin; k < end; k += kChunk) {
    for (int64_t i = 0; i < piece.count; ++i) x[i] = static_cast<const T*>(p.x) + piece.rows[i] * p.x_stride + k;
    add_chunk(h, ldh, x, piece.count, a + k, p.K, ranks, min(kChunk, end - k));
  }
}

// acc[i][j] += sum_r h[i * ldh + r] b[r * ldb + j], r < ranks, for CV vectors of columns; `left` are there if CV is 1.
template <int MI, int CV, class F>
PK_INLINE void expand_tile(float* acc, int64_t ld, const float* h, int64_t ldh, const F* b, int64_t ldb, int64_t ranks,
                           int64_t left) {
  vf sum[MI][CV];
  PK_UNROLL
  for (int i = 0; i < MI; ++i) {
    PK_UNROLL
    for (int j = 0; j < CV; ++j) sum[i][j] = load(acc + i * ld + j * kLanes);
  }
  for (int64_t r = 0; r < ranks; ++r) {
    vf row[CV];
    PK_UNROLL
    for (int j = 0; j < CV; ++j) row[j] = CV == 1 ? load_n(b + r * ldb, left) : load(b + r * ldb + j * kLanes);
    PK_UNROLL
    for (int i = 0; i < MI; ++i) {
      const vf factor = vf{} + h[i * ldh + r];
      PK_UNROLL
      for (int j = 0; j < CV; ++j) sum[i][j] = fma(factor, row[j], sum[i][j]);
    }
  }
  PK_UNROLL
  for (int i = 0; i < MI; ++i) {
    PK_UNROLL
    for (int j = 0; j < CV; ++j) store(acc + i * ld + j * kLanes, sum[i][j]);
  }
}

constexpr int64_t kGap = 16;  // floats between two rows of acc: powers of two would thrash L1

// acc[i] += h[i] of one page times its rows of B^T.
template <class F>
__attribute__((noinline)) void add_page(float* acc, int64_t ld, int64_t rows, int64_t cols, const float* h, int64_t ldh,
                                        const F* b, int64_t ldb, int64_t ranks) {
  constexpr int kWide = 4, kTall = kLanes == 16 ? 4 : 2;  // kTall x kWide accumulators: half of the registers
  for (int64_t j = 0; j < cols;) {
    const bool wide = cols - j >= kWide * kLanes;
    for (int64_t i = 0; i < rows;) {
      const auto tile = [&](auto mi) __attribute__((always_inline)) {
        constexpr int MI = decltype(mi)::value;
        float* at = acc + i * ld + j;
        if (wide) {
          expand_tile<MI, kWide>(at, ld, h + i * ldh, ldh, b + j, ldb, ranks, 0);
        } else {
          expand_tile<MI, 1>(at, ld, h + i * ldh, ldh, b + j, ldb, ranks, cols - j);
        }
        i += MI;
      };
      if (rows - i >= kTall) {
        tile(Constant<kTall>{});
      } else {
        tile(Constant<1>{});
      }
    }
    j += wide ? kWide * kLanes : kLanes;
  }
}

// Adds the parts of h, in order, to the first.
inline void sum_unit(const Problem& p, const Piece& piece) {
  const int64_t ldh = piece.pages() * kPageRows, size = piece.count * ldh;
  float* h = p.h + piece.h;
  for (int64_t part = 1; part < p.parts; ++part) {
    for (int64_t i = 0; i < piece.count; ++i) {
      for (int64_t r = 0; r < piece.rank; ++r) h[i * ldh + r] += h[part * size + i * ldh + r];
    }
  }
}

// h <- f(h + a).
inline void activate_unit(const Problem& p, const Piece& piece) {
  const Slice& slice = p.slice[piece.slice];
  const float* a = static_cast<const float*>(slice.down_bias);
  if (a == nullptr && piece.activation == kIdentity) return;
  if (a != nullptr) a += piece.slot * slice.T * kPageRows;
  with_activation(static_cast<int>(piece.activation), [&](auto f) __attribute__((always_inline)) {
    for (int64_t i = 0; i < piece.count; ++i) {
      float* h = p.h + piece.h + i * piece.pages() * kPageRows;
      for (int64_t r = 0; r < piece.rank; r += kLanes) {
        vf low = load_n(h + r, piece.rank - r);
        if (a != nullptr) low += load_n(a + r, piece.rank - r);
        store_n(h + r, activated<decltype(f)::value>(low, nullptr), piece.rank - r);
      }
    }
  });
}

// y[rows of the piece, n0 ... n0 + its block] += s (h B^T + b); or, with a gain, <- (1 + d) (y + s h B^T) + s b.
template <class T, class F>
void expand_unit(const Problem& p, const Piece& piece, int64_t n0) {
  const Slice& slice = p.slice[piece.slice];
  const int64_t cols = min(piece.block, slice.N - n0), ldh = piece.pages() * kPageRows, ld = piece.block + kGap;
  const float* h = p.h + piece.h;
  const vf scaling = vf{} + static_cast<const float*>(slice.scaling)[piece.slot];
  const F* bias = static_cast<const F*>(slice.pages_out) + piece.bias * slice.N + n0;
  const F* gain = static_cast<const F*>(slice.pages_out) + piece.gain * slice.N + n0;
  alignas(64) float acc[kTile * (kBlock + kGap)];
  for (int64_t i = 0; i < piece.count; ++i) {
    for (int64_t j = 0; j < cols; j += kLanes) store(acc + i * ld + j, vf{});
  }
  for (int64_t q = 0; q < piece.pages(); ++q) {
    const F* b = page<F>(slice.pages_out, piece.pages_B[q], slice.N) + n0;
    add_page(acc, ld, piece.count, cols, h + q * kPageRows, ldh, b, slice.N,
             min(kPageRows, piece.rank - q * kPageRows));
  }
  for (int64_t i = 0; i < piece.count; ++i) {
    T* y = static_cast<T*>(slice.y) + piece.rows[i] * slice.y_stride + n0;
    for (int64_t j = 0; j < cols; j += kLanes) {
      vf sum = load(acc + i * ld + j), out = load_n(y + j, cols - j);
      if (piece.gain < 0) {
        if (piece.bias >= 0) sum += load_n(bias + j, cols - j);
        out = fma(scaling, sum, out);
      } else {
        out = fma(scaling, sum, out);
        out = fma(load_n(gain + j, cols - j), out, out);
        if (piece.bias >= 0) out = fma(scaling, load_n(bias + j, cols - j), out);
      }
      store_n(y + j, out, cols - j);
    }
  }
}

// The piece that a unit belongs to; `first` says which unit of a piece is its first. (Not std::upper_bound: what the
// standard library instantiates would be merged across instruction sets.)
inline const Piece* piece_of(const Problem& p, int64_t unit, int64_t Piece::* first) {
  int64_t low = 0, high = p.pieces;
  while (high - low > 1) {
    const int64_t middle = (low + high) / 2;
    (p.piece[middle].*first <= unit ? low : high) = middle;
  }
  return p.piece + low;
}

}  // namespace pk::PK_ISA
