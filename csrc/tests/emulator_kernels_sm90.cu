// Kernels of sm_90a that test the emulator: a rotation through the blocks of a cluster, a relay between warp groups by
// a named barrier, and a GEMM whose warp groups are a producer (TMA, for all blocks of the cluster) and a consumer
// (wgmma). `kBug` plants one bug.
#include "common/cluster.h"
#include "common/tma.h"
#include "common/wgmma.h"
#include "tests/emulator_kernels.h"

namespace pk::test {
namespace {

constexpr int kTurnThreads = 64, kGroup = 128;
constexpr int kTileM = 64, kTileN = 128, kTileK = kSwizzledColumns, kStages = 3;
constexpr int kABytes = kTileM * 128, kBBytes = kTileN * 128, kStageBytes = kABytes + kBBytes;
constexpr int kBoxRows = 64;  // of every box

template <Bug kBug>
__global__ void turn_sm90_kernel(const int* x, int* y) {
  PK_DYNAMIC_SHARED(int, slots);  // [2][64]: from the next block, and for the block before to read
  const int t = static_cast<int>(threadIdx.x), i = static_cast<int>(blockIdx.x) * kTurnThreads + t;
  const int rank = cluster_rank(), blocks = cluster_blocks();
  if (kBug == Bug::kDivergentCluster && t >= kTurnThreads / 2) return;
  if (kBug != Bug::kNoFirstClusterBarrier) cluster_sync();
  of_block(slots, (rank + blocks - 1) % blocks)[t] = x[i];  // half of the way by a write, half by a read
  slots[kTurnThreads + t] = x[i];
  if (kBug == Bug::kArriveTwice) cluster_arrive();
  if (kBug == Bug::kNoClusterBarrier) {
    __syncthreads();
  } else {
    cluster_arrive();
    cluster_wait();
  }
  const int next = kBug == Bug::kNoSuchBlock ? blocks : (rank + 1) % blocks;
  const int read = of_block(slots, next)[kTurnThreads + t];
  y[i] = t % 2 == 0 ? slots[t] : read;
  if (kBug != Bug::kNoLastClusterBarrier) cluster_sync();
}

__global__ void static_in_cluster_sm90_kernel(const int* x, int* y) {
  __shared__ int slots[kTurnThreads];
  const int t = static_cast<int>(threadIdx.x);
  slots[t] = x[t];
  cluster_sync();
  y[t] = slots[t];
}

__global__ void through_shared_sm90_kernel(int count, int* y) {
  PK_DYNAMIC_SHARED(int, slots);
  slots[count - 1] = 7;
  *y = slots[count - 1];
}

template <Bug kBug>
__global__ void __launch_bounds__(3 * kGroup, 1) relay_sm90_kernel(const int* x, int* y) {
  PK_DYNAMIC_SHARED(int, slots);
  const int t = static_cast<int>(threadIdx.x), i = t % kGroup;
  if (t >= 2 * kGroup) {
    if (kBug != Bug::kPartOfGroup || i < kGroup / 2) give_registers<40>();
    return;
  }
  take_registers<kBug == Bug::kTooManyRegisters ? 248 : 216>();
  if (t < kGroup) slots[i] = x[i];
  constexpr int kMeet = kBug == Bug::kNamedBarrierCount ? 3 * kGroup : 2 * kGroup;
  if (kBug != Bug::kNoNamedBarrier) named_barrier(1, kMeet);
  if (t >= kGroup) y[i] = slots[kGroup - 1 - i];
}

struct Stage {
  unsigned char* tile;
  Mbarrier *full, *empty;
};

// One thread: brings stage t % 3 the tiles of columns 64 t ... of A and B, of B the block's share to all blocks.
template <Major kB, Bug kBug>
__device__ void produce(const Stage (&stages)[kStages], const TensorMap* a_map, const TensorMap* b_map, int m0, int n0,
                        int steps) {
  const int blocks = cluster_blocks(), rank = cluster_rank(), share = kBug == Bug::kSameHalf ? 0 : rank;
  const int to = kBug == Bug::kOwnMask ? 1 << rank : kBug == Bug::kNoBlockInMask ? 2 << blocks : (1 << blocks) - 1;
  for (int t = 0; t < steps + (kBug == Bug::kNoCopyWait); ++t) {
    const Stage& stage = stages[t % kStages];
    if (kBug != Bug::kNoEmptyWait) mbarrier_wait(stage.empty, t / kStages % 2 ^ 1);
    constexpr int kExtra = kBug == Bug::kTooFewBytes    ? -kABytes
                           : kBug == Bug::kTooManyBytes ? 16
                           : kBug == Bug::kOwnBytesOnly ? -kBBytes / 2
                                                        : 0;
    mbarrier_arrive_expect(stage.full, kStageBytes + kExtra);
    if (kBug == Bug::kArrivesTwice) mbarrier_arrive(stage.full);
    const int past = kBug == Bug::kBoxBounds && t % kStages == kStages - 1 ? kStageBytes : 0;
    const int off = kBug == Bug::kMisalignedBox ? 512 : 0;
    tma_load(stage.tile + off, a_map, stage.full, t * kTileK, m0);
    for (int n = share * kBoxRows; n < kTileN; n += blocks * kBoxRows) {
      const int col = kB == Major::kOutput ? n0 + n : t * kTileK, row = kB == Major::kOutput ? t * kTileK : n0 + n;
      tma_load_multicast(stage.tile + kABytes + n * 128 + past, b_map, stage.full, col, row, static_cast<uint16_t>(to));
    }
  }
}

// Turns the signs of the tile of A, by plain stores.
template <Bug kBug>
__device__ void negate(unsigned char* tile) {
  uint32_t* const pairs = reinterpret_cast<uint32_t*>(tile);
  for (int i = static_cast<int>(threadIdx.x); i < kABytes / 4; i += kGroup) pairs[i] ^= 0x80008000u;
  if (kBug == Bug::kPlainReads && pairs[kABytes / 4] == 1) pairs[0] = 0;
  if (kBug != Bug::kNoProxyFence) async_proxy_fence();
  named_barrier(1, kGroup);
}

// The producers of all blocks write into it.
template <Bug kBug>
__device__ void give_back(const Stage& stage) {
  for (int r = 0; r < cluster_blocks(); ++r) {
    if ((kBug == Bug::kNoRemoteArrival || kBug == Bug::kOwnReadersOnly) && r != cluster_rank()) continue;
    mbarrier_arrive_at(stage.empty, r);
  }
}

// One warp group. The product of a step runs while the next tile is awaited.
template <class T, Major kB, Bug kBug>
__device__ void consume(float (&sum)[kTileN / 2], const Stage (&stages)[kStages], int steps) {
  for (int t = 0; t < steps; ++t) {
    const Stage& stage = stages[t % kStages];
    if (kBug != Bug::kNoFullWait) mbarrier_wait(stage.full, (t / kStages + (kBug == Bug::kWrongParity)) % 2);
    negate<kBug>(stage.tile);
    const uint64_t a = wgmma_operand<Major::kContraction>(stage.tile);
    const uint64_t b = wgmma_operand<kB>(stage.tile + kABytes, kBoxRows);
    if (kBug != Bug::kNoProductFence) wgmma_fence(sum);
#pragma unroll
    for (int k = 0; k < kTileK / 16; ++k) {
      const int step = kBug == Bug::kStepPastRow ? k + 1 : k;
      wgmma_m64k16<T, kTileN, kB>(sum, wgmma_step<Major::kContraction>(a, step), wgmma_step<kB>(b, k));
    }
    if (kBug != Bug::kNoCommit) wgmma_commit();
    if (kBug == Bug::kEarlyRelease) give_back<kBug>(stage);
    if (kBug != Bug::kNoProductWait && kBug != Bug::kEarlyRead) wgmma_wait<1>(sum);
    if (kBug != Bug::kEarlyRelease && t > 0) give_back<kBug>(stages[(t - 1) % kStages]);
  }
  if (kBug != Bug::kNoProductWait && kBug != Bug::kEarlyRead) wgmma_wait<0>(sum);
}

// Grid (M / 64, N / 128), in clusters along M. Threads 0 ... 127 consume, thread 128 produces.
template <class T, Major kB, Bug kBug>
__global__ void __launch_bounds__(2 * kGroup, 1)
    warp_group_gemm_sm90_kernel(const __grid_constant__ TensorMap a_map, const __grid_constant__ TensorMap b_map,
                                float* C, int M, int N, int K) {
  PK_SWIZZLED_SHARED(unsigned char, shared);
  Mbarrier* const barriers = reinterpret_cast<Mbarrier*>(shared + kStages * kStageBytes);
  Stage stages[kStages];
  for (int s = 0; s < kStages; ++s) stages[s] = {shared + s * kStageBytes, barriers + s, barriers + kStages + s};
  const int t = static_cast<int>(threadIdx.x), m0 = static_cast<int>(blockIdx.x) * kTileM;
  const int n0 = static_cast<int>(blockIdx.y) * kTileN, steps = (K + kTileK - 1) / kTileK;
  if (t == 0 && kBug != Bug::kNoInit) {
    for (const Stage& stage : stages) {
      mbarrier_init(stage.full, 1);
      mbarrier_init(stage.empty, kGroup * (kBug == Bug::kOwnReadersOnly ? 1 : cluster_blocks()));
    }
    if (kBug != Bug::kNoInitFence) mbarrier_init_fence();
  }
  if (kBug == Bug::kNoBlockHasBegun) __syncthreads();
  if (kBug != Bug::kNoInitBarrier && kBug != Bug::kNoBlockHasBegun) cluster_sync();
  if (t >= kGroup) {
    give_registers<40>();
    if (t == kGroup) produce<kB, kBug>(stages, &a_map, &b_map, m0, n0, steps);
    __syncwarp();
  } else {
    take_registers<232>();
    float sum[kTileN / 2] = {};
    consume<T, kB, kBug>(sum, stages, steps);
    const int warp = t / 32, lane = t % 32;
#pragma unroll
    for (int i = 0; i < kTileN / 2; ++i) {
      const int m = m0 + 16 * warp + lane / 4 + 8 * (i / 2 % 2), n = n0 + 8 * (i / 4) + 2 * (lane % 4) + i % 2;
      if (m < M && n < N) C[static_cast<int64_t>(m) * N + n] = -sum[i];
    }
    if (kBug == Bug::kEarlyRead) wgmma_wait<0>(sum);
  }
  if (kBug != Bug::kEndsEarly) cluster_sync();
}

template <class T, Major kB>
cudaError_t launch_gemm(Bug bug, int blocks, const TensorMap& a_map, const TensorMap& b_map, float* C, int M, int N,
                        int K, cudaStream_t stream) {
  const int row_tiles = (M + kTileM - 1) / kTileM;
  const dim3 grid((row_tiles + blocks - 1) / blocks * blocks, (N + kTileN - 1) / kTileN);
  return with_bug<Bug::kNoInit, Bug::kNoInitBarrier, Bug::kNoInitFence, Bug::kNoFullWait, Bug::kWrongParity,
                  Bug::kNoEmptyWait, Bug::kEarlyRelease, Bug::kTooFewBytes, Bug::kTooManyBytes, Bug::kArrivesTwice,
                  Bug::kBoxBounds, Bug::kMisalignedBox, Bug::kNoCopyWait, Bug::kNoProxyFence, Bug::kNoProductFence,
                  Bug::kNoCommit, Bug::kNoProductWait, Bug::kEarlyRead, Bug::kStepPastRow, Bug::kNoBlockHasBegun,
                  Bug::kNoRemoteArrival, Bug::kOwnReadersOnly, Bug::kPlainReads, Bug::kOwnBytesOnly, Bug::kSameHalf,
                  Bug::kOwnMask, Bug::kNoBlockInMask, Bug::kEndsEarly>(bug, [&](auto planted) {
    return PK_LAUNCH_CLUSTER((warp_group_gemm_sm90_kernel<T, kB, planted.value>), blocks, false, grid, dim3(2 * kGroup),
                             kStages * (kStageBytes + 2 * sizeof(Mbarrier)), stream, a_map, b_map, C, M, N, K);
  });
}

}  // namespace

cudaError_t turn(Bug bug, int clusters, int blocks, const int* x, int* y, cudaStream_t stream) {
  if (bug == Bug::kStaticInCluster) {
    return PK_LAUNCH_CLUSTER(static_in_cluster_sm90_kernel, blocks, false, dim3(blocks), dim3(kTurnThreads), 0, stream,
                             x, y);
  }
  return with_bug<Bug::kNoFirstClusterBarrier, Bug::kNoClusterBarrier, Bug::kNoLastClusterBarrier,
                  Bug::kDivergentCluster, Bug::kArriveTwice, Bug::kNoSuchBlock>(bug, [&](auto planted) {
    return PK_LAUNCH_CLUSTER((turn_sm90_kernel<planted.value>), blocks, false, dim3(clusters * blocks),
                             dim3(kTurnThreads), 2 * kTurnThreads * sizeof(int), stream, x, y);
  });
}

cudaError_t through_shared(size_t bytes, int* y, cudaStream_t stream) {
  return PK_LAUNCH_CLUSTER(through_shared_sm90_kernel, 1, false, dim3(1), dim3(1), bytes, stream,
                           static_cast<int>(bytes / sizeof(int)), y);
}

cudaError_t relay(Bug bug, const int* x, int* y, cudaStream_t stream) {
  return with_bug<Bug::kNoNamedBarrier, Bug::kNamedBarrierCount, Bug::kTooManyRegisters, Bug::kPartOfGroup>(
      bug, [&](auto planted) {
        return PK_LAUNCH_CLUSTER((relay_sm90_kernel<planted.value>), 1, false, dim3(1), dim3(3 * kGroup),
                                 kGroup * sizeof(int), stream, x, y);
      });
}

template <class T>
cudaError_t warp_group_gemm(Bug bug, bool along_output, int blocks, const T* A, const T* B, float* C, int M, int N,
                            int K, cudaStream_t stream) {
  TensorMap a_map, b_map;
  cudaError_t error = make_tensor_map(&a_map, A, M, K, K, kTileM, kTileK);
  if (error == cudaSuccess) {
    error = along_output ? make_tensor_map(&b_map, B, K, N, N, kBoxRows, kTileK)
                         : make_tensor_map(&b_map, B, N, K, K, kBoxRows, kTileK);
  }
  if (error != cudaSuccess) return error;
  return along_output ? launch_gemm<T, Major::kOutput>(bug, blocks, a_map, b_map, C, M, N, K, stream)
                      : launch_gemm<T, Major::kContraction>(bug, blocks, a_map, b_map, C, M, N, K, stream);
}

template cudaError_t warp_group_gemm(Bug, bool, int, const bf16*, const bf16*, float*, int, int, int, cudaStream_t);
template cudaError_t warp_group_gemm(Bug, bool, int, const fp16*, const fp16*, float*, int, int, int, cudaStream_t);

}  // namespace pk::test
