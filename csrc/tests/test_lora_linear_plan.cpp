// The launch plan: units cover every row and column, and few rows need no GEMM.
#include <cstdio>
#include <cstring>

#include "plan/lora_linear_plan.h"

using pk::lora_linear::Plan;
using pk::lora_linear::Step;

static int failures = 0;

static void expect(bool condition, const char* what, int64_t M, int64_t N, int64_t K) {
  if (condition) return;
  ++failures;
  std::printf("M=%lld N=%lld K=%lld: %s\n", (long long)M, (long long)N, (long long)K, what);
}

static int64_t units(const std::vector<Step>& steps, const char* name) {
  for (const Step& step : steps) {
    if (std::strcmp(step.name, name) == 0) return step.units;
  }
  return 0;
}

int main() {
  constexpr int64_t kSizes[] = {1, 15, 16, 17, 255, 256, 257, 5000};
  for (int64_t M : kSizes) {
    for (int64_t N : kSizes) {
      for (int64_t K : kSizes) {
        const Plan plan = pk::lora_linear::plan(M, N, K, 8, 4);
        const bool gemm = std::strcmp(plan.path, "gemm") == 0;
        expect(units(plan.forward, "shrink") * plan.row_block >= M, "the shrink misses rows", M, N, K);
        expect(units(plan.forward, "expand") * plan.block >= N, "the expansion misses columns", M, N, K);
        expect(units(plan.backward, "dy_pass") * plan.block >= N, "the pass over dy misses columns", M, N, K);
        expect(units(plan.backward, "x_pass") * plan.block >= K, "the pass over x misses columns", M, N, K);
        expect(gemm == (units(plan.forward, "gemm") == 1), "path and forward disagree", M, N, K);
        expect(gemm == (units(plan.backward, "gemm") == 1), "path and backward disagree", M, N, K);
        expect(M > 1 || !gemm, "one row goes through a GEMM", M, N, K);
      }
    }
  }
  std::printf("%d failures\n", failures);
  return failures != 0;
}
