// The activations of a bottleneck and their slopes, one number at a time, for host and device; numbered by their places
// in peft_kernels/ops/common/activations.py. NaN stays NaN in all of them.
#pragma once

#include <math.h>

#include "common/philox.h"

namespace pk {

enum Activation { kIdentity, kRelu, kGelu, kGeluTanh, kSilu, kTanh, kSigmoid, kLeakyRelu, kActivations };

constexpr double kHalfRoot = 0.70710678118654752440, kDensity = 0.39894228040143267794;  // 1 / sqrt(2), 1 / sqrt(2 pi)
constexpr double kTanhFactor = 0.79788456080286535588, kTanhCube = 0.044715;             // gelu_tanh's
constexpr double kLeak = 0.01;

// f(h). `static`: a copy in every object, as in philox.h.
template <class T>
PK_HOST_DEVICE static inline T activated(int activation, T h) {
  switch (activation) {
    case kRelu:
      return h < 0 ? 0 : h;
    case kGelu:
      return h / 2 * (1 + erf(h * T(kHalfRoot)));
    case kGeluTanh:
      return h / 2 * (1 + tanh(T(kTanhFactor) * (h + T(kTanhCube) * h * h * h)));
    case kSilu:
      return h / (1 + exp(-h));
    case kTanh:
      return tanh(h);
    case kSigmoid:
      return 1 / (1 + exp(-h));
    case kLeakyRelu:
      return h > 0 ? h : T(kLeak) * h;
    default:
      return h;
  }
}

template <class T>
PK_HOST_DEVICE static inline T sigmoid(T h) {
  return T(1) / (T(1) + exp(-h));
}

// f'(h); relu's and leaky_relu's at 0 are those of PyTorch.
template <class T>
PK_HOST_DEVICE static inline T slope_of(int activation, T h) {
  switch (activation) {
    case kRelu:
      return h > 0 ? T(1) : h <= 0 ? T(0) : h;
    case kGelu:
      return erfc(-h * T(kHalfRoot)) / 2 + h * T(kDensity) * exp(-h * h / 2);
    case kGeluTanh: {         // (1 + tanh z) / 2 is the logistic function of 2 z
      constexpr T kFar = 64;  // past it nothing changes, and squares would overflow
      const T c = h > kFar ? kFar : h < -kFar ? -kFar : h;
      const T z = 2 * T(kTanhFactor) * (c + T(kTanhCube) * c * c * c), s = sigmoid(z);
      return s + c * s * sigmoid(-z) * 2 * T(kTanhFactor) * (1 + 3 * T(kTanhCube) * c * c);
    }
    case kSilu: {
      const T s = sigmoid(h);
      return s * (1 + h * (1 - s));
    }
    case kTanh: {
      const T t = tanh(h);
      return 1 - t * t;
    }
    case kSigmoid: {
      const T s = sigmoid(h);
      return s * (1 - s);
    }
    case kLeakyRelu:
      return h > 0 ? T(1) : h <= 0 ? T(kLeak) : h;
    default:
      return T(1);
  }
}

}  // namespace pk
