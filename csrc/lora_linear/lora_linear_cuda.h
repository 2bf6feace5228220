// lora_linear on an NVIDIA GPU (sm_80 and later), free of torch: what each launcher computes. The forward is
//   shrink:  h_l = s_l drop_l(x) A_l^T                              x read once for all adapters
//   expand:  y = sum_l h_l B_l^T + bias, and a library GEMM adds x W^T on top (beta = 1)
//   few rows (M <= kFewRows) instead of expand: y = [x | h] [W | B]^T + bias, W streamed once
//   concat (sm_90) instead of expand and the library GEMM, one GEMM over both; for dx as well
// and the backward
//   dy pass: ds_l = s_l dy B_l and dB_l = dy^T h_l                  dy read once
//   expand:  dx = sum_l mask_l * (ds_l A_l) / (1 - p), and a library GEMM adds dy W on top
//   x pass:  dA_l = ds_l^T drop_l(x)                                x read once, masks replayed
// These are tensor-core kernels (mma.sync; concat: wgmma) for the pairs of `has_mma_kernels`; `product`, on the plain
// cores, computes every one of these formulas for all dtypes. h and ds are fp32 (fp64 for fp64) and enter a product as
// bf16 parts, as fp32 factors do: rounded once they would be the largest error of the layer. Split sums write partial
// results, which `sum` adds in a fixed order: no atomics. How a sum is split depends on the shape alone; the tiles of
// concat depend on the device too, but none splits a sum. A launcher launches one kernel on `stream`, and touches
// nothing else of the device's state.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "common/dropout.h"
#include "common/dtype.h"

namespace pk::lora_linear {

constexpr int kMostAdapters = 32;  // of one launch: they travel as kernel parameters
constexpr int kMostMembers = 8;
constexpr int kFewRowsCuda = 16;
constexpr int kMultiprocessors = 128;  // about as many as the large GPUs have

// The seed stays on the device: `seed` points to it, and is null where no adapter of the launch drops anything.
struct Keep {
  uint32_t stream = 0, threshold = kKeepAll;  // of Dropout
  float scale = 1.f;
};

inline Keep make_keep(double p, uint32_t stream) {
  const Dropout dropout = make_dropout(p, 0, stream);
  return {stream, dropout.threshold, dropout.scale};
}

// One adapter of a launch; what a kernel does not use stays null.
struct CudaAdapter {
  const void* factor;  // shrink, x pass: A [R, K]; dy pass, few rows: B [N, R]; expand: see there. Contiguous
  const void* bias;    // expand, few rows: [N] of the factors' dtype, added times `scaling`; or null
  int R, rank0;        // its columns of h and ds are rank0 ... rank0 + R
  int member;          // few rows
  float scaling;
  Keep keep;
};

struct Adapters {
  int count = 0;
  CudaAdapter at[kMostAdapters];
};

bool has_mma_kernels(Dtype x, Dtype factors);  // (bf16, bf16), (fp16, fp16), (bf16, fp32)

// h[m, rank0 + r] = s sum_k drop(x)[m, k] A[r, k]. With splits > 1 the sum over k is cut: parts [splits][M][R]. DoRA
// wants the squares of the rows too.
struct Shrink {
  const void* x;  // [M, K], rows x_stride apart, unit stride along K
  int64_t x_stride, M, K;
  float* h;  // [splits][M][R]; columns of other adapters are left alone
  int64_t R;
  int splits;
  const uint64_t* seed;
  Adapters adapters;
  float* squares = nullptr;  // [splits][M]: sum_k x[m, k]^2 of each part, or null
};
int shrink_splits(int64_t M, int64_t K, int64_t R);
cudaError_t shrink(Dtype x, Dtype factors, const Shrink& call, cudaStream_t stream);

// out[m, n] = (accumulate ? out[m, n] : 0) + sum_l mask_l[m, n] keep_l (sum_r low[m, rank0_l + r] F_l(r, n)) + bias[n]
// + sum_l s_l bias_l[n]; F_l(r, n) is factor[r * N + n] where `across` (A, for dx), else factor[n * R_l + r] (B, for
// y). Only dx has masks: an adapter that drops something is refused where `across` is false. With a residual (of x's
// dtype, rows residual_stride apart, unit stride along n), which excludes `accumulate`, it is added too.
// bottleneck_adapter's y goes through `gated`, which the other direction has not: in place of the biases above,
//   out[m, n] = residual[m, n] + scaling gate[m] scale[n] keep mask[m, n] (sum_scale sum_l ... + bias[n])
struct Gated {
  const void* gate = nullptr;   // [M] of the factors' dtype, or null: 1
  const void* scale = nullptr;  // of the factors' dtype, [N] where `per_channel`, else [1]; or null: 1
  const void* bias = nullptr;   // [N] of the factors' dtype, or null: 0
  bool per_channel = false;
  double scaling = 1, sum_scale = 1;
  Keep keep;  // the mask, over [M, N]
};
struct Expand {
  void* out;  // [M, N] contiguous, of x's dtype
  int64_t M, N;
  const float* low;  // [M][R]: h or ds
  int64_t R;
  const void* bias;  // [N] of x's dtype, or null
  bool across, accumulate;
  const uint64_t* seed;
  Adapters adapters;
  const void* residual = nullptr;
  int64_t residual_stride = 0;
  bool is_gated = false;
  Gated gated = {};
};
cudaError_t expand(Dtype x, Dtype factors, const Expand& call, cudaStream_t stream);

// For M <= kFewRowsCuda, right behind a shrink of the same adapters, which it may overlap:
// y_g = x W_g^T + sum_{l in g} h_l B_l^T + bias_g + sum_l s_l bias_l, where h is the sum of the shrink's `splits`
// parts; also writes that sum to `h`. Needs has_few_rows_kernel().
struct FewRowsMember {
  const void* weight;  // [N, K], rows weight_stride apart, unit stride along K
  int64_t weight_stride, N;
  const void* bias;  // [N] of x's dtype, or null
  void* y;           // [M, N] contiguous
};
struct FewRows {
  const void* x;
  int64_t x_stride, M, K;
  const float* parts;  // [splits][M][R]
  int splits;
  float* h;  // [M][R]
  int64_t R;
  int members;
  FewRowsMember member[kMostMembers];
  Adapters adapters;  // of all members
};
bool has_few_rows_kernel(Dtype x, Dtype factors, const FewRows& call);  // 16-byte aligned rows, K a multiple of 8, ...
cudaError_t few_rows(Dtype x, Dtype factors, const FewRows& call, cudaStream_t stream);

// On sm_90 one GEMM takes the place of expand and the library's: its contraction runs over the base operands and goes
// on over those of the adapters, which concat_operands writes, in bf16, since the parts of an fp32 are. P columns of
// them give sum_l low_l F_l as exactly as expand does; see there for low and F_l.
struct ConcatOperands {
  const float* low;  // [I][R]
  int64_t I, J, R;
  bool across;
  const void* bias;  // [J] of x's dtype, or null
  Adapters adapters;
  void* left;     // [I][concat_stride(P)]
  void* right;    // [J][concat_stride(P)]; across: [P][J]
  float* biases;  // [J]: bias + sum_l s_l bias_l; null: not wanted
};
int64_t concat_columns(Dtype factors, const Adapters& adapters);  // P
constexpr int64_t concat_stride(int64_t columns) {                // of whole 16 bytes
  return (columns + 7) / 8 * 8;
}
cudaError_t concat_operands(Dtype x, Dtype factors, const ConcatOperands& call, cudaStream_t stream);

// out[i, j] = (accumulate ? out[i, j] : 0) + sum_s sum_c left_s[i, c] right_s(c, j) + biases[j], over the members and
// `adapters` (bf16; 0 columns: none), whose sum is multiplied by `keep`'s mask over out first; right_s(c, j) is
// right[c * right_stride + j] across (dx: W [N, K]), else right[j * right_stride + c] (y). With adapters it stands
// right behind concat_operands, whose end it overlaps. Needs has_concat_gemm() and has_tensor_maps(). One block adds up
// an element in the order of the contraction, whatever the tiles.
constexpr int kMostConcatMembers = 4;
struct ConcatSegment {
  const void *left, *right;
  int64_t left_stride, right_stride, columns;
};
struct ConcatGemm {
  void* out;  // [I, J] contiguous, of x's dtype
  int64_t I, J;
  bool across, accumulate;
  int members;
  ConcatSegment member[kMostConcatMembers], adapters;
  const float* biases;  // or null
  Keep keep;            // across only
  const uint64_t* seed;
  int blocks;       // at most, which share the tiles: as many as the device has multiprocessors
  int cluster = 0;  // of so many blocks, 1 or 2, one above the other, which load right together; 0: concat_cluster()
  int width = 0;    // of a tile, 128 or 256 columns; 0: concat_width()
};
int concat_width(const ConcatGemm& call);
// 2 where there are two rows of tiles, and pairs of blocks take no more turns than single ones.
int concat_cluster(const ConcatGemm& call);
bool has_tensor_maps();                                 // or else the driver is too old
bool has_concat_gemm(Dtype x, const ConcatGemm& call);  // I >= 128, J a multiple of 8, 16-byte aligned rows, ...
cudaError_t concat_gemm(Dtype x, const ConcatGemm& call, cudaStream_t stream);

// One member's pass over dy. For its adapters l:
//   ds [column_blocks][M][R]: parts of s_l dy B_l in columns rank0_l ..., to be summed;   null: not wanted
//   dB_l [row_chunks][N][R_l]: parts of dy^T h_l, to be summed
struct DyPass {
  const void* dy;  // [M, N], rows dy_stride apart, unit stride along N
  int64_t dy_stride, M, N;
  const float* h;  // [M][R]; null where no dB is wanted
  float* ds;
  int64_t R;
  float* dB[kMostAdapters];  // null: not wanted
  Adapters adapters;         // factor: B
};
int dy_column_blocks(int64_t N);          // parts of ds
int dy_row_chunks(int64_t M, int64_t N);  // parts of every dB_l
cudaError_t dy_pass(Dtype x, Dtype factors, const DyPass& call, cudaStream_t stream);

// dA_l [row_chunks][R_l][K]: parts of ds_l^T drop_l(x), to be summed.
struct XPass {
  const void* x;
  int64_t x_stride, M, K;
  const float* ds;  // [M][R]
  int64_t R;
  float* dA[kMostAdapters];
  const uint64_t* seed;
  Adapters adapters;  // factor: not read
};
int x_row_chunks(int64_t M, int64_t K);
cudaError_t x_pass(Dtype x, Dtype factors, const XPass& call, cudaStream_t stream);

// A matrix of any dtype and strides, element (i, j) at i * row + j * col.
struct Strided {
  const void* data;
  Dtype type;
  int64_t row, col;
};

// out[split][i, j] = scale sum_k left(i, k) right(k, j), k in the split's share, fp32 (fp64 where both are fp64);
// where `masked` names left (element (m, k) of drop(x) is (i, k)), right ((k, j)) or out ((i, j)), that one is
// multiplied by its mask and keep.scale (in double for fp64). A dropped element counts as 0 even if it is NaN.
enum class Masked { kNone, kLeft, kRight, kOut };
struct Product {
  int64_t I, J, K;
  Strided left, right;
  void* out;  // [splits], each out_split elements from the one before it; element (i, j) at i * out_row + j
  int64_t out_row, out_split;
  int splits;
  bool accumulate;  // splits = 1 only
  double scale;
  Masked masked;
  Keep keep;
  const uint64_t* seed;
};
int product_splits(int64_t I, int64_t J, int64_t K);
cudaError_t product(const Product& call, cudaStream_t stream);

// out(i, j) = scale sum_p in[p * in_split + i * in_row + j] + sum_v scale_v vector_v[j], p and v in order; rounded once
// to out's dtype. out may be in. With splits = 0 nothing is read of in.
struct SumVector {
  const void* data;
  Dtype type;
  double scale;
};
struct Sum {
  const void* in;  // fp32, or fp64 where out is fp64
  int64_t in_split, in_row;
  int splits;
  void* out;  // element (i, j) at i * out_row + j
  Dtype type;
  int64_t out_row, rows, cols;
  double scale;
  int vectors;
  SumVector vector[kMostAdapters];  // biases
};
cudaError_t sum(const Sum& call, cudaStream_t stream);

// out[j] = scale sum_i in(i, j), of in's dtype or the factors': gradients of biases.
cudaError_t column_sum(const Strided& in, int64_t rows, int64_t cols, double scale, void* out, Dtype out_type,
                       cudaStream_t stream);

// out[row, col] = 1 where the element of drop(x) is kept.
cudaError_t dropout_mask(uint8_t* out, int64_t rows, int64_t cols, const Keep& keep, const uint64_t* seed,
                         cudaStream_t stream);

}  // namespace pk::lora_linear
