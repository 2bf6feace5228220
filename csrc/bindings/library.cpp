// What Python calls by name in the operator library. Nothing is registered when the library is loaded: Python defines
// the schemas first and then binds the kernels of a device under a namespace of its choice.
#include <cstring>

#include "bindings/batched_lora.h"
#include "bindings/bottleneck_adapter.h"
#include "bindings/dora.h"
#include "bindings/lora_linear.h"
#include "bindings/prefix_attention.h"
#include "bindings/tensors.h"
#include "common/instruction_set.h"

#define PK_EXPORT extern "C" __attribute__((visibility("default")))

// Kernels for tensors of `device` ("CPU", "CUDA") under `ns`; does nothing for a device that has none.
PK_EXPORT void peft_kernels_bind(const char* ns, const char* device) {
  using torch::stable::detail::StableLibrary;
  const bool cpu = std::strcmp(device, "CPU") == 0;
#ifdef PK_WITH_CUDA
  const bool cuda = std::strcmp(device, "CUDA") == 0;
#else
  const bool cuda = false;
#endif
  if (!cpu && !cuda) return;
  // Registrations last as long as this object: until the process ends.
  auto* library = new StableLibrary(StableLibrary::Kind::IMPL, ns, device, __FILE__, __LINE__);
  if (cpu) {
    pk::bind_lora_linear_cpu(*library);
    pk::bind_lora_embedding_cpu(*library);
    pk::bind_gated_product_cpu(*library);
    pk::bind_dora_cpu(*library);
    pk::bind_lora_add_cpu(*library);
    pk::bind_batched_lora_cpu(*library);
    pk::bind_batched_lora_pool_cpu(*library);
    pk::bind_bottleneck_adapter_cpu(*library);
    pk::bind_prefix_attention_cpu(*library);
  }
#ifdef PK_WITH_CUDA
  if (cuda) {
    pk::bind_lora_linear_cuda(*library);
    pk::bind_lora_embedding_cuda(*library);
    pk::bind_gated_product_cuda(*library);
    pk::bind_dora_cuda(*library);
    pk::bind_batched_lora_pool_cuda(*library);
    pk::bind_bottleneck_adapter_cuda(*library);
    pk::bind_prefix_attention_cuda(*library);
  }
#endif
}

// For tests: see poison() in tensors.h.
PK_EXPORT float peft_kernels_poison(int on) {
  return pk::poison(on != 0);
}

// The instruction set that the CPU kernels use: "default", "avx2", "avx512" or "avx512_bf16".
PK_EXPORT const char* peft_kernels_isa() {
  return pk::instruction_set_name();
}

// For tests: makes the kernels use another set. 0 if it is available, else nothing changes.
PK_EXPORT int peft_kernels_set_isa(const char* name) {
  return pk::use_instruction_set(name) ? 0 : 1;
}
