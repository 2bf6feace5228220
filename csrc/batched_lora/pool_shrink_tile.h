// What the kernels of the tensor cores share that multiply rows of x by a page of A: how a lane holds both, and the
// product of a warp's 128 columns of a chunk. Lane t of a row takes 8 neighbours, which serve as columns 2t, 2t + 1,
// 2t + 8, 2t + 9 of two k16 steps, in x and A alike.
#pragma once

#include "batched_lora/pool_tile.h"
#include "common/mma.h"

namespace pk::batched_lora {

constexpr int kPages = 2;                    // at a time
constexpr int kWarpChunk = kChunk / kWarps;  // columns of a chunk
constexpr int kVectors = kWarpChunk / 32;    // of a lane in a row, 32 columns apart

using Vectors = uint4[kVectors];

// The lane's first column of a chunk.
__device__ __forceinline__ int64_t first_column(int64_t chunk, int warp, int lane) {
  return chunk * kChunk + warp * kWarpChunk + lane % 4 * 8;
}

// d += x A^T: the lane's vectors of rows lane / 4 and lane / 4 + 8 of x, and of row lane / 4 of the page.
template <class T>
__device__ __forceinline__ void multiply(float (&d)[4], const Vectors (&x)[2], const Vectors& factor) {
#pragma unroll
  for (int s = 0; s < kVectors; ++s) {
    const uint4 top = x[0][s], low = x[1][s];
    mma_m16n8k16<T>(d, {top.x, low.x, top.y, low.y}, {factor[s].x, factor[s].y});
    mma_m16n8k16<T>(d, {top.z, low.z, top.w, low.w}, {factor[s].z, factor[s].w});
  }
}

// A warp's sums of a page, on their way to being added to those of the other warps.
using WarpSums = float[kWarps][kPages][kTileMost][kPage];

__device__ __forceinline__ void store_sums(WarpSums& sums, int warp, int lane, int page, const float (&d)[4]) {
  float* const to = &sums[warp][page][lane / 4][lane % 4 * 2];
  *reinterpret_cast<float2*>(to) = {d[0], d[1]};
  *reinterpret_cast<float2*>(to + 8 * kPage) = {d[2], d[3]};
}

// In the order of the warps.
__device__ __forceinline__ float add_sums(const WarpSums& sums, int page, int row, int rank) {
  float sum = sums[0][page][row][rank];
#pragma unroll
  for (int w = 1; w < kWarps; ++w) sum += sums[w][page][row][rank];
  return sum;
}

}  // namespace pk::batched_lora
