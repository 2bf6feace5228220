// Registration of lora_linear's kernels, and of those beside them: lora_add, lora_embedding, gated_product.
#pragma once

#include <torch/csrc/stable/library.h>

namespace pk {

void bind_lora_linear_cpu(torch::stable::detail::StableLibrary& library);
void bind_lora_add_cpu(torch::stable::detail::StableLibrary& library);
void bind_lora_linear_cuda(torch::stable::detail::StableLibrary& library);
void bind_lora_embedding_cpu(torch::stable::detail::StableLibrary& library);
void bind_lora_embedding_cuda(torch::stable::detail::StableLibrary& library);
void bind_gated_product_cpu(torch::stable::detail::StableLibrary& library);
void bind_gated_product_cuda(torch::stable::detail::StableLibrary& library);

}  // namespace pk
