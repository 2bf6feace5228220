// The emulator's own test: kernels that are right pass under every schedule and nothing is reported, and each planted
// bug is caught. Built three times, EMULATOR_BUILD = plain, asan or race; what a build must catch is in the table
// below. Inputs are small integers, so that every sum is exact and results are compared bit for bit.
#include <cstdio>
#include <cstring>
#include <vector>

#include "common/launch.h"
#include "tests/planted_bugs.h"

using namespace pk;
using namespace pk::test;

namespace {

std::vector<int> integers(int n) {
  std::vector<int> x(n);
  for (int i = 0; i < n; ++i) x[i] = small_integer(i);
  return x;
}

template <class T>
bool gemm_is_right(Bug bug, int M, int N, int K) {
  std::vector<T> A(M * K), B(N * K);
  std::vector<float> C(M * N, -1.f);
  for (int i = 0; i < M * K; ++i) A[i] = whole<T>(small_integer(i));
  for (int i = 0; i < N * K; ++i) B[i] = whole<T>(small_integer(i + 3));
  if (gemm(bug, A.data(), B.data(), C.data(), M, N, K, nullptr) != cudaSuccess) return false;
  for (int m = 0; m < M; ++m) {
    for (int n = 0; n < N; ++n) {
      int sum = 0;
      for (int k = 0; k < K; ++k) sum += small_integer(m * K + k) * small_integer(n * K + k + 3);
      if (C[m * N + n] != static_cast<float>(sum)) return false;
    }
  }
  return true;
}

std::vector<int> stencil_of(const std::vector<int>& x) {
  std::vector<int> y(x.size());
  for (size_t i = 0; i < x.size(); ++i) y[i] = (i > 0 ? x[i - 1] : 0) + (i + 1 < x.size() ? x[i + 1] : 0);
  return y;
}

bool stencil_is_right(Bug bug) {
  const std::vector<int> x = integers(150);
  std::vector<int> y(x.size());
  return stencil(bug, x.data(), y.data(), 150, nullptr) == cudaSuccess && y == stencil_of(x);
}

bool stencil_twice_is_right(Bug bug) {
  const std::vector<int> x = integers(150);
  std::vector<int> between(x.size()), y(x.size());
  return stencil_twice(bug, x.data(), between.data(), y.data(), 150, nullptr) == cudaSuccess &&
         y == stencil_of(stencil_of(x));
}

bool stencil_past_another_is_right(Bug bug) {
  const std::vector<int> x = integers(150);
  std::vector<int> between(x.size()), aside(x.size()), y(x.size());
  return stencil_past_another(bug, x.data(), between.data(), aside.data(), y.data(), 150, nullptr) == cudaSuccess &&
         aside == stencil_of(x) && y == stencil_of(stencil_of(x));
}

bool reverse_is_right(Bug bug) {
  const std::vector<int> x = integers(96);
  std::vector<int> y(x.size());
  if (reverse(bug, x.data(), y.data(), 96, nullptr) != cudaSuccess) return false;
  for (int i = 0; i < 96; ++i) {
    int expected = x[i / 32 * 32 + 31 - i % 32];
    for (int l = 0; l < 32; ++l) expected += x[i / 32 * 32 + l];
    if (y[i] != expected) return false;
  }
  return true;
}

bool ordered_sum_is_right(Bug bug) {
  std::vector<float> x(1000), parts(kSumBlocks);
  int tickets = 0;
  float total = -1.f, expected = 0.f;
  for (int i = 0; i < 1000; ++i) expected += x[i] = static_cast<float>(small_integer(i));
  return ordered_sum(bug, x.data(), parts.data(), &tickets, &total, 1000, nullptr) == cudaSuccess && total == expected;
}

bool gemm_bf16_is_right(Bug bug) {
  return gemm_is_right<bf16>(bug, 70, 136, 200);
}
bool gemm_fp16_is_right(Bug bug) {
  return gemm_is_right<fp16>(bug, 130, 40, 72);
}
bool gemm_of_one_is_right(Bug bug) {
  return gemm_is_right<bf16>(bug, 1, 1, 8);
}

constexpr Planted kPlanted[] = {
    {"global read out of bounds", gemm_bf16_is_right, Bug::kGlobalRead, nullptr, "heap-buffer-overflow", nullptr},
    {"global write out of bounds", gemm_bf16_is_right, Bug::kGlobalWrite, nullptr, "heap-buffer-overflow", nullptr},
    {"dynamic shared memory out of bounds", gemm_bf16_is_right, Bug::kSharedBounds, "out of bounds: ldmatrix",
     "use-after-poison", "out of bounds: ldmatrix"},
    {"static shared memory out of bounds", stencil_is_right, Bug::kSharedBounds, nullptr, "index 66 out of bounds",
     nullptr},
    {"missing __syncthreads", gemm_bf16_is_right, Bug::kMissingBarrier, nullptr, nullptr, "emulator: race"},
    {"missing __syncthreads, static", stencil_is_right, Bug::kMissingBarrier, nullptr, nullptr, "emulator: race"},
    {"wrong cp.async wait", gemm_bf16_is_right, Bug::kWrongWait, nullptr, nullptr, "cp.async still in flight"},
    {"stage overwritten while in use", gemm_bf16_is_right, Bug::kStageInUse, "wrong result", "wrong result",
     "cp.async still in flight"},
    {"cp.async in flight at the end", gemm_bf16_is_right, Bug::kNoLastWait, "returns with cp.async in flight",
     "returns with cp.async in flight", "returns with cp.async in flight"},
    {"divergent __syncthreads", stencil_is_right, Bug::kDivergentBarrier, "divergent barrier", "divergent barrier",
     "divergent barrier"},
    {"early return before __syncthreads", stencil_is_right, Bug::kEarlyReturn, "divergent barrier", "divergent barrier",
     "divergent barrier"},
    {"unwritten shared memory", stencil_is_right, Bug::kUnwritten, "wrong result", nullptr,
     "read of unwritten shared memory"},
    {"missing __syncwarp", reverse_is_right, Bug::kWarpRace, nullptr, nullptr, "emulator: race"},
    {"shuffle by half of its mask", reverse_is_right, Bug::kDivergentShuffle, "divergent warp operation",
     "divergent warp operation", "divergent warp operation"},
    {"race between blocks", ordered_sum_is_right, Bug::kBlockRace, nullptr, nullptr, "emulator: race"},
    {"missing __threadfence", ordered_sum_is_right, Bug::kMissingFence, nullptr, nullptr, "emulator: race"},
    {"no wait for the launch before", stencil_twice_is_right, Bug::kNoLaunchWait, nullptr, nullptr, "emulator: race"},
    {"no wait for the launch before that", stencil_past_another_is_right, Bug::kNoLaunchWaits, nullptr, nullptr,
     "emulator: race"},
    {"wait for a launch that did not wait", stencil_past_another_is_right, Bug::kNoWaitBetween, nullptr, nullptr,
     "emulator: race"},
};

constexpr Right kRight[] = {{"gemm bf16", gemm_bf16_is_right},
                            {"gemm fp16", gemm_fp16_is_right},
                            {"gemm 1x1", gemm_of_one_is_right},
                            {"stencil", stencil_is_right},
                            {"reverse", reverse_is_right},
                            {"ordered sum", ordered_sum_is_right},
                            {"overlapped launches", stencil_twice_is_right},
                            {"three overlapped launches", stencil_past_another_is_right}};

// The runtime's own refusals come back as errors, as they do from CUDA.
void impossible_launches_are_refused() {
  int x = 0;
  expect(reverse(Bug::kNone, &x, &x, 2048, nullptr) == cudaErrorInvalidConfiguration, "2048 threads", {}, "");
  expect(stencil(Bug::kNone, &x, &x, 0, nullptr) == cudaErrorInvalidConfiguration, "an empty grid", {}, "");
}

// 99 KiB of both kinds together, and not a byte more.
void shared_memory_is_that_of_the_smallest_gpu() {
  const std::vector<int> x = integers(32);
  std::vector<int> y(32, -1);
  const auto with = [&](size_t bytes) {
    return both_kinds_of_shared(bytes - kStaticBytes, x.data(), y.data(), nullptr);
  };
  expect(with(kMostSharedEverywhere + 1) == cudaErrorInvalidValue, "99 KiB and a byte", {}, "");
  expect(y[0] == -1, "a refused kernel that runs", {}, "");
  expect(with(kMostSharedEverywhere) == cudaSuccess, "99 KiB", {}, "");
  bool right = true;
  for (int i = 0; i < 32; ++i) right = right && y[i] == x[31 - i] + 2 * x[i];
  expect(right, "both kinds of shared memory", {}, "");
}

}  // namespace

int main(int argc, char** argv) {
  right_kernels_pass(kRight);
  planted_bugs_are_caught(kPlanted, argc > 1 && strcmp(argv[1], "--verbose") == 0);
  impossible_launches_are_refused();
  shared_memory_is_that_of_the_smallest_gpu();
  printf("%s: %d failures\n", kBuild, failures);
  return failures != 0;
}
