// Kernels that test the emulator, each right as it stands and wrong in the ways that Bug names (emulator_kernels.cu).
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "common/dtype.h"

namespace pk::test {

enum class Bug {
  kNone,
  kGlobalRead,        // one row past the end of an input
  kGlobalWrite,       // one row past the end of the output
  kSharedBounds,      // a tile's row past the end of shared memory
  kMissingBarrier,    // between the copies of some threads and the reads of others
  kWrongWait,         // one group of copies too many left in flight
  kStageInUse,        // the next copies go into the stage that is being read
  kNoLastWait,        // the kernel ends with copies in flight
  kDivergentBarrier,  // only some threads of a block reach it
  kEarlyReturn,       // some threads of a block return before it
  kUnwritten,         // shared memory that nobody wrote
  kWarpRace,          // no __syncwarp between lanes
  kDivergentShuffle,  // half of the lanes of the mask
  kBlockRace,         // blocks count with a plain addition
  kMissingFence,      // a block's results are announced before they are visible
  kNoLaunchWait,      // an overlapped launch does not wait for the one before it
};

// C[M, N] = A[M, K] B[N, K]^T in fp32, 16-bit inputs, K a multiple of 8.
template <class T>
cudaError_t gemm(Bug bug, const T* A, const T* B, float* C, int M, int N, int K, cudaStream_t stream);

// y[i] = x[i - 1] + x[i + 1], zero outside.
cudaError_t stencil(Bug bug, const int* x, int* y, int n, cudaStream_t stream);

// Of each 32: y = x reversed, plus the sum of x. n a multiple of 32, one block.
cudaError_t reverse(Bug bug, const int* x, int* y, int n, cudaStream_t stream);

// total = sum of x: each block sums a part, the last to finish adds the parts in their order. tickets starts at 0.
constexpr int kSumBlocks = 5;
cudaError_t ordered_sum(Bug bug, const float* x, float* parts, int* tickets, float* total, int n, cudaStream_t stream);

// y = stencil(stencil(x)) by two launches, the second overlapped with the first.
cudaError_t stencil_twice(Bug bug, const int* x, int* between, int* y, int n, cudaStream_t stream);

// y[i] = x[31 - i] + 2 x[i], 32 of them, by way of 1 KiB of static and some dynamic shared memory.
constexpr size_t kStaticBytes = 1024;
cudaError_t both_kinds_of_shared(size_t dynamic_bytes, const int* x, int* y, cudaStream_t stream);

}  // namespace pk::test
