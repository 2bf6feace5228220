// What tensor-core kernels share: tiles of 16-bit elements in shared memory, and dropout on fragments. Lanes are named
// as in mma.h: lane l = 4 g + t.
#pragma once

#include "common/dropout.h"
#include "common/mma.h"
#include "common/parts.h"
#include "common/warp.h"

namespace pk {

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

}  // namespace pk
