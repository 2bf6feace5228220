// Asks the processor once; tests may choose a lesser set.
#include "common/instruction_set.h"

#include <atomic>
#include <cstring>

namespace pk {
namespace {

constexpr const char* kNames[] = {"default", "avx2", "avx512", "avx512_bf16"};

bool runs_here(int set) {
#if defined(__x86_64__)
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  const bool answers[] = {true, avx2, avx512, avx512 && __builtin_cpu_supports("avx512bf16")};
  return answers[set];
#else
  return set == 0;
#endif
}

std::atomic<int>& chosen() {
  static std::atomic<int> set = [] {
    int best = kInstructionSets - 1;
    while (!runs_here(best)) --best;
    return best;
  }();
  return set;
}

}  // namespace

int instruction_set() {
  return chosen().load(std::memory_order_relaxed);
}

const char* instruction_set_name() {
  return kNames[instruction_set()];
}

bool use_instruction_set(const char* name) {
  for (int set = 0; set < kInstructionSets; ++set) {
    if (std::strcmp(kNames[set], name) == 0 && runs_here(set)) {
      chosen().store(set, std::memory_order_relaxed);
      return true;
    }
  }
  return false;
}

}  // namespace pk
