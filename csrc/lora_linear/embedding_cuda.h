// What lora_embedding has in place of lora_linear's x, on an NVIDIA GPU, free of torch: embedding.h, whose words hold
// here too, with ids that may lie outside of [0, V): h is 0 there, and dA has no part of it. A launcher launches one
// kernel on `stream`. No atomics: a run is added up by one thread for each rank.
#pragma once

#include <cuda_runtime.h>

#include "lora_linear/embedding.h"

namespace pk::lora_embedding {

cudaError_t gather(const Problem& call, bool is_double, cudaStream_t stream);
cudaError_t scatter(const Problem& call, bool is_double, cudaStream_t stream);

}  // namespace pk::lora_embedding
