// The whole forward of bottleneck_adapter in one launch: many rows, E <= 256, x [M, K] and the factors of one 16-bit T.
// For few rows the second of two: x A^T then comes in parts from a shrink, and every tile of N has its own block.
//   h = x A^T + a (fp32, written),  u = drop(f(h)),  y = residual + (gated, as of Expand) from u B^T
// x and the residual are read once, y is written once; every block reads all of A and B. Grid: a block of 8 warps for
// each 64 rows. It walks along K in stages of 64 columns of x and A, with h in fp32 registers; lays h down in shared
// memory, where a warp to a row makes u of it; walks along N in tiles of 64 columns, with B in pieces of 64 x 32.
// mma.sync, cp.async; y is rounded once. u enters as two bf16 parts, [high | low] in one row of shared memory, in the
// place of the row's h; a B of fp16 as two bf16 parts too, as in lora_linear's expand, without the product of the two
// small ones. There the second part of a B may be 0, so that an infinite u gives NaN.
#include "bottleneck_adapter/fused_tiles.h"
#include "common/activation.h"

namespace pk::bottleneck_adapter {
namespace {

constexpr int kDepth = 64, kPiece = 32, kPieces = 3;  // of a stage along K; of B along E, and how many are on their way
constexpr int kWidest = 256;                          // E
constexpr int kMostTiles = 65535;                     // along N, where each has its block

template <int kE>
struct Shape {
  static constexpr int kColWarps = kE == 64 ? 2 : 4;  // h: a warp has kRowTiles x kColTiles tiles of 16 x 8
  static constexpr int kRowTiles = kColWarps / 2, kColTiles = kE / kColWarps / 8;
  static constexpr int kStages = kE == 256 ? 2 : 3, kStage = (kTileRows + kE) * tile_pitch(kDepth);
  static constexpr int kPitch = tile_pitch(2 * kE);  // of u; half of it in floats: of h
  static constexpr int kPieceSize = kTileCols * tile_pitch(kPiece);
  static constexpr int kOut = 2 * kTileRows * kPitch;  // where they begin, in bytes
  static constexpr int kFactor = kOut + 4 * kTileRows * kOutPitch;
  static constexpr int kDown = 2 * kStages * kStage, kUp = kFactor + 2 * kPieces * kPieceSize;
  static constexpr int kBytes = kDown > kUp ? kDown : kUp;  // the way up takes the place of the way down
};

// Which matrices can be read and written 16 bytes at a time.
struct Vectors {
  bool x, down, up, residual, y;
};

// hidden [kTileRows][kPitch / 2] = x A^T for the block's rows; on return nothing else of shared memory is in use.
template <class T, int kE>
__device__ __forceinline__ void project_down(const Fused& call, const Vectors& vectors, T* shared, int64_t m0,
                                             int rows) {
  using S = Shape<kE>;
  constexpr int kTilePitch = tile_pitch(kDepth);
  const T* const x = static_cast<const T*>(call.x) + m0 * call.x_stride;
  const T* const A = static_cast<const T*>(call.A);
  const int row0 = warp_index() / S::kColWarps * 16 * S::kRowTiles;
  const int col0 = warp_index() % S::kColWarps * 8 * S::kColTiles;
  const int count = static_cast<int>((call.K + kDepth - 1) / kDepth);
  const auto fill = [&](int i) {
    if (i < count) {
      T* const stage = shared + i % S::kStages * S::kStage;
      copy_tile<kTileRows, kDepth>(stage, x, call.x_stride, rows, i * kDepth, call.K, vectors.x);
      copy_tile<kE, kDepth>(stage + kTileRows * kTilePitch, A, call.K, call.E, i * kDepth, call.K, vectors.down);
    }
    cp_async_commit();
  };
  float sums[S::kRowTiles][S::kColTiles][4] = {};
  for (int i = 0; i < S::kStages - 1; ++i) fill(i);
#pragma unroll 1
  for (int i = 0; i < count; ++i) {
    cp_async_wait<S::kStages - 2>();
    __syncthreads();  // also: the stage that is filled next has been read
    fill(i + S::kStages - 1);
    const T* const stage = shared + i % S::kStages * S::kStage;
    const T* const left_tile = stage + row0 * kTilePitch;
    const T* const right_tile = stage + (kTileRows + col0) * kTilePitch;
#pragma unroll
    for (int k = 0; k < kDepth; k += 16) {
      uint32_t left[S::kRowTiles][4];
#pragma unroll
      for (int r = 0; r < S::kRowTiles; ++r) load_left(left[r], left_tile + 16 * r * kTilePitch + k, kTilePitch);
#pragma unroll
      for (int j = 0; j < S::kColTiles; j += 2) {
        uint32_t right[2][2];
        load_right(right, right_tile + 8 * j * kTilePitch + k, kTilePitch);
#pragma unroll
        for (int r = 0; r < 2 * S::kRowTiles; ++r) {
          mma_m16n8k16<T>(sums[r / 2][j + r % 2], left[r / 2], right[r % 2]);
        }
      }
    }
  }
  cp_async_wait<0>();
  __syncthreads();
  float* const own =
      reinterpret_cast<float*>(shared) + (row0 + lane_index() / 4) * (S::kPitch / 2) + col0 + lane_index() % 4 * 2;
#pragma unroll
  for (int i = 0; i < 2 * S::kRowTiles * S::kColTiles; ++i) {
    const int r = i / 2 / S::kColTiles, j = i / 2 % S::kColTiles, half = i % 2;
    const float* const pair = sums[r][j] + 2 * half;
    *reinterpret_cast<float2*>(own + (16 * r + 8 * half) * (S::kPitch / 2) + 8 * j) = {pair[0], pair[1]};
  }
  __syncthreads();
}

// The same from parts of x A^T, which are added in order.
template <int kE>
__device__ __forceinline__ void add_parts(const Fused& call, float* hidden, int64_t m0, int rows) {
  for (int i = static_cast<int>(threadIdx.x); i < rows * kE; i += kThreads) {
    const int row = i / kE, e = i % kE;
    const float* const from = call.parts + (m0 + row) * call.E + e;
    float sum = 0.f;
    if (e < call.E) {
#pragma unroll 4
      for (int p = 0; p < call.splits; ++p) sum += from[p * call.M * call.E];
    }
    hidden[row * (Shape<kE>::kPitch / 2) + e] = sum;
  }
  __syncthreads();
}

// h = sum + a, written by the first block of the rows; u, which is 0 past the last column. `random` is the element's
// lane of Philox.
template <class T>
__device__ __forceinline__ float activate_one(const Fused& call, int64_t m, int64_t e, float sum, uint32_t random) {
  if (e >= call.E) return 0.f;
  const T* const bias = static_cast<const T*>(call.down_bias);
  const float h = bias ? sum + to_float(bias[e]) : sum;
  if (blockIdx.y == 0) call.h[m * call.E + e] = h;
  return random < call.keep.threshold ? activated(call.activation, h) : 0.f;
}

// Makes the parts of u of the x A^T in every row of shared memory.
template <class T, int kE>
__device__ __forceinline__ void make_parts(const Fused& call, void* shared, int64_t m0, int rows) {
  constexpr int kPitch = Shape<kE>::kPitch;
  const int own = lane_index() * 2;
  const bool drops = call.keep.threshold != kKeepAll;
  const uint64_t seed = drops ? *call.seed : 0;
#pragma unroll 1
  for (int row = warp_index(); row < kTileRows; row += kWarps) {
    bf16* const parts = static_cast<bf16*>(shared) + row * kPitch;
    float* const values = reinterpret_cast<float*>(parts) + own;
    const int64_t m = m0 + row;
#pragma unroll 1
    for (int e = own; e < kE; e += 64) {
      float* const pair = values + (e - own);
      float u[2] = {};
      if (row < rows) {
        uint32_t random = 0;
        if (drops) {
          const uint32_t k = static_cast<uint32_t>(e);
          const Philox4 words = philox(seed, {{static_cast<uint32_t>(m), k / 32, k % 8 / 2, call.keep.stream}});
          const int w = own / 8 % 4;  // spelled out: an index would put the words into local memory
          random = w & 2 ? (w & 1 ? words.word[3] : words.word[2]) : (w & 1 ? words.word[1] : words.word[0]);
        }
        u[0] = activate_one<T>(call, m, e, pair[0], random & 0xFFFFu);
        u[1] = activate_one<T>(call, m, e + 1, pair[1], random >> 16);
      }
      pair[0] = u[0];
      pair[1] = u[1];
    }
    float u[kE / 32];
#pragma unroll
    for (int i = 0; i < kE / 32; ++i) u[i] = values[i / 2 * 64 + i % 2];
    __syncwarp();  // the parts overwrite what other lanes have read
#pragma unroll
    for (int i = 0; i < kE / 32; i += 2) {
      uint32_t pair[2];
      split_pair<bf16>(u[i], u[i + 1], pair);
#pragma unroll
      for (int p = 0; p < 2; ++p) *reinterpret_cast<uint32_t*>(parts + p * kE + i * 32 + own) = pair[p];
    }
  }
}

// sum += u B^T over a piece of 32 of E, for the warp's 16 x 32 of the tile.
template <class T, int kE>
__device__ __forceinline__ void multiply_up(float (&sum)[4][4], const bf16* u, const T* factor) {
#pragma unroll
  for (int k = 0; k < kPiece; k += 16) {
    uint32_t left[2][4], right[kBf16Parts<T>][4][2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      uint32_t pairs[2][2];
      load_left(left[i], u + i * kE + k, Shape<kE>::kPitch);
      load_right(pairs, factor + 16 * i * tile_pitch(kPiece) + k, tile_pitch(kPiece));
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        uint32_t parts[kBf16Parts<T>];
        as_bf16(parts, pairs[e / 2][e % 2], T{});
#pragma unroll
        for (int p = 0; p < kBf16Parts<T>; ++p) right[p][2 * i + e / 2][e % 2] = parts[p];
      }
    }
#pragma unroll
    for (int i = 0; i < 4 * (kBf16Parts<T> + 1); ++i) {  // of the parts: high high, low high, high low
      mma_m16n8k16<bf16>(sum[i % 4], left[i / 4 % 2], right[i / 8][i % 4]);
    }
  }
}

template <class T, int kE, bool kParts>
__global__ void __launch_bounds__(kThreads, 2)
    bottleneck_adapter_forward_fused_kernel(const __grid_constant__ Fused call, const Vectors vectors) {
  using S = Shape<kE>;
  PK_DYNAMIC_SHARED(T, shared);
  __shared__ float bias[kTileCols], scale[kTileCols];
  const int64_t m0 = static_cast<int64_t>(blockIdx.x) * kTileRows;
  const int rows = call.M - m0 < kTileRows ? static_cast<int>(call.M - m0) : kTileRows;
  if constexpr (!kParts) project_down<T, kE>(call, vectors, shared, m0, rows);

  float* const tile = reinterpret_cast<float*>(shared + S::kOut / 2);
  T* const pieces = shared + S::kFactor / 2;
  const int count = static_cast<int>((call.E + kPiece - 1) / kPiece);
  const int64_t begin = kParts ? static_cast<int64_t>(blockIdx.y) * kTileCols : 0;
  const int64_t end = kParts && call.N - begin > kTileCols ? begin + kTileCols : call.N;
  int64_t next_n = begin;
  int next = 0, filled = 0, used = 0;
  const auto fetch = [&] {
    if (next_n < end) {
      copy_tile<kTileCols, kPiece>(pieces + filled * S::kPieceSize, static_cast<const T*>(call.B) + next_n * call.E,
                                   call.E, call.N - next_n, next * kPiece, call.E, vectors.up);
      filled = filled + 1 == kPieces ? 0 : filled + 1;
      next = next + 1 == count ? 0 : next + 1;
      if (next == 0) next_n += kTileCols;
    }
    cp_async_commit();
  };
  for (int i = 0; i < kPieces - 1; ++i) fetch();
  if constexpr (kParts) {
    wait_for_previous_launch();
    add_parts<kE>(call, reinterpret_cast<float*>(shared), m0, rows);
  }
  make_parts<T, kE>(call, shared, m0, rows);
  __syncthreads();

  const int row = warp_index() / 2 * 16 + lane_index() / 4, col0 = warp_index() % 2 * 32;
  const T* const gate = static_cast<const T*>(call.gated.gate);
  const float scaling = static_cast<float>(call.gated.scaling);
  float factor[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    factor[i] = gate && row + 8 * i < rows ? scaling * to_float(gate[m0 + row + 8 * i]) : scaling;
  }
  const bf16* const u = reinterpret_cast<const bf16*>(shared) + warp_index() / 2 * 16 * S::kPitch;
  Run<T> run;
#pragma unroll 1
  for (int64_t n0 = begin; n0 < end; n0 += kTileCols) {
    const T* const residual = static_cast<const T*>(call.residual) + m0 * call.residual_stride + n0;
    run.fetch(residual, call.residual_stride, rows, call.N - n0, vectors.residual);
    if (threadIdx.x < kTileCols) load_column<T>(bias[threadIdx.x], scale[threadIdx.x], call, n0 + threadIdx.x);
    float sum[4][4] = {};
#pragma unroll 1
    for (int i = 0; i < count; ++i) {
      cp_async_wait<kPieces - 2>();
      __syncthreads();  // also: the piece that is fetched next, and the tile of before, have been read
      fetch();
      multiply_up<T, kE>(sum, u + i * kPiece, pieces + used * S::kPieceSize + col0 * tile_pitch(kPiece));
      used = used + 1 == kPieces ? 0 : used + 1;
    }
    gate_tile(tile, sum, call, factor, bias, scale, m0, row, n0, col0);
    __syncthreads();
    run.write(static_cast<T*>(call.y) + m0 * call.N + n0, call.N, tile, rows, call.N - n0, vectors.y);
  }
  cp_async_wait<0>();
}

template <class T, int kE>
cudaError_t launch_fused(const Fused& call, cudaStream_t stream) {
  constexpr int kSize = sizeof(T);
  const Vectors vectors{vector_rows(call.x, call.x_stride, kSize), vector_rows(call.A, call.K, kSize),
                        vector_rows(call.B, call.E, kSize), vector_rows(call.residual, call.residual_stride, kSize),
                        vector_rows(call.y, call.N, kSize)};
  const unsigned row_tiles = static_cast<unsigned>((call.M + kTileRows - 1) / kTileRows);
  if (!call.parts) {
    return PK_LAUNCH((bottleneck_adapter_forward_fused_kernel<T, kE, false>), dim3(row_tiles), dim3(kThreads),
                     Shape<kE>::kBytes, stream, call, vectors);
  }
  const int64_t col_tiles = (call.N + kTileCols - 1) / kTileCols;
  if (col_tiles > kMostTiles) return cudaErrorInvalidValue;
  return PK_LAUNCH_OVERLAPPED((bottleneck_adapter_forward_fused_kernel<T, kE, true>),
                              dim3(row_tiles, static_cast<unsigned>(col_tiles)), dim3(kThreads), Shape<kE>::kUp, stream,
                              call, vectors);
}

template <class T>
cudaError_t fused_of(const Fused& call, cudaStream_t stream) {
  if (call.E > kWidest) return cudaErrorInvalidValue;
  if (call.M == 0) return cudaSuccess;
  return call.E > 128  ? launch_fused<T, 256>(call, stream)
         : call.E > 64 ? launch_fused<T, 128>(call, stream)
                       : launch_fused<T, 64>(call, stream);
}

bool serves(Dtype x, Dtype factors, int64_t E) {
  return x == factors && (x == Dtype::kBFloat16 || x == Dtype::kFloat16) && E <= kWidest;
}

}  // namespace

// Enough rows that a block for each tile of them fills a large GPU: with fewer, more blocks share the work of a row.
bool has_fused_kernel(Dtype x, Dtype factors, int64_t M, int64_t E) {
  return serves(x, factors, E) && M > kTileRows * (lora_linear::kMultiprocessors - 1);
}

bool has_few_rows_kernel(Dtype x, Dtype factors, int64_t M, int64_t N, int64_t E) {
  return serves(x, factors, E) && M <= lora_linear::kFewRowsCuda && N <= kMostTiles * kTileCols;
}

cudaError_t fused(Dtype x, const Fused& call, cudaStream_t stream) {
  if (x == Dtype::kBFloat16) return fused_of<bf16>(call, stream);
  return x == Dtype::kFloat16 ? fused_of<fp16>(call, stream) : cudaErrorInvalidValue;
}

}  // namespace pk::bottleneck_adapter
