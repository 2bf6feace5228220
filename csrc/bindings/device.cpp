// The device query under the C name that Python calls through ctypes.
#include "common/device_query.h"

extern "C" __attribute__((visibility("default"))) const char* peft_kernels_cuda_devices() {
#ifdef PK_WITH_CUDA
  return pk::cuda_device_summary();
#else
  return "built without CUDA";
#endif
}
