// What lora_embedding has in place of lora_linear's x, on an NVIDIA GPU, free of torch: embedding.h, whose words hold
// here too, with ids that may lie outside of [0, V): h is 0 there, and dA has no part of it. A launcher launches one
// kernel on `stream`; M >= 1. No atomics: a run is added up by one thread for each rank, a long one in pieces.
#pragma once

#include <cuda_runtime.h>

#include "lora_linear/embedding.h"

namespace pk::lora_embedding {

cudaError_t gather(const Problem& call, bool is_double, cudaStream_t stream);
// Before scatter, where there is more than one piece: parts of runs that began in a piece before, to `pieces`.
constexpr int64_t kPiece = 64;  // places in the order
constexpr int64_t pieces(int64_t M) {
  return (M + kPiece - 1) / kPiece;
}
cudaError_t sum_pieces(const Problem& call, bool is_double, cudaStream_t stream);
cudaError_t scatter(const Problem& call, bool is_double, cudaStream_t stream);

}  // namespace pk::lora_embedding
