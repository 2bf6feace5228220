// What the tests of the primitives multiply: small whole numbers, which 16 bits hold exactly and whose sums fp32 does.
#pragma once

#include <cstdint>

namespace pk::test {

enum class Type { kBFloat16, kFloat16 };

// -3 ... 3, without a pattern that a wrong index would meet again.
inline int whole(int i) {
  return (i * 7919 + i / 7) % 7 - 3;
}

// -3 ... 3 as bits of the type.
inline uint16_t bits(Type type, int value) {
  constexpr uint16_t kBFloat16[] = {0, 0x3F80, 0x4000, 0x4040}, kFloat16[] = {0, 0x3C00, 0x4000, 0x4200};
  const uint16_t magnitude = (type == Type::kBFloat16 ? kBFloat16 : kFloat16)[value < 0 ? -value : value];
  return static_cast<uint16_t>(value < 0 ? magnitude | 0x8000 : magnitude);
}

}  // namespace pk::test
