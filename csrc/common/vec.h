// A vector of fp32, as wide as the instruction set: 16 lanes with AVX-512, 8 with AVX2, 4 otherwise (SSE2, NEON).
// 16-bit types are widened on load and rounded to nearest even on store; NaN stays NaN. Arithmetic is written with
// gcc's vector operators; intrinsics are used only where gcc has no operator. Included by *_cpu.cpp files alone,
// which are compiled once per instruction set: everything lives in the namespace PK_ISA, so nothing is merged.
#pragma once

#include <cstdint>

#include "common/dtype.h"
#if defined(__x86_64__)
// gcc 12 warns of its own intrinsics, whose "undefined" operands are meant to be uninitialised.
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#define PK_INLINE inline __attribute__((always_inline))
// Arrays of accumulators live in registers only if every loop over them is unrolled.
#define PK_UNROLL _Pragma("GCC unroll 32")

namespace pk::PK_ISA {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

typedef float vf __attribute__((vector_size(4 * kLanes)));
typedef int32_t vi __attribute__((vector_size(4 * kLanes)));
typedef uint32_t vu __attribute__((vector_size(4 * kLanes)));
typedef uint16_t vh __attribute__((vector_size(2 * kLanes)));
typedef float vf_unaligned __attribute__((vector_size(4 * kLanes), aligned(4), may_alias));
typedef uint16_t vh_unaligned __attribute__((vector_size(2 * kLanes), aligned(2), may_alias));

// -- whole vectors ----------------------------------------------------------------------------------------------------

PK_INLINE vf load(const float* p) {
  return *reinterpret_cast<const vf_unaligned*>(p);
}
PK_INLINE void store(float* p, vf v) {
  *reinterpret_cast<vf_unaligned*>(p) = v;
}

// gcc 12 makes six instructions of __builtin_convertvector to or from twice the width with AVX2, three of them
// shuffles.
PK_INLINE vf load(const bf16* p) {
#if defined(__AVX512F__)
  return (vf)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))), 16);
#elif defined(__AVX2__)
  return (vf)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))), 16);
#else
  return (vf)(__builtin_convertvector(*reinterpret_cast<const vh_unaligned*>(p), vu) << 16);
#endif
}

PK_INLINE void store(bf16* p, vf v) {
#if defined(__AVX512BF16__)
  *reinterpret_cast<vh_unaligned*>(p) = (vh)_mm512_cvtneps_pbh((__m512)v);
#else
  const vu bits = (vu)v;
  const vu rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
  const vu result = (v == v) ? rounded : ((bits >> 16) | 0x40u);
#if defined(__AVX2__) && !defined(__AVX512F__)
  const __m128i low = _mm256_castsi256_si128((__m256i)result), high = _mm256_extracti128_si256((__m256i)result, 1);
  *reinterpret_cast<vh_unaligned*>(p) = (vh)_mm_packus_epi32(low, high);
#else
  *reinterpret_cast<vh_unaligned*>(p) = __builtin_convertvector(result, vh);
#endif
#endif
}

#if defined(__AVX512F__)
PK_INLINE vf load(const fp16* p) {
  return (vf)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
PK_INLINE void store(fp16* p, vf v) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT));
}
#elif defined(__F16C__)
PK_INLINE vf load(const fp16* p) {
  return (vf)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
PK_INLINE void store(fp16* p, vf v) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT));
}
#else
// Shifting the fields into place leaves the exponent 112 too small; a product mends it, for subnormals too.
PK_INLINE vf load(const fp16* p) {
  const vu bits = __builtin_convertvector(*reinterpret_cast<const vh_unaligned*>(p), vu);
  const vu magnitude = bits & 0x7FFFu;
  const vu special = (vu)(magnitude >= 0x7C00u) & 0x7F800000u;  // infinity or NaN
  return (vf)((vu)((vf)(magnitude << 13) * 0x1p112f) | special | ((bits & 0x8000u) << 16));
}
PK_INLINE void store(fp16* p, vf v) {
  const vu sign = (vu)v & 0x80000000u, a = (vu)v ^ sign;
  const vu normal = ((a + 0xFFFu + ((a >> 13) & 1u)) >> 13) - (112u << 10);
  const vu subnormal = (vu)((vf)a + 0.5f) - 0x3F000000u;  // the sum rounds to multiples of 2^-24, fp16's smallest
  vu half = (a < 0x38800000u) ? subnormal : normal;
  half = (a >= 0x47800000u) ? vu{} + 0x7C00u : half;
  half = (v == v) ? half : vu{} + 0x7E00u;
  *reinterpret_cast<vh_unaligned*>(p) = __builtin_convertvector(half | (sign >> 16), vh);
}
#endif

// -- the first n lanes, n >= 1; lanes past n load as zero and are not touched in memory
// ----------------------------------

#if defined(__AVX512F__)
PK_INLINE uint32_t first_lanes(int64_t n) {
  return n >= kLanes ? 0xFFFFu : (1u << n) - 1;
}

PK_INLINE vf load_n(const float* p, int64_t n) {
  return (vf)_mm512_maskz_loadu_ps((__mmask16)first_lanes(n), p);
}
PK_INLINE vf load_n(const bf16* p, int64_t n) {
  const __m256i bits = _mm256_maskz_loadu_epi16((__mmask16)first_lanes(n), p);
  return (vf)_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16);
}
PK_INLINE vf load_n(const fp16* p, int64_t n) {
  return (vf)_mm512_cvtph_ps(_mm256_maskz_loadu_epi16((__mmask16)first_lanes(n), p));
}
PK_INLINE void store_n(float* p, vf v, int64_t n) {
  _mm512_mask_storeu_ps(p, (__mmask16)first_lanes(n), (__m512)v);
}
#else
template <class T>
PK_INLINE vf load_n(const T* p, int64_t n) {
  if (n >= kLanes) return load(p);
  T lanes[kLanes] = {};
  __builtin_memcpy(lanes, p, n * sizeof(T));
  return load(lanes);
}
PK_INLINE void store_n(float* p, vf v, int64_t n) {
  if (n >= kLanes) return store(p, v);
  __builtin_memcpy(p, &v, n * sizeof(float));
}
#endif

template <class T>
PK_INLINE void store_n(T* p, vf v, int64_t n) {
  if (n >= kLanes) return store(p, v);
  T lanes[kLanes];
  store(lanes, v);
  __builtin_memcpy(p, lanes, n * sizeof(T));
}

// a b + c, rounded once wherever the instruction set can, never left to the compiler to fuse or not: for results whose
// bits must not depend on the shape of the loop around them.
PK_INLINE vf fma(vf a, vf b, vf c) {
#if defined(__AVX512F__)
  return (vf)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__FMA__)
  return (vf)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined(__aarch64__)
  return (vf)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#else
  return a * b + c;  // no instruction to fuse them into
#endif
}

// Lane i survives if bit i is set, else becomes +0 (whatever it was: a dropped NaN is gone).
PK_INLINE vf keep(vf v, uint32_t bits) {
#if defined(__AVX512F__)
  return (vf)_mm512_maskz_mov_ps((__mmask16)bits, (__m512)v);
#else
  vu lane_bit;
  PK_UNROLL
  for (int i = 0; i < kLanes; ++i) lane_bit[i] = 1u << i;
  return (vf)((vu)v & (vu)(((vu{} + bits) & lane_bit) != 0));
#endif
}

// -- across vectors ---------------------------------------------------------------------------------------------------

// Interleaves the low or the high halves of a and b: a0 b0 a1 b1 ...
template <bool kHigh>
PK_INLINE vf interleave(vf a, vf b) {
  vi index;
  PK_UNROLL
  for (int i = 0; i < kLanes; ++i) index[i] = i / 2 + (i & 1) * kLanes + (kHigh ? kLanes / 2 : 0);
  return __builtin_shuffle(a, b, index);
}

// Lane i of the result is the sum of v[i]: kLanes vectors at once cost 2 shuffles and 1 sum each; a lone horizontal
// sum costs as much as 20 FMAs.
PK_INLINE vf lane_sums(vf (&v)[kLanes]) {
  PK_UNROLL
  for (int width = kLanes / 2; width > 0; width /= 2) {
    PK_UNROLL
    for (int i = 0; i < width; ++i) v[i] = interleave<false>(v[i], v[i + width]) + interleave<true>(v[i], v[i + width]);
  }
  return v[0];
}

// v[i][j] <-> v[j][i]. One round rotates the bits of (row, lane) by one place; log2(kLanes) rounds swap the two.
PK_INLINE void transpose(vf (&v)[kLanes]) {
  PK_UNROLL
  for (int round = 1; round < kLanes; round *= 2) {
    vf t[kLanes];
    PK_UNROLL
    for (int i = 0; i < kLanes / 2; ++i) {
      t[2 * i] = interleave<false>(v[i], v[i + kLanes / 2]);
      t[2 * i + 1] = interleave<true>(v[i], v[i + kLanes / 2]);
    }
    PK_UNROLL
    for (int i = 0; i < kLanes; ++i) v[i] = t[i];
  }
}

}  // namespace pk::PK_ISA
