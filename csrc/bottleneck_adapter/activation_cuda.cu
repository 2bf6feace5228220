// Elementwise work on the bottleneck [M, E], Acc (fp32, fp64 for fp64), between lora_linear's products:
//   activate  h = sum_p parts[p] + a,  u = g mask f(h), and g beside it
//   slope     v = s sum_p parts[p],  dh = f'(h) g mask v,  dg[m] = sum_e mask f(h) v + v[m, E]
// Grid: eight rows to a block, a warp to each; activate has pieces of 512 columns along y. Parts are added in order;
// dg is the lanes' sums in the order of a butterfly. A masked element is 0 whatever it was.
#include "bottleneck_adapter/bottleneck_adapter_cuda.h"
#include "bottleneck_adapter/rows.h"
#include "common/activation.h"

namespace pk::bottleneck_adapter {
namespace {

template <class Acc>
__global__ void __launch_bounds__(kThreads, 2)
    bottleneck_adapter_forward_activate_kernel(const Activate call, Dtype factors) {
  const int64_t m = own_row(), end = piece_end(call.u_row);
  if (m >= call.M) return;
  const bool drops = call.keep.threshold != kKeepAll;
  const Dropout dropout{drops ? *call.seed : 0, call.keep.stream, call.keep.threshold, call.keep.scale};
  const Acc gate = load_or<Acc>(call.gate, factors, m, Acc(1));
  Acc* const u = static_cast<Acc*>(call.u) + m * call.u_row;
#pragma unroll 1
  for (int64_t e = piece_begin(); e < end; e += 32) {
    if (e >= call.E) {
      u[e] = gate;
      continue;
    }
    const Acc* const parts = static_cast<const Acc*>(call.parts) + m * call.E + e;
    Acc h = parts[0];
#pragma unroll 1
    for (int p = 1; p < call.splits; ++p) h += parts[p * call.M * call.E];
    h += load_or<Acc>(call.bias, factors, e, Acc(0));
    if (call.h) static_cast<Acc*>(call.h)[m * call.E + e] = h;
    const bool keeps = !drops || kept(dropout, static_cast<uint32_t>(m), static_cast<uint32_t>(e));
    u[e] = gate * (keeps ? activated(call.activation, h) : Acc(0));
  }
}

template <class Acc>
__global__ void __launch_bounds__(kThreads, 2)
    bottleneck_adapter_backward_slope_kernel(const Slope call, Dtype factors) {
  const int64_t m = own_row();
  if (m >= call.M) return;
  const bool drops = call.keep.threshold != kKeepAll;
  const Dropout dropout{drops ? *call.seed : 0, call.keep.stream, call.keep.threshold, call.keep.scale};
  const Acc gate = load_or<Acc>(call.gate, factors, m, Acc(1)), scale = load_or<Acc>(call.scale, factors, 0, Acc(1));
  const Acc* const h_row = static_cast<const Acc*>(call.h) + m * call.E;
  Acc* const dh = static_cast<Acc*>(call.dh) + m * call.E;
  Acc sum = 0;
#pragma unroll 1
  for (int64_t e = lane_index(); e < call.v_row; e += 32) {
    const Acc* const parts = static_cast<const Acc*>(call.parts) + m * call.v_row + e;
    Acc v = parts[0];
#pragma unroll 1
    for (int p = 1; p < call.splits; ++p) v += parts[p * call.M * call.v_row];
    v *= scale;
    if (e >= call.E) {
      sum += v;
      continue;
    }
    const Acc h = h_row[e];
    const bool keeps = !drops || kept(dropout, static_cast<uint32_t>(m), static_cast<uint32_t>(e));
    dh[e] = slope_of(call.activation, h) * (keeps ? gate * v : Acc(0));
    if (call.dgate) sum += v * (keeps ? activated(call.activation, h) : Acc(0));
  }
  sum = warp_sum(sum);
  if (call.dgate && lane_index() == 0) store<Acc>(call.dgate, factors, m, sum);
}

}  // namespace

cudaError_t activate(Dtype factors, const Activate& call, cudaStream_t stream) {
  const dim3 grid = row_grid(call.M, call.u_row), block(kThreads);
  if (factors == Dtype::kFloat64) {
    return PK_LAUNCH(bottleneck_adapter_forward_activate_kernel<double>, grid, block, 0, stream, call, factors);
  }
  return PK_LAUNCH(bottleneck_adapter_forward_activate_kernel<float>, grid, block, 0, stream, call, factors);
}

cudaError_t slope(Dtype factors, const Slope& call, cudaStream_t stream) {
  const dim3 grid = row_grid(call.M, 1), block(kThreads);
  if (factors == Dtype::kFloat64) {
    return PK_LAUNCH(bottleneck_adapter_backward_slope_kernel<double>, grid, block, 0, stream, call, factors);
  }
  return PK_LAUNCH(bottleneck_adapter_backward_slope_kernel<float>, grid, block, 0, stream, call, factors);
}

}  // namespace pk::bottleneck_adapter
