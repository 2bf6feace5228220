// What the two passes of lora_linear's backward share. A block takes 512 columns of a matrix (dy or x) and walks a
// chunk of its rows in tiles of 16, through a ring of stages that cp.async fills. Beside each tile stand the same rows
// of a low-rank fp32 matrix [M][R] (h or ds), as 16-bit parts.
#pragma once

#include "lora_linear/mma_tiles.h"

namespace pk::lora_linear {

constexpr int kTileRows = 16, kTileCols = 512, kTilePitch = tile_pitch(kTileCols), kTileSize = kTileRows * kTilePitch;

inline int64_t ceil_div(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

// About `blocks` blocks over all columns, and chunks of no fewer than 64 rows, since each writes a part of the result.
struct RowChunks {
  int count;
  int64_t rows;
};
inline RowChunks row_chunks(int64_t M, int64_t cols, int blocks) {
  const int64_t col_blocks = ceil_div(cols, kTileCols), most = col_blocks < blocks ? blocks / col_blocks : 1;
  const int64_t rows = ceil_div(ceil_div(M, most), kTileRows) * kTileRows;
  const int64_t chunk = rows < 64 ? 64 : rows;
  return {M > chunk ? static_cast<int>(ceil_div(M, chunk)) : 1, chunk};
}

// One tile of a matrix, whose first element is `from`; `rows` and `cols` are what is left of it.
template <int kThreads, class T>
__device__ __forceinline__ void bring_tile(T* tile, const T* from, int64_t ld, int64_t rows, int64_t cols,
                                           bool vector) {
  if (vector) {
    load_tile<kTileRows, kTileCols, kThreads, true>(tile, from, ld, rows, cols);
  } else {
    load_tile<kTileRows, kTileCols, kThreads, false>(tile, from, ld, rows, cols);
  }
}

// One thread's share of the low-rank rows beside a tile: column `from` (null: zeros) of kEach of its rows. fetch() runs
// a tile ahead of store(), so that the reads are over when the values are needed.
template <class T, int kThreads, int kRanks, int kParts>
struct LowRows {
  static constexpr int kPitch = tile_pitch(kRanks), kPart = kTileRows * kPitch, kSize = kParts * kPart;
  static constexpr int kEach = kTileRows * kRanks / kThreads;
  const float* from;
  int64_t stride;
  float value[kEach];

  static __device__ __forceinline__ int rank() { return threadIdx.x % kRanks; }
  static __device__ __forceinline__ int row(int i) { return threadIdx.x / kRanks + i * (kThreads / kRanks); }

  __device__ __forceinline__ void fetch(int64_t row0, int64_t rows_end) {
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      const int64_t m = row0 + row(i);
      value[i] = from && m < rows_end ? from[m * stride] : 0.f;
    }
  }

  __device__ __forceinline__ void store(T* tile) const {
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      T parts[kParts];
      split(value[i], parts);
#pragma unroll
      for (int p = 0; p < kParts; ++p) tile[p * kPart + row(i) * kPitch + rank()] = parts[p];
    }
  }
};

}  // namespace pk::lora_linear
