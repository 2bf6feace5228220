// The dropout that every backend replays bit for bit: element (row, k) of stream s is kept where
//   lane((k >> 3) & 3, k & 1) of philox(seed, {row, k >> 5, (k & 7) >> 1, s}) < threshold,
// lane(w, i) being the low (i = 0) or high half of word w; kept elements are scaled by 65536 / threshold.
// Four calls serve 32 neighbours, and one call the eight elements that a thread owns in a tensor-core fragment.
#pragma once

#include "common/philox.h"

namespace pk {

constexpr uint32_t kKeepAll = 65536;

struct Dropout {
  uint64_t seed = 0;
  uint32_t stream = 0;            // index of the adapter in the call
  uint32_t threshold = kKeepAll;  // of 65536
  float scale = 1.f;

  PK_HOST_DEVICE bool active() const { return threshold != kKeepAll; }
};

static inline Dropout make_dropout(double p, uint64_t seed, uint32_t stream) {
  uint32_t threshold = static_cast<uint32_t>((1.0 - p) * kKeepAll + 0.5);
  if (threshold == 0) threshold = 1;  // p rounds to 1: the scale must stay finite
  return {seed, stream, threshold, static_cast<float>(kKeepAll) / static_cast<float>(threshold)};
}

PK_HOST_DEVICE static inline bool kept(const Dropout& dropout, uint32_t row, uint32_t k) {
  const Philox4 random = philox(dropout.seed, {{row, k >> 5, (k & 7) >> 1, dropout.stream}});
  const uint32_t word = random.word[(k >> 3) & 3];
  return ((k & 1) ? word >> 16 : word & 0xFFFF) < dropout.threshold;
}

// Keep-bits of 32 neighbours: bit i is element (row, 32 * group + i).
PK_HOST_DEVICE static inline uint32_t keep_word(const Dropout& dropout, uint32_t row, uint32_t group) {
  uint32_t bits = 0;
  for (uint32_t call = 0; call < 4; ++call) {
    const Philox4 random = philox(dropout.seed, {{row, group, call, dropout.stream}});
    for (uint32_t w = 0; w < 4; ++w) {
      bits |= static_cast<uint32_t>((random.word[w] & 0xFFFF) < dropout.threshold) << (8 * w + 2 * call);
      bits |= static_cast<uint32_t>((random.word[w] >> 16) < dropout.threshold) << (8 * w + 2 * call + 1);
    }
  }
  return bits;
}

}  // namespace pk
