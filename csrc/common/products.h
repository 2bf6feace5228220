// The two small products that everything skinny is made of. Accumulation is fp32.
//   dots   c[i][j]  = sum_k x[i][k] w[j][k]     both operands contiguous along the sum; lanes lie along k
//   outer  c[i][j] += sum_n p(n, i) v[n][j]     v and c contiguous along j; lanes lie along j, p is broadcast
// Sixteen-bit operands are widened as they are loaded. Where the processor multiplies pairs of bf16 (AVX512_BF16) and
// both operands are bf16, the products run at twice the rate; they are exact, so only the order of the sum differs.
#pragma once

#include "common/vec.h"

namespace pk::PK_ISA {

template <class A, class B>
constexpr bool kSame = false;
template <class A>
constexpr bool kSame<A, A> = true;

#if defined(__AVX512BF16__)
template <class A, class B>
constexpr bool kPairs = kSame<A, bf16> && kSame<B, bf16>;
#else
template <class A, class B>
constexpr bool kPairs = false;
#endif

template <int N>
struct Constant {
  static constexpr int value = N;
};

PK_INLINE int64_t min(int64_t a, int64_t b) {
  return a < b ? a : b;
}

// -- dots -------------------------------------------------------------------------------------------------------------

constexpr int64_t kMaskWords = 32;  // words of keep-bits per row, at most: one chunk of dots, one block of outer
constexpr int64_t kDotChunk = 32 * kMaskWords;

// sums[i * NJ + j] = sum_k x[i][k] w[j][k], k < n. With kMasked, x[i][k] counts where bit k of row i of the mask is
// set.
template <int MI, int NJ, bool kMasked, class X, class W>
PK_INLINE void dots_tile(const X* x, int64_t ldx, const W* w, int64_t ldw, int64_t n, const uint32_t* mask,
                         float (&sums)[MI * NJ]) {
  vf acc[MI * NJ] = {};
  int64_t k = 0;
#if defined(__AVX512BF16__)
  if constexpr (kPairs<X, W>) {
    for (; k < n; k += 32) {
      const __mmask32 within = n - k >= 32 ? ~0u : (1u << (n - k)) - 1;
      __m512bh b[NJ];
      PK_UNROLL
      for (int j = 0; j < NJ; ++j) b[j] = (__m512bh)_mm512_maskz_loadu_epi16(within, w + j * ldw + k);
      PK_UNROLL
      for (int i = 0; i < MI; ++i) {
        const __mmask32 counts = kMasked ? within & mask[i * kMaskWords + k / 32] : within;
        const __m512bh a = (__m512bh)_mm512_maskz_loadu_epi16(counts, x + i * ldx + k);
        PK_UNROLL
        for (int j = 0; j < NJ; ++j) acc[i * NJ + j] = (vf)_mm512_dpbf16_ps((__m512)acc[i * NJ + j], a, b[j]);
      }
    }
  }
#endif
  for (; k < n; k += kLanes) {
    vf b[NJ];
    PK_UNROLL
    for (int j = 0; j < NJ; ++j) b[j] = load_n(w + j * ldw + k, n - k);
    PK_UNROLL
    for (int i = 0; i < MI; ++i) {
      vf a = load_n(x + i * ldx + k, n - k);
      if (kMasked) a = keep(a, mask[i * kMaskWords + k / 32] >> (k % 32));
      PK_UNROLL
      for (int j = 0; j < NJ; ++j) acc[i * NJ + j] += a * b[j];
    }
  }
  PK_UNROLL
  for (int first = 0; first < MI * NJ; first += kLanes) {
    vf group[kLanes];
    PK_UNROLL
    for (int i = 0; i < kLanes; ++i) group[i] = first + i < MI * NJ ? acc[first + i] : vf{};
    store_n(sums + first, lane_sums(group), MI * NJ - first);
  }
}

// c[i][j] += scale * sum_k x[i][k] w[j][k] for `rows` rows of x and `cols` rows of w; k < n <= kDotChunk with a mask.
template <bool kMasked, class X, class W>
__attribute__((noinline)) void dots(float* c, int64_t ldc, int64_t rows, int64_t cols, const X* x, int64_t ldx,
                                    const W* w, int64_t ldw, int64_t n, float scale, const uint32_t* mask = nullptr) {
  const auto tile = [&](auto mi, auto nj, int64_t i0, int64_t j0) __attribute__((always_inline)) {
    constexpr int MI = decltype(mi)::value, NJ = decltype(nj)::value;
    float sums[MI * NJ];
    dots_tile<MI, NJ, kMasked>(x + i0 * ldx, ldx, w + j0 * ldw, ldw, n, kMasked ? mask + i0 * kMaskWords : nullptr,
                               sums);
    PK_UNROLL
    for (int i = 0; i < MI; ++i) {
      PK_UNROLL
      for (int j = 0; j < NJ; ++j) c[(i0 + i) * ldc + j0 + j] += scale * sums[i * NJ + j];
    }
  };
  for (int64_t i = 0; i < rows;) {  // the rows of x stay in L1 for all of w
    const bool tall = rows - i >= 4;
    for (int64_t j = 0; j < cols;) {
      const bool wide = cols - j >= 4;
      if (wide && tall) {
        tile(Constant<4>{}, Constant<4>{}, i, j);
      } else if (wide) {
        tile(Constant<1>{}, Constant<4>{}, i, j);
      } else if (tall) {
        tile(Constant<4>{}, Constant<1>{}, i, j);
      } else {
        tile(Constant<1>{}, Constant<1>{}, i, j);
      }
      j += wide ? 4 : 1;
    }
    i += tall ? 4 : 1;
  }
}

// -- outer ------------------------------------------------------------------------------------------------------------

// p(n, i) = p[n * ldn + i * ldi], fp32. `left` columns of v are there; with kMasked, v[n][j] counts where bit j of
// mask[n * kMaskWords] >> shift is set.
template <int MI, int CV, bool kMasked, class V>
PK_INLINE void outer_tile(float* c, int64_t ldc, const float* p, int64_t ldn, int64_t ldi, const V* v, int64_t ldv,
                          int64_t n, int64_t left, const uint32_t* mask, int64_t shift) {
  vf acc[MI][CV];
  PK_UNROLL
  for (int i = 0; i < MI; ++i) {
    PK_UNROLL
    for (int j = 0; j < CV; ++j) acc[i][j] = load(c + i * ldc + j * kLanes);
  }
  for (int64_t t = 0; t < n; ++t, v += ldv, p += ldn) {
    vf row[CV];
    PK_UNROLL
    for (int j = 0; j < CV; ++j) {
      row[j] = CV == 1 ? load_n(v, left) : load(v + j * kLanes);
      if (kMasked) row[j] = keep(row[j], mask[t * kMaskWords] >> (shift + j * kLanes));
    }
    PK_UNROLL
    for (int i = 0; i < MI; ++i) {
      const float factor = p[i * ldi];
      PK_UNROLL
      for (int j = 0; j < CV; ++j) acc[i][j] += row[j] * factor;
    }
  }
  PK_UNROLL
  for (int i = 0; i < MI; ++i) {
    PK_UNROLL
    for (int j = 0; j < CV; ++j) store(c + i * ldc + j * kLanes, acc[i][j]);
  }
}

#if defined(__AVX512BF16__)
// Columns of rows v and v + ldv as pairs, in order: {v[0][j], v[1][j]}.
PK_INLINE __m512bh row_pairs(const bf16* v, const bf16* next, __mmask16 within) {
  const __m512i low = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(within, v));
  const __m512i high = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(within, next));
  return (__m512bh)_mm512_or_si512(low, _mm512_slli_epi32(high, 16));
}

// The same in pairs of n: p(n, i) = p[i * ldi + n], bf16.
template <int MI>
PK_INLINE void outer_pairs_tile(float* c, int64_t ldc, const bf16* p, int64_t ldi, const bf16* v, int64_t ldv,
                                int64_t n, int64_t left) {
  const __mmask16 within = static_cast<__mmask16>(first_lanes(left));
  __m512 acc[MI];
  PK_UNROLL
  for (int i = 0; i < MI; ++i) acc[i] = (__m512)load(c + i * ldc);
  int64_t t = 0;
  for (; t + 2 <= n; t += 2) {
    const __m512bh row = row_pairs(v + t * ldv, v + (t + 1) * ldv, within);
    PK_UNROLL
    for (int i = 0; i < MI; ++i) {
      int32_t pair;
      __builtin_memcpy(&pair, p + i * ldi + t, sizeof pair);
      acc[i] = _mm512_dpbf16_ps(acc[i], row, (__m512bh)_mm512_set1_epi32(pair));
    }
  }
  if (t < n) {
    const __m512bh row = row_pairs(v + t * ldv, v + t * ldv, within);  // the upper half meets a zero
    PK_UNROLL
    for (int i = 0; i < MI; ++i) {
      acc[i] = _mm512_dpbf16_ps(acc[i], row, (__m512bh)_mm512_set1_epi32(p[i * ldi + t].bits));
    }
  }
  PK_UNROLL
  for (int i = 0; i < MI; ++i) store(c + i * ldc, (vf)acc[i]);
}
#endif

constexpr int kHalfTall = kLanes == 16 ? 8 : 4;  // rows of a tile of two vectors: it takes half of the registers
constexpr int kTallest = kLanes == 16 ? 12 : 6;  // nearly all: for fp32 that lies in L1

// c[i][j] += sum_n p(n, i) v[n][j], i < rows, j < cols. c has room for whole vectors; what is past cols is undefined.
// kTall changes the speed only.
template <bool kMasked, int kTall = kHalfTall, class V>
__attribute__((noinline)) void outer(float* c, int64_t ldc, int64_t rows, int64_t cols, const float* p, int64_t ldn,
                                     int64_t ldi, const V* v, int64_t ldv, int64_t n, const uint32_t* mask = nullptr) {
  for (int64_t j = 0; j < cols;) {
    const bool wide = cols - j >= 2 * kLanes;
    const uint32_t* words = kMasked ? mask + j / 32 : nullptr;
    for (int64_t i = 0; i < rows;) {
      const auto tile = [&](auto mi) __attribute__((always_inline)) {
        constexpr int MI = decltype(mi)::value;
        if (wide) {
          outer_tile<MI, 2, kMasked>(c + i * ldc + j, ldc, p + i * ldi, ldn, ldi, v + j, ldv, n, 0, words, j % 32);
        } else {
          outer_tile<MI, 1, kMasked>(c + i * ldc + j, ldc, p + i * ldi, ldn, ldi, v + j, ldv, n, cols - j, words,
                                     j % 32);
        }
        i += MI;
      };
      if (rows - i >= kTall) {
        tile(Constant<kTall>{});
      } else if (kTall > 4 && rows - i >= 4) {
        tile(Constant<4>{});
      } else if (rows - i >= 2) {
        tile(Constant<2>{});
      } else {
        tile(Constant<1>{});
      }
    }
    j += wide ? 2 * kLanes : kLanes;
  }
}

// The same for p(n, i) = p[i * ldi + n] of a 16- or 32-bit type: rows that are contiguous along the sum.
template <class P, class V>
__attribute__((noinline)) void outer_rows(float* c, int64_t ldc, int64_t rows, int64_t cols, const P* p, int64_t ldi,
                                          const V* v, int64_t ldv, int64_t n) {
#if defined(__AVX512BF16__)
  if constexpr (kPairs<P, V>) {
    for (int64_t j = 0; j < cols; j += kLanes) {
      for (int64_t i = 0; i < rows;) {
        const auto tile = [&](auto mi) __attribute__((always_inline)) {
          constexpr int MI = decltype(mi)::value;
          outer_pairs_tile<MI>(c + i * ldc + j, ldc, p + i * ldi, ldi, v + j, ldv, n, cols - j);
          i += MI;
        };
        if (rows - i >= 16) {
          tile(Constant<16>{});
        } else if (rows - i >= 4) {
          tile(Constant<4>{});
        } else {
          tile(Constant<1>{});
        }
      }
    }
    return;
  }
#endif
  if constexpr (kSame<P, float>) {
    outer<false>(c, ldc, rows, cols, p, 1, ldi, v, ldv, n);
  } else {
    constexpr int64_t kStep = 128;  // p is widened a piece at a time: it is small, and used for many columns
    float piece[16][kStep + kLanes];
    for (int64_t i = 0; i < rows; i += 16) {
      const int64_t height = min(rows - i, 16);
      for (int64_t t = 0; t < n; t += kStep) {
        const int64_t length = min(n - t, kStep);
        for (int64_t a = 0; a < height; ++a) {
          for (int64_t b = 0; b < length; b += kLanes)
            store(piece[a] + b, load_n(p + (i + a) * ldi + t + b, length - b));
        }
        outer<false>(c + i * ldc, ldc, height, cols, piece[0], 1, kStep + kLanes, v + t * ldv, ldv, length);
      }
    }
  }
}

// -- transposition ----------------------------------------------------------------------------------------------------

// to[j][i] = from[i][j] for `rows` rows and `cols` columns of `from`.
template <class From, class To>
__attribute__((noinline)) void transpose(const From* from, int64_t ld_from, int64_t rows, int64_t cols, To* to,
                                         int64_t ld_to) {
  for (int64_t i = 0; i < rows; i += kLanes) {
    for (int64_t j = 0; j < cols; j += kLanes) {
      vf block[kLanes];
      PK_UNROLL
      for (int a = 0; a < kLanes; ++a) {
        block[a] = i + a < rows ? load_n(from + (i + a) * ld_from + j, cols - j) : vf{};
      }
      transpose(block);
      PK_UNROLL
      for (int b = 0; b < kLanes; ++b) {
        if (j + b < cols) store_n(to + (j + b) * ld_to + i, block[b], rows - i);
      }
    }
  }
}

}  // namespace pk::PK_ISA
