// What the kernels of the tensor cores share that multiply u of a tile by 256 columns of B^T, 64 to a warp: how B^T and
// y come into shared memory, 16 ranks of B^T and up to 16 rows of y at a time, and the product. u is fp32 and enters as
// three bf16 parts, which hold all its bits; fp16 factors enter as two.
#pragma once

#include "batched_lora/pool_tile.h"
#include "common/mma.h"
#include "common/parts.h"
#include "common/warp.h"

namespace pk::batched_lora {

constexpr int kWarpCols = 64, kCols = kWarps * kWarpCols, kTiles = kWarpCols / 8;
constexpr int kStep = 16, kPitch = tile_pitch(kCols);  // ranks of a stage
constexpr int kLowParts = 3;

using Left = uint32_t[kLowParts][4];  // 16 rows and 16 ranks of u, as mma.sync wants them

// Ranks [kStep stage, ...) of B^T into a stage of the ring, zeros past the rank and N. n: the lane's first column.
template <class T>
__device__ __forceinline__ void fill(T* to, const Slice& slice, const PoolTile& tile, int stage, int64_t n) {
  const int32_t* const numbers = tile.entry + kTablePages + slice.T;
  const T* const from = static_cast<const T*>(slice.pages_out);
#pragma unroll
  for (int i = 0; i < kStep / kWarps; ++i) {
    const int row = warp_index() + kWarps * i, r = stage * kStep + row;
    const bool inside = r < tile.rank && n < slice.N;
    const int64_t number = inside ? numbers[r / kPage] : 0;
    cp_async<16>(to + row * kPitch + lane_index() * 8,
                 inside ? from + (number * kPage + r % kPage) * slice.N + n : from, inside ? 16 : 0);
  }
}

// sums += u B^T of 16 ranks for the warp's columns, the first of which `factor` points to.
template <class T>
__device__ __forceinline__ void multiply(float (&sums)[kTiles][4], const Left& left, const T* factor) {
  constexpr int kParts = kBf16Parts<T>;
  const int lane = lane_index();
#pragma unroll
  for (int j = 0; j < kTiles; j += 2) {
    uint32_t pairs[4], right[2][kParts][2];
    ldmatrix_trans(pairs, factor + lane % 16 * kPitch + 8 * j + lane / 16 * 8);
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      uint32_t parts[kParts];
      as_bf16(parts, pairs[e], T{});
#pragma unroll
      for (int q = 0; q < kParts; ++q) right[e / 2][q][e % 2] = parts[q];
    }
#pragma unroll
    for (int i = 0; i < 2 * kLowParts * kParts; ++i) {
      mma_m16n8k16<bf16>(sums[j + i % 2], left[i / 2 % kLowParts], right[i % 2][i / 2 / kLowParts]);
    }
  }
}

template <class T>
__device__ __forceinline__ T* output(const Slice& slice, const PoolTile& tile, int row, int64_t n) {
  return static_cast<T*>(slice.y) + tile.order[row] * slice.y_stride + n;
}

// y of the tile's rows, kRowPitch apart in shared memory; nothing past N.
template <int kRowPitch, class T>
__device__ __forceinline__ void load_outputs(T* to, const Slice& slice, const PoolTile& tile, int64_t n) {
  for (int row = warp_index(); row < tile.rows; row += kWarps) {
    if (n < slice.N) cp_async<16>(to + row * kRowPitch + lane_index() * 8, output<T>(slice, tile, row, n));
  }
}

}  // namespace pk::batched_lora
