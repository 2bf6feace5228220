// The norm over the features of x [M, K] and its derivative, Acc (fp32, fp64 where the factors are):
//   normalize   out = (x - mean) reciprocal . weight + bias, reciprocal = 1 / sqrt(mean (x - mean)^2 + eps)
//   norm_slope  dx = reciprocal (q - mean(q) - normed mean(q normed)) + residual, q = out_grad . weight; rounded once
// An RMSNorm has no mean and no mean(q). Grid: a warp to a row, eight to a block; a lane's sums run along the row, the
// lanes' in the order of a butterfly. The variance is that of the centred row: no difference of squares.
#include "bottleneck_adapter/bottleneck_adapter_cuda.h"
#include "bottleneck_adapter/rows.h"

namespace pk::bottleneck_adapter {
namespace {

template <class Acc>
__global__ void __launch_bounds__(kThreads)
    bottleneck_adapter_forward_normalize_kernel(const Normalize call, Dtype x, Dtype factors) {
  const int64_t m = own_row();
  if (m >= call.M) return;
  const auto at = [&](int64_t k) { return load<Acc>(call.x, x, m * call.x_stride + k); };
  const Acc K = static_cast<Acc>(call.K);
  Acc mean = 0, squares = 0;
  if (call.centred) {
    for (int64_t k = lane_index(); k < call.K; k += 32) mean += at(k);
    mean = warp_sum(mean) / K;
  }
  for (int64_t k = lane_index(); k < call.K; k += 32) squares += (at(k) - mean) * (at(k) - mean);
  const Acc reciprocal = 1 / sqrt(warp_sum(squares) / K + static_cast<Acc>(call.eps));
  Acc* const out = static_cast<Acc*>(call.out) + m * call.K;
  for (int64_t k = lane_index(); k < call.K; k += 32) {
    out[k] = (at(k) - mean) * reciprocal * load_or<Acc>(call.weight, factors, k, Acc(1)) +
             load_or<Acc>(call.bias, factors, k, Acc(0));
  }
  if (call.reciprocal && lane_index() == 0) static_cast<Acc*>(call.reciprocal)[m] = reciprocal;
}

template <class Acc>
__global__ void __launch_bounds__(kThreads)
    bottleneck_adapter_backward_norm_slope_kernel(const NormSlope call, Dtype x, Dtype factors) {
  const int64_t m = own_row();
  if (m >= call.M) return;
  const Acc* const out_grad = static_cast<const Acc*>(call.out_grad) + m * call.K;
  const Acc* const normed = static_cast<const Acc*>(call.normed) + m * call.K;
  const auto q = [&](int64_t k) { return out_grad[k] * load_or<Acc>(call.weight, factors, k, Acc(1)); };
  const Acc K = static_cast<Acc>(call.K), reciprocal = static_cast<const Acc*>(call.reciprocal)[m];
  Acc mean = 0, along = 0;
  for (int64_t k = lane_index(); k < call.K; k += 32) {
    mean += q(k);
    along += q(k) * normed[k];
  }
  mean = call.centred ? warp_sum(mean) / K : Acc(0);
  along = warp_sum(along) / K;
  for (int64_t k = lane_index(); k < call.K; k += 32) {
    Acc value = reciprocal * (q(k) - mean - normed[k] * along);
    if (call.residual) value += load<Acc>(call.residual, x, m * call.residual_stride + k);
    store<Acc>(call.dx, x, m * call.K + k, value);
  }
}

}  // namespace

cudaError_t normalize(Dtype x, Dtype factors, const Normalize& call, cudaStream_t stream) {
  const dim3 grid = row_grid(call.M, 1), block(kThreads);
  if (factors == Dtype::kFloat64) {
    return PK_LAUNCH(bottleneck_adapter_forward_normalize_kernel<double>, grid, block, 0, stream, call, x, factors);
  }
  return PK_LAUNCH(bottleneck_adapter_forward_normalize_kernel<float>, grid, block, 0, stream, call, x, factors);
}

cudaError_t norm_slope(Dtype x, Dtype factors, const NormSlope& call, cudaStream_t stream) {
  const dim3 grid = row_grid(call.M, 1), block(kThreads);
  if (factors == Dtype::kFloat64) {
    return PK_LAUNCH(bottleneck_adapter_backward_norm_slope_kernel<double>, grid, block, 0, stream, call, x, factors);
  }
  return PK_LAUNCH(bottleneck_adapter_backward_norm_slope_kernel<float>, grid, block, 0, stream, call, x, factors);
}

}  // namespace pk::bottleneck_adapter
