// How a kernel is started and how it names its dynamic shared memory: by nvcc on a GPU, by g++ in csrc/emulator. The
// headers launch.h, warp.h, cp_async.h and mma.h, and for kernels of sm_90a (`*_sm90.cu`) cluster.h, mbarrier.h, tma.h
// and wgmma.h, are the one seam between the two; all PTX of the project is in them.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>

namespace pk {

// Static and dynamic shared memory of a block: what sm_86, 89 and 120 have, and what a kernel for sm_90 alone may have,
// which is launched by PK_LAUNCH_CLUSTER (cluster.h). The emulator refuses more.
constexpr size_t kMostSharedEverywhere = 99 * 1024, kMostSharedSm90 = 227 * 1024;

}  // namespace pk

#ifdef __CUDACC__

namespace pk {

__device__ __forceinline__ uint32_t shared_address(const void* place) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(place));
}

// Lets a kernel have all the dynamic shared memory that its static kind leaves. Always to the same size: another thread
// may be about to launch it with another one.
inline cudaError_t allow_most_shared(const void* kernel, size_t static_bytes) {
  int device = 0, most = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  if (error != cudaSuccess) return error;
  return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                              most - static_cast<int>(static_bytes));
}

// Returns the launch's own error. overlapped: the blocks may start before the launch before them in the stream has
// ended; the kernel calls wait_for_previous_launch() before it touches what that launch reads or writes. Ignored where
// that is no instruction: what counts is the architecture that the kernel was compiled for (ptxVersion), not the
// device's, which may have compiled an older one's PTX. cluster_blocks neighbours along x form a cluster.
template <class... Parameters, class... Arguments>
inline cudaError_t launch(bool overlapped, int cluster_blocks, void (*kernel)(Parameters...), dim3 grid, dim3 block,
                          size_t shared_bytes, cudaStream_t stream, Arguments&&... arguments) {
  cudaFuncAttributes compiled = {};
  if (overlapped || shared_bytes > 0) {
    const void* const entry = reinterpret_cast<const void*>(kernel);
    cudaError_t error = cudaFuncGetAttributes(&compiled, entry);
    // At first 48 KiB less the static kind.
    if (error == cudaSuccess && shared_bytes > static_cast<size_t>(compiled.maxDynamicSharedSizeBytes)) {
      error = allow_most_shared(entry, compiled.sharedSizeBytes);
    }
    if (error != cudaSuccess) return error;
  }
  cudaLaunchAttribute attributes[2] = {};
  unsigned count = 0;
  if (overlapped && compiled.ptxVersion >= 90) {
    attributes[count].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[count++].val.programmaticStreamSerializationAllowed = 1;
  }
  if (cluster_blocks > 1) {
    attributes[count].id = cudaLaunchAttributeClusterDimension;
    attributes[count++].val.clusterDim = {static_cast<unsigned>(cluster_blocks), 1, 1};
  }
  cudaLaunchConfig_t shape = {};
  shape.gridDim = grid;
  shape.blockDim = block;
  shape.dynamicSmemBytes = shared_bytes;
  shape.stream = stream;
  shape.attrs = attributes;
  shape.numAttrs = count;
  return cudaLaunchKernelEx(&shape, kernel, static_cast<Arguments&&>(arguments)...);
}

__device__ __forceinline__ void wait_for_previous_launch() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// The next launch, if it is overlapped, may start as soon as all blocks have said so or ended.
__device__ __forceinline__ void let_next_launch_start() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
#endif
}

}  // namespace pk

// Aligned to 128 bytes. A kernel names it once.
#define PK_DYNAMIC_SHARED(T, name)                              \
  extern __shared__ __align__(128) unsigned char pk_dynamic_[]; \
  T* const name = reinterpret_cast<T*>(pk_dynamic_)

// cudaError_t PK_LAUNCH(kernel, grid, block, shared_bytes, stream, arguments...); a kernel with commas in parentheses.
#define PK_LAUNCH(kernel, ...) ::pk::launch(false, 1, kernel, __VA_ARGS__)
#define PK_LAUNCH_OVERLAPPED(kernel, ...) ::pk::launch(true, 1, kernel, __VA_ARGS__)

#else

#include "emulator/emulator.h"

#define PK_DYNAMIC_SHARED(T, name) \
  T* const name = static_cast<T*>(emulator::dynamic_shared(128, emulator::Site::here()))
#define PK_LAUNCH(kernel, ...) emulator::launch(#kernel, false, 0, kernel, __VA_ARGS__)
#define PK_LAUNCH_OVERLAPPED(kernel, ...) emulator::launch(#kernel, true, 0, kernel, __VA_ARGS__)

namespace pk {

using emulator::wait_for_previous_launch;
inline void let_next_launch_start() {}

}  // namespace pk

#endif
