// What the fused forward of bottleneck_adapter does with tiles of 64 rows: copies of 16-bit matrices into shared memory
// (cp.async where rows are aligned to 16 bytes), operands of mma.sync, and the output of a tile of 64 columns: gated in
// the layout of the sums, then added to the residual and written by whole rows, rounded once.
#pragma once

#include "bottleneck_adapter/bottleneck_adapter_cuda.h"
#include "common/mma_tiles.h"

namespace pk::bottleneck_adapter {

constexpr int kTileRows = 64, kTileCols = 64, kThreads = 256, kWarps = kThreads / 32;
constexpr int kOutPitch = kTileCols + 8;  // floats, by which the pairs of a half warp meet in no bank

// Columns col ... of kCount rows of a matrix with `cols` columns; zeros past the last one, and past the last row.
template <int kCount, int kWidth, class T>
__device__ __forceinline__ void copy_tile(T* tile, const T* from, int64_t ld, int64_t rows, int64_t col, int64_t cols,
                                          bool vector) {
  constexpr int kPerRow = kWidth / 8;
  const int thread = static_cast<int>(threadIdx.x), own = thread % kPerRow * 8;
  const int64_t left = cols - col - own;
#pragma unroll
  for (int i = 0; i < kCount * kPerRow / kThreads; ++i) {
    const int row = thread / kPerRow + i * (kThreads / kPerRow);
    const int valid = row >= rows || left <= 0 ? 0 : left >= 8 ? 8 : static_cast<int>(left);
    T* const to = tile + row * tile_pitch(kWidth) + own;
    const T* const source = from + row * ld + col + own;
    if (vector) {
      cp_async<16>(to, valid ? source : from, valid * static_cast<int>(sizeof(T)));
    } else {
#pragma unroll 1
      for (int e = 0; e < 8; ++e) to[e] = e < valid ? source[e] : T{};
    }
  }
}

// Two right operands of eight columns each: rows of a tile are columns of the product.
template <class T>
__device__ __forceinline__ void load_right(uint32_t (&right)[2][2], const T* tile, int pitch) {
  const int lane = lane_index();
  uint32_t all[4];
  ldmatrix(all, tile + (lane / 16 * 8 + lane % 8) * pitch + lane / 8 % 2 * 8);
#pragma unroll
  for (int i = 0; i < 4; ++i) right[i / 2][i % 2] = all[i];
}

template <class T>
__device__ __forceinline__ void load_left(uint32_t (&left)[4], const T* tile, int pitch) {
  ldmatrix(left, tile + lane_index() % 16 * pitch + lane_index() / 16 * 8);
}

// What a thread adds and writes of a tile: 8 columns of the rows threadIdx.x / 8 and 32 below.
template <class T>
struct Run {
  static constexpr int kStep = kThreads / (kTileCols / 8);
  uint32_t residual[2][4];  // pairs
  int row = static_cast<int>(threadIdx.x) / (kTileCols / 8), col = static_cast<int>(threadIdx.x) % (kTileCols / 8) * 8;

  // rows, cols: what is left of the matrix from the tile's first element on.
  __device__ __forceinline__ int valid(int i, int rows, int64_t cols) const {
    return row + i * kStep >= rows || cols <= col ? 0 : cols - col >= 8 ? 8 : static_cast<int>(cols - col);
  }

  __device__ __forceinline__ void fetch(const T* from, int64_t ld, int rows, int64_t cols, bool vector) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const T* const source = from + (row + i * kStep) * ld + col;
      const int count = valid(i, rows, cols);
      if (vector && count == 8) {
        const uint4 all = *reinterpret_cast<const uint4*>(source);
        residual[i][0] = all.x, residual[i][1] = all.y, residual[i][2] = all.z, residual[i][3] = all.w;
        continue;
      }
#pragma unroll
      for (int e = 0; e < 8; e += 2) {
        residual[i][e / 2] = pack(e < count ? source[e] : T{}, e + 1 < count ? source[e + 1] : T{});
      }
    }
  }

  __device__ __forceinline__ void write(T* to, int64_t ld, const float* tile, int rows, int64_t cols,
                                        bool vector) const {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float* const sums = tile + (row + i * kStep) * kOutPitch + col;
      T* const out = to + (row + i * kStep) * ld + col;
      const int count = valid(i, rows, cols);
      T whole[8];
#pragma unroll
      for (int e = 0; e < 8; ++e) {
        const T own = {static_cast<uint16_t>(e % 2 ? residual[i][e / 2] >> 16 : residual[i][e / 2] & 0xFFFFu)};
        whole[e] = from_float<T>(to_float(own) + sums[e]);
      }
      if (vector && count == 8) {
        *reinterpret_cast<uint4*>(out) = {pack(whole[0], whole[1]), pack(whole[2], whole[3]), pack(whole[4], whole[5]),
                                          pack(whole[6], whole[7])};
      } else {
#pragma unroll
        for (int e = 0; e < 8; ++e) {
          if (e < count) out[e] = whole[e];
        }
      }
    }
  }
};

// keep mask (sum_scale sum + bias) times `factor`; random: the element's lane of Philox.
__device__ __forceinline__ float gated_sum(const Gated& gated, float sum, float bias, uint32_t random, float factor) {
  const float whole = (static_cast<float>(gated.sum_scale) * sum + bias) * gated.keep.scale;
  return (random < gated.keep.threshold ? whole : 0.f) * factor;
}

// tile = scaling gate scale keep mask (sum_scale sum + bias), for the warp's 16 x 32 from (row, n0 + col0) on;
// factor = scaling gate of the lane's row and the one 8 below.
__device__ __forceinline__ void gate_tile(float* tile, const float (&sum)[4][4], const Fused& call,
                                          const float (&factor)[2], const float* bias, const float* scale, int64_t m0,
                                          int row, int64_t n0, int col0) {
  const Gated& gated = call.gated;
  const bool drops = gated.keep.threshold != kKeepAll;
  const uint64_t seed = drops ? *call.seed : 0;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    Philox4 words = {};
    if (drops) words = keep_words(seed, gated.keep.stream, m0 + row + 8 * i, (n0 + col0) / 32);
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int col = col0 + 8 * j + lane_index() % 4 * 2;
      float pair[2];
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const uint32_t random = e ? words.word[j] >> 16 : words.word[j] & 0xFFFFu;
        pair[e] = gated_sum(gated, sum[j][2 * i + e], bias[col + e], random, factor[i] * scale[col + e]);
      }
      *reinterpret_cast<float2*>(tile + (row + 8 * i) * kOutPitch + col) = {pair[0], pair[1]};
    }
  }
}

template <class T>
__device__ __forceinline__ void load_column(float& bias, float& scale, const Fused& call, int64_t n) {
  const T* const biases = static_cast<const T*>(call.gated.bias);
  const T* const scales = static_cast<const T*>(call.gated.scale);
  bias = biases && n < call.N ? to_float(biases[n]) : 0.f;
  scale = scales && n < call.N ? to_float(scales[call.gated.per_channel ? n : 0]) : 1.f;
}

}  // namespace pk::bottleneck_adapter
