// The gradients of bottleneck_adapter's weights from parts of rank-sized products, which are added in order:
//   up_gradients    dB[n, e] = c s[n] D[n, e],  db[n] = c' s[n] d[n],  ds[n] = c sum_e B[n, e] D[n, e] + c' b[n] d[n];
//                   a warp to a channel n, eight to a block
//   down_gradients  dA[e, k] = w[k] D[e, k] + b[k] da[e],  dw[k] = sum_e A D,  db[k] = sum_e A[e, k] da[e];
//                   a block has 32 features k, eight threads to each, which take the rows e in turn
//   scale_rows      s[n] B[n, e];  a warp to a row
//   column_parts    sums of the columns of [rows][cols] over chunks of rows; a block has 32 columns of a chunk
// Accumulation in fp32, fp64 for fp64; one fixed order.
#include "bottleneck_adapter/bottleneck_adapter_cuda.h"
#include "bottleneck_adapter/rows.h"

namespace pk::bottleneck_adapter {
namespace {

template <class Acc>
__device__ __forceinline__ Acc sum_of(const Parts& parts, int splits, int64_t n, int64_t e) {
  const Acc* const from = static_cast<const Acc*>(parts.data) + n * parts.row + e;
  Acc sum = 0;
  for (int p = 0; p < splits; ++p) sum += from[p * parts.split];
  return sum;
}

template <class Acc>
__global__ void __launch_bounds__(kThreads)
    bottleneck_adapter_backward_up_gradients_kernel(const UpGradients call, Dtype factors) {
  const int64_t n = own_row();
  if (n >= call.N) return;
  const Acc scale = load_or<Acc>(call.scale, factors, call.per_channel ? n : 0, Acc(1));
  const Acc weight_factor = static_cast<Acc>(call.weight_factor), bias_factor = static_cast<Acc>(call.bias_factor);
  Acc dot = 0;
  for (int64_t e = lane_index(); call.weight.data && e < call.E; e += 32) {
    const Acc sum = weight_factor * sum_of<Acc>(call.weight, call.splits, n, e);
    if (call.up_weight_grad) store<Acc>(call.up_weight_grad, factors, n * call.E + e, scale * sum);
    if (call.scale_grad) dot += load<Acc>(call.up_weight, factors, n * call.E + e) * sum;
  }
  dot = warp_sum(dot);
  if (lane_index() != 0) return;
  const Acc sum = call.bias.data ? bias_factor * sum_of<Acc>(call.bias, call.splits, n, 0) : Acc(0);
  if (call.up_bias_grad) store<Acc>(call.up_bias_grad, factors, n, scale * sum);
  if (!call.scale_grad) return;
  if (call.up_bias) dot += load<Acc>(call.up_bias, factors, n) * sum;
  store<Acc>(call.scale_grad, call.scale_type, n, dot);
}

constexpr int kFeatures = 32, kTurns = kThreads / kFeatures;

template <class Acc>
__global__ void __launch_bounds__(kThreads)
    bottleneck_adapter_backward_down_gradients_kernel(const DownGradients call, Dtype factors) {
  __shared__ Acc weight_sums[kTurns][kFeatures], bias_sums[kTurns][kFeatures];
  const int turn = warp_index(), lane = lane_index();
  const int64_t k = static_cast<int64_t>(blockIdx.x) * kFeatures + lane;
  Acc weight_sum = 0, bias_sum = 0;
  if (k < call.K) {
    const Acc weight = load_or<Acc>(call.weight, factors, k, Acc(1));
    const Acc bias = load_or<Acc>(call.bias, factors, k, Acc(0));
    for (int64_t e = turn; e < call.E; e += kTurns) {
      const int64_t at = e * call.K + k;
      const Acc da = static_cast<const Acc*>(call.da)[e], A = load<Acc>(call.down_weight, factors, at);
      Acc sum = 0;
#pragma unroll 1
      for (int p = 0; p < call.splits; ++p) sum += static_cast<const Acc*>(call.parts)[p * call.E * call.K + at];
      if (call.down_weight_grad) store<Acc>(call.down_weight_grad, factors, at, weight * sum + bias * da);
      weight_sum += A * sum;
      bias_sum += A * da;
    }
  }
  weight_sums[turn][lane] = weight_sum;
  bias_sums[turn][lane] = bias_sum;
  __syncthreads();
  if (turn > 0 || k >= call.K) return;
  for (int t = 1; t < kTurns; ++t) {
    weight_sum += weight_sums[t][lane];
    bias_sum += bias_sums[t][lane];
  }
  if (call.weight_grad) store<Acc>(call.weight_grad, factors, k, weight_sum);
  if (call.bias_grad) store<Acc>(call.bias_grad, factors, k, bias_sum);
}

template <class Acc>
__global__ void __launch_bounds__(kThreads)
    bottleneck_adapter_backward_scale_rows_kernel(const void* in, const void* scale, int64_t rows, int64_t cols,
                                                  Acc* out, Dtype factors) {
  const int64_t n = own_row();
  if (n >= rows) return;
  const Acc factor = load<Acc>(scale, factors, n);
  for (int64_t e = lane_index(); e < cols; e += 32) out[n * cols + e] = factor * load<Acc>(in, factors, n * cols + e);
}

template <class Acc>
__global__ void __launch_bounds__(kThreads)
    bottleneck_adapter_backward_column_parts_kernel(const Acc* in, int64_t rows, int64_t cols, int64_t rows_each,
                                                    Acc* out) {
  __shared__ Acc sums[kTurns][kFeatures];
  const int turn = warp_index(), lane = lane_index();
  const int64_t j = static_cast<int64_t>(blockIdx.x) * kFeatures + lane, first = blockIdx.y * rows_each;
  const int64_t end = first + rows_each < rows ? first + rows_each : rows;
  Acc sum = 0;
  for (int64_t i = first + turn; j < cols && i < end; i += kTurns) sum += in[i * cols + j];
  sums[turn][lane] = sum;
  __syncthreads();
  if (turn > 0 || j >= cols) return;
  for (int t = 1; t < kTurns; ++t) sum += sums[t][lane];
  out[blockIdx.y * cols + j] = sum;
}

}  // namespace

cudaError_t up_gradients(Dtype factors, const UpGradients& call, cudaStream_t stream) {
  const dim3 grid = row_grid(call.N, 1), block(kThreads);
  if (factors == Dtype::kFloat64) {
    return PK_LAUNCH(bottleneck_adapter_backward_up_gradients_kernel<double>, grid, block, 0, stream, call, factors);
  }
  return PK_LAUNCH(bottleneck_adapter_backward_up_gradients_kernel<float>, grid, block, 0, stream, call, factors);
}

cudaError_t down_gradients(Dtype factors, const DownGradients& call, cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>((call.K + kFeatures - 1) / kFeatures)), block(kThreads);
  if (factors == Dtype::kFloat64) {
    return PK_LAUNCH(bottleneck_adapter_backward_down_gradients_kernel<double>, grid, block, 0, stream, call, factors);
  }
  return PK_LAUNCH(bottleneck_adapter_backward_down_gradients_kernel<float>, grid, block, 0, stream, call, factors);
}

cudaError_t scale_rows(Dtype factors, const void* in, const void* scale, int64_t rows, int64_t cols, void* out,
                       cudaStream_t stream) {
  const dim3 grid = row_grid(rows, 1), block(kThreads);
  if (factors == Dtype::kFloat64) {
    return PK_LAUNCH(bottleneck_adapter_backward_scale_rows_kernel<double>, grid, block, 0, stream, in, scale, rows,
                     cols, static_cast<double*>(out), factors);
  }
  return PK_LAUNCH(bottleneck_adapter_backward_scale_rows_kernel<float>, grid, block, 0, stream, in, scale, rows, cols,
                   static_cast<float*>(out), factors);
}

int column_chunks(int64_t rows) {
  constexpr int64_t kLeastRows = 128, kMost = 64;
  const int64_t chunks = (rows + kLeastRows - 1) / kLeastRows;
  return static_cast<int>(chunks < kMost ? chunks : kMost);
}

cudaError_t column_parts(Dtype factors, const void* in, int64_t rows, int64_t cols, void* out, cudaStream_t stream) {
  const int64_t chunks = column_chunks(rows), rows_each = (rows + chunks - 1) / chunks;
  const dim3 grid(static_cast<unsigned>((cols + kFeatures - 1) / kFeatures), static_cast<unsigned>(chunks));
  const dim3 block(kThreads);
  if (factors == Dtype::kFloat64) {
    return PK_LAUNCH(bottleneck_adapter_backward_column_parts_kernel<double>, grid, block, 0, stream,
                     static_cast<const double*>(in), rows, cols, rows_each, static_cast<double*>(out));
  }
  return PK_LAUNCH(bottleneck_adapter_backward_column_parts_kernel<float>, grid, block, 0, stream,
                   static_cast<const float*>(in), rows, cols, rows_each, static_cast<float*>(out));
}

}  // namespace pk::bottleneck_adapter
