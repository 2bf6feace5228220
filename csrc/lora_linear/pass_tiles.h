// What the two passes of lora_linear's backward share. A block takes 512 columns of a matrix (dy or x) and walks a
// chunk of its rows in tiles of 16, through a ring of stages that cp.async fills. Beside each tile stand the same rows
// of a low-rank fp32 matrix [M][R] (h or ds), as bf16 parts: it reaches as far as fp32, and h and ds may.
#pragma once

#include "common/mma_tiles.h"
#include "lora_linear/lora_linear_cuda.h"

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

// A chunk of a block's columns, tile after tile. What a tile's addresses have in common is computed once:
// worked out for every vector, they would cost as many instructions as the products.
template <class T, int kThreads>
struct WideRows {
  static constexpr int kPerRow = kTileCols / 8, kRowStep = kThreads / kPerRow;
  const T* next;  // the block's first element of the next tile
  int64_t ld, offset;
  int64_t cols;  // of the matrix, from the block's first one on
  int valid;     // bytes of this thread's vectors
  bool vector;

  __device__ __forceinline__ WideRows(const void* matrix, int64_t ld, int64_t row, int64_t col, int64_t cols_in_all,
                                      bool vector)
      : next(static_cast<const T*>(matrix) + row * ld + col), ld(ld), cols(cols_in_all - col), vector(vector) {
    const int own_col = threadIdx.x % kPerRow * 8;
    offset = threadIdx.x / kPerRow * ld + own_col;
    valid = own_col + 8 <= cols ? 16 : own_col < cols ? static_cast<int>(cols - own_col) * 2 : 0;
  }

  // Fills a tile; `rows` >= 1 are left of the chunk.
  __device__ __forceinline__ void fetch(T* tile, int rows) {
    if (vector) {
      const int own_row = threadIdx.x / kPerRow;
      T* const to = tile + own_row * kTilePitch + threadIdx.x % kPerRow * 8;
      const T* from = next + offset;
#pragma unroll
      for (int i = 0; i < kTileRows / kRowStep; ++i, from += kRowStep * ld) {
        const int bytes = own_row + i * kRowStep < rows ? valid : 0;
        cp_async<16>(to + i * kRowStep * kTilePitch, bytes ? from : next, bytes);
      }
    } else {
      load_tile<kTileRows, kTileCols, kThreads>(tile, next, ld, rows, cols);
    }
    next += kTileRows * ld;
  }
};

// One thread's share of the low-rank rows beside the tiles: kEach elements of one column, `next` (null: zeros) being
// the first of them in the next tile. fetch() runs a tile ahead of store(), so that the reads are over when the values
// are needed.
template <int kThreads, int kRanks, int kParts>
struct LowRows {
  static constexpr int kPitch = tile_pitch(kRanks), kPart = kTileRows * kPitch, kSize = kParts * kPart;
  static constexpr int kRowStep = kThreads / kRanks < kTileRows ? kThreads / kRanks : kTileRows;
  static constexpr int kEach = kTileRows / kRowStep;
  const float* next;
  int64_t ld;
  float value[kEach] = {};

  static __device__ __forceinline__ int rank() { return threadIdx.x % kRanks; }
  static __device__ __forceinline__ int row() { return threadIdx.x / kRanks; }

  // `column` of the matrix from `row0` on; nothing where it is null.
  __device__ __forceinline__ LowRows(const float* column, int64_t ld, int64_t row0)
      : next(column && row() < kTileRows ? column + (row0 + row()) * ld : nullptr), ld(ld) {}

  __device__ __forceinline__ void fetch(int rows) {
    if (!next) return;
#pragma unroll
    for (int i = 0; i < kEach; ++i) value[i] = row() + i * kRowStep < rows ? next[i * kRowStep * ld] : 0.f;
    next += kTileRows * ld;
  }

  __device__ __forceinline__ void store(bf16* tile) const {
    if (!next) return;
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      bf16 parts[kParts];
      split(value[i], parts);
#pragma unroll
      for (int p = 0; p < kParts; ++p) tile[p * kPart + (row() + i * kRowStep) * kPitch + rank()] = parts[p];
    }
  }

  // Zeroes the columns that are nobody's, once for all tiles.
  static __device__ __forceinline__ void clear(bf16* tiles, int count) {
    for (int i = threadIdx.x; i < count * kSize; i += kThreads) tiles[i] = bf16{};
  }
};

}  // namespace pk::lora_linear
