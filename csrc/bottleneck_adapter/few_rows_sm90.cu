// The whole forward of bottleneck_adapter in one launch for up to 16 rows on sm_90: E <= 64, x [M, K] and the factors
// of one 16-bit T in rows of whole, aligned vectors of 16 bytes.
//   h = x A^T + a (fp32, written),  u = drop(f(h)),  y = residual + (gated, as of Expand) from u B^T
// Grid: (8, G), G clusters of 8 blocks. Block c of each cluster multiplies its eighth of K, in stages of 64 columns;
// behind a cluster barrier every block adds up the eight parts of h in order, from the shared memory of all of them,
// and makes u; then it takes its share of the tiles of 64 columns of y. Bound by latency, and by A: each cluster reads
// all of it, from L2, an eighth to a block. B of the first tile is on its way from the start. mma.sync: a warp has 8
// columns of h, then 8 of the tile, for 16 rows. u enters as two bf16 parts, a B of fp16 as two as well, without the
// product of the two small ones. fp32 sums; rows, E and K are filled up with zeros, which are not read.
#include "bottleneck_adapter/fused_tiles.h"
#include "common/activation.h"
#include "common/cluster.h"

namespace pk::bottleneck_adapter {
namespace {

constexpr int kRows = 16, kMostE = 64, kDepth = 64, kPitch = tile_pitch(kDepth);
constexpr int kStages = 7, kStage = (kRows + kMostE) * kPitch;  // rows of x and of A
constexpr int kFactor = kTileCols * kPitch;                     // a tile of B, two of which have room
constexpr int kPartPitch = kMostE + 8;                          // floats
constexpr int64_t kMostOfA = 8 * 32 * 1024;                     // elements: 64 KiB to a block, see the README
constexpr int64_t kMostClusters = 16;                           // 132 SMs of an H100 or H200
static_assert(kWarps * 8 == kMostE && kWarps * 8 == kTileCols && kMostE <= kDepth, "a warp to 8 columns");

template <class T>
struct Shared {
  T stages[kStages][kStage];
  T factors[2][kFactor];
  float part[kRows][kPartPitch];  // of h
  bf16 u[2][kRows][kPitch];       // its parts
};

// Rows [0, kCount) of a matrix, columns [col, col + 64), zeros past its end.
template <int kCount, class T>
__device__ __forceinline__ void copy_rows(T* tile, const T* from, int64_t stride, int64_t rows, int64_t col,
                                          int64_t cols) {
  for (int i = static_cast<int>(threadIdx.x); i < kCount * 8; i += kThreads) {
    const int row = i / 8, own = i % 8 * 8;
    const bool inside = row < rows && col + own < cols;
    cp_async<16>(tile + row * kPitch + own, inside ? from + row * stride + col + own : from, inside ? 16 : 0);
  }
}

// sums += the warp's 16 x 8 of x A^T over a stage; the steps of 16 take turns at two sums, which halves the chain.
template <class T>
__device__ __forceinline__ void multiply_down(float (&sums)[2][4], const T* stage) {
  const int lane = lane_index();
#pragma unroll
  for (int k = 0; k < kDepth; k += 32) {
    uint32_t right[4];
    ldmatrix(right, stage + (kRows + warp_index() * 8 + lane % 8) * kPitch + k + lane / 8 * 8);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      uint32_t left[4];
      load_left(left, stage + k + 16 * i, kPitch);
      mma_m16n8k16<T>(sums[i], left, {right[2 * i], right[2 * i + 1]});
    }
  }
}

// sum = the warp's 16 x 8 of u B^T.
template <class T>
__device__ __forceinline__ void multiply_up(float (&sum)[4], const bf16 (&u)[2][kRows][kPitch], const T* factor,
                                            int E) {
  const int lane = lane_index();
#pragma unroll 1
  for (int e = 0; e < E; e += 32) {
    uint32_t pairs[4], right[4][kBf16Parts<T>];
    ldmatrix(pairs, factor + (warp_index() * 8 + lane % 8) * kPitch + e + lane / 8 * 8);
#pragma unroll
    for (int i = 0; i < 4; ++i) as_bf16(right[i], pairs[i], T{});
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      uint32_t left[2][4];
#pragma unroll
      for (int p = 0; p < 2; ++p) load_left(left[p], &u[p][0][e + 16 * i], kPitch);
#pragma unroll
      for (int p = 0; p < kBf16Parts<T> + 1; ++p) {  // high high, low high, high low
        mma_m16n8k16<bf16>(sum, left[p % 2], {right[2 * i][p / 2], right[2 * i + 1][p / 2]});
      }
    }
  }
}

// The word of Philox for columns col and col + 1 of a row.
__device__ __forceinline__ uint32_t random_pair(const Keep& keep, uint64_t seed, int row, int64_t col) {
  if (keep.threshold == kKeepAll) return 0;
  const Philox4 words = philox(seed, {{static_cast<uint32_t>(row), static_cast<uint32_t>(col / 32),
                                       static_cast<uint32_t>(col % 8 / 2), keep.stream}});
  const int w = static_cast<int>(col / 8 % 4);  // spelled out: an index would put the words into local memory
  return w & 2 ? (w & 1 ? words.word[3] : words.word[2]) : (w & 1 ? words.word[1] : words.word[0]);
}

// h from the parts of all blocks, written by one of them, and the parts of u. A thread takes two neighbours of a row.
template <class T>
__device__ __forceinline__ void make_hidden(const Fused& call, Shared<T>& shared, uint64_t seed, bool writes) {
  const int e = lane_index() * 2;
  const T* const bias = static_cast<const T*>(call.down_bias);
#pragma unroll
  for (int row = warp_index(); row < kRows; row += kWarps) {
    float2 h = {0.f, 0.f};
    if (row < call.M) {
#pragma unroll
      for (int block = 0; block < kMostClusterBlocks; ++block) {
        const float2 part = *reinterpret_cast<const float2*>(of_block(&shared.part[row][e], block));
        h.x += part.x;
        h.y += part.y;
      }
    }
    const uint32_t random = random_pair(call.keep, seed, row, e);
    const auto finish = [&](float sum, int column, uint32_t own) {
      if (row >= call.M || column >= call.E) return 0.f;
      if (bias) sum += to_float(bias[column]);
      if (writes) call.h[row * call.E + column] = sum;
      return own < call.keep.threshold ? activated(call.activation, sum) : 0.f;
    };
    const float first = finish(h.x, e, random & 0xFFFFu), second = finish(h.y, e + 1, random >> 16);
    uint32_t pair[2];
    split_pair<bf16>(first, second, pair);
#pragma unroll
    for (int p = 0; p < 2; ++p) {
      bf16* const to = shared.u[p][row] + e;
      *reinterpret_cast<uint32_t*>(to) = pair[p];
    }
  }
}

// What a thread adds and writes of a tile of y: two neighbours of rows lane / 4 and lane / 4 + 8.
template <class T>
struct Pairs {
  uint32_t residual[2];
  float bias[2], scale[2];
  int row = lane_index() / 4, own = warp_index() * 8 + lane_index() % 4 * 2;

  __device__ __forceinline__ void fetch(const Fused& call, int64_t n0) {
    const int64_t n = n0 + own;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const T* const from = static_cast<const T*>(call.residual) + (row + 8 * i) * call.residual_stride + n;
      residual[i] = row + 8 * i < call.M && n < call.N ? *reinterpret_cast<const uint32_t*>(from) : 0;
      load_column<T>(bias[i], scale[i], call, n + i);
    }
  }

  __device__ __forceinline__ void write(const Fused& call, int64_t n0, const float (&sum)[4], const float (&factor)[2],
                                        uint64_t seed) const {
    const int64_t n = n0 + own;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      if (row + 8 * i >= call.M || n >= call.N) continue;
      const uint32_t random = random_pair(call.gated.keep, seed, row + 8 * i, n);
      const float first = gated_sum(call.gated, sum[2 * i], bias[0], random & 0xFFFFu, factor[i] * scale[0]),
                  second = gated_sum(call.gated, sum[2 * i + 1], bias[1], random >> 16, factor[i] * scale[1]);
      const T before[2] = {T{static_cast<uint16_t>(residual[i])}, T{static_cast<uint16_t>(residual[i] >> 16)}};
      const uint32_t pair =
          pack(from_float<T>(to_float(before[0]) + first), from_float<T>(to_float(before[1]) + second));
      *reinterpret_cast<uint32_t*>(static_cast<T*>(call.y) + (row + 8 * i) * call.N + n) = pair;
    }
  }
};

// Stage i of the block's [begin, end), if it has one, into its place in the ring.
template <class T>
__device__ __forceinline__ void fetch_stage(const Fused& call, Shared<T>& shared, int i, int begin, int end) {
  if (i >= end) return;
  T* const stage = shared.stages[(i - begin) % kStages];
  const int64_t k = static_cast<int64_t>(i) * kDepth;
  copy_rows<kRows>(stage, static_cast<const T*>(call.x), call.x_stride, call.M, k, call.K);
  copy_rows<kMostE>(stage + kRows * kPitch, static_cast<const T*>(call.A), call.K, call.E, k, call.K);
}

// part = the block's part of x A^T, of the columns of its stages [begin, end).
template <class T>
__device__ __forceinline__ void project_down(const Fused& call, Shared<T>& shared, int begin, int end) {
  float sums[2][4] = {};
#pragma unroll 1
  for (int i = begin; i < end; ++i) {
    // Behind the stages that were fetched first, in the order of the groups, lies the first tile of B.
    if (i - begin < kStages) {
      cp_async_wait<kStages>();
    } else {
      cp_async_wait<kStages - 2>();
    }
    __syncthreads();  // also: the stage before has been read
    if (i > begin) fetch_stage(call, shared, i - 1 + kStages, begin, end);
    cp_async_commit();
    multiply_down(sums, shared.stages[(i - begin) % kStages]);
  }
  float* const to = &shared.part[lane_index() / 4][warp_index() * 8 + lane_index() % 4 * 2];
  *reinterpret_cast<float2*>(to) = {sums[0][0] + sums[1][0], sums[0][1] + sums[1][1]};
  *reinterpret_cast<float2*>(to + 8 * kPartPitch) = {sums[0][2] + sums[1][2], sums[0][3] + sums[1][3]};
}

template <class T>
__global__ void __launch_bounds__(kThreads, 2)
    bottleneck_adapter_forward_few_rows_sm90_kernel(const __grid_constant__ Fused call) {
  PK_DYNAMIC_SHARED(Shared<T>, shared);
  // Nothing is read before: what lies before this launch in the stream may be what writes x, or a step of an optimizer.
  wait_for_previous_launch();
  const int rank = cluster_rank(), stages = static_cast<int>((call.K + kDepth - 1) / kDepth);
  const int begin = stages * rank / kMostClusterBlocks, end = stages * (rank + 1) / kMostClusterBlocks;
  const int64_t tiles = (call.N + kTileCols - 1) / kTileCols, shares = int64_t{gridDim.y} * kMostClusterBlocks,
                share = int64_t{blockIdx.y} * kMostClusterBlocks + rank;
  int64_t tile = tiles * share / shares;
  const int64_t last = tiles * (share + 1) / shares;
  const auto fetch_factor = [&](int64_t i) {
    if (i < last) {
      copy_rows<kTileCols>(shared->factors[i % 2], static_cast<const T*>(call.B) + i * kTileCols * call.E, call.E,
                           call.N - i * kTileCols, 0, call.E);
    }
    cp_async_commit();
  };
  for (int i = 0; i < kStages; ++i) {
    fetch_stage(call, *shared, begin + i, begin, end);
    cp_async_commit();
  }
  fetch_factor(tile);
  Pairs<T> pairs;
  if (tile < last) pairs.fetch(call, tile * kTileCols);
  const bool drops = call.keep.threshold != kKeepAll || call.gated.keep.threshold != kKeepAll;
  const uint64_t seed = drops ? *call.seed : 0;
  const T* const gate = static_cast<const T*>(call.gated.gate);
  float factor[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    factor[i] = static_cast<float>(call.gated.scaling);
    if (gate && pairs.row + 8 * i < call.M) factor[i] *= to_float(gate[pairs.row + 8 * i]);
  }

  project_down(call, *shared, begin, end);
  cluster_sync();
  make_hidden(call, *shared, seed, rank == 0 && blockIdx.y == 0);
  cluster_arrive();
#pragma unroll 1
  for (; tile < last; ++tile) {
    cp_async_wait<0>();
    __syncthreads();  // also: u is whole, and the tile before has been read
    fetch_factor(tile + 1);
    float sum[4] = {};
    multiply_up<T>(sum, shared->u, shared->factors[tile % 2], static_cast<int>(call.E));
    pairs.write(call, tile * kTileCols, sum, factor, seed);
    if (tile + 1 < last) pairs.fetch(call, (tile + 1) * kTileCols);
  }
  cp_async_wait<0>();
  cluster_wait();  // others may still have read this block's part
}

template <class T>
cudaError_t launch_few_rows(const Fused& call, cudaStream_t stream) {
  const int64_t tiles = (call.N + kTileCols - 1) / kTileCols,
                wanted = (tiles + kMostClusterBlocks - 1) / kMostClusterBlocks;
  const dim3 grid(kMostClusterBlocks, static_cast<unsigned>(wanted < kMostClusters ? wanted : kMostClusters));
  return PK_LAUNCH_CLUSTER(bottleneck_adapter_forward_few_rows_sm90_kernel<T>, kMostClusterBlocks, true, grid,
                           dim3(kThreads), sizeof(Shared<T>), stream, call);
}

}  // namespace

bool has_few_rows_cluster_kernel(Dtype x, Dtype factors, const Fused& call) {
  const bool narrow = x == factors && (x == Dtype::kBFloat16 || x == Dtype::kFloat16);
  const bool small = call.M <= kRows && call.E <= kMostE && call.E * call.K <= kMostOfA;
  return narrow && small && vector_rows(call.x, call.x_stride, 2) && vector_rows(call.A, call.K, 2) &&
         vector_rows(call.B, call.E, 2) && vector_rows(call.residual, call.residual_stride, 2) &&
         vector_rows(call.y, call.N, 2);
}

cudaError_t few_rows_cluster(Dtype x, const Fused& call, cudaStream_t stream) {
  if (call.M == 0) return cudaSuccess;
  return x == Dtype::kFloat16 ? launch_few_rows<fp16>(call, stream) : launch_few_rows<bf16>(call, stream);
}

}  // namespace pk::bottleneck_adapter
