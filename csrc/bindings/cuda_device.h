// All that the CUDA operators do differently on a GPU and in the emulator (PK_EMULATED: their tensors are the CPU's):
// the device and the stream of a call, the library GEMM, the words of an error; and whether the kernels for sm_90a
// (`*_sm90.cu`) are wanted there.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>

#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "bindings/tensors.h"

#ifndef PK_EMULATED
// Weak: only libtorch_cuda has them, and the library is to load beside a torch that comes without.
extern "C" {
__attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index, void** stream);
__attribute__((weak)) AOTITorchError aoti_torch_cuda_mm_out(AtenTensorHandle out, AtenTensorHandle a,
                                                            AtenTensorHandle b);
__attribute__((weak)) AOTITorchError aoti_torch_cuda_addmm_out(AtenTensorHandle out, AtenTensorHandle added,
                                                               AtenTensorHandle a, AtenTensorHandle b, double beta,
                                                               double alpha);
}
#endif

namespace pk {

// They are not measured yet, and are asked for by the environment until they are. Read at each call on Hopper (and in
// the emulator), nowhere else: 30 to 100 ns.
inline bool sm90_asked_for() {
  const char* const value = std::getenv("PEFT_KERNELS_SM90");
  return value != nullptr && std::strcmp(value, "1") == 0;
}

#ifdef PK_EMULATED

class OnDevice {
 public:
  explicit OnDevice(Device) {}
  cudaStream_t stream() const { return nullptr; }
  int multiprocessors() const { return 2; }  // so that a block of a small grid has several units of work in turn
};

inline bool sm90_wanted(const OnDevice&) {
  return sm90_asked_for();
}

inline void cuda_gemm(const Tensor& out, const Tensor& a, const Tensor& b, bool accumulate) {
  gemm(out, a, b, accumulate);
}

inline std::string words_of(cudaError_t error) {
  return "CUDA error " + std::to_string(error);
}

#else

inline bool torch_has_cuda() {
  return aoti_torch_get_current_cuda_stream && aoti_torch_cuda_mm_out && aoti_torch_cuda_addmm_out;
}

// While it lives, a device is the current one; its stream is the caller's current stream there.
class OnDevice {
 public:
  explicit OnDevice(Device device) : guard_(device.index), index_(device.index) {
    cudaSetDevice(device.index);  // this library's own runtime, linked statically, is told too
    void* stream;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device.index, &stream));
    stream_ = static_cast<cudaStream_t>(stream);
  }
  cudaStream_t stream() const { return stream_; }
  int index() const { return index_; }
  int multiprocessors() const {
    int count = 0;
    return cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, index_) == cudaSuccess ? count : 1;
  }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  int index_;
  cudaStream_t stream_;
};

inline bool sm90_wanted(const OnDevice& on) {
  static const std::vector<bool> can = [] {
    int count = 0;
    if (cudaGetDeviceCount(&count) != cudaSuccess) count = 0;
    std::vector<bool> of_device(count);
    for (int i = 0; i < count; ++i) {
      int major = 0, minor = 0;
      cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, i);
      cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, i);
      of_device[i] = major == 9 && minor == 0;
    }
    return of_device;
  }();
  return on.index() < static_cast<int>(can.size()) && can[on.index()] && sm90_asked_for();
}

// out (+)= a b.
inline void cuda_gemm(const Tensor& out, const Tensor& a, const Tensor& b, bool accumulate) {
  if (accumulate) {
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_cuda_addmm_out(out.get(), out.get(), a.get(), b.get(), 1.0, 1.0));
  } else {
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_cuda_mm_out(out.get(), a.get(), b.get()));
  }
}

inline std::string words_of(cudaError_t error) {
  return cudaGetErrorString(error);
}

#endif

}  // namespace pk
