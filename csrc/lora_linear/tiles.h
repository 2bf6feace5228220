// What the forward and backward units of lora_linear share: tiles of up to kRowBlock rows and kBlock columns in fp32,
// rows kPitch apart, and the base product on them.
#pragma once

#include "common/dropout_mask.h"
#include "common/products.h"
#include "lora_linear/lora_linear.h"

namespace pk::PK_ISA {

using lora_linear::Adapter;
using lora_linear::blocks;
using lora_linear::kBlock;
using lora_linear::kPitch;
using lora_linear::kRowBlock;
using lora_linear::mask_row;
using lora_linear::Member;
using lora_linear::pitch;
using lora_linear::Problem;
using lora_linear::slice_rows;
using lora_linear::slices;

struct Tile {
  alignas(64) float at[kRowBlock][kPitch];
};

PK_INLINE float scaling(const Adapter& adapter) {
  return static_cast<float>(adapter.scaling);
}

PK_INLINE void fill(float* row, int64_t cols, vf value) {
  for (int64_t j = 0; j < cols; j += kLanes) store(row + j, value);
}

// Calls up the next row block of a matrix into L2: runs of `cols` columns are too short for the hardware to follow.
template <class T>
PK_INLINE void prefetch_rows(const T* next, int64_t rows, int64_t cols, int64_t ld) {
  constexpr int64_t kLine = 64 / sizeof(T);
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t j = 0; j < cols; j += kLine) __builtin_prefetch(next + i * ld + j, 0, 2);
  }
}

template <class T>
PK_INLINE void store_tile(const Tile& tile, int64_t rows, int64_t cols, T* out, int64_t ld) {
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t j = 0; j < cols; j += kLanes) store_n(out + i * ld + j, load(tile.at[i] + j), cols - j);
  }
}

// tile += x w^T over `length` elements, where rows of w (columns of the tile) lie along the sum, w_column apart. Four
// of them stream from memory at a time, a chunk for all the rows of x, which stay in L2.
template <class T>
void add_product(Tile& tile, int64_t rows, int64_t cols, const T* x, int64_t ldx, int64_t length, const T* w,
                 int64_t w_column) {
  constexpr int64_t kColumns = 4, kChunk = 4096 / sizeof(T);
  for (int64_t j = 0; j < cols; j += kColumns) {
    for (int64_t k = 0; k < length; k += kChunk) {
      dots<false>(tile.at[0] + j, kPitch, rows, min(cols - j, kColumns), x + k, ldx, w + j * w_column + k, w_column,
                  min(length - k, kChunk), 1.f);
    }
  }
}

// sums[M][pitch(cols)] = x w over one slice of the sum, where rows of w lie across the sum, w_k apart. kDepth rows move
// along together, so that sums are loaded and stored once for all of them; no hardware prefetcher follows so many.
template <class T>
void stream_slice(float* sums, int64_t M, int64_t cols, const T* x, int64_t ldx, const T* w, int64_t w_k, int64_t begin,
                  int64_t end) {
  constexpr int64_t kLine = 64 / sizeof(T), kDepth = kLine, kStrip = 2 * kLine, kAhead = 4 * kStrip;
  constexpr int kToL2 = 2;  // rows a power of two apart share few sets of L1
  const int64_t ld = pitch(cols);
  fill(sums, M * ld, vf{});
  for (int64_t k = begin; k < end; k += kDepth) {
    const int64_t depth = min(end - k, kDepth);
    for (int64_t j = 0; j < cols; j += kStrip) {
      const T* block = w + k * w_k + j;
      for (int64_t row = 0; row < depth; ++row) {
        __builtin_prefetch(block + row * w_k + kAhead, 0, kToL2);
        __builtin_prefetch(block + row * w_k + kAhead + kLine, 0, kToL2);
      }
      outer_rows(sums + j, ld, M, min(cols - j, kStrip), x + k, ldx, block, w_k, depth);
    }
  }
}

// tile += the sums of `count` slices, columns j0 ... j0 + cols.
PK_INLINE void add_slices(Tile& tile, int64_t rows, int64_t cols, const float* sums, int64_t count, int64_t ld,
                          int64_t j0) {
  for (int64_t slice = 0; slice < count; ++slice) {
    for (int64_t i = 0; i < rows; ++i) {
      const float* from = sums + (slice * rows + i) * ld + j0;
      for (int64_t j = 0; j < cols; j += kLanes) store(tile.at[i] + j, load(tile.at[i] + j) + load(from + j));
    }
  }
}

// Calls f(adapter, its rank rows in the block's scratch) for the adapters of a member.
template <class F>
PK_INLINE void each_adapter(const Problem& p, int64_t g, float* rank_rows, F f) {
  for (int64_t l = 0; l < p.L; ++l) {
    if (p.adapter[l].member != g) continue;
    f(p.adapter[l], rank_rows);
    rank_rows += p.adapter[l].R * kPitch;
  }
}

// Calls f(member, block of its columns, scratch of the block) for the units [begin, end).
template <class F>
PK_INLINE void each_member_unit(const Problem& p, int64_t begin, int64_t end, F f) {
  float* scratch = p.scratch;
  int64_t unit = 0;
  for (int64_t g = 0; g < p.G; ++g) {
    for (int64_t block = 0; block < blocks(p.member[g].N); ++block, ++unit) {
      if (unit >= begin && unit < end) f(g, block, scratch);
      scratch += (p.member[g].R + 1) * kPitch;
    }
  }
}

}  // namespace pk::PK_ISA
