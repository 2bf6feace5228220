// lora_linear's plain-core kernels: for the dtypes that have no tensor-core kernels, and what both kinds need.
//   product     out[p](i, j) = scale sum_{k in share p} left(i, k) right(k, j), dropout on one of the three
//               grid (I/64 x J/64, splits), 256 threads of 4 x 4 results each, 32 deep
//   sum         out(i, j) = scale sum_p in[p](i, j) + sum_v scale_v vector_v(j), rounded once; one thread per result
//   column_sum  out(j) = scale sum_i in(i, j); a block has 32 columns, eight threads to each
//   mask        one thread per 32 neighbours
// Accumulation is fp32, fp64 where the operands are fp64. Any strides; every sum has one fixed order.
#include "common/dropout.h"
#include "common/launch.h"
#include "common/typed.h"
#include "lora_linear/lora_linear_cuda.h"

namespace pk::lora_linear {
namespace {

constexpr int kThreads = 256;
constexpr int kTile = 64, kDepth = 32, kPitch = kTile + 1;
constexpr int kEach = 4, kAcross = kTile / kEach;  // a thread's results lie kAcross apart in both directions

int64_t ceil_div(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

// -- dropout of a tile ------------------------------------------------------------------------------------------------

// Keep-bits of rows x kCols elements from (row0, col0), col0 a multiple of 32: byte [row][col / 32][call] is what that
// call of Philox says of the eight columns (col & 7) >> 1 == call, in the order of `is_kept`.
template <int kCols>
__device__ __forceinline__ void draw_bits(uint8_t* bits, int rows, const Keep& keep, uint64_t seed, int64_t row0,
                                          int64_t col0) {
  for (int i = threadIdx.x; i < rows * kCols / 8; i += kThreads) {
    const int row = i / (kCols / 8), piece = i % (kCols / 8);
    const Philox4 random =
        philox(seed, {{static_cast<uint32_t>(row0 + row), static_cast<uint32_t>((col0 >> 5) + piece / 4),
                       static_cast<uint32_t>(piece % 4), keep.stream}});
    uint32_t byte = 0;
#pragma unroll
    for (int w = 0; w < 4; ++w) {
      byte |= static_cast<uint32_t>((random.word[w] & 0xFFFF) < keep.threshold) << (2 * w);
      byte |= static_cast<uint32_t>((random.word[w] >> 16) < keep.threshold) << (2 * w + 1);
    }
    bits[i] = static_cast<uint8_t>(byte);
  }
}

template <int kCols>
__device__ __forceinline__ bool is_kept(const uint8_t* bits, int row, int col) {
  const int byte = bits[row * (kCols / 8) + col / 32 * 4 + col % 8 / 2];
  return byte >> (col / 8 % 4 * 2 + col % 2) & 1;
}

// -- product ----------------------------------------------------------------------------------------------------------

// A tile [kDepth][kPitch] of an operand, element (k, at) from (k0 + k) * along_k + at * along; zero outside. Threads
// run along the direction whose elements are neighbours in memory.
template <class Acc, class Kept>
__device__ __forceinline__ void load_operand(Acc* tile, const void* data, Dtype type, int64_t offset, int64_t along_k,
                                             int64_t along, int64_t depth, int64_t length, Acc scale, Kept kept) {
  const bool k_first = along_k == 1;
#pragma unroll 4
  for (int e = threadIdx.x; e < kTile * kDepth; e += kThreads) {
    const int k = k_first ? e % kDepth : e / kTile, at = k_first ? e / kDepth : e % kTile;
    const bool inside = k < depth && at < length && kept(k, at);
    tile[k * kPitch + at] = inside ? scale * load<Acc>(data, type, offset + k * along_k + at * along) : Acc(0);
  }
}

template <class Acc>
__device__ __forceinline__ void multiply_tiles(Acc (&sum)[kEach][kEach], const Acc* left, const Acc* right) {
  const int row = static_cast<int>(threadIdx.x) / kAcross, col = static_cast<int>(threadIdx.x) % kAcross;
#pragma unroll 4
  for (int k = 0; k < kDepth; ++k) {
    Acc a[kEach], b[kEach];
#pragma unroll
    for (int e = 0; e < kEach; ++e) a[e] = left[k * kPitch + row + e * kAcross];
#pragma unroll
    for (int e = 0; e < kEach; ++e) b[e] = right[k * kPitch + col + e * kAcross];
#pragma unroll
    for (int r = 0; r < kEach; ++r) {
#pragma unroll
      for (int c = 0; c < kEach; ++c) sum[r][c] = a[r] * b[c] + sum[r][c];
    }
  }
}

template <class Acc>
__global__ __launch_bounds__(kThreads, 3) void lora_linear_product_kernel(const Product call, int64_t share) {
  __shared__ Acc left[kDepth * kPitch], right[kDepth * kPitch];
  __shared__ uint8_t bits[kTile * kTile / 8];
  const auto tiles_j = static_cast<uint32_t>((call.J + kTile - 1) / kTile);
  const int64_t i0 = int64_t{blockIdx.x / tiles_j} * kTile, j0 = int64_t{blockIdx.x % tiles_j} * kTile;
  const int64_t k_begin = blockIdx.y * share, k_end = k_begin + share < call.K ? k_begin + share : call.K;
  const bool mask_left = call.masked == Masked::kLeft, mask_right = call.masked == Masked::kRight;
  const uint64_t seed = call.masked == Masked::kNone ? 0 : *call.seed;
  const Acc keep = Acc(kKeepAll) / static_cast<Acc>(call.keep.threshold);  // call.keep.scale, in double for double
  Acc sum[kEach][kEach] = {};
  for (int64_t k0 = k_begin; k0 < k_end; k0 += kDepth) {
    if (mask_left) draw_bits<kDepth>(bits, kTile, call.keep, seed, i0, k0);
    if (mask_right) draw_bits<kTile>(bits, kDepth, call.keep, seed, k0, j0);
    if (mask_left || mask_right) __syncthreads();
    const auto kept_left = [&](int k, int i) { return !mask_left || is_kept<kDepth>(bits, i, k); };
    const auto kept_right = [&](int k, int j) { return !mask_right || is_kept<kTile>(bits, k, j); };
    load_operand<Acc>(left, call.left.data, call.left.type, i0 * call.left.row + k0 * call.left.col, call.left.col,
                      call.left.row, k_end - k0, call.I - i0, mask_left ? keep : Acc(1), kept_left);
    load_operand<Acc>(right, call.right.data, call.right.type, k0 * call.right.row + j0 * call.right.col,
                      call.right.row, call.right.col, k_end - k0, call.J - j0, mask_right ? keep : Acc(1), kept_right);
    __syncthreads();
    multiply_tiles(sum, left, right);
    __syncthreads();
  }
  const bool mask_out = call.masked == Masked::kOut;
  if (mask_out) {
    draw_bits<kTile>(bits, kTile, call.keep, seed, i0, j0);
    __syncthreads();
  }
  Acc* const out = static_cast<Acc*>(call.out) + blockIdx.y * call.out_split;
  const int row = static_cast<int>(threadIdx.x) / kAcross, col = static_cast<int>(threadIdx.x) % kAcross;
#pragma unroll
  for (int r = 0; r < kEach; ++r) {
#pragma unroll
    for (int c = 0; c < kEach; ++c) {
      const int i = row + r * kAcross, j = col + c * kAcross;
      if (i0 + i >= call.I || j0 + j >= call.J) continue;
      Acc value = static_cast<Acc>(call.scale) * sum[r][c];
      if (mask_out) value = is_kept<kTile>(bits, i, j) ? value * keep : Acc(0);
      Acc& place = out[(i0 + i) * call.out_row + j0 + j];
      place = call.accumulate ? place + value : value;
    }
  }
}

// -- sums -------------------------------------------------------------------------------------------------------------

template <class Acc>
__global__ __launch_bounds__(kThreads) void lora_linear_sum_kernel(const Sum call) {
  const int64_t j = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (j >= call.cols) return;
  const Acc* const in = static_cast<const Acc*>(call.in) + j;
  const int64_t step = static_cast<int64_t>(gridDim.y) * blockDim.y;
  for (int64_t i = static_cast<int64_t>(blockIdx.y) * blockDim.y + threadIdx.y; i < call.rows; i += step) {
    Acc sum = 0;
    for (int p = 0; p < call.splits; ++p) sum += in[p * call.in_split + i * call.in_row];
    sum *= static_cast<Acc>(call.scale);
    for (int v = 0; v < call.vectors; ++v) {
      const SumVector& vector = call.vector[v];
      sum += static_cast<Acc>(vector.scale) * load<Acc>(vector.data, vector.type, j);
    }
    store<Acc>(call.out, call.type, i * call.out_row + j, sum);
  }
}

constexpr int kSumColumns = 32, kSumRows = kThreads / kSumColumns;

template <class Acc>
__global__ __launch_bounds__(kThreads) void lora_linear_backward_column_sum_kernel(Strided in, int64_t rows,
                                                                                   int64_t cols, double scale,
                                                                                   void* out, Dtype out_type) {
  __shared__ Acc parts[kSumRows][kSumColumns];
  const int row = static_cast<int>(threadIdx.x) / kSumColumns, col = static_cast<int>(threadIdx.x) % kSumColumns;
  const int64_t j = static_cast<int64_t>(blockIdx.x) * kSumColumns + col;
  Acc sum = 0;
  for (int64_t i = row; j < cols && i < rows; i += kSumRows)
    sum += load<Acc>(in.data, in.type, i * in.row + j * in.col);
  parts[row][col] = sum;
  __syncthreads();
  if (row > 0 || j >= cols) return;
#pragma unroll
  for (int r = 1; r < kSumRows; ++r) sum += parts[r][col];
  store<Acc>(out, out_type, j, static_cast<Acc>(scale) * sum);
}

__global__ __launch_bounds__(kThreads) void lora_dropout_mask_kernel(uint8_t* out, int64_t rows, int64_t cols,
                                                                     Keep keep, const uint64_t* seed) {
  const int64_t groups = (cols + 31) / 32, unit = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (unit >= rows * groups) return;
  const int64_t row = unit / groups, col0 = unit % groups * 32;
  const Dropout dropout{*seed, keep.stream, keep.threshold, keep.scale};
  const uint32_t bits = keep_word(dropout, static_cast<uint32_t>(row), static_cast<uint32_t>(col0 / 32));
  const int valid = cols - col0 < 32 ? static_cast<int>(cols - col0) : 32;
  for (int i = 0; i < valid; ++i) out[row * cols + col0 + i] = bits >> i & 1;
}

}  // namespace

// -- launchers --------------------------------------------------------------------------------------------------------

// Enough blocks for every SM of the largest GPUs, none with less than 256 terms; by the shape alone.
int product_splits(int64_t I, int64_t J, int64_t K) {
  constexpr int64_t kBlocks = 256, kLeastTerms = 256, kMost = 64;
  const int64_t tiles = ceil_div(I, kTile) * ceil_div(J, kTile);
  const int64_t wanted = tiles < kBlocks ? kBlocks / tiles : 1, possible = ceil_div(K, kLeastTerms);
  const int64_t splits = wanted < possible ? wanted : possible;
  return static_cast<int>(splits > kMost ? kMost : splits < 1 ? 1 : splits);
}

cudaError_t product(const Product& call, cudaStream_t stream) {
  const int64_t tiles = ceil_div(call.I, kTile) * ceil_div(call.J, kTile);
  const int64_t share = ceil_div(ceil_div(call.K, call.splits), kDepth) * kDepth;
  const dim3 grid(static_cast<unsigned>(tiles), static_cast<unsigned>(call.splits));
  if (call.left.type == Dtype::kFloat64) {
    return PK_LAUNCH(lora_linear_product_kernel<double>, grid, dim3(kThreads), 0, stream, call, share);
  }
  return PK_LAUNCH(lora_linear_product_kernel<float>, grid, dim3(kThreads), 0, stream, call, share);
}

cudaError_t sum(const Sum& call, cudaStream_t stream) {
  Sum flat = call;
  if (call.vectors == 0 && call.in_row == call.cols && call.out_row == call.cols) {
    flat.cols = call.rows * call.cols;
    flat.rows = 1;
  }
  unsigned across = 32;
  while (across < kThreads && across < flat.cols) across *= 2;
  const unsigned down = kThreads / across;
  const int64_t high = ceil_div(flat.rows, down);
  constexpr int64_t kMostHigh = 65535;
  const dim3 grid(static_cast<unsigned>(ceil_div(flat.cols, across)),
                  static_cast<unsigned>(high < kMostHigh ? high : kMostHigh));
  if (call.type == Dtype::kFloat64) {
    return PK_LAUNCH(lora_linear_sum_kernel<double>, grid, dim3(across, down), 0, stream, flat);
  }
  return PK_LAUNCH(lora_linear_sum_kernel<float>, grid, dim3(across, down), 0, stream, flat);
}

cudaError_t column_sum(const Strided& in, int64_t rows, int64_t cols, double scale, void* out, Dtype out_type,
                       cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>(ceil_div(cols, kSumColumns)));
  if (in.type == Dtype::kFloat64) {
    return PK_LAUNCH(lora_linear_backward_column_sum_kernel<double>, grid, dim3(kThreads), 0, stream, in, rows, cols,
                     scale, out, out_type);
  }
  return PK_LAUNCH(lora_linear_backward_column_sum_kernel<float>, grid, dim3(kThreads), 0, stream, in, rows, cols,
                   scale, out, out_type);
}

cudaError_t dropout_mask(uint8_t* out, int64_t rows, int64_t cols, const Keep& keep, const uint64_t* seed,
                         cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>(ceil_div(rows * ceil_div(cols, 32), kThreads)));
  return PK_LAUNCH(lora_dropout_mask_kernel, grid, dim3(kThreads), 0, stream, out, rows, cols, keep, seed);
}

}  // namespace pk::lora_linear
