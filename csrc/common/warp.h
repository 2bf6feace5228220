// Position in the warp, and reductions over its lanes by shuffles, in a fixed order: the same bits on every run.
#pragma once

#include "common/launch.h"

namespace pk {

constexpr unsigned kFullWarp = 0xFFFFFFFFu;

__device__ __forceinline__ int lane_index() {
  return static_cast<int>(threadIdx.x % 32);
}
__device__ __forceinline__ int warp_index() {
  return static_cast<int>(threadIdx.x / 32);
}

// Sum over groups of kLanes neighbouring lanes; every lane of the group gets it. All lanes of the warp must call.
template <int kLanes = 32, class T>
__device__ __forceinline__ T warp_sum(T value) {
#pragma unroll
  for (int by = kLanes / 2; by > 0; by /= 2) value += __shfl_xor_sync(kFullWarp, value, by);
  return value;
}

template <int kLanes = 32, class T>
__device__ __forceinline__ T warp_max(T value) {
#pragma unroll
  for (int by = kLanes / 2; by > 0; by /= 2) {
    const T other = __shfl_xor_sync(kFullWarp, value, by);
    value = other > value ? other : value;
  }
  return value;
}

}  // namespace pk
