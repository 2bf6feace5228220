// The operators of the CUDA kernels, emulated, for CPU tensors: python_tests/test_emulated.py loads this library and
// runs the registry's samples through it. Built by CMake where it is told of a torch; linked with the emulator's
// objects, the kernels and csrc/bindings (PK_EMULATED).
#include <cstdint>

#include "bindings/batched_lora.h"
#include "bindings/bottleneck_adapter.h"
#include "bindings/dora.h"
#include "bindings/lora_linear.h"
#include "bindings/prefix_attention.h"
#include "bindings/tensors.h"
#include "emulator/emulator.h"

#define PK_EXPORT extern "C" __attribute__((visibility("default")))

PK_EXPORT void peft_kernels_bind(const char* ns, const char* device) {
  using torch::stable::detail::StableLibrary;
  auto* library = new StableLibrary(StableLibrary::Kind::IMPL, ns, device, __FILE__, __LINE__);
  pk::bind_lora_linear_cuda(*library);
  pk::bind_lora_embedding_cuda(*library);
  pk::bind_gated_product_cuda(*library);
  pk::bind_dora_cuda(*library);
  pk::bind_batched_lora_pool_cuda(*library);
  pk::bind_bottleneck_adapter_cuda(*library);
  pk::bind_prefix_attention_cuda(*library);
}

PK_EXPORT float peft_kernels_poison(int on) {
  return pk::poison(on != 0);
}

// The order of threads and blocks (0: as numbered), and when a cp.async lands: 0 late, 1 early, 2 at random.
PK_EXPORT void peft_kernels_emulator_schedule(uint64_t seed, int copies) {
  emulator::set_schedule({seed, static_cast<emulator::Copies>(copies)});
}
