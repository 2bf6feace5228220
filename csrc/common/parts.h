// 16-bit numbers on the device, and fp32 values as sums of 16-bit parts: how values that must not be rounded go through
// the tensor cores.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <math.h>

#include <type_traits>

#include "common/dtype.h"
#include "common/launch.h"

namespace pk {

template <class T>
__device__ __forceinline__ float to_float(T value);
template <>
__device__ __forceinline__ float to_float<float>(float value) {
  return value;
}
template <>
__device__ __forceinline__ float to_float<bf16>(bf16 value) {
  return __uint_as_float(static_cast<uint32_t>(value.bits) << 16);
}
template <>
__device__ __forceinline__ float to_float<fp16>(fp16 value) {
  return __half2float(__ushort_as_half(value.bits));
}

template <class T>
__device__ __forceinline__ T from_float(float value);
template <>
__device__ __forceinline__ float from_float<float>(float value) {
  return value;
}
template <>
__device__ __forceinline__ bf16 from_float<bf16>(float value) {
  return {__bfloat16_as_ushort(__float2bfloat16_rn(value))};
}
template <>
__device__ __forceinline__ fp16 from_float<fp16>(float value) {
  return {__half_as_ushort(__float2half_rn(value))};
}

// Two neighbours in one register, the first in the low half.
template <class T>
__device__ __forceinline__ uint32_t pack(T first, T second) {
  return first.bits | static_cast<uint32_t>(second.bits) << 16;
}

// The same of two fp32, each rounded.
template <class T>
__device__ __forceinline__ uint32_t round_pair(float first, float second);
template <>
__device__ __forceinline__ uint32_t round_pair<bf16>(float first, float second) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(first, second);
  uint32_t bits;
  memcpy(&bits, &pair, sizeof bits);
  return bits;
}
template <>
__device__ __forceinline__ uint32_t round_pair<fp16>(float first, float second) {
  const __half2 pair = __floats2half2_rn(first, second);
  uint32_t bits;
  memcpy(&bits, &pair, sizeof bits);
  return bits;
}

// value = parts[0] + parts[1] + ..., each the rounded rest of those before it. Three bf16 hold all 24 bits of an fp32,
// two hold 16; two fp16 hold 22, where neither over- nor underflows. Infinities and NaNs are in parts[0] alone.
template <class T, int kParts>
__device__ __forceinline__ void split(float value, T (&parts)[kParts]) {
  parts[0] = from_float<T>(value);
  const bool finite = isfinite(to_float(parts[0]));
#pragma unroll
  for (int i = 1; i < kParts; ++i) {
    value = finite ? value - to_float(parts[i - 1]) : 0.f;
    parts[i] = from_float<T>(value);
  }
}

template <class T, int kParts>
__device__ __forceinline__ void split_pair(float first, float second, uint32_t (&parts)[kParts]) {
  T a[kParts], b[kParts];
  split(first, a);
  split(second, b);
#pragma unroll
  for (int i = 0; i < kParts; ++i) parts[i] = pack(a[i], b[i]);
}

// The same for bf16, cut after every 8 bits and not rounded: three parts hold every fp32, the largest too, and two
// every fp16. Infinity is in the first part alone.
template <int kParts>
__device__ __forceinline__ void cut_pair(float first, float second, uint32_t (&parts)[kParts]) {
#pragma unroll
  for (int i = 0; i < kParts; ++i) {
    const uint32_t low = __float_as_uint(first) & 0xFFFF0000u, high = __float_as_uint(second) & 0xFFFF0000u;
    parts[i] = low >> 16 | high;
    if (i + 1 == kParts) break;
    first = fabsf(first) == INFINITY ? 0.f : first - __uint_as_float(low);
    second = fabsf(second) == INFINITY ? 0.f : second - __uint_as_float(high);
  }
}

// Two neighbours of 16 bits as bf16 parts, which are all of them. Beside fp32 values, which bf16 parts hold at any size
// and fp16 ones do not, fp16 enters a product like this: the types of one mma.sync are the same.
template <class T>
constexpr int kBf16Parts = std::is_same_v<T, bf16> ? 1 : 2;

__device__ __forceinline__ void as_bf16(uint32_t (&parts)[1], uint32_t pair, bf16) {
  parts[0] = pair;
}
__device__ __forceinline__ void as_bf16(uint32_t (&parts)[2], uint32_t pair, fp16) {
  cut_pair(to_float(fp16{static_cast<uint16_t>(pair)}), to_float(fp16{static_cast<uint16_t>(pair >> 16)}), parts);
}

}  // namespace pk
