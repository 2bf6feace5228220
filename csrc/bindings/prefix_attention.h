// Registration of prefix_attention's kernels.
#pragma once

#include <torch/csrc/stable/library.h>

namespace pk {

void bind_prefix_attention_cpu(torch::stable::detail::StableLibrary& library);
void bind_prefix_attention_cuda(torch::stable::detail::StableLibrary& library);

}  // namespace pk
