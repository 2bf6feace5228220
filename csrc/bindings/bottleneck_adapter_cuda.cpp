// bottleneck_adapter on a GPU: allocate, launch. Where tensor cores serve the dtypes and there is no norm: three
// launches, shrink, activate and expand, which reads the residual and writes y; or, up to E = 256 and in 16 bits, one
// for many rows, `fused`, and two for few, shrink and `fused` (one on sm_90, where it is asked for). Nothing here waits
// for the device or reads from it.
#include "bindings/bottleneck_adapter.h"
#include "bindings/bottleneck_adapter_cuda_call.h"

namespace pk {
namespace {

using bottleneck_adapter::Activate;
using lora_linear::Gated;

Gated gated_of(const BottleneckCall& b) {
  return {BottleneckCall::data_of(b.gate),
          BottleneckCall::data_of(b.scale),
          BottleneckCall::data_of(b.up_bias),
          b.per_channel,
          b.a.scaling,
          BottleneckCall::scale_of(b.keep_inside),
          b.keep_output};
}

void run_shrink(const BottleneckCall& b, int splits, const Tensor& parts) {
  const CudaCall& call = b.call;
  const lora_linear::Shrink shrink{b.x.data(),
                                   b.x.stride,
                                   b.M,
                                   b.K,
                                   static_cast<float*>(parts.mutable_data_ptr()),
                                   b.E,
                                   splits,
                                   nullptr,
                                   BottleneckCall::adapter_of(b.A().const_data_ptr(), b.E, 1)};
  call.launched("shrink", lora_linear::shrink(call.type, call.factors, shrink, b.stream()));
}

// Writes h and returns u = drop(f(h)) without the dropout's scale.
Tensor run_down(const BottleneckCall& b, const Tensor& h) {
  const CudaCall& call = b.call;
  const bool tensor_cores = call.tensor_cores && !b.has_norm;
  const int splits =
      tensor_cores ? lora_linear::shrink_splits(b.M, b.K, b.E) : lora_linear::product_splits(b.M, b.E, b.K);
  const Tensor parts = splits > 1 ? call.scratch({splits, b.M, b.E}) : h;
  if (tensor_cores) {
    run_shrink(b, splits, parts);
  } else {
    OptionalTensor normed;
    if (b.has_norm) normed = b.normalized(true, std::nullopt);
    b.multiply_parts(b.M, b.E, b.K, normed ? b.accumulated(*normed, b.K) : b.x_rows(),
                     transposed(by_rows(b.A().const_data_ptr(), call.factors, b.K)), 1, splits,
                     parts.mutable_data_ptr(), b.E);
  }
  const Tensor u = call.scratch({b.M, b.E});
  const Activate activate{parts.const_data_ptr(),
                          splits,
                          BottleneckCall::data_of(b.down_bias),
                          nullptr,
                          h.mutable_data_ptr(),
                          u.mutable_data_ptr(),
                          b.M,
                          b.E,
                          b.E,
                          b.activation,
                          b.keep_inside,
                          b.seed};
  call.launched("activate", bottleneck_adapter::activate(call.factors, activate, b.stream()));
  return u;
}

// y = residual + scaling gate scale drop(u B^T + bias).
void run_up(const BottleneckCall& b, const Tensor& u, const Rows& residual, const Tensor& y) {
  const CudaCall& call = b.call;
  const Gated gated = gated_of(b);
  if (call.tensor_cores) {
    const lora_linear::Expand expand{y.mutable_data_ptr(),
                                     b.M,
                                     b.N,
                                     static_cast<const float*>(u.const_data_ptr()),
                                     b.E,
                                     nullptr,
                                     false,
                                     false,
                                     b.seed,
                                     BottleneckCall::adapter_of(b.B().const_data_ptr(), b.E, 1),
                                     residual.data(),
                                     residual.stride,
                                     true,
                                     gated};
    return call.launched("expand", lora_linear::expand(call.type, call.factors, expand, b.stream()));
  }
  const Tensor sum = call.type == call.accumulator() ? y : call.scratch({b.M, b.N});
  call.multiply_onto(call.product_of(b.M, b.N, b.E, b.accumulated(u, b.E),
                                     transposed(by_rows(b.B().const_data_ptr(), call.factors, b.E)), call.adapters[0],
                                     1, Masked::kNone),
                     sum, false);
  const bottleneck_adapter::Finish finish{
      sum.const_data_ptr(), residual.data(), residual.stride, y.mutable_data_ptr(), b.M, b.N, gated, b.seed};
  call.launched("finish", bottleneck_adapter::finish(call.type, call.factors, finish, b.stream()));
}

// Everything as one launch takes it; with parts of x A^T, as the second of two does.
bottleneck_adapter::Fused fused_of(const BottleneckCall& b, const Rows& residual, const Tensor& y, const Tensor& h,
                                   const OptionalTensor& parts, int splits) {
  return {b.x.data(),
          b.x.stride,
          b.M,
          b.K,
          b.A().const_data_ptr(),
          BottleneckCall::data_of(b.down_bias),
          b.E,
          b.B().const_data_ptr(),
          b.N,
          residual.data(),
          residual.stride,
          static_cast<float*>(h.mutable_data_ptr()),
          y.mutable_data_ptr(),
          b.activation,
          b.keep_inside,
          gated_of(b),
          b.seed,
          parts ? static_cast<const float*>(parts->const_data_ptr()) : nullptr,
          splits};
}

void run_fused(const BottleneckCall& b, const bottleneck_adapter::Fused& fused) {
  b.call.launched("fused", bottleneck_adapter::fused(b.call.type, fused, b.stream()));
}

// Whether one launch for few rows did it all.
bool run_few_rows(const BottleneckCall& b, const bottleneck_adapter::Fused& fused) {
  if (!sm90_wanted(b.call.on)) return false;
  if (!bottleneck_adapter::has_few_rows_cluster_kernel(b.call.type, b.call.factors, fused)) return false;
  b.call.launched("few_rows_cluster", bottleneck_adapter::few_rows_cluster(b.call.type, fused, b.stream()));
  return true;
}

std::tuple<Tensor, Tensor> forward(const BottleneckArguments& a) {
  const BottleneckCall b("bottleneck_adapter", a);
  const Tensor y = empty_rows(a.x, b.N, dtype_code(a.x)), h = b.call.scratch({b.M, b.E});
  if (b.M == 0) return {y, h};
  const Rows onto = a.residual ? as_rows(*a.residual) : b.x;
  if (!b.has_norm && bottleneck_adapter::has_fused_kernel(b.call.type, b.call.factors, b.M, b.E)) {
    run_fused(b, fused_of(b, onto, y, h, std::nullopt, 0));
    return {y, h};
  }
  if (!b.has_norm && bottleneck_adapter::has_few_rows_kernel(b.call.type, b.call.factors, b.M, b.N, b.E)) {
    if (run_few_rows(b, fused_of(b, onto, y, h, std::nullopt, 0))) return {y, h};
    const int splits = lora_linear::shrink_splits(b.M, b.K, b.E);
    const Tensor parts = b.call.scratch({splits, b.M, b.E});
    run_shrink(b, splits, parts);
    run_fused(b, fused_of(b, onto, y, h, parts, splits));
    return {y, h};
  }
  const Tensor u = run_down(b, h);
  run_up(b, u, onto, y);
  return {y, h};
}

}  // namespace

void bind_bottleneck_adapter_cuda(torch::stable::detail::StableLibrary& library) {
  library.impl("bottleneck_adapter", TORCH_BOX(&call_bottleneck<forward>));
  library.impl("bottleneck_adapter_backward", TORCH_BOX(&call_bottleneck_backward<bottleneck_adapter_backward_cuda>));
}

}  // namespace pk
