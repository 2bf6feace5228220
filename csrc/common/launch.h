// How a kernel is started and how it names its dynamic shared memory: by nvcc on a GPU, by g++ in csrc/emulator. The
// headers launch.h, warp.h, cp_async.h and mma.h are the one seam between the two; all PTX of the project is in them.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>

#ifdef __CUDACC__

namespace pk {

// Asks for more than 48 KiB of dynamic shared memory where that is needed, and returns the launch's own error.
// overlapped: the blocks may start before the launch before them in the stream has ended (Hopper and later; elsewhere
// ignored); the kernel calls wait_for_previous_launch() before it touches what that launch reads or writes.
template <class... Parameters, class... Arguments>
inline cudaError_t launch(bool overlapped, void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes,
                          cudaStream_t stream, Arguments&&... arguments) {
  if (shared_bytes > 48 * 1024) {
    const cudaError_t error =
        cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize,
                             static_cast<int>(shared_bytes));
    if (error != cudaSuccess) return error;
  }
  int device = 0, major = 0;
  if (overlapped && cudaGetDevice(&device) == cudaSuccess) {
    cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  }
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t shape = {};
  shape.gridDim = grid;
  shape.blockDim = block;
  shape.dynamicSmemBytes = shared_bytes;
  shape.stream = stream;
  shape.attrs = &attribute;
  shape.numAttrs = major >= 9 ? 1 : 0;
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
#define PK_LAUNCH(kernel, ...) ::pk::launch(false, kernel, __VA_ARGS__)
#define PK_LAUNCH_OVERLAPPED(kernel, ...) ::pk::launch(true, kernel, __VA_ARGS__)

#else

#include "emulator/emulator.h"

#define PK_DYNAMIC_SHARED(T, name) T* const name = static_cast<T*>(emulator::dynamic_shared(emulator::Site::here()))
#define PK_LAUNCH(kernel, ...) emulator::launch(#kernel, false, kernel, __VA_ARGS__)
#define PK_LAUNCH_OVERLAPPED(kernel, ...) emulator::launch(#kernel, true, kernel, __VA_ARGS__)

namespace pk {

using emulator::wait_for_previous_launch;
inline void let_next_launch_start() {}

}  // namespace pk

#endif
