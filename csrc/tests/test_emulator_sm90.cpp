// The emulator's own test of what kernels of sm_90a use: clusters, named barriers, mbarriers, TMA, wgmma. As
// test_emulator.cpp: right kernels pass under every schedule, and each planted bug is caught.
#include <cstdio>
#include <cstring>
#include <vector>

#include "common/launch.h"
#include "tests/planted_bugs.h"

using namespace pk;
using namespace pk::test;

namespace {

bool turn_is_right(Bug bug) {
  constexpr int kClusters = 3, kBlocks = 4, kThreads = 64, kAll = kClusters * kBlocks * kThreads;
  std::vector<int> x(kAll), y(kAll, -100);
  for (int i = 0; i < kAll; ++i) x[i] = 3 * i + small_integer(i);
  if (turn(bug, kClusters, kBlocks, x.data(), y.data(), nullptr) != cudaSuccess) return false;
  for (int i = 0; i < kAll; ++i) {
    const int block = i / kThreads, next = block % kBlocks == kBlocks - 1 ? block - kBlocks + 1 : block + 1;
    if (y[i] != x[next * kThreads + i % kThreads]) return false;
  }
  return true;
}

bool relay_is_right(Bug bug) {
  std::vector<int> x(128), y(128, -100);
  for (int i = 0; i < 128; ++i) x[i] = 3 * i;
  if (relay(bug, x.data(), y.data(), nullptr) != cudaSuccess) return false;
  for (int i = 0; i < 128; ++i) {
    if (y[i] != x[127 - i]) return false;
  }
  return true;
}

template <class T>
bool gemm_is_right(Bug bug, bool along_output, int blocks, int M, int N, int K) {
  std::vector<T> A(M * K), B(N * K);
  std::vector<float> C(M * N, -1.f);
  for (int i = 0; i < M * K; ++i) A[i] = whole<T>(small_integer(i));
  for (int i = 0; i < N * K; ++i) B[i] = whole<T>(small_integer(i + 3));
  const cudaError_t error = warp_group_gemm(bug, along_output, blocks, A.data(), B.data(), C.data(), M, N, K, nullptr);
  if (error != cudaSuccess) return false;
  for (int m = 0; m < M; ++m) {
    for (int n = 0; n < N; ++n) {
      int sum = 0;
      for (int k = 0; k < K; ++k) {
        sum += small_integer(m * K + k) * small_integer((along_output ? k * N + n : n * K + k) + 3);
      }
      if (C[m * N + n] != static_cast<float>(sum)) return false;
    }
  }
  return true;
}

bool gemm_bf16_is_right(Bug bug) {
  return gemm_is_right<bf16>(bug, false, 1, 70, 136, 328);
}
bool gemm_fp16_along_output_is_right(Bug bug) {
  return gemm_is_right<fp16>(bug, true, 1, 40, 264, 456);
}
bool gemm_of_one_is_right(Bug bug) {
  return gemm_is_right<bf16>(bug, true, 1, 1, 8, 8);
}
bool gemm_by_two_is_right(Bug bug) {
  return gemm_is_right<bf16>(bug, false, 2, 70, 136, 328);
}
bool gemm_by_two_along_output_is_right(Bug bug) {  // three tiles one above the other
  return gemm_is_right<bf16>(bug, true, 2, 150, 72, 264);
}

constexpr Planted kPlanted[] = {
    {"no cluster barrier at first", turn_is_right, Bug::kNoFirstClusterBarrier, nullptr, nullptr,
     "of a block that may not have begun"},
    {"missing cluster barrier", turn_is_right, Bug::kNoClusterBarrier, nullptr, nullptr, "emulator: race"},
    {"a block ends that is still read", turn_is_right, Bug::kNoLastClusterBarrier, nullptr, nullptr,
     "of a block that may have ended"},
    {"early return in a cluster", turn_is_right, Bug::kDivergentCluster, "divergent cluster barrier",
     "divergent cluster barrier", "divergent cluster barrier"},
    {"cluster_arrive twice", turn_is_right, Bug::kArriveTwice, "cluster_arrive twice", "cluster_arrive twice",
     "cluster_arrive twice"},
    {"of_block of no block", turn_is_right, Bug::kNoSuchBlock, "no such block", "no such block", "no such block"},
    {"static shared memory in a cluster", turn_is_right, Bug::kStaticInCluster, "static shared memory",
     "static shared memory", "static shared memory"},
    {"missing named barrier", relay_is_right, Bug::kNoNamedBarrier, nullptr, nullptr, "emulator: race"},
    {"named barrier of too many", relay_is_right, Bug::kNamedBarrierCount, "deadlock", "deadlock", "deadlock"},
    {"too many registers", relay_is_right, Bug::kTooManyRegisters, "more registers than the block has",
     "more registers than the block has", "more registers than the block has"},
    {"half a warp group", relay_is_right, Bug::kPartOfGroup, "divergent warp group", "divergent warp group",
     "divergent warp group"},
    {"mbarrier without init", gemm_bf16_is_right, Bug::kNoInit, "was not initialised", "was not initialised",
     "was not initialised"},
    {"mbarrier used before it is known", gemm_bf16_is_right, Bug::kNoInitBarrier, nullptr, nullptr, "emulator: "},
    {"mbarrier without init fence", gemm_bf16_is_right, Bug::kNoInitFence, "mbarrier_init_fence", "mbarrier_init_fence",
     "mbarrier_init_fence"},
    {"no wait for a tile", gemm_bf16_is_right, Bug::kNoFullWait, nullptr, nullptr, "emulator: "},
    {"wrong parity", gemm_bf16_is_right, Bug::kWrongParity, nullptr, nullptr, "emulator: "},
    {"no wait for an empty stage", gemm_bf16_is_right, Bug::kNoEmptyWait, nullptr, nullptr, "emulator: "},
    {"stage given back too early", gemm_bf16_is_right, Bug::kEarlyRelease, nullptr, nullptr, "emulator: race"},
    {"too few bytes expected", gemm_bf16_is_right, Bug::kTooFewBytes, "emulator: ", "emulator: ", "emulator: "},
    {"too many bytes expected", gemm_bf16_is_right, Bug::kTooManyBytes, "lacks 0 arrivals and 16 bytes",
     "lacks 0 arrivals and 16 bytes", "lacks 0 arrivals and 16 bytes"},
    {"an arrival too many", gemm_bf16_is_right, Bug::kArrivesTwice, "more arrivals", "more arrivals", "more arrivals"},
    {"box out of bounds", gemm_bf16_is_right, Bug::kBoxBounds, "out of bounds: tma_load", "use-after-poison",
     "out of bounds: tma_load"},
    {"misaligned box", gemm_bf16_is_right, Bug::kMisalignedBox, "misaligned tma_load", "misaligned tma_load",
     "misaligned tma_load"},
    {"copy in flight at the end", gemm_bf16_is_right, Bug::kNoCopyWait, "tma_load or bulk_load in flight",
     "tma_load or bulk_load in flight", "tma_load or bulk_load in flight"},
    {"no proxy fence", gemm_bf16_is_right, Bug::kNoProxyFence, nullptr, nullptr, "no async_proxy_fence"},
    {"no wgmma_fence", gemm_bf16_is_right, Bug::kNoProductFence, "without wgmma_fence", "without wgmma_fence",
     "without wgmma_fence"},
    {"no wgmma_commit", gemm_bf16_is_right, Bug::kNoCommit, "before wgmma_commit", "before wgmma_commit",
     "before wgmma_commit"},
    {"wgmma in flight at the end", gemm_of_one_is_right, Bug::kNoProductWait, "wgmma in flight", "wgmma in flight",
     "wgmma in flight"},
    {"accumulators read too early", gemm_of_one_is_right, Bug::kEarlyRead, "wrong result", "wrong result",
     "wrong result"},
    {"step past a row of a box", gemm_bf16_is_right, Bug::kStepPastRow, "misaligned wgmma", "misaligned wgmma",
     "misaligned wgmma"},
    {"copy to a block not known to run", gemm_by_two_is_right, Bug::kNoBlockHasBegun, nullptr, nullptr, "emulator: "},
    {"no arrival at the other block", gemm_by_two_is_right, Bug::kNoRemoteArrival, "deadlock", "deadlock", "deadlock"},
    {"stage that the other block reads", gemm_by_two_is_right, Bug::kOwnReadersOnly, nullptr, nullptr, "emulator: "},
    {"plain reads before a remote arrival", gemm_by_two_is_right, Bug::kPlainReads, nullptr, nullptr, "emulator: race"},
    {"own bytes only", gemm_by_two_is_right, Bug::kOwnBytesOnly, "emulator: ", "emulator: ", "emulator: "},
    {"the same half by both blocks", gemm_by_two_is_right, Bug::kSameHalf, "wrong result", "wrong result",
     "emulator: "},
    {"own block only in the mask", gemm_by_two_is_right, Bug::kOwnMask, "deadlock", "deadlock", "deadlock"},
    {"no such block in the mask", gemm_by_two_is_right, Bug::kNoBlockInMask, "that the cluster has not",
     "that the cluster has not", "that the cluster has not"},
    {"a block ends that is arrived at", gemm_by_two_is_right, Bug::kEndsEarly, nullptr, nullptr,
     "an mbarrier of a block that"},
};

constexpr Right kRight[] = {{"turn", turn_is_right},
                            {"relay", relay_is_right},
                            {"gemm bf16", gemm_bf16_is_right},
                            {"gemm fp16 along output", gemm_fp16_along_output_is_right},
                            {"gemm 1x8x8", gemm_of_one_is_right},
                            {"gemm by two blocks", gemm_by_two_is_right},
                            {"gemm by two blocks along output", gemm_by_two_along_output_is_right}};

// As CUDA refuses them; and 227 KiB of shared memory, and not a byte more.
void impossible_launches_are_refused() {
  int x = 0;
  expect(through_shared(kMostSharedSm90 + 1, &x, nullptr) == cudaErrorInvalidValue && x == 0, "too much memory", {},
         "");
  expect(through_shared(kMostSharedSm90, &x, nullptr) == cudaSuccess && x == 7, "227 KiB", {}, "");
  expect(turn(Bug::kNone, 1, 16, &x, &x, nullptr) == cudaErrorInvalidClusterSize, "a cluster of 16", {}, "");
  expect(turn(Bug::kNone, 0, 2, &x, &x, nullptr) == cudaErrorInvalidConfiguration, "an empty grid", {}, "");
}

}  // namespace

int main(int argc, char** argv) {
  right_kernels_pass(kRight);
  planted_bugs_are_caught(kPlanted, argc > 1 && strcmp(argv[1], "--verbose") == 0);
  impossible_launches_are_refused();
  printf("%s: %d failures\n", kBuild, failures);
  return failures != 0;
}
