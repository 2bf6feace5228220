// Registration of DoRA's kernels.
#pragma once

#include <torch/csrc/stable/library.h>

namespace pk {

void bind_dora_cpu(torch::stable::detail::StableLibrary& library);
void bind_dora_cuda(torch::stable::detail::StableLibrary& library);

}  // namespace pk
