// What the tensor-core kernels of lora_linear share: tiles of 16-bit elements in shared memory, fp32 values as sums of
// 16-bit parts, and dropout on fragments. Lanes are named as in common/mma.h: lane l = 4 g + t.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "common/dropout.h"
#include "common/dtype.h"
#include "common/mma.h"
#include "common/warp.h"
#include "lora_linear/lora_linear_cuda.h"

namespace pk::lora_linear {

// -- 16-bit numbers ---------------------------------------------------------------------------------------------------

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

// -- tiles in shared memory -------------------------------------------------------------------------------------------

// Rows of a tile of 16-bit elements lie kCols + 8 apart: 16 bytes over a multiple of 128 where kCols is a multiple of
// 64, so that the eight rows of an ldmatrix meet in no bank.
constexpr int tile_pitch(int cols) {
  return cols + 8;
}

// Brings rows x cols of a row-major matrix into a tile [kRows][tile_pitch(kCols)] and zeroes the rest of it. kVector:
// rows start on 16 bytes and the copies are asynchronous (commit and wait are the caller's); else they are plain.
// All kThreads threads of the block call it; kCols is a multiple of 8.
template <int kRows, int kCols, int kThreads, bool kVector, class T>
__device__ __forceinline__ void load_tile(T* tile, const T* from, int64_t ld, int64_t rows, int64_t cols) {
  constexpr int kWidth = kVector ? 16 / sizeof(T) : 1, kPerRow = kCols / kWidth;
  for (int i = threadIdx.x; i < kRows * kPerRow; i += kThreads) {
    const int row = i / kPerRow, col = i % kPerRow * kWidth;
    T* const to = tile + row * tile_pitch(kCols) + col;
    const int64_t left = row < rows ? cols - col : 0;
    if constexpr (kVector) {
      const int valid = left <= 0 ? 0 : left >= kWidth ? 16 : static_cast<int>(left * sizeof(T));
      cp_async<16>(to, valid ? from + row * ld + col : from, valid);
    } else {
      *to = left > 0 ? from[row * ld + col] : T{};
    }
  }
}

// Can the rows of a matrix be read 16 bytes at a time? The last, partial vector of a row is zero-filled, not read over.
inline bool vector_rows(const void* data, int64_t ld, int bytes_each) {
  return reinterpret_cast<uintptr_t>(data) % 16 == 0 && ld * bytes_each % 16 == 0;
}

// -- dropout on fragments ---------------------------------------------------------------------------------------------

// Zeroes the dropped ones of two neighbours; `random` is their word of Philox.
__device__ __forceinline__ uint32_t keep_pair(uint32_t pair, uint32_t random, uint32_t threshold) {
  const uint32_t low = (random & 0xFFFFu) < threshold ? 0x0000FFFFu : 0u;
  const uint32_t high = (random >> 16) < threshold ? 0xFFFF0000u : 0u;
  return pair & (low | high);
}

// The words of one row for 32 columns, 32 group ... 32 group + 31, as a lane needs them: word w covers the two columns
// 32 group + 8 w + 2 t + {0, 1}. That is what the lane holds of the row in two k16 steps of a left operand (a[0], a[2]
// of the first step take words 0, 1; of the second 2, 3; a[1], a[3] are row g + 8), and in four n8 tiles of a result.
__device__ __forceinline__ Philox4 keep_words(uint64_t seed, uint32_t stream, int64_t row, int64_t group) {
  const uint32_t t = static_cast<uint32_t>(lane_index()) % 4;
  return philox(seed, {{static_cast<uint32_t>(row), static_cast<uint32_t>(group), t, stream}});
}

}  // namespace pk::lora_linear
