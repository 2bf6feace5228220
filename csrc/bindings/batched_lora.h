// Registration of batched_lora's kernels.
#pragma once

#include <torch/csrc/stable/library.h>

namespace pk {

void bind_batched_lora_cpu(torch::stable::detail::StableLibrary& library);
void bind_batched_lora_pool_cpu(torch::stable::detail::StableLibrary& library);
void bind_batched_lora_pool_cuda(torch::stable::detail::StableLibrary& library);

}  // namespace pk
