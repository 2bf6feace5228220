// Keep-bits of dropout by the vector: with AVX-512 sixteen Philox calls side by side give 128 neighbours of a row.
#pragma once

#include "common/dropout.h"
#include "common/vec.h"

namespace pk::PK_ISA {

#if defined(__AVX512F__)

PK_INLINE __m512i swap_words(__m512i a) {
  return _mm512_shuffle_epi32(a, static_cast<_MM_PERM_ENUM>(0xB1));
}

// High and low words of 16 products. The hardware multiplies even lanes only, so the odd ones swap places with them.
PK_INLINE void multiply_wide(__m512i a, uint32_t b, __m512i& high, __m512i& low) {
  const __m512i factor = _mm512_set1_epi32(static_cast<int>(b));
  const __m512i even = _mm512_mul_epu32(a, factor), odd = _mm512_mul_epu32(swap_words(a), factor);
  high = _mm512_mask_blend_epi32(0xAAAA, swap_words(even), odd);
  low = _mm512_mask_blend_epi32(0xAAAA, even, swap_words(odd));
}

// Words of `group` ... `group` + 3. Lane i of the counters serves call i % 4 of group i / 4.
PK_INLINE void keep_words4(uint32_t (&words)[4], const Dropout& dropout, uint32_t row, uint32_t group) {
  const __m512i groups = _mm512_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3);
  __m512i c0 = _mm512_set1_epi32(static_cast<int>(row));
  __m512i c1 = _mm512_add_epi32(_mm512_set1_epi32(static_cast<int>(group)), groups);
  __m512i c2 = _mm512_setr_epi32(0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3);
  __m512i c3 = _mm512_set1_epi32(static_cast<int>(dropout.stream));
  uint32_t key0 = static_cast<uint32_t>(dropout.seed), key1 = static_cast<uint32_t>(dropout.seed >> 32);
  PK_UNROLL
  for (int round = 0; round < kPhiloxRounds; ++round, key0 += kPhiloxWeyl0, key1 += kPhiloxWeyl1) {
    __m512i high0, low0, high1, low1;
    multiply_wide(c0, kPhiloxMultiplier0, high0, low0);
    multiply_wide(c2, kPhiloxMultiplier1, high1, low1);
    constexpr int kXor3 = 0x96;
    c0 = _mm512_ternarylogic_epi32(high1, c1, _mm512_set1_epi32(static_cast<int>(key0)), kXor3);
    c2 = _mm512_ternarylogic_epi32(high0, c3, _mm512_set1_epi32(static_cast<int>(key1)), kXor3);
    c1 = low1;
    c3 = low0;
  }
  // Word w of group g is the 128-bit piece g of c_w: gather the pieces of a group, whose 32 lanes are then in order.
  const __m512i low01 = _mm512_shuffle_i32x4(c0, c1, 0x44), high01 = _mm512_shuffle_i32x4(c0, c1, 0xEE);
  const __m512i low23 = _mm512_shuffle_i32x4(c2, c3, 0x44), high23 = _mm512_shuffle_i32x4(c2, c3, 0xEE);
  const __m512i last_kept = _mm512_set1_epi16(static_cast<short>(dropout.threshold - 1));
  words[0] = _mm512_cmple_epu16_mask(_mm512_shuffle_i32x4(low01, low23, 0x88), last_kept);
  words[1] = _mm512_cmple_epu16_mask(_mm512_shuffle_i32x4(low01, low23, 0xDD), last_kept);
  words[2] = _mm512_cmple_epu16_mask(_mm512_shuffle_i32x4(high01, high23, 0x88), last_kept);
  words[3] = _mm512_cmple_epu16_mask(_mm512_shuffle_i32x4(high01, high23, 0xDD), last_kept);
}

#else

PK_INLINE void keep_words4(uint32_t (&words)[4], const Dropout& dropout, uint32_t row, uint32_t group) {
  for (uint32_t i = 0; i < 4; ++i) words[i] = keep_word(dropout, row, group + i);
}

#endif

// Bits of row `row`, columns 32 * group ... 32 * (group + count) - 1.
static __attribute__((noinline)) void keep_words(uint32_t* out, const Dropout& dropout, int64_t row, int64_t group,
                                                 int64_t count) {
  for (int64_t i = 0; i < count; i += 4) {
    uint32_t words[4];
    keep_words4(words, dropout, static_cast<uint32_t>(row), static_cast<uint32_t>(group + i));
    for (int64_t j = 0; j < 4 && i + j < count; ++j) out[i + j] = words[j];
  }
}

}  // namespace pk::PK_ISA
