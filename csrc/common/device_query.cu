// Device query: names, compute capability, memory, and which of this library's machine code each device would run.
// Free of torch, so that it answers the same under a CPU-only torch, and without a driver (the runtime is static).
// All CUDA files are compiled for the same architectures.
#include <cuda_runtime.h>

#include <cstdio>
#include <string>

#include "common/device_query.h"

namespace pk {
namespace {

// Does nothing: the runtime says of a kernel which image of it a device loads.
__global__ void probe_kernel() {}

std::string version(int number) {
  if (number == 0) return "none";
  return std::to_string(number / 1000) + "." + std::to_string(number % 1000 / 10);
}

// "runs sm_90 code", or why it can run none; the current device must be the one that is asked about.
std::string served_by() {
  cudaFuncAttributes attributes;
  cudaError_t error = cudaFuncGetAttributes(&attributes, probe_kernel);
  if (error != cudaSuccess) return std::string("cannot run this build: ") + cudaGetErrorString(error);
  return "runs sm_" + std::to_string(attributes.binaryVersion) + " code";
}

std::string describe(int device) {
  cudaDeviceProp properties;
  cudaError_t error = cudaGetDeviceProperties(&properties, device);
  if (error == cudaSuccess) error = cudaSetDevice(device);
  if (error != cudaSuccess) return std::to_string(device) + ": " + cudaGetErrorString(error) + "\n";
  char facts[128];
  std::snprintf(facts, sizeof facts, ", compute capability %d.%d, %d SMs, %.1f GiB, ", properties.major,
                properties.minor, properties.multiProcessorCount, properties.totalGlobalMem / 1073741824.0);
  return std::to_string(device) + ": " + properties.name + facts + served_by() + "\n";
}

std::string query() {
  int driver = 0, runtime = 0, count = 0;
  cudaDriverGetVersion(&driver);
  cudaRuntimeGetVersion(&runtime);
  const std::string versions = "driver " + version(driver) + ", runtime " + version(runtime);
  cudaError_t error = cudaGetDeviceCount(&count);
  if (error != cudaSuccess || count == 0) {
    return "no CUDA device: " + std::string(error != cudaSuccess ? cudaGetErrorString(error) : "none found") + " (" +
           versions + ")";
  }
  int current = 0;
  cudaGetDevice(&current);
  std::string text;
  for (int device = 0; device < count; ++device) text += describe(device);
  cudaSetDevice(current);
  return text + versions;
}

}  // namespace

bool cuda_serves(int major, int minor) {
  constexpr int kCompiled[] = {__CUDA_ARCH_LIST__};  // 800, 900, ...: nvcc's own list, the latest one last
  int latest = 0;
  for (const int arch : kCompiled) {
    latest = arch;
    if (arch / 100 == major && arch % 100 / 10 <= minor) return true;
  }
  return major * 100 + minor * 10 >= latest;
}

const char* cuda_device_summary() {
  static const std::string text = query();
  return text.c_str();
}

}  // namespace pk
