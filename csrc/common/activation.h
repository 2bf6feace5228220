// The activations of a bottleneck, one number at a time, for host and device; numbered by their places in
// peft_kernels/ops/common/activations.py. NaN stays NaN in all of them.
#pragma once

#include <math.h>

#include "common/philox.h"

namespace pk {

enum Activation { kIdentity, kRelu, kGelu, kGeluTanh, kSilu, kTanh, kSigmoid, kLeakyRelu, kActivations };

// `static`: a copy in every object, as in philox.h.
template <class T>
PK_HOST_DEVICE static inline T activated(int activation, T h) {
  switch (activation) {
    case kRelu:
      return h < 0 ? 0 : h;
    case kGelu:
      return h / 2 * (1 + erf(h * static_cast<T>(0.70710678118654752)));
    case kGeluTanh:
      return h / 2 * (1 + tanh(static_cast<T>(0.79788456080286536) * (h + static_cast<T>(0.044715) * h * h * h)));
    case kSilu:
      return h / (1 + exp(-h));
    case kTanh:
      return tanh(h);
    case kSigmoid:
      return 1 / (1 + exp(-h));
    case kLeakyRelu:
      return h > 0 ? h : static_cast<T>(0.01) * h;
    default:
      return h;
  }
}

}  // namespace pk
