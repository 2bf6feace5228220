// Registration of lora_linear's and lora_add's kernels.
#pragma once

#include <torch/csrc/stable/library.h>

namespace pk {

void bind_lora_linear_cpu(torch::stable::detail::StableLibrary& library);
void bind_lora_add_cpu(torch::stable::detail::StableLibrary& library);
void bind_lora_linear_cuda(torch::stable::detail::StableLibrary& library);

}  // namespace pk
