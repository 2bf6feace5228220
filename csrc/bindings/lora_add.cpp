// lora_add for CPU tensors: lora_linear's phases on one member that has a residual and no weight, and no GEMM.
#include <tuple>

#include "bindings/lora_add_check.h"
#include "bindings/lora_linear.h"
#include "bindings/lora_linear_call.h"
#include "bindings/lora_linear_gradients.h"

namespace pk {
namespace {

// Writes y, which may be the residual, and returns h.
Tensor add(const Tensor& y, const Tensor& residual, const Tensor& x, const std::vector<Tensor>& lora_A,
           const std::vector<Tensor>& lora_B, const std::vector<OptionalTensor>& lora_bias,
           const std::vector<double>& scaling, const std::vector<double>& dropout_p, const OptionalTensor& seed) {
  LoraLinearCall call(x, lora_A, lora_B, scaling, dropout_p, seed);
  lora_linear::Problem& p = call.problem;
  lora_linear::Member& member = call.members[0];
  const Rows x_rows = as_rows(x), residual_rows = as_rows(residual);
  call.set_rows(x_rows.count);
  call.set_x(x_rows);
  member.residual = residual_rows.data();
  member.residual_stride = residual_rows.stride;
  member.y = y.mutable_data_ptr();
  for (size_t l = 0; l < lora_bias.size(); ++l) {
    if (lora_bias[l]) call.adapters[l].bias = call.factor(*lora_bias[l]);
  }
  const Tensor h = empty({p.M, p.R}, call.accumulator());
  p.h = h.mutable_data_ptr();
  if (p.M == 0) return h;
  if (call.is_double()) {
    lora_linear::forward_double(p);
    return h;
  }
  p.scratch = call.scratch(lora_linear::member_scratch(p));
  call.run(call.kernels->shrink, lora_linear::row_units(p.M) * p.L, p.M * p.K * p.R);
  call.run(call.kernels->expand, lora_linear::member_units(p), p.M * member.N * p.R);
  return h;
}

std::tuple<Tensor, Tensor> forward(const Tensor& residual, const Tensor& x, const std::vector<Tensor>& lora_A,
                                   const std::vector<Tensor>& lora_B, const std::vector<OptionalTensor>& lora_bias,
                                   const std::vector<double>& scaling, const std::vector<double>& dropout_p,
                                   const OptionalTensor& seed) {
  check_add(residual, x, lora_A, lora_B, lora_bias, scaling, dropout_p, seed);
  const Tensor y = empty_rows(residual, residual.size(residual.dim() - 1), dtype_code(residual));
  return {y, add(y, residual, x, lora_A, lora_B, lora_bias, scaling, dropout_p, seed)};
}

void forward_(const Tensor& residual, const Tensor& x, const std::vector<Tensor>& lora_A,
              const std::vector<Tensor>& lora_B, const std::vector<OptionalTensor>& lora_bias,
              const std::vector<double>& scaling, const std::vector<double>& dropout_p, const OptionalTensor& seed) {
  check_add_in_place(residual, x, lora_A, lora_B, lora_bias, scaling, dropout_p, seed);
  add(residual, residual, x, lora_A, lora_B, lora_bias, scaling, dropout_p, seed);
}

std::vector<Tensor> backward(const Tensor& dy, const OptionalTensor& x, const OptionalTensor& h,
                             const std::vector<Tensor>& lora_A, const std::vector<Tensor>& lora_B,
                             const std::vector<double>& scaling, const std::vector<double>& dropout_p,
                             const OptionalTensor& seed, const std::vector<bool>& needs) {
  check_add_backward(dy, x, h, lora_A, lora_B, scaling, dropout_p, seed, needs);
  LoraLinearCall call(dy, lora_A, lora_B, scaling, dropout_p, seed);
  const std::vector<Tensor> gradients = new_gradients({dy}, {}, lora_A, lora_B, needs);
  const Rows dy_rows = as_rows(dy);
  call.members[0].dy = dy_rows.data();
  call.members[0].dy_stride = dy_rows.stride;
  call.set_rows(dy_rows.count);
  if (dy_rows.count == 0) {
    for (Tensor gradient : gradients) torch::stable::zero_(gradient);
    return gradients;
  }
  if (x) call.set_x(as_rows(*x));
  if (h) call.problem.h = const_cast<void*>(h->const_data_ptr());  // read only
  set_outputs(call, {0, lora_A.size()}, gradients, needs);
  if (call.is_double()) {
    lora_linear::backward_double(call.problem);
  } else {
    run_lora_linear_backward(call);
  }
  call.finish();
  return gradients;
}

}  // namespace

void bind_lora_add_cpu(torch::stable::detail::StableLibrary& library) {
  library.impl("lora_add", TORCH_BOX(&forward));
  library.impl("lora_add_", TORCH_BOX(&forward_));
  library.impl("lora_add_backward", TORCH_BOX(&backward));
}

}  // namespace pk
