// What there is of CUDA, under the C names that Python calls through ctypes.
#include "common/device_query.h"

#ifdef PK_WITH_CUDA
#include "bindings/cuda_device.h"
#endif

#define PK_EXPORT extern "C" __attribute__((visibility("default")))

PK_EXPORT const char* peft_kernels_cuda_devices() {
#ifdef PK_WITH_CUDA
  return pk::cuda_device_summary();
#else
  return "built without CUDA";
#endif
}

// 1 if this library has code for devices of that compute capability, else 0. Asks no device.
PK_EXPORT int peft_kernels_cuda_serves([[maybe_unused]] int major, [[maybe_unused]] int minor) {
#ifdef PK_WITH_CUDA
  return pk::cuda_serves(major, minor) ? 1 : 0;
#else
  return 0;
#endif
}

// Why the CUDA operators cannot run in this process, whatever its devices; empty where they can.
PK_EXPORT const char* peft_kernels_cuda_missing() {
#ifdef PK_WITH_CUDA
  return pk::torch_has_cuda() ? "" : "this torch comes without CUDA";
#else
  return "built without CUDA";
#endif
}
