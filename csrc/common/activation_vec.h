// The activations of a bottleneck and their slopes by the vector: f(h) and f'(h), as activation.h and
// peft_kernels/ops/bottleneck_adapter/reference.py define them. NaN stays NaN in both.
#pragma once

#include "common/activation.h"
#include "common/products.h"
#include "common/vec_math.h"

namespace pk::PK_ISA {

// f(h); `slope`, where it is not null, receives f'(h). relu's and leaky_relu's slopes at 0 are those of PyTorch.
template <int kActivation>
PK_INLINE vf activated(vf h, vf* slope) {
  const vf one = vf{} + 1.f;
  if constexpr (kActivation == kRelu) {
    if (slope) *slope = h <= 0.f ? vf{} : (h == h ? one : h);
    return h <= 0.f ? vf{} : h;
  } else if constexpr (kActivation == kLeakyRelu) {
    constexpr float kLow = static_cast<float>(kLeak);
    if (slope) *slope = h <= 0.f ? vf{} + kLow : (h == h ? one : h);
    return h <= 0.f ? h * kLow : h;
  } else if constexpr (kActivation == kGelu) {
    vf density;
    const vf share = normal(h, density);
    if (slope) *slope = share + h * density;
    return h * share;
  } else if constexpr (kActivation == kGeluTanh) {  // (1 + tanh z) / 2 is the logistic function of 2 z
    constexpr float kTwice = static_cast<float>(2 * kTanhFactor), kCube = static_cast<float>(kTanhCube), kFar = 64.f;
    vf c = h > kFar ? vf{} + kFar : h;  // past it nothing changes, and squares would overflow
    c = c < -kFar ? vf{} - kFar : c;
    vf rest;
    const vf share = logistic(kTwice * (c + kCube * c * c * c), rest);
    if (slope) *slope = share + c * (share * rest) * (kTwice * (1.f + 3.f * kCube * c * c));
    return h * share;
  } else if constexpr (kActivation == kSilu) {
    vf rest;
    const vf share = logistic(h, rest);
    if (slope) *slope = share * (1.f + h * rest);
    return h * share;
  } else if constexpr (kActivation == kTanh) {
    const vf t = hyperbolic_tangent(h);
    if (slope) *slope = 1.f - t * t;
    return t;
  } else if constexpr (kActivation == kSigmoid) {
    vf rest;
    const vf share = logistic(h, rest);
    if (slope) *slope = share * rest;
    return share;
  } else {
    if (slope) *slope = one;
    return h;
  }
}

// f(Constant<activation>{})
template <class F>
PK_INLINE void with_activation(int activation, const F& f) {
  switch (activation) {
    case kRelu:
      return f(Constant<kRelu>{});
    case kGelu:
      return f(Constant<kGelu>{});
    case kGeluTanh:
      return f(Constant<kGeluTanh>{});
    case kSilu:
      return f(Constant<kSilu>{});
    case kTanh:
      return f(Constant<kTanh>{});
    case kSigmoid:
      return f(Constant<kSigmoid>{});
    case kLeakyRelu:
      return f(Constant<kLeakyRelu>{});
    default:
      return f(Constant<kIdentity>{});
  }
}

}  // namespace pk::PK_ISA
