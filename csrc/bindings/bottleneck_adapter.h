// Registration of bottleneck_adapter's kernels.
#pragma once

#include <torch/csrc/stable/library.h>

namespace pk {

void bind_bottleneck_adapter_cpu(torch::stable::detail::StableLibrary& library);
void bind_bottleneck_adapter_cuda(torch::stable::detail::StableLibrary& library);

}  // namespace pk
