// Forward of lora_linear, the shrink: h[m, rank0_l + r] = s_l sum_k drop_l(x)[m, k] A_l[r, k], x [M, K], A_l [R_l, K].
// Bound by reading x, which is read once for all adapters of a block. Block (blockIdx.x, blockIdx.y) -> 32 or 64
// rows x up to eight tiles of 8 ranks x one split of K; blocks of the same rows are neighbours, so that x comes from L2
// for the second. Stages of 64 columns of x and A arrive by cp.async, as many ahead as shared memory holds; a warp
// takes 16 rows x 32 columns of a stage, and the two warps of the same rows are added at the end. mma.sync, fp32 sums;
// fp32 factors enter as three bf16 parts, which hold all their bits. Dropout is drawn on the fragments, once per
// adapter; the squares of x's rows, for DoRA, are summed from the same fragments.
#include "common/mma_tiles.h"
#include "lora_linear/lora_linear_cuda.h"

namespace pk::lora_linear {
namespace {

constexpr int kCols = 64, kPitch = tile_pitch(kCols);  // of a stage
constexpr int kMostRankTiles = 8;                      // of one block
constexpr int kMostStages = 8, kMostShared = 96 * 1024;

template <class F>
struct RankTile {  // eight ranks of one adapter, or its last few
  const F* factor;
  int ranks, column, adapter;  // column: of h
  bool new_mask;               // other elements of x are dropped than in the tile before
};

template <class F>
__device__ __forceinline__ void set_rank_tile(RankTile<F>& tile, const Shrink& call, int index) {
  int l = 0;
  for (; index >= (call.adapters.at[l].R + 7) / 8; ++l) index -= (call.adapters.at[l].R + 7) / 8;
  const CudaAdapter& adapter = call.adapters.at[l];
  const int rank = 8 * index, left = adapter.R - rank;
  const bool drops = adapter.keep.threshold != kKeepAll;
  tile.factor = static_cast<const F*>(adapter.factor) + rank * call.K;
  tile.ranks = left < 8 ? left : 8;
  tile.column = adapter.rank0 + rank;
  tile.adapter = l;
  tile.new_mask = rank == 0 && l > 0 && (drops || call.adapters.at[l - 1].keep.threshold != kKeepAll);
}

// What a thread copies of every stage: the same columns of each kStep-th row from `row` on.
template <class T, int kThreads, bool kVector>
struct Share {
  static constexpr int kWidth = kVector ? 16 / sizeof(T) : 1, kPerRow = kCols / kWidth, kStep = kThreads / kPerRow;
  int row = static_cast<int>(threadIdx.x) / kPerRow, col = static_cast<int>(threadIdx.x) % kPerRow * kWidth;

  // Columns k + col ... of a row of K. kWhole: all of the stage's columns are there; else what is not becomes zero.
  template <bool kWhole>
  __device__ __forceinline__ void copy(T* to, const T* from, int k, int K) const {
    const int at = k + col, left = K - at;
    if constexpr (!kVector) {
      *to = left > 0 ? from[at] : T{};
    } else if constexpr (kWhole) {
      cp_async<16>(to, from + at);
    } else {
      const int valid = left <= 0 ? 0 : left >= kWidth ? 16 : left * static_cast<int>(sizeof(T));
      cp_async<16>(to, valid ? from + at : from, valid);
    }
  }
};

// A right operand of 32 columns and eight ranks, in parts whose sum it is: b[step of 16 columns][part].
template <class T>
__device__ __forceinline__ void load_right(uint32_t (&b)[2][1][2], const T* factors) {
  const int lane = lane_index();
  uint32_t r[4];
  ldmatrix(r, factors + lane % 8 * kPitch + lane / 8 * 8);
#pragma unroll
  for (int i = 0; i < 4; ++i) b[i / 2][0][i % 2] = r[i];
}
__device__ __forceinline__ void load_right(uint32_t (&b)[2][3][2], const float* factors) {
  const int lane = lane_index();
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float2 pair = *reinterpret_cast<const float2*>(factors + lane / 4 * kPitch + 8 * i + lane % 4 * 2);
    uint32_t parts[3];
    cut_pair(pair.x, pair.y, parts);
#pragma unroll
    for (int p = 0; p < 3; ++p) b[i / 2][p][i % 2] = parts[p];
  }
}

// drop(x) of 16 rows x 32 columns, both as the fragments of two k16 steps.
__device__ __forceinline__ void drop(uint32_t (&out)[2][4], const uint32_t (&x)[2][4], const Keep& keep,
                                     const uint64_t* seed_place, int64_t row, int64_t group) {
#pragma unroll
  for (int i = 0; i < 8; ++i) out[i / 4][i % 4] = x[i / 4][i % 4];
  if (keep.threshold == kKeepAll) return;
  const uint64_t seed = *seed_place;  // read here, so that nothing of Philox is worked out where nothing drops
  const int64_t mine = row + lane_index() / 4;
  const Philox4 random[2] = {keep_words(seed, keep.stream, mine, group),
                             keep_words(seed, keep.stream, mine + 8, group)};
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const int step = i / 4, e = i % 4;
    out[step][e] = keep_pair(x[step][e], random[e % 2].word[2 * step + e / 2], keep.threshold);
  }
}

// squares += those of two neighbours.
template <class T>
__device__ __forceinline__ void add_squares(float& squares, uint32_t pair) {
  const float low = to_float(T{static_cast<uint16_t>(pair)}), high = to_float(T{static_cast<uint16_t>(pair >> 16)});
  squares += low * low;
  squares += high * high;
}

// sums += one warp's share of a stage: x and factors point to its 32 columns, group is their number in the row.
// masks: bit j where tile j has another mask than the one before it. squares: of rows lane / 4 and lane / 4 + 8.
template <class T, class F>
__device__ __forceinline__ void multiply(float (&sums)[kMostRankTiles][4], float (&squares)[2], const T* x,
                                         const F* factors, const Shrink& call, const RankTile<F>* tile, int tiles,
                                         uint32_t masks, int64_t row, int64_t group) {
  constexpr int kParts = sizeof(F) == sizeof(T) ? 1 : 3;
  const int lane = lane_index();
  uint32_t all[2][4], kept[2][4];
#pragma unroll
  for (int step = 0; step < 2; ++step) ldmatrix(all[step], x + lane % 16 * kPitch + 16 * step + lane / 16 * 8);
  if (call.squares) {
#pragma unroll
    for (int i = 0; i < 8; ++i) add_squares<T>(squares[i % 2], all[i / 4][i % 4]);
  }
  while (masks) {  // tiles that share a mask: `run` has a bit for each
    const int begin = __ffs(static_cast<int>(masks)) - 1;
    masks &= masks - 1;
    const uint32_t run = (masks ? (masks & -masks) : 1u << tiles) - (1u << begin);
    drop(kept, all, call.adapters.at[tile[begin].adapter].keep, call.seed, row, group);
#pragma unroll
    for (int j = 0; j < kMostRankTiles; ++j) {
      if (!(run >> j & 1)) continue;
      uint32_t b[2][kParts][2];
      load_right(b, factors + 8 * j * kPitch);
#pragma unroll
      for (int i = 0; i < 2 * kParts; ++i) mma_m16n8k16<T>(sums[j], kept[i % 2], b[i % 2][i / 2]);
    }
  }
}

// Waits for the oldest of the stages - 1 groups in flight.
__device__ __forceinline__ void wait_for_oldest(int stages) {
  switch (stages) {
    case 3:
      return cp_async_wait<1>();
    case 4:
      return cp_async_wait<2>();
    case 5:
      return cp_async_wait<3>();
    case 6:
      return cp_async_wait<4>();
    case 7:
      return cp_async_wait<5>();
    default:
      return cp_async_wait<6>();
  }
}

// Adds the second warp of the same rows to the first one, which scales and stores.
template <int kRowTiles, class F>
__device__ __forceinline__ void store(const Shrink& call, const float (&sums)[kMostRankTiles][4], float* shared,
                                      const RankTile<F>* tile, int tiles, int64_t row) {
  const int lane = lane_index(), warp = warp_index();
  float* const other = shared + warp % kRowTiles * tiles * 128 + lane;
  if (warp >= kRowTiles) {
#pragma unroll
    for (int i = 0; i < 4 * kMostRankTiles; ++i) {
      if (i < 4 * tiles) other[i * 32] = sums[i / 4][i % 4];
    }
  }
  __syncthreads();
  if (warp >= kRowTiles) return;
#pragma unroll
  for (int i = 0; i < 4 * kMostRankTiles; ++i) {
    if (i >= 4 * tiles) break;
    const RankTile<F>& of = tile[i / 4];
    const int rank = lane % 4 * 2 + i % 2;
    const int64_t m = row + lane / 4 + i % 4 / 2 * 8;
    if (m >= call.M || rank >= of.ranks) continue;
    const CudaAdapter& adapter = call.adapters.at[of.adapter];
    const float scale = adapter.scaling * adapter.keep.scale;
    float* const h = call.h + (blockIdx.y * call.M + m) * call.R + of.column;
    h[rank] = (sums[i / 4][i % 4] + other[i * 32]) * scale;
  }
}

// The same for the squares.
template <int kRowTiles>
__device__ __forceinline__ void store_squares(const Shrink& call, const float (&squares)[2], float* shared,
                                              int64_t row) {
  const int lane = lane_index(), warp = warp_index(), i = lane % 4;
  const float first = warp_sum<4>(squares[0]), second = warp_sum<4>(squares[1]), sum = i == 0 ? first : second;
  float* const other = shared + warp % kRowTiles * 16 + lane / 4 + 8 * i;
  if (warp >= kRowTiles && i < 2) *other = sum;
  __syncthreads();
  const int64_t m = row + lane / 4 + 8 * i;
  if (warp < kRowTiles && i < 2 && m < call.M) call.squares[blockIdx.y * call.M + m] = sum + *other;
}

template <class T, class F, int kRowTiles, bool kVector>
__global__ void __launch_bounds__(64 * kRowTiles, 1)
    lora_linear_forward_shrink_kernel(const __grid_constant__ Shrink call, int rank_tiles, int groups, int stages) {
  constexpr int kRows = 16 * kRowTiles, kThreads = 64 * kRowTiles;
  let_next_launch_start();
  __shared__ RankTile<F> tile[kMostRankTiles];
  __shared__ const F* rank_row[8 * kMostRankTiles];
  __shared__ float square_sums[16 * kRowTiles];
  PK_DYNAMIC_SHARED(unsigned char, shared);
  const int number = blockIdx.x % groups, first = rank_tiles * number / groups;
  const int tiles = rank_tiles * (number + 1) / groups - first;
  const int thread = static_cast<int>(threadIdx.x);
  if (thread < tiles) set_rank_tile(tile[thread], call, first + thread);
  __syncthreads();
  if (thread < 8 * tiles) {
    const RankTile<F>& of = tile[thread / 8];
    rank_row[thread] = of.factor + (thread % 8 < of.ranks ? thread % 8 : of.ranks - 1) * call.K;
  }
  __syncthreads();
  uint32_t masks = 1;
#pragma unroll 1
  for (int j = 1; j < tiles; ++j) masks |= static_cast<uint32_t>(tile[j].new_mask) << j;

  const int64_t row0 = static_cast<int64_t>(blockIdx.x / groups) * kRows, all = (call.K + kCols - 1) / kCols;
  const int64_t begin = all * blockIdx.y / call.splits;
  const int count = static_cast<int>(all * (blockIdx.y + 1) / call.splits - begin), K = static_cast<int>(call.K);
  const Share<T, kThreads, kVector> x_share;
  const Share<F, kThreads, kVector> a_share;
  const int stage_bytes = kRows * kPitch * sizeof(T) + 8 * tiles * kPitch * sizeof(F);
  // Rows past the last of x or A_l are the last again: what comes of them is stored nowhere.
  const T* x_row[kRows / x_share.kStep];
#pragma unroll
  for (int i = 0; i < kRows / x_share.kStep; ++i) {
    const int64_t m = row0 + x_share.row + i * x_share.kStep;
    x_row[i] = static_cast<const T*>(call.x) + (m < call.M ? m : call.M - 1) * call.x_stride;
  }
  const auto fill = [&](unsigned char* stage, int k, auto whole) {
    T* const x_tile = reinterpret_cast<T*>(stage) + x_share.row * kPitch + x_share.col;
    F* const a_tile = reinterpret_cast<F*>(stage + kRows * kPitch * sizeof(T)) + a_share.col;
#pragma unroll
    for (int i = 0; i < kRows / x_share.kStep; ++i) {
      x_share.template copy<whole.value>(x_tile + i * x_share.kStep * kPitch, x_row[i], k, K);
    }
#pragma unroll 1
    for (int i = a_share.row; i < 8 * tiles; i += a_share.kStep) {
      a_share.template copy<whole.value>(a_tile + i * kPitch, rank_row[i], k, K);
    }
  };

  const int row = warp_index() % kRowTiles * 16, col = warp_index() / kRowTiles * 32,
            k0 = static_cast<int>(begin) * kCols;
  float sums[kMostRankTiles][4] = {}, squares[2] = {};
  unsigned char *filled = shared, *used = shared, *const end = shared + stages * stage_bytes;  // stages of the ring
  for (int i = 1 - stages; i < count; ++i) {
    if (i >= 0) {
      wait_for_oldest(stages);
      __syncthreads();
    }
    if (const int k = k0 + (i + stages - 1) * kCols; i + stages - 1 < count) {
      k + kCols <= K ? fill(filled, k, std::true_type{}) : fill(filled, k, std::false_type{});
    }
    cp_async_commit();
    filled = filled + stage_bytes == end ? shared : filled + stage_bytes;
    if (i < 0) continue;
    const T* const stage = reinterpret_cast<const T*>(used);
    multiply(sums, squares, stage + row * kPitch + col, reinterpret_cast<const F*>(stage + kRows * kPitch) + col, call,
             tile, tiles, masks, row0 + row, (k0 + i * kCols + col) / 32);
    used = used + stage_bytes == end ? shared : used + stage_bytes;
  }
  cp_async_wait<0>();
  __syncthreads();
  if (call.squares && number == 0) store_squares<kRowTiles>(call, squares, square_sums, row0 + row);
  store<kRowTiles>(call, sums, reinterpret_cast<float*>(shared), tile, tiles, row0 + row);
}

template <class T, class F, int kRowTiles, bool kVector>
cudaError_t launch_shrink(const Shrink& call, int rank_tiles, cudaStream_t stream) {
  constexpr int kRows = 16 * kRowTiles;
  const int groups = (rank_tiles + kMostRankTiles - 1) / kMostRankTiles, most = (rank_tiles + groups - 1) / groups;
  const int stage_bytes = kPitch * (kRows * sizeof(T) + 8 * most * sizeof(F));
  const int fitting = kMostShared / stage_bytes, stages = fitting < kMostStages ? fitting : kMostStages;
  const dim3 grid(static_cast<unsigned>((call.M + kRows - 1) / kRows * groups), call.splits);
  return PK_LAUNCH((lora_linear_forward_shrink_kernel<T, F, kRowTiles, kVector>), grid, dim3(64 * kRowTiles),
                   static_cast<size_t>(stages) * stage_bytes, stream, call, rank_tiles, groups, stages);
}

// Rows of 16 in a block: many, so that A is read seldom, where that leaves enough blocks.
int row_tiles(int64_t M, int64_t rank_groups) {
  return (M + 63) / 64 * rank_groups < kMultiprocessors ? 2 : 4;
}

template <class T, class F>
cudaError_t shrink_pair(const Shrink& call, cudaStream_t stream) {
  bool vector = vector_rows(call.x, call.x_stride, sizeof(T));
  int rank_tiles = 0;
  for (int l = 0; l < call.adapters.count; ++l) {
    rank_tiles += (call.adapters.at[l].R + 7) / 8;
    vector = vector && vector_rows(call.adapters.at[l].factor, call.K, sizeof(F));
  }
  if (call.M == 0 || rank_tiles == 0) return cudaSuccess;
  if (!vector) return launch_shrink<T, F, 2, false>(call, rank_tiles, stream);
  const bool tall = row_tiles(call.M, (rank_tiles + kMostRankTiles - 1) / kMostRankTiles) == 4;
  return tall ? launch_shrink<T, F, 4, true>(call, rank_tiles, stream)
              : launch_shrink<T, F, 2, true>(call, rank_tiles, stream);
}

}  // namespace

bool has_mma_kernels(Dtype x, Dtype factors) {
  return (x == Dtype::kBFloat16 || x == Dtype::kFloat16) &&
         (factors == x || (x == Dtype::kBFloat16 && factors == Dtype::kFloat32));
}

// As many as fill the GPU, of 256 columns or more. Few rows: every block of the few rows kernel reads the parts again,
// so they are kept below 32 KiB.
int shrink_splits(int64_t M, int64_t K, int64_t R) {
  constexpr int64_t kLeastCols = 256, kMostParts = 8192;
  const int64_t groups = (R + 8 * kMostRankTiles - 1) / (8 * kMostRankTiles), rows = 16 * row_tiles(M, groups);
  int64_t splits = kMultiprocessors / ((M + rows - 1) / rows * groups + 1);
  if (splits > K / kLeastCols) splits = K / kLeastCols;
  if (M <= kFewRowsCuda && splits > kMostParts / (M * R + 1)) splits = kMostParts / (M * R + 1);
  return splits < 1 ? 1 : static_cast<int>(splits);
}

cudaError_t shrink(Dtype x, Dtype factors, const Shrink& call, cudaStream_t stream) {
  if (!has_mma_kernels(x, factors)) return cudaErrorInvalidValue;
  if (x == Dtype::kFloat16) return shrink_pair<fp16, fp16>(call, stream);
  return factors == Dtype::kFloat32 ? shrink_pair<bf16, float>(call, stream) : shrink_pair<bf16, bf16>(call, stream);
}

}  // namespace pk::lora_linear
