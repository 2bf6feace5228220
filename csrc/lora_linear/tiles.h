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
using lora_linear::Member;
using lora_linear::Problem;

struct Tile {
  alignas(64) float at[kRowBlock][kPitch];
};

PK_INLINE float scaling(const Adapter& adapter) { return static_cast<float>(adapter.scaling); }

PK_INLINE void fill(float* row, int64_t cols, vf value) {
  for (int64_t j = 0; j < cols; j += kLanes) store(row + j, value);
}

template <class T>
PK_INLINE void store_tile(const Tile& tile, int64_t rows, int64_t cols, T* out, int64_t ld) {
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t j = 0; j < cols; j += kLanes) store_n(out + i * ld + j, load(tile.at[i] + j), cols - j);
  }
}

// tile += x w^T over `length` elements; w's element (column j, k) lies at j * w_column + k * w_k, and one of the two
// strides is 1. Either way every element of w is read once from memory, while x is found in L1 or L2.
template <class T>
void add_product(Tile& tile, int64_t rows, int64_t cols, const T* x, int64_t ldx, int64_t length, const T* w,
                 int64_t w_column, int64_t w_k) {
  if (w_k == 1) {  // rows of w lie along the sum: four of them stream, a chunk at a time for all the rows of x
    constexpr int64_t kColumns = 4, kChunk = 4096 / sizeof(T);
    for (int64_t j = 0; j < cols; j += kColumns) {
      for (int64_t k = 0; k < length; k += kChunk) {
        dots<false>(tile.at[0] + j, kPitch, rows, min(cols - j, kColumns), x + k, ldx, w + j * w_column + k, w_column,
                    min(length - k, kChunk), 1.f);
      }
    }
    return;
  }
  // Rows of w lie across the sum: 32 of them by two cache lines. No hardware prefetcher follows such a path.
  constexpr int64_t kDepth = 32, kLine = 64 / sizeof(T), kStrip = 2 * kLine;
  for (int64_t k = 0; k < length; k += kDepth) {
    for (int64_t j = 0; j < cols; j += kStrip) {
      const T* block = w + k * w_k + j;
      for (int64_t ahead = kDepth; ahead < min(2 * kDepth, length - k); ++ahead) {
        __builtin_prefetch(block + ahead * w_k, 0, 2);
        __builtin_prefetch(block + ahead * w_k + kLine, 0, 2);
      }
      outer_rows(tile.at[0] + j, kPitch, rows, min(cols - j, kStrip), x + k, ldx, block, w_k,
                 min(length - k, kDepth));
    }
  }
}

// Calls f(member, adapter-independent column, its scratch) for the units of [begin, end) of the members' columns.
template <class F>
PK_INLINE void each_member_unit(const Problem& p, int64_t begin, int64_t end, F f) {
  float* scratch = p.scratch;
  int64_t unit = 0;
  for (int64_t g = 0; g < p.G; ++g) {
    for (int64_t block = 0; block < blocks(p.member[g].N); ++block, ++unit) {
      if (unit >= begin && unit < end) f(g, block, scratch);
      scratch += p.member[g].R * kPitch;
    }
  }
}

}  // namespace pk::PK_ISA
