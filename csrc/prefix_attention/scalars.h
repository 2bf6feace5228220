// What the kernels of prefix_attention for fp32 and fp64 say by one name: e^x and tanh x in the type, and the gate (or
// 1) of a sequence and a head.
#pragma once

#include "common/typed.h"
#include "prefix_attention/prefix_attention.h"

namespace pk::prefix_attention {

__device__ __forceinline__ float exponential(float x) {
  return expf(x);
}
__device__ __forceinline__ double exponential(double x) {
  return exp(x);
}
__device__ __forceinline__ float hyperbolic_tangent(float x) {
  return tanhf(x);
}
__device__ __forceinline__ double hyperbolic_tangent(double x) {
  return tanh(x);
}

template <class Acc>
__device__ __forceinline__ Acc gate_of(const Gate& gate, int64_t sequence, int64_t head) {
  return gate.data ? load<Acc>(gate.data, gate.type, sequence * gate.row + head * gate.head) : Acc(1);
}

}  // namespace pk::prefix_attention
