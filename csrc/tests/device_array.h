// Arrays that kernels and the test both see: managed memory on a GPU, the heap (where AddressSanitizer guards them) in
// the emulator.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdio>
#include <cstdlib>

namespace pk::test {

#ifdef EMULATOR_BUILD
constexpr const char* kWhere = EMULATOR_BUILD;
inline bool device_present() {
  return true;
}
inline bool finished(cudaError_t launched) {
  return launched == cudaSuccess;
}
inline void* allocate(size_t bytes) {
  return malloc(bytes);
}
inline void release(void* memory) {
  free(memory);
}
#else
constexpr const char* kWhere = "gpu";
inline bool device_present() {
  int count = 0;
  return cudaGetDeviceCount(&count) == cudaSuccess && count > 0;
}
inline bool finished(cudaError_t launched) {
  return launched == cudaSuccess && cudaDeviceSynchronize() == cudaSuccess;
}
inline void* allocate(size_t bytes) {
  void* memory = nullptr;
  if (cudaMallocManaged(&memory, bytes) != cudaSuccess) abort();
  return memory;
}
inline void release(void* memory) {
  cudaFree(memory);
}
#endif

template <class T>
class Array {
 public:
  explicit Array(size_t size) : data_(static_cast<T*>(allocate(size * sizeof(T)))) {}
  ~Array() { release(data_); }
  Array(const Array&) = delete;
  Array& operator=(const Array&) = delete;
  T* data() { return data_; }
  T& operator[](size_t i) { return data_[i]; }

 private:
  T* data_;
};

constexpr int kSkipped = 77;  // ctest counts it as skipped

}  // namespace pk::test
