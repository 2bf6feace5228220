// Forward of batched_lora over a pool, the shrink: h[part][p, r] = sum_k x[i, k] A[r, k], row i at position p of the
// route's order; x [M, K], A in pages of 8 rank rows of K.
// Bound by reading A, each element of which a tile reads once. Grid: (tile, chunk of K or all of them, slice and a turn
// at its ranks); blocks past the tiles in use end at once. A block takes 16 ranks at a time and its four warps 128
// columns of a chunk each; both operands of mma.sync come from memory without a stop: lane t of a row takes 8
// neighbours, which serve as columns 2t, 2t + 1, 2t + 8, 2t + 9 of two k16 steps, in x and A alike. The rows of a tile
// are padded to 16 with zeros, K to whole chunks, the rank to whole pages: nothing of that is read. fp32 sums; the
// warps are added in order, then the chunks.
#include "batched_lora/pool_shrink_tile.h"
#include "common/warp.h"

namespace pk::batched_lora {
namespace {

constexpr int64_t kMostInParts = 1 << 24, kMostParts = 65535;  // elements of h; blocks along y

// The lane's vectors of one row, from column k + col on; zeros past K or where the row is not wanted.
template <class T>
__device__ __forceinline__ void load_row(Vectors& to, const T* row, int64_t k, int64_t K, bool wanted) {
#pragma unroll
  for (int s = 0; s < kVectors; ++s) {
    to[s] = wanted && k + 32 * s < K ? __ldg(reinterpret_cast<const uint4*>(row + k + 32 * s)) : uint4{};
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads, 4)
    batched_lora_forward_pool_shrink_kernel(const __grid_constant__ Pool call, int lanes) {
  let_next_launch_start();
  __shared__ WarpSums sums;
  const int g = static_cast<int>(blockIdx.z) / lanes, turn = static_cast<int>(blockIdx.z) % lanes;
  const Slice& slice = call.slice[g];
  const PoolTile tile = pool_tile(call, slice, blockIdx.x);
  const int pages = (tile.rank + kPage - 1) / kPage;
  if (turn * kPages >= pages) return;

  const int thread = static_cast<int>(threadIdx.x), lane = lane_index(), warp = warp_index();
  const T *x[2], *const pages_in = static_cast<const T*>(call.pages_in);
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int row = lane / 4 + 8 * i;
    x[i] = static_cast<const T*>(call.x) + (row < tile.rows ? tile.order[row] : 0) * call.x_stride;
  }
  // This thread adds up the warps for one row and one rank of each page.
  const int m = thread / kPage, r = thread % kPage;
  float* const h = static_cast<float*>(call.h) + (blockIdx.y * call.M + tile.first + m) * h_column(call, call.slices) +
                   h_column(call, g) + r;
  const int64_t chunks = ceil_div(call.K, kChunk), begin = chunks * blockIdx.y / call.parts,
                end = chunks * (blockIdx.y + 1) / call.parts;
#pragma unroll 1
  for (int64_t chunk = begin; chunk < end; ++chunk) {
    const int64_t k = first_column(chunk, warp, lane);
    Vectors left[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) load_row(left[i], x[i], k, call.K, lane / 4 + 8 * i < tile.rows);
#pragma unroll 1
    for (int page = turn * kPages; page < pages; page += lanes * kPages) {
      Vectors right[kPages];
      float before[kPages] = {}, d[kPages][4] = {};
#pragma unroll
      for (int p = 0; p < kPages; ++p) {
        const bool wanted = (page + p) * kPage + lane / 4 < tile.rank;
        const int64_t number = page + p < pages ? tile.entry[kTablePages + page + p] : 0;
        load_row(right[p], pages_in + (number * kPage + lane / 4) * call.K, k, call.K, wanted);
      }
#pragma unroll
      for (int p = 0; p < kPages; ++p) {
        const bool mine = m < tile.rows && (page + p) * kPage + r < tile.rank;
        if (chunk > begin && mine) before[p] = h[(page + p) * kPage];
        multiply<T>(d[p], left, right[p]);
        store_sums(sums, warp, lane, p, d[p]);
      }
      __syncthreads();
#pragma unroll
      for (int p = 0; p < kPages; ++p) {
        const float sum = add_sums(sums, p, m, r);
        if (m < tile.rows && (page + p) * kPage + r < tile.rank) h[(page + p) * kPage] = before[p] + sum;
      }
      __syncthreads();
    }
  }
}

template <class T>
cudaError_t launch_shrink(const Pool& call, cudaStream_t stream) {
  const int lanes = rank_lanes(call, ceil_div(most_pages(call), kPages));
  const dim3 grid(static_cast<unsigned>(tile_capacity(call.M, call.slots)), call.parts, call.slices * lanes);
  return PK_LAUNCH(batched_lora_forward_pool_shrink_kernel<T>, grid, dim3(kThreads), 0, stream, call, lanes);
}

}  // namespace

int h_parts(const Pool& call) {
  const int64_t chunks = ceil_div(call.K, kChunk);
  const bool fits = chunks <= kMostParts && chunks * call.M * h_columns(call) <= kMostInParts;
  return few_tiles(call) && fits ? static_cast<int>(chunks) : 1;
}

cudaError_t pool_shrink(Dtype x, Dtype pages, const Pool& call, cudaStream_t stream) {
  if (!narrow(x, pages) || !vectors_in(call)) return pool_shrink_plain(x, pages, call, stream);
  if (no_tiles(call)) return cudaSuccess;
  return x == Dtype::kFloat16 ? launch_shrink<fp16>(call, stream) : launch_shrink<bf16>(call, stream);
}

}  // namespace pk::batched_lora
