// Both products of dy with low-rank matrices, for the adapters of one member, from one read of dy:
//   ds_l = s_l dy B_l   parts [column blocks][M][R], columns rank0_l ...
//   dB_l = dy^T h_l     parts [row chunks][N][R_l]
// dy [M, N]: bf16 or fp16; h [M, R] fp32; B_l [N, R_l].
// Grid: (ranks in blocks of 16 or 32, all adapters side by side; 512 columns of dy; chunk of rows). Blocks of the same
// dy with other ranks are neighbours in the grid and find it in the L2 cache. A warp has 64 of the columns: its part of
// B stays in registers, as does its dB over the whole chunk; ds of a tile of 16 rows is summed over the block's warps,
// in their order, by way of shared memory. fp32 accumulation. h enters as two bf16 parts; three, which are all of it,
// where dB is fp32, and so does an fp32 B, as ds is always fp32; fp16 dy meets h as two bf16 parts, and fp16 B as it
// is.
#include "lora_linear/pass_tiles.h"

namespace pk::lora_linear {

namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32, kStages = 3, kBlocks = 264;
constexpr int kWarpCols = kTileCols / kWarps, kSteps = kWarpCols / 16;

template <class T, class F, int kRanks>
struct Shape {
  static constexpr int kFactorParts = sizeof(F) == 4 ? 3 : 1, kLowParts = sizeof(F) == 4 ? 3 : 2;
  static constexpr int kGroups = kRanks / 8;
  using Low = LowRows<kThreads, kRanks, kLowParts>;
  static constexpr int kSumPitch = kRanks + 8, kSum = kWarps * kTileRows * kSumPitch;  // ds of each warp
  static constexpr size_t kBytes =
      kStages * kTileSize * sizeof(T) + 2 * Low::kSize * sizeof(T) + 2 * kSum * sizeof(float);
};

// Where rank v of all the adapters side by side belongs; adapter = -1 past the last.
struct Rank {
  int adapter, r;
};
__device__ __forceinline__ Rank find_rank(const Adapters& adapters, int v) {
  for (int l = 0; l < adapters.count; ++l) {
    if (v < adapters.at[l].R) return {l, v};
    v -= adapters.at[l].R;
  }
  return {-1, 0};
}

// The warp's columns of B as right operands of dy B: [step of 16 columns][8 ranks][part].
template <class T, class F, int kRanks>
__device__ __forceinline__ void load_factor(uint32_t (&to)[kSteps][kRanks / 8][Shape<T, F, kRanks>::kFactorParts][2],
                                            const DyPass& call, int rank0, int64_t col0) {
  constexpr int kParts = Shape<T, F, kRanks>::kFactorParts;
  const int lane = lane_index();
#pragma unroll
  for (int j = 0; j < kRanks / 8; ++j) {
    const Rank rank = find_rank(call.adapters, rank0 + 8 * j + lane / 4);
    const CudaAdapter& adapter = call.adapters.at[rank.adapter < 0 ? 0 : rank.adapter];
    const F* const from = static_cast<const F*>(adapter.factor) + rank.r;
    const int64_t cols = rank.adapter < 0 ? 0 : call.N;
#pragma unroll
    for (int s = 0; s < kSteps; ++s) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int64_t n = col0 + 16 * s + 8 * half + lane % 4 * 2;
        const float first = n < cols ? to_float(from[n * adapter.R]) : 0.f;
        const float second = n + 1 < cols ? to_float(from[(n + 1) * adapter.R]) : 0.f;
        uint32_t parts[kParts];
        split_pair<T>(first, second, parts);
#pragma unroll
        for (int p = 0; p < kParts; ++p) to[s][j][p][half] = parts[p];
      }
    }
  }
}

// dy B of 16 rows and the warp's columns, left in shared memory for the sum over the warps.
template <class T, int kGroups, int kParts>
__device__ __forceinline__ void multiply_ds(float* sum, const T* tile,
                                            const uint32_t (&factor)[kSteps][kGroups][kParts][2]) {
  constexpr int kPitch = 8 * kGroups + 8;
  const int lane = lane_index();
  float product[kGroups][4] = {};
#pragma unroll
  for (int s = 0; s < kSteps; ++s) {
    uint32_t left[4];
    ldmatrix(left, tile + lane % 16 * kTilePitch + 16 * s + lane / 16 * 8);
#pragma unroll
    for (int p = 0; p < kParts; ++p) {
#pragma unroll
      for (int j = 0; j < kGroups; ++j) mma_m16n8k16<T>(product[j], left, factor[s][j][p]);
    }
  }
#pragma unroll
  for (int j = 0; j < kGroups; ++j) {
    float* const to = sum + lane / 4 * kPitch + 8 * j + lane % 4 * 2;
    *reinterpret_cast<float2*>(to) = {product[j][0], product[j][1]};
    *reinterpret_cast<float2*>(to + 8 * kPitch) = {product[j][2], product[j][3]};
  }
}

// dB += dy^T h over 16 rows, for the warp's columns.
template <class T, int kGroups, int kParts>
__device__ __forceinline__ void multiply_dB(float (&dB)[kSteps][kGroups][4], const T* tile, const bf16* low) {
  constexpr int kPitch = tile_pitch(8 * kGroups);
  const int lane = lane_index();
  uint32_t right[kParts][kGroups][2];
#pragma unroll
  for (int p = 0; p < kParts; ++p) {
#pragma unroll
    for (int j = 0; j < kGroups; j += 2) {
      uint32_t pair[4];
      ldmatrix_trans(pair, low + p * kTileRows * kPitch + lane % 16 * kPitch + 8 * j + lane / 16 * 8);
#pragma unroll
      for (int e = 0; e < 4; ++e) right[p][j + e / 2][e % 2] = pair[e];
    }
  }
#pragma unroll
  for (int s = 0; s < kSteps; ++s) {
    uint32_t pairs[4], left[kBf16Parts<T>][4];
    ldmatrix_trans(pairs, tile + (lane % 8 + lane / 16 * 8) * kTilePitch + 16 * s + lane / 8 % 2 * 8);
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      uint32_t parts[kBf16Parts<T>];
      as_bf16(parts, pairs[e], T{});
#pragma unroll
      for (int q = 0; q < kBf16Parts<T>; ++q) left[q][e] = parts[q];
    }
#pragma unroll
    for (int p = 0; p < kParts; ++p) {
#pragma unroll
      for (int j = 0; j < kGroups; ++j) {
        mma_m16n8k16<bf16>(dB[s][j], left[0], right[p][j]);
        if constexpr (kBf16Parts<T> == 2) {
          if (p == 0) mma_m16n8k16<bf16>(dB[s][j], left[1], right[0][j]);  // the small parts' product would not show
        }
      }
    }
  }
}

template <int kGroups>
__device__ __forceinline__ void write_dB(const DyPass& call, const float (&dB)[kSteps][kGroups][4], int rank0,
                                         int64_t col0, int64_t chunk) {
  const int lane = lane_index();
#pragma unroll
  for (int j = 0; j < kGroups; ++j) {
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const Rank rank = find_rank(call.adapters, rank0 + 8 * j + lane % 4 * 2 + e);
      float* const to = rank.adapter < 0 ? nullptr : call.dB[rank.adapter];
      if (!to) continue;
      const int64_t R = call.adapters.at[rank.adapter].R;
#pragma unroll
      for (int i = 0; i < 2 * kSteps; ++i) {
        const int64_t n = col0 + 8 * i + lane / 4;
        if (n < call.N) to[(chunk * call.N + n) * R + rank.r] = dB[i / 2][j][i % 2 * 2 + e];
      }
    }
  }
}

template <class T, class F, int kRanks>
__global__ void __launch_bounds__(kThreads, kRanks == 16 && sizeof(F) == 2 ? 2 : 1)
    lora_linear_backward_dy_pass_kernel(const __grid_constant__ DyPass call, int64_t rows_each, bool vector) {
  using S = Shape<T, F, kRanks>;
  using Low = typename S::Low;
  PK_DYNAMIC_SHARED(T, stages);
  bf16* const lows = reinterpret_cast<bf16*>(stages + kStages * kTileSize);
  float* const sums = reinterpret_cast<float*>(lows + 2 * Low::kSize);
  const int rank0 = blockIdx.x * kRanks, warp = warp_index();
  const int64_t block_col = static_cast<int64_t>(blockIdx.y) * kTileCols, col0 = block_col + warp * kWarpCols;
  const int64_t first = blockIdx.z * rows_each, end = first + rows_each < call.M ? first + rows_each : call.M;
  const int rows = first < end ? static_cast<int>(end - first) : 0, tiles = (rows + kTileRows - 1) / kTileRows;

  uint32_t factor[kSteps][S::kGroups][S::kFactorParts][2];
  if (call.ds) load_factor<T, F, kRanks>(factor, call, rank0, col0);
  float dB[kSteps][S::kGroups][4] = {};

  // This thread's column of h and ds.
  const Rank rank = find_rank(call.adapters, rank0 + Low::rank());
  const CudaAdapter& adapter = call.adapters.at[rank.adapter < 0 ? 0 : rank.adapter];
  const float scaling = adapter.scaling;
  const int64_t column = adapter.rank0 + rank.r;
  float* ds = nullptr;
  if (call.ds && rank.adapter >= 0) ds = call.ds + (blockIdx.y * call.M + first + Low::row()) * call.R + column;
  Low low(call.h && rank.adapter >= 0 ? call.h + column : nullptr, call.R, first);
  WideRows<T, kThreads> dy(call.dy, call.dy_stride, first, block_col, call.N, vector);

  const auto bring = [&](int i) {
    if (i < tiles) dy.fetch(stages + i % kStages * kTileSize, rows - i * kTileRows);
    cp_async_commit();
  };
  const auto write_ds = [&](int i) {
    if (!ds) return;
#pragma unroll
    for (int e = 0; e < Low::kEach; ++e) {
      const int row = Low::row() + e * Low::kRowStep;
      const float* const from = sums + i % 2 * S::kSum + row * S::kSumPitch + Low::rank();
      float sum = 0.f;
#pragma unroll
      for (int w = 0; w < kWarps; ++w) sum += from[w * kTileRows * S::kSumPitch];
      if (row < rows - i * kTileRows) ds[e * Low::kRowStep * call.R] = scaling * sum;
    }
    ds += kTileRows * call.R;
  };

  for (int i = 0; i < kStages - 1; ++i) bring(i);
  Low::clear(lows, 2);
  low.fetch(rows);
  __syncthreads();
  low.store(lows);
  low.fetch(rows - kTileRows);
  for (int i = 0; i < tiles; ++i) {
    cp_async_wait<kStages - 2>();
    __syncthreads();  // tile i and its rows of h are there; of what follows, nobody reads any more what is overwritten
    bring(i + kStages - 1);
    const T* const tile = stages + i % kStages * kTileSize + warp * kWarpCols;
    if (call.ds) {
      multiply_ds<T>(sums + i % 2 * S::kSum + warp * kTileRows * S::kSumPitch, tile, factor);
      if (i > 0) write_ds(i - 1);
    }
    if (call.h) {
      multiply_dB<T, S::kGroups, S::kLowParts>(dB, tile, lows + i % 2 * Low::kSize);
      low.store(lows + (i + 1) % 2 * Low::kSize);
      low.fetch(rows - (i + 2) * kTileRows);
    }
  }
  __syncthreads();
  if (call.ds && tiles > 0) write_ds(tiles - 1);
  write_dB(call, dB, rank0, col0, blockIdx.z);
}

template <class T, class F, int kRanks>
cudaError_t launch_ranks(const DyPass& call, int ranks, cudaStream_t stream) {
  const RowChunks chunks = row_chunks(call.M, call.N, kBlocks);
  const dim3 grid(static_cast<unsigned>(ceil_div(ranks, kRanks)), dy_column_blocks(call.N), chunks.count);
  const bool vector = vector_rows(call.dy, call.dy_stride, sizeof(T));
  return PK_LAUNCH((lora_linear_backward_dy_pass_kernel<T, F, kRanks>), grid, dim3(kThreads),
                   (Shape<T, F, kRanks>::kBytes), stream, call, chunks.rows, vector);
}

template <class T, class F>
cudaError_t run(DyPass call, cudaStream_t stream) {
  int ranks = 0;
  bool wants_dB = false;
  for (int l = 0; l < call.adapters.count; ++l) {
    ranks += call.adapters.at[l].R;
    wants_dB = wants_dB || call.dB[l];
  }
  if (!wants_dB) call.h = nullptr;
  if (!call.ds && !call.h) return cudaSuccess;
  // An fp32 B fills three times the registers: no room for 32 ranks.
  if constexpr (sizeof(F) == 2) {
    if (ranks > 16) return launch_ranks<T, F, 32>(call, ranks, stream);
  }
  return launch_ranks<T, F, 16>(call, ranks, stream);
}

}  // namespace

int dy_column_blocks(int64_t N) {
  return static_cast<int>(ceil_div(N, kTileCols));
}

int dy_row_chunks(int64_t M, int64_t N) {
  return row_chunks(M, N, kBlocks).count;
}

cudaError_t dy_pass(Dtype x, Dtype factors, const DyPass& call, cudaStream_t stream) {
  if (x == Dtype::kBFloat16 && factors == Dtype::kBFloat16) return run<bf16, bf16>(call, stream);
  if (x == Dtype::kFloat16 && factors == Dtype::kFloat16) return run<fp16, fp16>(call, stream);
  if (x == Dtype::kBFloat16 && factors == Dtype::kFloat32) return run<bf16, float>(call, stream);
  return cudaErrorInvalidValue;
}

}  // namespace pk::lora_linear
