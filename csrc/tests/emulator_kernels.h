// Kernels that test the emulator, each right as it stands and wrong in the ways that Bug names (emulator_kernels.cu,
// emulator_kernels_sm90.cu).
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

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
  kNoLaunchWaits,     // neither do two in a row, and the second reads what was written before the first
  kNoWaitBetween,     // only the first of the two does not, which may end before what it does not wait for
  // Of clusters, named barriers and registers
  kNoFirstClusterBarrier,  // another block's shared memory before it is known to have begun
  kNoClusterBarrier,       // between a block's writes and another one's reads
  kNoLastClusterBarrier,   // a block ends while another one may still read its shared memory
  kDivergentCluster,       // some threads return before a cluster barrier
  kArriveTwice,            // cluster_arrive without its cluster_wait
  kNoSuchBlock,            // of_block of a rank that the cluster has not
  kStaticInCluster,        // static shared memory
  kNoNamedBarrier,         // between the writes of some warps and the reads of others
  kNamedBarrierCount,      // waits for a warp that does not come
  kTooManyRegisters,       // more than the block has
  kPartOfGroup,            // half of a warp group gives its registers away
  // Of mbarriers, copies and wgmma
  kNoInit,          // an mbarrier that nobody has initialised
  kNoInitBarrier,   // used by threads that may come before its initialisation
  kNoInitFence,     // the copies may not see its initialisation
  kNoFullWait,      // a tile is used before it has come
  kWrongParity,     // waits for the phase before
  kNoEmptyWait,     // a tile is overwritten that may be in use
  kEarlyRelease,    // a tile is given back before the product is done
  kTooFewBytes,     // expected by a phase
  kTooManyBytes,    // expected by a phase
  kArrivesTwice,    // one arrival too many
  kBoxBounds,       // a box past the end of shared memory
  kMisalignedBox,   // a box at a multiple of 512 bytes
  kNoCopyWait,      // the kernel ends with a copy in flight
  kNoProxyFence,    // between plain stores and wgmma
  kNoProductFence,  // wgmma without wgmma_fence
  kNoCommit,        // wgmma in no group
  kNoProductWait,   // the kernel ends with wgmma in flight
  kEarlyRead,       // of accumulators
  kStepPastRow,     // a step along k past the end of a box
  // Of copies to all blocks of a cluster
  kNoBlockHasBegun,  // a copy to a block that may not have begun
  kNoRemoteArrival,  // nobody tells the other block that a stage is read
  kOwnReadersOnly,   // and its producer does not wait for it either
  kPlainReads,       // by a block that arrives at another one's mbarrier
  kOwnBytesOnly,     // a block does not expect what the other one loads
  kSameHalf,         // both blocks load it
  kOwnMask,          // a block loads its half for itself alone
  kNoBlockInMask,    // a block that the cluster has not is to get a copy
  kEndsEarly,        // a block ends while the other one may still arrive at its mbarriers
};

// Calls launch(std::integral_constant) with the one of `kBugs` that is asked for, or with none of them.
template <Bug... kBugs, class Launch>
cudaError_t with_bug(Bug bug, Launch launch) {
  cudaError_t error = cudaErrorInvalidValue;
  const bool known = ((bug == kBugs && (error = launch(std::integral_constant<Bug, kBugs>()), true)) || ...);
  return known ? error : launch(std::integral_constant<Bug, Bug::kNone>());
}

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

// The same, with a third launch between the two, which leaves stencil(x) in `aside` and is overlapped as well.
cudaError_t stencil_past_another(Bug bug, const int* x, int* between, int* aside, int* y, int n, cudaStream_t stream);

// y[i] = x[31 - i] + 2 x[i], 32 of them, by way of 1 KiB of static and some dynamic shared memory.
constexpr size_t kStaticBytes = 1024;
cudaError_t both_kinds_of_shared(size_t dynamic_bytes, const int* x, int* y, cudaStream_t stream);

// -- of sm_90a (emulator_kernels_sm90.cu) -----------------------------------------------------------------------------

// y = x turned by a block's worth: block b of a cluster gets what the next one has. x [clusters, blocks, 64].
cudaError_t turn(Bug bug, int clusters, int blocks, const int* x, int* y, cudaStream_t stream);

// *y = 7, by way of the last of so many bytes of shared memory.
cudaError_t through_shared(size_t bytes, int* y, cudaStream_t stream);

// y = x reversed, 128 of them, by three warp groups: the first writes, the second reads.
cudaError_t relay(Bug bug, const int* x, int* y, cudaStream_t stream);

// C[M, N] = A[M, K] B in fp32, by TMA and wgmma; B is [N, K], or with `along_output` [K, N]. K and N are multiples
// of 8. Clusters of `blocks`, 1 or 2, load the tiles of B together.
template <class T>
cudaError_t warp_group_gemm(Bug bug, bool along_output, int blocks, const T* A, const T* B, float* C, int M, int N,
                            int K, cudaStream_t stream);

}  // namespace pk::test
