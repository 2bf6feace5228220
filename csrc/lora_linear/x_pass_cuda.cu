// The gradient of A for all adapters of a layer from one read of x, dropout replayed:
//   dA_l = keep_l sum_m ds_l[m, :]^T (mask_l[m, :] x[m, :])   parts [row chunks][R_l][K]
// x [M, K]: bf16 or fp16; ds [M, R] fp32, which carries s_l.
// Grid: (ranks in blocks of one or four tiles of up to 16 ranks of one adapter; 512 columns of x; chunk of rows).
// Blocks of the same x with other ranks are neighbours in the grid and find it in the L2 cache. A warp has 32 of the
// columns, and its dA stays in registers over the whole chunk. Where an adapter drops, each warp makes its own masked
// copy of its 16 x 32 elements (one Philox call for eight of them) and multiplies that. fp32 accumulation. ds enters as
// two bf16 parts; three, which are all of it, where dA is fp32; fp16 x as two, the product of the small ones left out.
#include "lora_linear/pass_tiles.h"

namespace pk::lora_linear {

namespace {

constexpr int kThreads = 512, kWarps = kThreads / 32, kStages = 4, kBlocks = 132;
constexpr int kMostRankTiles = 4, kWarpCols = kTileCols / kWarps;
constexpr int kCopyPitch = tile_pitch(kWarpCols), kCopySize = kTileRows * kCopyPitch;
static_assert(kWarpCols == 32, "a warp's columns are one group of the mask");

template <class T, int kParts, int kRankTiles>
struct Shape {
  using Low = LowRows<kThreads, 16 * kRankTiles, kParts>;
  static constexpr size_t kBytes = (kStages * kTileSize + 2 * Low::kSize + kWarps * kCopySize) * sizeof(T);
};

// Which ranks tile v of all adapters' tiles holds: rank ... rank + 16 of `adapter`, -1 past the last tile.
struct RankTile {
  int adapter, rank;
};
__device__ __forceinline__ RankTile find_tile(const Adapters& adapters, int v) {
  for (int l = 0; l < adapters.count; ++l) {
    const int tiles = (adapters.at[l].R + 15) / 16;
    if (v < tiles) return {l, 16 * v};
    v -= tiles;
  }
  return {-1, 0};
}

// The warp's elements of x, the dropped ones as zeros. Rows of 8 lanes meet in no bank, here as there.
template <class T>
__device__ __forceinline__ void copy_kept(T* copy, const T* tile, const Keep& keep, uint64_t seed, int64_t row,
                                          int64_t col) {
  const int lane = lane_index();
  __syncwarp();  // the copy before this one has been read
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int at = lane / 4 + 8 * half;
    const Philox4 words = keep_words(seed, keep.stream, row + at, col / 32);
#pragma unroll
    for (int w = 0; w < 4; ++w) {
      const int k = 8 * w + lane % 4 * 2;
      const uint32_t pair = *reinterpret_cast<const uint32_t*>(tile + at * kTilePitch + k);
      *reinterpret_cast<uint32_t*>(copy + at * kCopyPitch + k) = keep_pair(pair, words.word[w], keep.threshold);
    }
  }
  __syncwarp();
}

// 16 x 32 elements as right operands of ds^T x, in bf16 parts.
template <class T>
__device__ __forceinline__ void load_right(uint32_t (&right)[kBf16Parts<T>][4][2], const T* tile, int pitch) {
  const int lane = lane_index();
#pragma unroll
  for (int j = 0; j < 4; j += 2) {
    uint32_t pair[4];
    ldmatrix_trans(pair, tile + lane % 16 * pitch + 8 * j + lane / 16 * 8);
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      uint32_t parts[kBf16Parts<T>];
      as_bf16(parts, pair[e], T{});
#pragma unroll
      for (int q = 0; q < kBf16Parts<T>; ++q) right[q][j + e / 2][e % 2] = parts[q];
    }
  }
}

// dA += ds^T x over 16 rows, for one tile of ranks and the warp's columns.
template <int kParts, int kPitch, int kRightParts>
__device__ __forceinline__ void multiply(float (&dA)[4][4], const bf16* low,
                                         const uint32_t (&right)[kRightParts][4][2]) {
  const int lane = lane_index();
#pragma unroll
  for (int p = 0; p < kParts; ++p) {
    uint32_t left[4];
    ldmatrix_trans(left, low + (p * kTileRows + lane % 8 + lane / 16 * 8) * kPitch + lane / 8 % 2 * 8);
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      mma_m16n8k16<bf16>(dA[j], left, right[0][j]);
      if constexpr (kRightParts == 2) {
        if (p == 0) mma_m16n8k16<bf16>(dA[j], left, right[1][j]);
      }
    }
  }
}

__device__ __forceinline__ void write_dA(const XPass& call, const float (&dA)[4][4], const RankTile& tile, int64_t col0,
                                         int64_t chunk) {
  const int lane = lane_index();
  const CudaAdapter& adapter = call.adapters.at[tile.adapter];
  const float factor = adapter.keep.scale;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int64_t r = tile.rank + lane / 4 + 8 * half;
    if (r >= adapter.R) continue;
    float* const row = call.dA[tile.adapter] + (chunk * adapter.R + r) * call.K;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int64_t k = col0 + 8 * j + lane % 4 * 2;
      const float first = factor * dA[j][2 * half], second = factor * dA[j][2 * half + 1];
      if (call.K % 2 == 0 && k < call.K) {
        *reinterpret_cast<float2*>(row + k) = {first, second};
      } else {
        if (k < call.K) row[k] = first;
        if (k + 1 < call.K) row[k + 1] = second;
      }
    }
  }
}

template <class T, int kParts, int kRankTiles>
__global__ void __launch_bounds__(kThreads)
    lora_linear_backward_x_pass_kernel(const __grid_constant__ XPass call, int64_t rows_each, bool vector) {
  using Low = typename Shape<T, kParts, kRankTiles>::Low;
  PK_DYNAMIC_SHARED(T, stages);
  bf16* const lows = reinterpret_cast<bf16*>(stages + kStages * kTileSize);
  const int warp = warp_index();
  T* const copy = stages + kStages * kTileSize + 2 * Low::kSize + warp * kCopySize;
  const int64_t block_col = static_cast<int64_t>(blockIdx.y) * kTileCols, col0 = block_col + warp * kWarpCols;
  const int64_t first = blockIdx.z * rows_each, end = first + rows_each < call.M ? first + rows_each : call.M;
  const int rows = first < end ? static_cast<int>(end - first) : 0, tiles = (rows + kTileRows - 1) / kTileRows;
  const uint64_t seed = call.seed ? *call.seed : 0;

  RankTile ranks[kRankTiles];
#pragma unroll
  for (int j = 0; j < kRankTiles; ++j) ranks[j] = find_tile(call.adapters, blockIdx.x * kRankTiles + j);
  float dA[kRankTiles][4][4] = {};

  // This thread's column of ds.
  const RankTile own = find_tile(call.adapters, blockIdx.x * kRankTiles + Low::rank() / 16);
  const int r = own.rank + Low::rank() % 16;
  const bool inside = own.adapter >= 0 && r < call.adapters.at[own.adapter].R;
  Low low(inside ? call.ds + call.adapters.at[own.adapter].rank0 + r : nullptr, call.R, first);
  WideRows<T, kThreads> x(call.x, call.x_stride, first, block_col, call.K, vector);

  const auto bring = [&](int i) {
    if (i < tiles) x.fetch(stages + i % kStages * kTileSize, rows - i * kTileRows);
    cp_async_commit();
  };

  for (int i = 0; i < kStages - 1; ++i) bring(i);
  Low::clear(lows, 2);
  low.fetch(rows);
  __syncthreads();
  low.store(lows);
  low.fetch(rows - kTileRows);
  for (int i = 0; i < tiles; ++i) {
    cp_async_wait<kStages - 2>();
    __syncthreads();  // tile i and its rows of ds are there; of what follows, nobody reads any more what is overwritten
    bring(i + kStages - 1);
    low.store(lows + (i + 1) % 2 * Low::kSize);
    low.fetch(rows - (i + 2) * kTileRows);
    const T* const tile = stages + i % kStages * kTileSize + warp * kWarpCols;
    uint32_t right[kBf16Parts<T>][4][2];
#pragma unroll
    for (int j = 0; j < kRankTiles; ++j) {
      if (ranks[j].adapter < 0) continue;
      if (j == 0 || ranks[j].adapter != ranks[j - 1].adapter) {
        const Keep& keep = call.adapters.at[ranks[j].adapter].keep;
        if (keep.threshold != kKeepAll) {
          copy_kept(copy, tile, keep, seed, first + i * kTileRows, col0);
          load_right(right, copy, kCopyPitch);
        } else {
          load_right(right, tile, kTilePitch);
        }
      }
      multiply<kParts, Low::kPitch>(dA[j], lows + i % 2 * Low::kSize + 16 * j, right);
    }
  }
#pragma unroll
  for (int j = 0; j < kRankTiles; ++j) {
    if (ranks[j].adapter >= 0) write_dA(call, dA[j], ranks[j], col0, blockIdx.z);
  }
}

template <class T, int kParts, int kRankTiles>
cudaError_t launch_tiles(const XPass& call, int64_t rank_tiles, cudaStream_t stream) {
  const RowChunks chunks = row_chunks(call.M, call.K, kBlocks);
  const dim3 grid(static_cast<unsigned>(ceil_div(rank_tiles, kRankTiles)),
                  static_cast<unsigned>(ceil_div(call.K, kTileCols)), chunks.count);
  const bool vector = vector_rows(call.x, call.x_stride, sizeof(T));
  return PK_LAUNCH((lora_linear_backward_x_pass_kernel<T, kParts, kRankTiles>), grid, dim3(kThreads),
                   (Shape<T, kParts, kRankTiles>::kBytes), stream, call, chunks.rows, vector);
}

template <class T, int kParts>
cudaError_t run(const XPass& call, cudaStream_t stream) {
  int64_t rank_tiles = 0;
  for (int l = 0; l < call.adapters.count; ++l) rank_tiles += ceil_div(call.adapters.at[l].R, 16);
  if (rank_tiles == 0) return cudaSuccess;
  if (rank_tiles == 1) return launch_tiles<T, kParts, 1>(call, rank_tiles, stream);
  return launch_tiles<T, kParts, kMostRankTiles>(call, rank_tiles, stream);
}

}  // namespace

int x_row_chunks(int64_t M, int64_t K) {
  return row_chunks(M, K, kBlocks).count;
}

cudaError_t x_pass(Dtype x, Dtype factors, const XPass& call, cudaStream_t stream) {
  if (x == Dtype::kBFloat16 && factors == Dtype::kBFloat16) return run<bf16, 2>(call, stream);
  if (x == Dtype::kFloat16 && factors == Dtype::kFloat16) return run<fp16, 2>(call, stream);
  if (x == Dtype::kBFloat16 && factors == Dtype::kFloat32) return run<bf16, 3>(call, stream);
  return cudaErrorInvalidValue;
}

}  // namespace pk::lora_linear
