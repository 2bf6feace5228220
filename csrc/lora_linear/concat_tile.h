// What a warp does with its sums of a tile of concat_gemm_sm90.cu, besides multiplying: dropout's mask, the biases,
// what out holds already, and the way into global memory. A thread has of 16 rows x kCols, row and column from the
// warp's:
//   sums[i] at (lane / 4 + 8 (i / 2 % 2), 8 (i / 4) + 2 (lane % 4) + i % 2)
#pragma once

#include "common/mma_tiles.h"
#include "lora_linear/lora_linear_cuda.h"

namespace pk::lora_linear {

// First row and column.
struct TilePlace {
  int row, col;
};

struct ConcatOut {
  void* out;  // [I, J] contiguous
  const float* biases;
  int I, J;
  bool accumulate;
};

constexpr int kPieceCols = 64, kPiecePitch = tile_pitch(kPieceCols), kPiece = 16 * kPiecePitch;  // of a warp's stores

// Which of a thread's elements of a tile are kept: bit i of word w is sums[32 w + i]. Philox is many instructions, so
// the words of a tile are made one by one while the tensor cores are busy with the tile before it.
template <int kCols>
struct TileMask {
  static constexpr int kWords = kCols / 64;
  uint32_t word[kWords];
  int made = 0;

  // row, col: of the thread's warp.
  __device__ __forceinline__ void make_word(const Keep& keep, uint64_t seed, TilePlace warp) {
    uint32_t bits = 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) {  // two groups of 32 columns, two rows
      const int row = warp.row + lane_index() / 4 + 8 * (i % 2), group = (warp.col + 64 * made) / 32 + i / 2;
      const Philox4 words = keep_words(seed, keep.stream, row, group);
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        const uint32_t random = j % 2 ? words.word[j / 2] >> 16 : words.word[j / 2] & 0xFFFFu;
        bits |= static_cast<uint32_t>(random < keep.threshold) << (16 * (i / 2) + 4 * (j / 2) + 2 * (i % 2) + j % 2);
      }
    }
#pragma unroll
    for (int w = 0; w < kWords; ++w) word[w] = w == made ? bits : word[w];
    ++made;
  }
  __device__ __forceinline__ void make_rest(const Keep& keep, uint64_t seed, TilePlace warp) {
#pragma unroll 1
    while (made < kWords) make_word(keep, seed, warp);
  }
  // And there is room for the next tile's.
  __device__ __forceinline__ void apply(float (&sums)[kCols / 2], float scale) {
#pragma unroll
    for (int i = 0; i < kCols / 2; ++i) sums[i] = word[i / 32] >> i % 32 & 1 ? sums[i] * scale : 0.f;
    made = 0;
  }
};

// A warp's 16 rows of out, by pieces of kPieceCols columns that go through shared memory: global memory is read and
// written in vectors of 16 bytes, 8 lanes a line, 4 lines at a time.
template <class T>
struct OutRows {
  static constexpr int kLanes = kPieceCols / 8, kLines = 32 / kLanes;
  T *const out, *const piece;  // where the lane's first vector is
  const int64_t step;          // from a vector of the lane to the next below
  const int rows, cols;        // that out has from there on

  __device__ __forceinline__ OutRows(const ConcatOut& to, T* piece, TilePlace warp)
      : out(static_cast<T*>(to.out) + static_cast<int64_t>(warp.row + lane_index() / kLanes) * to.J + warp.col +
            lane_index() % kLanes * 8),
        piece(piece + lane_index() / kLanes * kPiecePitch + lane_index() % kLanes * 8),
        step(static_cast<int64_t>(kLines) * to.J),
        rows(to.I - warp.row - lane_index() / kLanes),
        cols(to.J - warp.col - lane_index() % kLanes * 8) {}

  // Zeros stand for what lies outside.
  __device__ __forceinline__ void load(int first_col) const {
#pragma unroll
    for (int i = 0; i < 16 / kLines; ++i) {
      uint4 vector = {};
      if (i * kLines < rows && first_col < cols) vector = *reinterpret_cast<const uint4*>(out + i * step + first_col);
      *reinterpret_cast<uint4*>(piece + i * kLines * kPiecePitch) = vector;
    }
  }
  __device__ __forceinline__ void store(int first_col) const {
#pragma unroll
    for (int i = 0; i < 16 / kLines; ++i) {
      if (i * kLines >= rows || first_col >= cols) continue;
      *reinterpret_cast<uint4*>(out + i * step + first_col) =
          *reinterpret_cast<const uint4*>(piece + i * kLines * kPiecePitch);
    }
  }
};

template <int kCols>
__device__ __forceinline__ void add_biases(float (&sums)[kCols / 2], const ConcatOut& to, int first_col) {
#pragma unroll
  for (int i = 0; i < kCols / 2; i += 4) {
    const int col = first_col + 2 * i + lane_index() % 4 * 2;
    float2 add = {0.f, 0.f};
    if (col < to.J) add = *reinterpret_cast<const float2*>(to.biases + col);
#pragma unroll
    for (int e = 0; e < 4; ++e) sums[i + e] += e % 2 ? add.y : add.x;
  }
}

// out = sums + biases (+ out) of a warp's 16 rows.
template <class T, int kCols>
__device__ __forceinline__ void store(float (&sums)[kCols / 2], const ConcatOut& to, T* piece, TilePlace warp) {
  if (to.biases) add_biases<kCols>(sums, to, warp.col);
  const OutRows<T> rows(to, piece, warp);
  T* const own = piece + lane_index() / 4 * kPiecePitch + lane_index() % 4 * 2;
  const auto pair_at = [&](int i) {  // of a piece's 16 pairs of the lane: one in each of two rows of every 8 columns
    return reinterpret_cast<uint32_t*>(own + i % 2 * 8 * kPiecePitch + i / 2 * 8);
  };
#pragma unroll
  for (int col = 0; col < kCols; col += kPieceCols) {
    if (warp.col + col >= to.J) break;
    float* const of_piece = sums + col / 2;
    if (to.accumulate) {
      rows.load(col);
      __syncwarp();
#pragma unroll
      for (int i = 0; i < kPieceCols / 4; ++i) {
        const uint32_t pair = *pair_at(i);
        of_piece[2 * i] += to_float(T{static_cast<uint16_t>(pair)});
        of_piece[2 * i + 1] += to_float(T{static_cast<uint16_t>(pair >> 16)});
      }
    }
#pragma unroll
    for (int i = 0; i < kPieceCols / 4; ++i) *pair_at(i) = round_pair<T>(of_piece[2 * i], of_piece[2 * i + 1]);
    __syncwarp();
    rows.store(col);
    __syncwarp();
  }
}

}  // namespace pk::lora_linear
