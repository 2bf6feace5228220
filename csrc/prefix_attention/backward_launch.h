// Which of the backward's kernels a call of prefix_attention gets: by its dtype, and by its head dim in 16 bits.
#pragma once

#include "prefix_attention/backward_tiles.h"

namespace pk::prefix_attention {

// Can the rows of all tensors be copied 16 bytes at a time?
inline bool all_vectors(const Problem& p) {
  bool all = true;
  for (const View* view : {&p.q, &p.k, &p.v, &p.pk, &p.pv, &p.dout}) all = all && vector_view(*view, 2);
  return all;
}

// f(T{}, integral_constant kDim), where counts and so many tiles, each in up to eight pieces of columns, are of 32
// bits.
template <class F>
cudaError_t with_kernel(const Problem& p, int64_t tiles, const F& f) {
  if (tiles > INT32_MAX / 8 || !fits(p)) return cudaErrorInvalidValue;
  const auto by_dim = [&](auto number) {
    if (p.D <= 32) return f(number, std::integral_constant<int, 32>{});
    if (p.D <= 64) return f(number, std::integral_constant<int, 64>{});
    if (p.D <= 128) return f(number, std::integral_constant<int, 128>{});
    return f(number, std::integral_constant<int, 256>{});
  };
  if (p.type == Dtype::kFloat16) return by_dim(fp16{});
  if (p.type == Dtype::kBFloat16) return by_dim(bf16{});
  if (p.type == Dtype::kFloat64) return f(double{}, std::integral_constant<int, 64>{});
  return f(float{}, std::integral_constant<int, 64>{});
}

}  // namespace pk::prefix_attention
