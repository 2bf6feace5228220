// Kernels that test the emulator: a pipelined tile GEMM (mma.sync, ldmatrix, cp.async), a stencil in static shared
// memory, a reversal within warps, a sum whose last block adds up what all wrote, and two overlapped launches. `kBug`
// plants one bug. They keep the three conventions of a kernel: PTX only in csrc/common, PK_DYNAMIC_SHARED, PK_LAUNCH.
#include "common/cp_async.h"
#include "common/mma.h"
#include "common/warp.h"
#include "tests/emulator_kernels.h"

namespace pk::test {
namespace {

constexpr int kTile = 64, kDepth = 32, kStages = 3, kThreads = 128;
constexpr int kPitch = kDepth + 8;  // elements; the padding spreads ldmatrix's rows over all banks
constexpr int kStageElements = 2 * kTile * kPitch;
constexpr int kSumThreads = 64, kStencilThreads = 64;

// Tile rows row0 ... of source [rows, K], columns k0 ...; zeros outside.
template <class T, Bug kBug>
__device__ void copy_tile(T* tile, const T* source, int row0, int rows, int k0, int K) {
  for (int chunk = threadIdx.x; chunk < kTile * kDepth / 8; chunk += kThreads) {
    const int row = chunk / (kDepth / 8), k = chunk % (kDepth / 8) * 8;
    const int last = kBug == Bug::kGlobalRead ? rows + 1 : rows;
    const bool inside = row0 + row < last && k0 + k < K;
    const T* const from = inside ? source + static_cast<int64_t>(row0 + row) * K + k0 + k : source;
    cp_async<16>(tile + row * kPitch + k, from, inside ? 16 : 0);
  }
}

template <class T>
__device__ void multiply_stage(float (&sum)[2][4][4], const T* a_tile, const T* b_tile) {
  const int lane = lane_index();
#pragma unroll
  for (int k = 0; k < kDepth; k += 16) {
    uint32_t a[2][4], b[4][2];
#pragma unroll
    for (int i = 0; i < 2; ++i) ldmatrix(a[i], a_tile + (16 * i + lane % 16) * kPitch + k + lane / 16 * 8);
#pragma unroll
    for (int j = 0; j < 4; ++j) ldmatrix(b[j], b_tile + (8 * j + lane % 8) * kPitch + k + lane / 8 % 2 * 8);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
#pragma unroll
      for (int j = 0; j < 4; ++j) mma_m16n8k16<T>(sum[i][j], a[i], b[j]);
    }
  }
}

// Grid (N / 64, M / 64), 4 warps of 32 x 32; stage t % 3 holds columns 32 t ... of A and B.
template <class T, Bug kBug>
__global__ void __launch_bounds__(kThreads) gemm_kernel(const T* A, const T* B, float* C, int M, int N, int K) {
  PK_DYNAMIC_SHARED(T, stages);
  const int lane = lane_index(), warp = warp_index();
  const int m0 = blockIdx.y * kTile, n0 = blockIdx.x * kTile, warp_m = warp / 2 * 32, warp_n = warp % 2 * 32;
  const auto start_copies = [&](int stage, int k0) {
    T* const a_tile = stages + stage * kStageElements;
    copy_tile<T, kBug>(a_tile, A, m0, M, k0, K);
    copy_tile<T, Bug::kNone>(a_tile + kTile * kPitch, B, n0, N, k0, K);
    cp_async_commit();
  };
  for (int t = 0; t < kStages - 1; ++t) start_copies(t, t * kDepth);
  float sum[2][4][4] = {};
  const int steps = (K + kDepth - 1) / kDepth;
  for (int t = 0; t < steps; ++t) {
    cp_async_wait<kBug == Bug::kWrongWait ? kStages - 1 : kStages - 2>();
    if (kBug != Bug::kMissingBarrier) __syncthreads();
    const int ahead = kBug == Bug::kStageInUse ? t : t + kStages - 1;
    start_copies(ahead % kStages, (t + kStages - 1) * kDepth);
    const T* const a_tile = stages + t % kStages * kStageElements;
    const int below = kBug == Bug::kSharedBounds ? kStages * kTile : 0;
    multiply_stage(sum, a_tile + warp_m * kPitch, a_tile + (kTile + warp_n + below) * kPitch);
  }
  if (kBug != Bug::kNoLastWait) cp_async_wait<0>();
#pragma unroll
  for (int i = 0; i < 2; ++i) {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int m = m0 + warp_m + 16 * i + lane / 4 + e / 2 * 8, n = n0 + warp_n + 8 * j + lane % 4 * 2 + e % 2;
        const int last = kBug == Bug::kGlobalWrite ? M + 1 : M;
        if (m < last && n < N) C[static_cast<int64_t>(m) * N + n] = sum[i][j][e];
      }
    }
  }
}

template <Bug kBug>
__global__ void __launch_bounds__(kStencilThreads) stencil_kernel(const int* x, int* y, int n) {
  __shared__ int tile[kStencilThreads + 2];
  const int t = static_cast<int>(threadIdx.x), i = static_cast<int>(blockIdx.x) * kStencilThreads + t;
  if (kBug != Bug::kNoLaunchWait) wait_for_previous_launch();
  if (kBug == Bug::kEarlyReturn && i >= n) return;
  tile[t + 1] = i < n ? x[i] : 0;
  if (t == 0 && kBug != Bug::kUnwritten) tile[0] = i > 0 ? x[i - 1] : 0;
  if (t == 0) tile[kStencilThreads + 1] = i + kStencilThreads < n ? x[i + kStencilThreads] : 0;
  if (kBug == Bug::kDivergentBarrier) {
    if (t < 40) {
      __syncthreads();
    } else {
      __syncthreads();
    }
  } else if (kBug != Bug::kMissingBarrier) {
    __syncthreads();
  }
  const int right = kBug == Bug::kSharedBounds ? t + 3 : t + 2;
  if (i < n) y[i] = tile[t] + tile[right];
}

template <Bug kBug>
__global__ void reverse_kernel(const int* x, int* y) {
  PK_DYNAMIC_SHARED(int, slots);
  const int t = static_cast<int>(threadIdx.x), lane = lane_index();
  slots[t] = x[t];
  if (kBug != Bug::kWarpRace) __syncwarp();
  const int mirrored = slots[t - lane + 31 - lane];
  int sum = 0;
  if (kBug != Bug::kDivergentShuffle || lane < 16) sum = warp_sum(x[t]);
  y[t] = mirrored + sum;
}

template <Bug kBug>
__global__ void ordered_sum_kernel(const float* x, float* parts, int* tickets, float* total, int n) {
  __shared__ float of_warp[kSumThreads / 32];
  __shared__ bool last;
  const int t = static_cast<int>(threadIdx.x), block = static_cast<int>(blockIdx.x);
  float sum = 0.f;
  for (int i = block * kSumThreads + t; i < n; i += kSumBlocks * kSumThreads) sum += x[i];
  sum = warp_sum(sum);
  if (lane_index() == 0) of_warp[warp_index()] = sum;
  __syncthreads();
  if (t == 0) {
    parts[block] = of_warp[0] + of_warp[1];
    if (kBug != Bug::kMissingFence) __threadfence();
    const int ticket = kBug == Bug::kBlockRace ? (*tickets)++ : atomicAdd(tickets, 1);
    __threadfence();
    last = ticket == kSumBlocks - 1;
  }
  __syncthreads();
  if (last && t == kSumThreads - 1) {
    float all = 0.f;
    for (int i = 0; i < kSumBlocks; ++i) all += parts[i];
    *total = all;
  }
}

__global__ void both_kinds_kernel(const int* x, int* y) {
  __shared__ int fixed[kStaticBytes / sizeof(int)];
  PK_DYNAMIC_SHARED(int, slots);
  const int t = static_cast<int>(threadIdx.x);
  fixed[t] = x[t];
  slots[t] = 2 * x[t];
  __syncwarp();
  y[t] = fixed[31 - t] + slots[t];
}

}  // namespace

template <class T>
cudaError_t gemm(Bug bug, const T* A, const T* B, float* C, int M, int N, int K, cudaStream_t stream) {
  const dim3 grid((N + kTile - 1) / kTile, (M + kTile - 1) / kTile);
  return with_bug<Bug::kGlobalRead, Bug::kGlobalWrite, Bug::kSharedBounds, Bug::kMissingBarrier, Bug::kWrongWait,
                  Bug::kStageInUse, Bug::kNoLastWait>(bug, [&](auto planted) {
    return PK_LAUNCH((gemm_kernel<T, planted.value>), grid, dim3(kThreads), kStages * kStageElements * sizeof(T),
                     stream, A, B, C, M, N, K);
  });
}

template cudaError_t gemm(Bug, const bf16*, const bf16*, float*, int, int, int, cudaStream_t);
template cudaError_t gemm(Bug, const fp16*, const fp16*, float*, int, int, int, cudaStream_t);

cudaError_t stencil(Bug bug, const int* x, int* y, int n, cudaStream_t stream) {
  const dim3 grid((n + kStencilThreads - 1) / kStencilThreads);
  return with_bug<Bug::kSharedBounds, Bug::kMissingBarrier, Bug::kDivergentBarrier, Bug::kEarlyReturn, Bug::kUnwritten>(
      bug, [&](auto planted) {
        return PK_LAUNCH((stencil_kernel<planted.value>), grid, dim3(kStencilThreads), 0, stream, x, y, n);
      });
}

cudaError_t reverse(Bug bug, const int* x, int* y, int n, cudaStream_t stream) {
  return with_bug<Bug::kWarpRace, Bug::kDivergentShuffle>(bug, [&](auto planted) {
    return PK_LAUNCH((reverse_kernel<planted.value>), dim3(1), dim3(n), n * sizeof(int), stream, x, y);
  });
}

cudaError_t ordered_sum(Bug bug, const float* x, float* parts, int* tickets, float* total, int n, cudaStream_t stream) {
  return with_bug<Bug::kBlockRace, Bug::kMissingFence>(bug, [&](auto planted) {
    return PK_LAUNCH((ordered_sum_kernel<planted.value>), dim3(kSumBlocks), dim3(kSumThreads), 0, stream, x, parts,
                     tickets, total, n);
  });
}

cudaError_t stencil_twice(Bug bug, const int* x, int* between, int* y, int n, cudaStream_t stream) {
  const dim3 grid((n + kStencilThreads - 1) / kStencilThreads);
  const cudaError_t error = stencil(Bug::kNone, x, between, n, stream);
  if (error != cudaSuccess) return error;
  return with_bug<Bug::kNoLaunchWait>(bug, [&](auto planted) {
    return PK_LAUNCH_OVERLAPPED((stencil_kernel<planted.value>), grid, dim3(kStencilThreads), 0, stream, between, y, n);
  });
}

cudaError_t stencil_past_another(Bug bug, const int* x, int* between, int* aside, int* y, int n, cudaStream_t stream) {
  const dim3 grid((n + kStencilThreads - 1) / kStencilThreads), block(kStencilThreads);
  return with_bug<Bug::kNoLaunchWaits, Bug::kNoWaitBetween>(bug, [&](auto planted) {
    constexpr Bug kFirst = planted.value == Bug::kNone ? Bug::kNone : Bug::kNoLaunchWait;
    constexpr Bug kSecond = planted.value == Bug::kNoLaunchWaits ? Bug::kNoLaunchWait : Bug::kNone;
    cudaError_t error = stencil(Bug::kNone, x, between, n, stream);
    if (error == cudaSuccess) {
      error = PK_LAUNCH_OVERLAPPED(stencil_kernel<kFirst>, grid, block, 0, stream, x, aside, n);
    }
    if (error != cudaSuccess) return error;
    return PK_LAUNCH_OVERLAPPED(stencil_kernel<kSecond>, grid, block, 0, stream, between, y, n);
  });
}

cudaError_t both_kinds_of_shared(size_t dynamic_bytes, const int* x, int* y, cudaStream_t stream) {
  return PK_LAUNCH(both_kinds_kernel, dim3(1), dim3(32), dynamic_bytes, stream, x, y);
}

}  // namespace pk::test
