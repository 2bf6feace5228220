// What the tensor-core kernels of lora_linear share: tiles of 16-bit elements in shared memory, and dropout on
// fragments. Lanes are named as in common/mma.h: lane l = 4 g + t.
#pragma once

#include "common/dropout.h"
#include "common/mma.h"
#include "common/parts.h"
#include "common/warp.h"
#include "lora_linear/lora_linear_cuda.h"

namespace pk::lora_linear {

// -- tiles in shared memory -------------------------------------------------------------------------------------------

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
