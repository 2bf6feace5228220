// Arrays that kernels and the test both see. On a GPU each is there twice, and copied when the other side wants it;
// what the test has not touched before a launch is uninitialised there, which compute-sanitizer's initcheck sees (in a
// copy back too: a kernel writes all of such an array). In the emulator both are one piece of the heap, where
// AddressSanitizer guards them.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstddef>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

namespace pk::test {

#ifdef EMULATOR_BUILD

constexpr const char* kWhere = EMULATOR_BUILD;
inline bool device_present() {
  return true;
}
inline bool sm90_present() {
  return true;
}

class Memory {
 public:
  explicit Memory(size_t bytes) : memory_(malloc(bytes)) {}
  ~Memory() { free(memory_); }
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;
  void* host() const { return memory_; }
  void* device() const { return memory_; }

 private:
  void* memory_;
};

inline void before_launch() {}
inline cudaError_t after_launch(cudaError_t launched) {
  return launched;
}
inline std::string words_of(cudaError_t error) {
  return "CUDA error " + std::to_string(error);
}

#else

constexpr const char* kWhere = "gpu";
inline bool device_present() {
  int count = 0;
  return cudaGetDeviceCount(&count) == cudaSuccess && count > 0;
}
inline bool sm90_present() {  // what the kernels of *_sm90.cu need
  int major = 0, minor = 0;
  return device_present() && cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, 0) == cudaSuccess &&
         cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, 0) == cudaSuccess && major == 9 &&
         minor == 0;
}
inline std::string words_of(cudaError_t error) {
  return cudaGetErrorString(error);
}

class Memory {
 public:
  explicit Memory(size_t bytes) : bytes_(bytes), host_(malloc(bytes)) {
    if (bytes > 0) must(cudaMalloc(&device_, bytes), "cudaMalloc");
    all().push_back(this);
  }
  ~Memory() {
    free(host_);
    cudaFree(device_);
    all().erase(std::find(all().begin(), all().end(), this));
  }
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;

  void* device() const { return device_; }
  void* host() {
    if (behind_) copy(host_, device_, cudaMemcpyDeviceToHost);
    behind_ = false;
    ahead_ = true;  // the caller may write
    return host_;
  }
  void to_device() {
    if (ahead_) copy(device_, host_, cudaMemcpyHostToDevice);
    ahead_ = false;
  }
  void device_has_changed() { behind_ = true; }
  static std::vector<Memory*>& all() {
    static std::vector<Memory*> memories;
    return memories;
  }

 private:
  void copy(void* to, const void* from, cudaMemcpyKind kind) const {
    if (bytes_ > 0) must(cudaMemcpy(to, from, bytes_, kind), "cudaMemcpy");
  }
  static void must(cudaError_t error, const char* what) {
    if (error == cudaSuccess) return;
    printf("FAILED %s: %s: %s\n", kWhere, what, words_of(error).c_str());
    exit(1);
  }

  size_t bytes_;
  void* host_;
  void* device_ = nullptr;
  bool ahead_ = false, behind_ = false;  // of the device's, the host's memory
};

inline void before_launch() {
  for (Memory* memory : Memory::all()) memory->to_device();
}
inline cudaError_t after_launch(cudaError_t launched) {
  for (Memory* memory : Memory::all()) memory->device_has_changed();
  return launched == cudaSuccess ? cudaDeviceSynchronize() : launched;
}

#endif

// `launch` returns the error of its launches. False, and a line that says why, where they or their kernels fail.
template <class Launch>
bool ran(const Launch& launch) {
  before_launch();
  const cudaError_t error = after_launch(launch());
  if (error != cudaSuccess) printf("%s: the launch failed: %s\n", kWhere, words_of(error).c_str());
  return error == cudaSuccess;
}

// data() is what a launch is given; host() and [] are the test's, before and after ran().
template <class T>
class Array {
 public:
  explicit Array(size_t size) : memory_(size * sizeof(T)) {}
  T* data() const { return static_cast<T*>(memory_.device()); }
  T* host() { return static_cast<T*>(memory_.host()); }
  T& operator[](size_t i) { return host()[i]; }

 private:
  Memory memory_;
};

constexpr int kSkipped = 77;  // ctest counts it as skipped

}  // namespace pk::test
