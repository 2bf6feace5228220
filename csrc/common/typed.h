// Elements of a dtype that is known at run time only, read and written as float or double: for kernels whose time is
// not in them. The branch is the same for all threads of a launch.
#pragma once

#include "common/dtype.h"
#include "common/parts.h"

namespace pk {

template <class Acc>
__device__ __forceinline__ Acc load(const void* data, Dtype type, int64_t at) {
  switch (type) {
    case Dtype::kFloat16:
      return static_cast<Acc>(to_float(static_cast<const fp16*>(data)[at]));
    case Dtype::kBFloat16:
      return static_cast<Acc>(to_float(static_cast<const bf16*>(data)[at]));
    case Dtype::kFloat64:
      return static_cast<Acc>(static_cast<const double*>(data)[at]);
    default:
      return static_cast<Acc>(static_cast<const float*>(data)[at]);
  }
}

template <class Acc>
__device__ __forceinline__ void store(void* data, Dtype type, int64_t at, Acc value) {
  switch (type) {
    case Dtype::kFloat16:
      static_cast<fp16*>(data)[at] = from_float<fp16>(static_cast<float>(value));
      break;
    case Dtype::kBFloat16:
      static_cast<bf16*>(data)[at] = from_float<bf16>(static_cast<float>(value));
      break;
    case Dtype::kFloat64:
      static_cast<double*>(data)[at] = static_cast<double>(value);
      break;
    default:
      static_cast<float*>(data)[at] = static_cast<float>(value);
  }
}

}  // namespace pk
