// gated_product on an NVIDIA GPU, free of torch, over n numbers that lie side by side:
//   y = f(gate) up,   dgate = dy up f'(gate),   dup = dy f(gate)
// A launcher launches one kernel on `stream`.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "common/dtype.h"

namespace pk::gated_product {

struct Product {
  int64_t n;  // >= 1
  const void *gate, *up;
  void* y;
  int activation;  // of common/activation.h
};
cudaError_t product(Dtype type, const Product& call, cudaStream_t stream);

struct Gradients {
  int64_t n;  // >= 1
  const void *dy, *gate, *up;
  void *dgate, *dup;
  int activation;
};
cudaError_t gradients(Dtype type, const Gradients& call, cudaStream_t stream);

}  // namespace pk::gated_product
