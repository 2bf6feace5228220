// The emulator's own test: kernels that are right pass under every schedule and nothing is reported, and each planted
// bug is caught. Built three times, EMULATOR_BUILD = plain, asan or race; what a build must catch is in the table
// below. Inputs are small integers, so that every sum is exact and results are compared bit for bit.
#include <sys/wait.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <type_traits>
#include <vector>

#include "common/launch.h"
#include "emulator/emulator.h"
#include "tests/emulator_kernels.h"

using namespace pk;
using namespace pk::test;

namespace {

constexpr const char* kBuild = EMULATOR_BUILD;

int small_integer(int i) {
  return (i * 7919 + i / 13) % 5 - 2;
}

std::vector<int> integers(int n) {
  std::vector<int> x(n);
  for (int i = 0; i < n; ++i) x[i] = small_integer(i);
  return x;
}

// -2 ... 2 in a 16-bit type; both write 2 alike.
template <class T>
T whole(int value) {
  const uint16_t one = std::is_same_v<T, bf16> ? 0x3F80 : 0x3C00, two = 0x4000;
  const uint16_t magnitude = value == 0 ? 0 : std::abs(value) == 1 ? one : two;
  return {static_cast<uint16_t>(value < 0 ? magnitude | 0x8000 : magnitude)};
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

// What each build must say of a bug; nullptr: it is not bound to see it. "wrong result" is the test's own word.
struct Planted {
  const char* name;
  bool (*is_right)(Bug);
  Bug bug;
  const char *plain, *asan, *race;
};

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
};

struct Outcome {
  bool right;
  std::string said;
};

// In a process of its own: what is caught ends it.
Outcome outcome(bool (*is_right)(Bug), Bug bug, emulator::Schedule schedule) {
  int ends[2];
  if (pipe(ends) != 0) abort();
  fflush(nullptr);
  const pid_t child = fork();
  if (child == 0) {
    dup2(ends[1], STDERR_FILENO);
    emulator::set_schedule(schedule);
    const bool right = is_right(bug);
    if (!right) fprintf(stderr, "wrong result\n");
    _exit(right ? 0 : 1);
  }
  close(ends[1]);
  Outcome seen;
  char text[4096];
  for (ssize_t bytes; (bytes = read(ends[0], text, sizeof text)) > 0;) seen.said.append(text, bytes);
  close(ends[0]);
  int status = 0;
  waitpid(child, &status, 0);
  seen.right = WIFEXITED(status) && WEXITSTATUS(status) == 0;
  return seen;
}

constexpr emulator::Copies kTimings[] = {emulator::Copies::kLate, emulator::Copies::kEarly, emulator::Copies::kRandom};

int failures = 0;

void expect(bool condition, const char* name, emulator::Schedule schedule, const std::string& said) {
  if (condition) return;
  ++failures;
  printf("FAILED %s: %s, seed %d, copies %d\n%s\n", kBuild, name, static_cast<int>(schedule.seed),
         static_cast<int>(schedule.copies), said.c_str());
}

void right_kernels_pass() {
  constexpr struct {
    const char* name;
    bool (*is_right)(Bug);
  } kRight[] = {{"gemm bf16", gemm_bf16_is_right},
                {"gemm fp16", gemm_fp16_is_right},
                {"gemm 1x1", gemm_of_one_is_right},
                {"stencil", stencil_is_right},
                {"reverse", reverse_is_right},
                {"ordered sum", ordered_sum_is_right},
                {"overlapped launches", stencil_twice_is_right}};
  for (const auto& kernel : kRight) {
    for (int seed = 0; seed < 4; ++seed) {
      for (const emulator::Copies copies : kTimings) {
        const emulator::Schedule schedule{static_cast<uint64_t>(seed), copies};
        const Outcome seen = outcome(kernel.is_right, Bug::kNone, schedule);
        expect(seen.right && seen.said.empty(), kernel.name, schedule, seen.said);
      }
    }
  }
}

// In order with late copies, in order with early ones, shuffled with random ones: what must be caught, in all three.
void planted_bugs_are_caught(bool verbose) {
  for (const Planted& planted : kPlanted) {
    const bool plain = strcmp(kBuild, "plain") == 0, asan = strcmp(kBuild, "asan") == 0;
    const char* expected = plain ? planted.plain : asan ? planted.asan : planted.race;
    int caught = 0;
    for (int i = 0; i < 3; ++i) {
      const emulator::Schedule schedule{static_cast<uint64_t>(i / 2 * 5), kTimings[i]};
      const Outcome seen = outcome(planted.is_right, planted.bug, schedule);
      caught += !seen.right;
      if (verbose) printf("-- %s, schedule %d\n%s", planted.name, i, seen.said.c_str());
      if (expected == nullptr) continue;
      expect(!seen.right && seen.said.find(expected) != std::string::npos, planted.name, schedule, seen.said);
    }
    printf("%-6s %-36s caught %d of 3%s\n", kBuild, planted.name, caught, expected != nullptr ? "" : " (not bound to)");
  }
}

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
  right_kernels_pass();
  planted_bugs_are_caught(argc > 1 && strcmp(argv[1], "--verbose") == 0);
  impossible_launches_are_refused();
  shared_memory_is_that_of_the_smallest_gpu();
  printf("%s: %d failures\n", kBuild, failures);
  return failures != 0;
}
