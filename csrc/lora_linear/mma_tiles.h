// What the tensor-core kernels of lora_linear share: tiles of 16-bit elements in shared memory, and dropout on
// fragments. Lanes are named as in common/mma.h: lane l = 4 g + t.
#pragma once

#include <cmath>
#include <type_traits>

#include "common/dropout.h"
#include "common/mma.h"
#include "common/parts.h"
#include "common/warp.h"
#include "lora_linear/lora_linear_cuda.h"

namespace pk::lora_linear {

// h and ds carry s, and the largest fp16 is 65504: they are cut into parts of fp16 after a multiplication by `down`,
// and the sums of their products are multiplied by `up`. Powers of two round nothing; bf16 reaches as far as fp32.
struct LowScale {
  float down = 1.f, up = 1.f;
};

template <class T>
LowScale low_scale(const Adapters& adapters) {
  LowScale scale;
  if constexpr (std::is_same_v<T, fp16>) {
    float largest = 1.f;
    for (int l = 0; l < adapters.count; ++l) largest = fmaxf(largest, fabsf(adapters.at[l].scaling));
    while (scale.up < largest && scale.up < 0x1p126f) scale.up *= 2;
    scale.down = 1 / scale.up;
  }
  return scale;
}

// value * factor, of a LowScale, where T has one.
template <class T>
__device__ __forceinline__ float rescaled(float value, float factor) {
  if constexpr (std::is_same_v<T, fp16>) return value * factor;
  return value;
}

// -- tiles in shared memory -------------------------------------------------------------------------------------------

// Brings rows x cols of a row-major matrix, of any alignment, into a tile [kRows][tile_pitch(kCols)] and zeroes the
// rest of it. All kThreads threads of the block call it.
template <int kRows, int kCols, int kThreads, class T>
__device__ __forceinline__ void load_tile(T* tile, const T* from, int64_t ld, int64_t rows, int64_t cols) {
  for (int i = threadIdx.x; i < kRows * kCols; i += kThreads) {
    const int row = i / kCols, col = i % kCols;
    tile[row * tile_pitch(kCols) + col] = row < rows && col < cols ? from[row * ld + col] : T{};
  }
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
