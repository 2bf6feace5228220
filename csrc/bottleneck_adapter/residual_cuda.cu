// Elementwise work on [M, N] around lora_linear's products, for the calls that their own epilogues do not serve:
//   finish     out = residual + scaling gate scale keep mask (sum_scale sum + bias), rounded once
//   drop_rows  out = in where the mask keeps, else 0, whatever it was; rounds nothing
// Arithmetic in fp32, fp64 where the factors are. Grid: eight rows x 512 columns to a block, a warp to each row.
#include "bottleneck_adapter/bottleneck_adapter_cuda.h"
#include "bottleneck_adapter/rows.h"

namespace pk::bottleneck_adapter {
namespace {

template <class Acc>
__global__ void __launch_bounds__(kThreads, 2)
    bottleneck_adapter_forward_finish_kernel(const Finish call, Dtype x, Dtype factors) {
  const int64_t m = own_row(), end = piece_end(call.N);
  if (m >= call.M) return;
  const Gated& gated = call.gated;
  const bool drops = gated.keep.threshold != kKeepAll;
  const Dropout dropout{drops ? *call.seed : 0, gated.keep.stream, gated.keep.threshold, gated.keep.scale};
  const Acc keep_scale = Acc(kKeepAll) / static_cast<Acc>(gated.keep.threshold);
  const Acc sum_scale = static_cast<Acc>(gated.sum_scale);
  const Acc factor = static_cast<Acc>(gated.scaling) * load_or<Acc>(gated.gate, factors, m, Acc(1));
#pragma unroll 1
  for (int64_t n = piece_begin(); n < end; n += 32) {
    Acc value = sum_scale * static_cast<const Acc*>(call.sum)[m * call.N + n];
    value = (value + load_or<Acc>(gated.bias, factors, n, Acc(0))) * keep_scale;
    if (drops && !kept(dropout, static_cast<uint32_t>(m), static_cast<uint32_t>(n))) value = 0;
    value *= factor * load_or<Acc>(gated.scale, factors, gated.per_channel ? n : 0, Acc(1));
    if (call.residual) value += load<Acc>(call.residual, x, m * call.residual_stride + n);
    store<Acc>(call.out, x, m * call.N + n, value);
  }
}

// T: as wide as the elements, which are only moved.
template <class T>
__global__ void __launch_bounds__(kThreads) bottleneck_adapter_backward_drop_rows_kernel(const DropRows call) {
  const int64_t m = own_row(), end = piece_end(call.N);
  if (m >= call.M) return;
  const Dropout dropout{*call.seed, call.keep.stream, call.keep.threshold, call.keep.scale};
  const T* const from = static_cast<const T*>(call.in) + m * call.stride;
  T* const to = static_cast<T*>(call.out) + m * call.N;
  for (int64_t n = piece_begin(); n < end; n += 32) {
    to[n] = kept(dropout, static_cast<uint32_t>(m), static_cast<uint32_t>(n)) ? from[n] : T(0);
  }
}

}  // namespace

cudaError_t finish(Dtype x, Dtype factors, const Finish& call, cudaStream_t stream) {
  const dim3 grid = row_grid(call.M, call.N), block(kThreads);
  if (factors == Dtype::kFloat64) {
    return PK_LAUNCH(bottleneck_adapter_forward_finish_kernel<double>, grid, block, 0, stream, call, x, factors);
  }
  return PK_LAUNCH(bottleneck_adapter_forward_finish_kernel<float>, grid, block, 0, stream, call, x, factors);
}

cudaError_t drop_rows(Dtype x, const DropRows& call, cudaStream_t stream) {
  const dim3 grid = row_grid(call.M, call.N), block(kThreads);
  if (x == Dtype::kFloat64) {
    return PK_LAUNCH(bottleneck_adapter_backward_drop_rows_kernel<uint64_t>, grid, block, 0, stream, call);
  }
  if (x == Dtype::kFloat32) {
    return PK_LAUNCH(bottleneck_adapter_backward_drop_rows_kernel<uint32_t>, grid, block, 0, stream, call);
  }
  return PK_LAUNCH(bottleneck_adapter_backward_drop_rows_kernel<uint16_t>, grid, block, 0, stream, call);
}

}  // namespace pk::bottleneck_adapter
