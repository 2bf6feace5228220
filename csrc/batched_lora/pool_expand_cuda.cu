// Forward of batched_lora over a pool, the expand: y[i, n] += s (sum_r u[p, r] B^T[r, n] + b[n]), or with a gain
// (1 + d[n]) (y[i, n] + s sum_r u[p, r] B^T[r, n]) + s b[n], rounded once; u[p, r] = f(h[p, r] + a[r]), which is h for
// LoRA; row i at position p of the route's order, h [parts][M][columns] the shrink's, y [M, N], B^T, b and d in pages
// of 8 rows of N.
// Bound by reading B^T, each element of which a tile reads once, and by y. Grid: (tile, 256 columns, slice), a warp
// takes 64 columns. Stages of 16 ranks of B^T arrive by cp.async, as many ahead as the ring has; h is added up in the
// order of its parts for 64 ranks at a time and enters mma.sync as three bf16 parts, which hold all its bits; fp16
// pages enter as two. Rows are padded to 16 and ranks to 16 with zeros. fp32 sums, in the order of r. The launch
// overlaps the shrink: B^T and the tables are read before it waits.
#include "batched_lora/pool_expand_tile.h"

namespace pk::batched_lora {
namespace {

constexpr int kLowRanks = 64, kLowPitch = tile_pitch(kLowRanks);  // of h at a time
constexpr int kDeltaPitch = kCols + 8;                            // of the sums, on their way to whole vectors of y
constexpr int kManyBlocks = 512;                                  // with fewer of them, more stages are in flight

using Low = uint16_t[kLowParts][kTileMost][kLowPitch];

// u of ranks [rank, rank + 64), as bf16 parts. h: of the tile's first row and the slice's first rank. Two rows at a
// time, and eight parts of each: a tile of few rows waits for memory once.
__device__ __forceinline__ void load_low(Low& low, const Pool& call, const Slice& slice, const float* h,
                                         const PoolTile& tile, int rank) {
  constexpr int kRowStep = kThreads / kLowRanks;
  const int r = threadIdx.x % kLowRanks, wanted = rank + r < tile.rank ? tile.rows : 0;
  const int64_t H = h_column(call, call.slices);
  const bool lora = is_lora(slice, tile);
#pragma unroll 1
  for (int m = threadIdx.x / kLowRanks; m < kTileMost; m += 2 * kRowStep) {
    const float* from = h + m * H + rank + r;
    float first = 0.f, second = 0.f;
#pragma unroll 8
    for (int part = 0; part < call.parts; ++part, from += call.M * H) {
      if (m < wanted) first += __ldcg(from);
      if (m + kRowStep < wanted) second += __ldcg(from + kRowStep * H);
    }
    if (!lora) {
      if (m < wanted) first = bottleneck(slice, tile, rank + r, first);
      if (m + kRowStep < wanted) second = bottleneck(slice, tile, rank + r, second);
    }
    uint32_t parts[kLowParts];
    cut_pair(first, second, parts);
#pragma unroll
    for (int p = 0; p < kLowParts; ++p) {
      low[p][m][r] = static_cast<uint16_t>(parts[p]);
      low[p][m + kRowStep][r] = static_cast<uint16_t>(parts[p] >> 16);
    }
  }
}

__device__ __forceinline__ void load_left(Left& left, const Low& low, int rank) {
#pragma unroll
  for (int p = 0; p < kLowParts; ++p) ldmatrix(left[p], &low[p][lane_index() % 16][rank + lane_index() / 16 * 8]);
}

// A thread changes and stores 8 neighbours of every fourth row of y.
template <class T>
__device__ __forceinline__ void add_outputs(const T* y, const float* sums, const Slice& slice, const PoolTile& tile,
                                            int64_t n, const uint4& bias, const uint4& gain, float scaling) {
  const bool gained = tile.entry[kTableGain] >= 0;
  for (int row = warp_index(); row < tile.rows && n < slice.N; row += kWarps) {
    const float* const sum = sums + row * kDeltaPitch + lane_index() * 8;
    T value[8], b[8], d[8];
    memcpy(value, __builtin_assume_aligned(y + row * kCols + lane_index() * 8, 16), 16);
    memcpy(b, &bias, 16);
    memcpy(d, &gain, 16);
#pragma unroll
    for (int e = 0; e < 8; ++e) {
      value[e] = from_float<T>(changed(to_float(value[e]), sum[e], scaling, to_float(b[e]), to_float(d[e]), gained));
    }
    uint4 vector;
    memcpy(&vector, value, 16);
    *reinterpret_cast<uint4*>(output<T>(slice, tile, row, n)) = vector;
  }
}

// 8 neighbours of a row of the pages, zeros where there is no row.
template <class T>
__device__ __forceinline__ uint4 load_vector(const Slice& slice, int64_t row, int64_t n) {
  if (row < 0 || n >= slice.N) return {};
  return __ldg(reinterpret_cast<const uint4*>(static_cast<const T*>(slice.pages_out) + row * slice.N + n));
}

template <class T, int kStages>
__global__ void __launch_bounds__(kThreads, kStages > 3               ? 2
                                            : std::is_same_v<T, bf16> ? 5
                                                                      : 4)
    batched_lora_forward_pool_expand_kernel(const __grid_constant__ Pool call) {
  constexpr int kStage = kStep * kPitch;
  static_assert(kStages * kStage * sizeof(T) >= kTileMost * kDeltaPitch * sizeof(float), "the sums fit the ring");
  __shared__ __align__(16) Low low;
  __shared__ __align__(16) T y[kTileMost * kCols];
  PK_DYNAMIC_SHARED(T, ring);
  const int g = static_cast<int>(blockIdx.z), lane = lane_index(), warp = warp_index();
  const Slice& slice = call.slice[g];
  const int64_t n = static_cast<int64_t>(blockIdx.y) * kCols + lane * 8;
  const PoolTile tile = pool_tile(call, slice, blockIdx.x);
  if (tile.rank == 0 || n - lane * 8 >= slice.N) {
    // One block at least waits, so that this launch cannot end before the shrink.
    if (blockIdx.x == 0) wait_for_previous_launch();
    return;
  }
  const int stages = (tile.rank + kStep - 1) / kStep;
#pragma unroll
  for (int i = 0; i < kStages - 1; ++i) {
    if (i < stages) fill(ring + i * kStage, slice, tile, i, n);
    cp_async_commit();
  }
  const uint4 bias = load_vector<T>(slice, tile.entry[kTableBias], n),
              gain = load_vector<T>(slice, tile.entry[kTableGain], n);
  const float scaling = static_cast<const float*>(slice.scaling)[tile.slot];

  wait_for_previous_launch();
  load_outputs<kCols>(y, slice, tile, n);
  const float* const h =
      static_cast<const float*>(call.h) + tile.first * h_column(call, call.slices) + h_column(call, g);
  float sums[kTiles][4] = {};
  int used = 0;
#pragma unroll 1
  for (int i = 0; i < stages; ++i) {
    if (i * kStep % kLowRanks == 0) {
      if (i > 0) __syncthreads();
      load_low(low, call, slice, h, tile, i * kStep);
    }
    cp_async_wait<kStages - 2>();
    __syncthreads();
    const int filled = used == 0 ? kStages - 1 : used - 1;
    if (i + kStages - 1 < stages) fill(ring + filled * kStage, slice, tile, i + kStages - 1, n);
    cp_async_commit();
    Left left;
    load_left(left, low, i * kStep % kLowRanks);
    multiply(sums, left, ring + used * kStage + warp * kWarpCols);
    used = used + 1 == kStages ? 0 : used + 1;
  }
  cp_async_wait<0>();
  __syncthreads();
  float* const delta = reinterpret_cast<float*>(ring);
#pragma unroll
  for (int j = 0; j < kTiles; ++j) {
    float* const to = delta + lane / 4 * kDeltaPitch + warp * kWarpCols + 8 * j + lane % 4 * 2;
    *reinterpret_cast<float2*>(to) = {sums[j][0], sums[j][1]};
    *reinterpret_cast<float2*>(to + 8 * kDeltaPitch) = {sums[j][2], sums[j][3]};
  }
  __syncthreads();
  add_outputs(y, delta, slice, tile, n, bias, gain, scaling);
}

int64_t column_blocks(const Pool& call) {
  int64_t blocks = 0;
  for (int g = 0; g < call.slices; ++g) {
    const int64_t of_slice = ceil_div(call.slice[g].N, kCols);
    blocks = of_slice > blocks ? of_slice : blocks;
  }
  return blocks;
}

template <class T>
cudaError_t launch_expand(const Pool& call, cudaStream_t stream) {
  const int64_t tiles = tile_capacity(call.M, call.slots), blocks = column_blocks(call);
  const dim3 grid(static_cast<unsigned>(tiles), static_cast<unsigned>(blocks), call.slices);
  const auto run = [&](auto kernel, int stages) {
    return PK_LAUNCH_OVERLAPPED(kernel, grid, dim3(kThreads), stages * kStep * kPitch * sizeof(T), stream, call);
  };
  const bool deep = tiles * blocks * call.slices < kManyBlocks && most_pages(call) * kPage > 3 * kStep;
  return deep ? run(batched_lora_forward_pool_expand_kernel<T, 8>, 8)
              : run(batched_lora_forward_pool_expand_kernel<T, 3>, 3);
}

}  // namespace

cudaError_t pool_expand(Dtype x, Dtype pages, const Pool& call, cudaStream_t stream) {
  if (!narrow(x, pages) || !vectors_out(call)) return pool_expand_plain(x, pages, call, stream);
  if (no_tiles(call)) return cudaSuccess;
  return x == Dtype::kFloat16 ? launch_expand<fp16>(call, stream) : launch_expand<bf16>(call, stream);
}

}  // namespace pk::batched_lora
