// Forward of batched_lora over a pool on the plain cores: both steps of batched_lora_cuda.h, for every pair of dtypes,
// any stride along the rows and any alignment. Sums in fp32, in fp64 for fp64; x [M, K], y [M, N], h
// [parts][M][columns].
//   shrink  grid: (tile, chunk of K or all of them, slice and a turn at its ranks); a warp takes a rank of A and its
//           lanes the columns in turn; the lanes are added pairwise, then the chunks in order
//   expand  grid: (tile, 128 columns, slice); a thread takes a column of B^T, ranks in order
#include <type_traits>

#include "batched_lora/pool_tile.h"
#include "common/parts.h"
#include "common/warp.h"

namespace pk::batched_lora {
namespace {

constexpr int kLowRanks = 32;  // of h at a time

template <class T>
using Acc = std::conditional_t<std::is_same_v<T, double>, double, float>;

template <class T>
__device__ __forceinline__ Acc<T> widen(T value) {
  if constexpr (std::is_same_v<T, double>) {
    return value;
  } else {
    return to_float(value);
  }
}
template <class T>
__device__ __forceinline__ T narrow(Acc<T> value) {
  if constexpr (std::is_same_v<T, double>) {
    return value;
  } else {
    return from_float<T>(value);
  }
}

template <class T, class F>
__global__ void __launch_bounds__(kThreads)
    batched_lora_forward_pool_shrink_plain_kernel(const __grid_constant__ Pool call, int lanes) {
  __shared__ int64_t row[kTileMost];  // where the rows of x begin
  const int g = static_cast<int>(blockIdx.z) / lanes, turn = static_cast<int>(blockIdx.z) % lanes;
  const PoolTile tile = pool_tile(call, call.slice[g], blockIdx.x);
  const int lane = lane_index(), thread = static_cast<int>(threadIdx.x);
  if (turn * kWarps >= tile.rank) return;
  if (thread < tile.rows) row[thread] = tile.order[thread] * call.x_stride;
  __syncthreads();
  const T* const x = static_cast<const T*>(call.x);
  Acc<T>* const h = static_cast<Acc<T>*>(call.h) +
                    (blockIdx.y * call.M + tile.first + lane) * h_column(call, call.slices) + h_column(call, g);
  const int64_t chunks = ceil_div(call.K, kChunk), begin = chunks * blockIdx.y / call.parts,
                end = chunks * (blockIdx.y + 1) / call.parts;
#pragma unroll 1
  for (int r = turn * kWarps + warp_index(); r < tile.rank; r += lanes * kWarps) {
    const int64_t number = tile.entry[kTablePages + r / kPage];
    const F* const factor = static_cast<const F*>(call.pages_in) + (number * kPage + r % kPage) * call.K;
    Acc<T> total = 0;  // of the row that is the lane's
#pragma unroll 1
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      const int64_t last = chunk + 1 < chunks ? (chunk + 1) * kChunk : call.K;
      Acc<T> sum[kTileMost] = {};
#pragma unroll 2
      for (int64_t k = chunk * kChunk + lane; k < last; k += 32) {
        const Acc<T> a = static_cast<Acc<T>>(widen(factor[k]));
#pragma unroll
        for (int m = 0; m < kTileMost; ++m) {
          if (m < tile.rows) sum[m] += widen(x[row[m] + k]) * a;
        }
      }
#pragma unroll
      for (int m = 0; m < kTileMost; ++m) {
        if (m >= tile.rows) break;
        const Acc<T> whole = warp_sum(sum[m]);
        if (lane == m) total += whole;
      }
    }
    if (lane < tile.rows) h[r] = total;
  }
}

template <class T, class F>
__global__ void __launch_bounds__(kThreads)
    batched_lora_forward_pool_expand_plain_kernel(const __grid_constant__ Pool call) {
  __shared__ Acc<T> low[kTileMost][kLowRanks];
  const int g = static_cast<int>(blockIdx.z), r0 = threadIdx.x % kLowRanks, m0 = threadIdx.x / kLowRanks;
  const Slice& slice = call.slice[g];
  const int64_t n = static_cast<int64_t>(blockIdx.y) * kThreads + threadIdx.x;
  const PoolTile tile = pool_tile(call, slice, blockIdx.x);
  if (tile.rank == 0 || n - threadIdx.x >= slice.N) return;
  const bool inside = n < slice.N;
  const int64_t H = h_column(call, call.slices);
  const Acc<T>* const h = static_cast<const Acc<T>*>(call.h) + tile.first * H + h_column(call, g);
  const F* const pages = static_cast<const F*>(slice.pages_out);
  const int32_t* const numbers = tile.entry + kTablePages + slice.T;
  Acc<T> sum[kTileMost] = {};
  const bool lora = is_lora(slice, tile);
#pragma unroll 1
  for (int rank = 0; rank < tile.rank; rank += kLowRanks) {
#pragma unroll
    for (int m = m0; m < kTileMost; m += kWarps) {
      Acc<T> value = 0;
      for (int part = 0; part < call.parts; ++part) {
        if (m < tile.rows && rank + r0 < tile.rank) value += h[(part * call.M + m) * H + rank + r0];
      }
      const bool wanted = !lora && m < tile.rows && rank + r0 < tile.rank;
      low[m][r0] = wanted ? bottleneck(slice, tile, rank + r0, value) : value;
    }
    __syncthreads();
    const int ranks = tile.rank - rank < kLowRanks ? tile.rank - rank : kLowRanks;
#pragma unroll 4
    for (int r = 0; r < ranks && inside; ++r) {
      const int64_t number = numbers[(rank + r) / kPage];
      const Acc<T> b = static_cast<Acc<T>>(widen(pages[(number * kPage + (rank + r) % kPage) * slice.N + n]));
#pragma unroll
      for (int m = 0; m < kTileMost; ++m) sum[m] += low[m][r] * b;
    }
    __syncthreads();
  }
  if (!inside) return;
  const auto value = [&](int64_t row) { return row < 0 ? Acc<T>{0} : Acc<T>{widen(pages[row * slice.N + n])}; };
  const Acc<T> bias = value(tile.entry[kTableBias]), scaling = static_cast<const Acc<T>*>(slice.scaling)[tile.slot];
  const auto store = [&](Acc<T> gain, bool gained) {
#pragma unroll
    for (int m = 0; m < kTileMost; ++m) {
      if (m >= tile.rows) break;
      T* const y = static_cast<T*>(slice.y) + tile.order[m] * slice.y_stride + n;
      *y = narrow<T>(changed(widen(*y), sum[m], scaling, bias, gain, gained));
    }
  };
  // A branch in every row would take registers that sm_80 and sm_90a do not leave.
  if (const int64_t row = tile.entry[kTableGain]; row < 0) {
    store(0, false);
  } else {
    store(value(row), true);
  }
}

template <class T, class F>
cudaError_t launch_shrink(const Pool& call, cudaStream_t stream) {
  const int lanes = rank_lanes(call, ceil_div(most_pages(call) * kPage, kWarps));
  const dim3 grid(static_cast<unsigned>(tile_capacity(call.M, call.slots)), call.parts, call.slices * lanes);
  return PK_LAUNCH((batched_lora_forward_pool_shrink_plain_kernel<T, F>), grid, dim3(kThreads), 0, stream, call, lanes);
}

template <class T, class F>
cudaError_t launch_expand(const Pool& call, cudaStream_t stream) {
  int64_t blocks = 0;
  for (int g = 0; g < call.slices; ++g) {
    const int64_t of_slice = ceil_div(call.slice[g].N, kThreads);
    blocks = of_slice > blocks ? of_slice : blocks;
  }
  const dim3 grid(static_cast<unsigned>(tile_capacity(call.M, call.slots)), static_cast<unsigned>(blocks), call.slices);
  return PK_LAUNCH((batched_lora_forward_pool_expand_plain_kernel<T, F>), grid, dim3(kThreads), 0, stream, call);
}

// f with a value of x's type and one of the pages'.
template <class Function>
cudaError_t with_types(Dtype x, Dtype pages, const Function& f) {
  if (x == Dtype::kFloat64 && pages == x) return f(double{}, double{});
  if (x == Dtype::kFloat32 && pages == x) return f(float{}, float{});
  if (x == Dtype::kFloat16 && pages == x) return f(fp16{}, fp16{});
  if (x == Dtype::kBFloat16 && pages == x) return f(bf16{}, bf16{});
  if (x == Dtype::kFloat16 && pages == Dtype::kFloat32) return f(fp16{}, float{});
  if (x == Dtype::kBFloat16 && pages == Dtype::kFloat32) return f(bf16{}, float{});
  return cudaErrorInvalidValue;
}

}  // namespace

cudaError_t pool_shrink_plain(Dtype x, Dtype pages, const Pool& call, cudaStream_t stream) {
  if (no_tiles(call)) return cudaSuccess;
  return with_types(x, pages, [&](auto t, auto f) { return launch_shrink<decltype(t), decltype(f)>(call, stream); });
}

cudaError_t pool_expand_plain(Dtype x, Dtype pages, const Pool& call, cudaStream_t stream) {
  if (no_tiles(call)) return cudaSuccess;
  return with_types(x, pages, [&](auto t, auto f) { return launch_expand<decltype(t), decltype(f)>(call, stream); });
}

}  // namespace pk::batched_lora
