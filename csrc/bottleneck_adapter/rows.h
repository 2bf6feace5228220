// How the kernels of bottleneck_adapter walk over a matrix: a warp to a row, its lanes along it, in pieces of kPiece
// columns where rows alone may be too few (blockIdx.y).
#pragma once

#include "common/dropout.h"
#include "common/typed.h"
#include "common/warp.h"

namespace pk::bottleneck_adapter {

constexpr int kRowsEach = 8, kThreads = 32 * kRowsEach, kPiece = 512;

inline dim3 row_grid(int64_t rows, int64_t cols) {
  return dim3(static_cast<unsigned>((rows + kRowsEach - 1) / kRowsEach),
              static_cast<unsigned>((cols + kPiece - 1) / kPiece));
}

// The row of this warp; may lie past the last one.
__device__ __forceinline__ int64_t own_row() {
  return static_cast<int64_t>(blockIdx.x) * kRowsEach + warp_index();
}

// One past the last column of this block's piece of a row.
__device__ __forceinline__ int64_t piece_end(int64_t cols) {
  const int64_t end = (static_cast<int64_t>(blockIdx.y) + 1) * kPiece;
  return end < cols ? end : cols;
}
__device__ __forceinline__ int64_t piece_begin() {
  return static_cast<int64_t>(blockIdx.y) * kPiece + lane_index();
}

// Element i of a vector that may be missing.
template <class Acc>
__device__ __forceinline__ Acc load_or(const void* data, Dtype type, int64_t i, Acc otherwise) {
  return data ? load<Acc>(data, type, i) : otherwise;
}

}  // namespace pk::bottleneck_adapter
