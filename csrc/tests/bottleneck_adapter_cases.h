// What the tests of bottleneck_adapter's CUDA kernels share: one mask for all of them, and the count of what was held.
#pragma once

#include <cstdint>
#include <cstdio>
#include <string>

#include "bottleneck_adapter/bottleneck_adapter_cuda.h"
#include "tests/device_array.h"

namespace pk::test {

constexpr uint64_t kSeed = 0x0123456789ABCDEFull;
constexpr double kP = 0.3;
inline const Dropout kDropout = make_dropout(kP, kSeed, 0);
inline int failures = 0, cases = 0;

inline void expect(bool holds, const std::string& what) {
  ++cases;
  if (holds) return;
  ++failures;
  printf("FAILED %s: %s\n", kWhere, what.c_str());
}

// What main() returns.
inline int said() {
  printf("%s: %d cases, %d failures\n", kWhere, cases, failures);
  return failures != 0;
}

inline bool keeps(bool drops, int64_t m, int64_t n) {
  return !drops || kept(kDropout, static_cast<uint32_t>(m), static_cast<uint32_t>(n));
}

}  // namespace pk::test
