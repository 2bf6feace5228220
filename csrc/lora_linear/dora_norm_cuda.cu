// DoRA's norm on the plain cores: ||W + s B A|| of every row of W [N, K] without B A.
//   rows    low = W A^T and the squares of W's rows, for the dtypes and layouts that the shrink does not take;
//           grid (N/16 x R/64), 16 rows x 64 ranks of a block, 32 deep, four ranks to a thread
//   finish  sqrt(max(0, squares + <B, 2 s low + s^2 B A A^T>)); a warp to a row, eight to a block
// Accumulation is fp32, fp64 for fp64; every sum has one fixed order.
#include "common/typed.h"
#include "common/warp.h"
#include "lora_linear/dora_cuda.h"

namespace pk::dora_cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kRows = 16, kRanks = 64, kDepth = 32, kEach = kRanks / kRows;
constexpr int kLeftPitch = kRows + 1, kRightPitch = kRanks + 1;

template <class Acc>
__global__ void __launch_bounds__(kThreads, 2) dora_norm_forward_products_kernel(const NormRows call) {
  __shared__ Acc left[kDepth * kLeftPitch], right[kDepth * kRightPitch];
  const int thread = static_cast<int>(threadIdx.x), row = thread / kRows, col = thread % kRows;
  const auto groups = static_cast<unsigned>((call.R + kRanks - 1) / kRanks);
  const int64_t n0 = int64_t{blockIdx.x / groups} * kRows, r0 = int64_t{blockIdx.x % groups} * kRanks;
  const bool along = call.weight_k == 1;  // threads run along what lies side by side in memory
  Acc sum[kEach] = {}, square = 0;
  for (int64_t k0 = 0; k0 < call.K; k0 += kDepth) {
#pragma unroll
    for (int e = thread; e < kRows * kDepth; e += kThreads) {
      const int k = along ? e % kDepth : e / kRows, i = along ? e / kDepth : e % kRows;
      const bool inside = k0 + k < call.K && n0 + i < call.N;
      const int64_t at = (n0 + i) * call.weight_n + (k0 + k) * call.weight_k;
      left[k * kLeftPitch + i] = inside ? load<Acc>(call.weight, call.type, at) : Acc(0);
    }
#pragma unroll 4
    for (int e = thread; e < kRanks * kDepth; e += kThreads) {
      const int k = e % kDepth, r = e / kDepth;
      const bool inside = k0 + k < call.K && r0 + r < call.R;
      right[k * kRightPitch + r] = inside ? load<Acc>(call.A, call.factors, (r0 + r) * call.K + k0 + k) : Acc(0);
    }
    __syncthreads();
#pragma unroll 4
    for (int k = 0; k < kDepth; ++k) {
      const Acc w = left[k * kLeftPitch + row];
#pragma unroll
      for (int e = 0; e < kEach; ++e) sum[e] += w * right[k * kRightPitch + col + e * kRows];
    }
#pragma unroll
    for (int k = col; k < kDepth; k += kRows) square += left[k * kLeftPitch + row] * left[k * kLeftPitch + row];
    __syncthreads();
  }
  square = warp_sum<kRows>(square);
  const int64_t n = n0 + row;
  if (n >= call.N) return;
  if (col == 0 && r0 == 0) static_cast<Acc*>(call.squares)[n] = square;
#pragma unroll
  for (int e = 0; e < kEach; ++e) {
    const int64_t r = r0 + col + e * kRows;
    if (r < call.R) static_cast<Acc*>(call.low)[n * call.R + r] = sum[e];
  }
}

template <class Acc>
__global__ void __launch_bounds__(kThreads) dora_norm_forward_finish_kernel(const NormFinish call, Dtype factors) {
  const int64_t n = int64_t{blockIdx.x} * (kThreads / 32) + warp_index();
  if (n >= call.N) return;
  const Acc scale = static_cast<Acc>(call.scale);
  Acc dot = 0;
  for (int64_t r = lane_index(); r < call.R; r += 32) {
    const int64_t at = n * call.R + r;
    Acc low = 0;
#pragma unroll 1
    for (int p = 0; p < call.splits; ++p) low += static_cast<const Acc*>(call.low)[p * call.N * call.R + at];
    dot += load<Acc>(call.B, factors, at) * (scale * low + static_cast<const Acc*>(call.cross)[at]);
  }
  dot = warp_sum(dot);
  if (lane_index() != 0) return;
  Acc square = 0;
#pragma unroll 1
  for (int p = 0; p < call.splits; ++p) square += static_cast<const Acc*>(call.squares)[p * call.N + n];
  square += dot;
  static_cast<Acc*>(call.norm)[n] = square < 0 ? Acc(0) : sqrt(square);  // NaN stays NaN
}

}  // namespace

cudaError_t norm_rows(const NormRows& call, cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>((call.N + kRows - 1) / kRows * ((call.R + kRanks - 1) / kRanks)));
  if (call.type == Dtype::kFloat64) {
    return PK_LAUNCH(dora_norm_forward_products_kernel<double>, grid, dim3(kThreads), 0, stream, call);
  }
  return PK_LAUNCH(dora_norm_forward_products_kernel<float>, grid, dim3(kThreads), 0, stream, call);
}

cudaError_t norm_finish(Dtype factors, const NormFinish& call, cudaStream_t stream) {
  constexpr int kRowsEach = kThreads / 32;
  const dim3 grid(static_cast<unsigned>((call.N + kRowsEach - 1) / kRowsEach));
  if (factors == Dtype::kFloat64) {
    return PK_LAUNCH(dora_norm_forward_finish_kernel<double>, grid, dim3(kThreads), 0, stream, call, factors);
  }
  return PK_LAUNCH(dora_norm_forward_finish_kernel<float>, grid, dim3(kThreads), 0, stream, call, factors);
}

}  // namespace pk::dora_cuda
