// Numbers of the four dtypes in untyped memory, as doubles: for tests that loop over dtypes.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "common/dtype.h"

namespace pk::test {

inline int bytes_of(Dtype type) {
  return type == Dtype::kFloat64 ? 8 : type == Dtype::kFloat32 ? 4 : 2;
}

// Values that all four types hold exactly: -2 ... 2 in steps of 1/8.
inline double exact_value(int64_t i) {
  return static_cast<double>((i * 7919 + i / 13) % 33 - 16) / 8;
}

inline void write(void* data, Dtype type, int64_t at, double value) {
  if (type == Dtype::kFloat64) static_cast<double*>(data)[at] = value;
  if (type == Dtype::kFloat32) static_cast<float*>(data)[at] = static_cast<float>(value);
  uint16_t bits = 0;
  if (type == Dtype::kBFloat16) {
    const float narrow = static_cast<float>(value);
    uint32_t word;
    memcpy(&word, &narrow, 4);
    bits = static_cast<uint16_t>(word >> 16);
  } else if (type == Dtype::kFloat16 && std::isnan(value)) {
    bits = 0x7E00;
  } else if (type == Dtype::kFloat16 && value != 0) {
    int exponent;
    const double fraction = std::frexp(std::fabs(value), &exponent);  // in [1/2, 1)
    bits = static_cast<uint16_t>((value < 0 ? 0x8000 : 0) | (exponent + 14) << 10 |
                                 (static_cast<int>(fraction * 2048) & 0x3FF));
  }
  if (bytes_of(type) == 2) static_cast<uint16_t*>(data)[at] = bits;
}

inline double read(const void* data, Dtype type, int64_t at) {
  if (type == Dtype::kFloat64) return static_cast<const double*>(data)[at];
  if (type == Dtype::kFloat32) return static_cast<const float*>(data)[at];
  const uint16_t bits = static_cast<const uint16_t*>(data)[at];
  if (type == Dtype::kBFloat16) {
    const uint32_t word = static_cast<uint32_t>(bits) << 16;
    float value;
    memcpy(&value, &word, 4);
    return value;
  }
  const int exponent = bits >> 10 & 31;
  if (exponent == 31) return bits & 0x3FF ? NAN : bits >> 15 ? -INFINITY : INFINITY;
  const double size = exponent ? std::ldexp(1024 + (bits & 0x3FF), exponent - 25) : std::ldexp(bits & 0x3FF, -24);
  return bits >> 15 ? -size : size;
}

}  // namespace pk::test
