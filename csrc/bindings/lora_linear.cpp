// lora_linear for CPU tensors: check, allocate, fill the Problem, run its phases; the base product of many rows is
// torch's own GEMM, called in place.
#include "bindings/lora_linear.h"

#include <algorithm>
#include <tuple>

#include "bindings/lora_linear_call.h"
#include "bindings/lora_linear_gradients.h"

namespace pk {
namespace {

using lora_linear::Adapter;
using lora_linear::Kernels;
using lora_linear::Member;
using lora_linear::Problem;

int64_t sum_of_N(const Problem& p) {
  int64_t sum = 0;
  for (int64_t g = 0; g < p.G; ++g) sum += p.member[g].N;
  return sum;
}

std::tuple<std::vector<Tensor>, Tensor> forward(const Tensor& x, const std::vector<Tensor>& weight,
                                                const std::vector<OptionalTensor>& bias,
                                                const std::vector<Tensor>& lora_A, const std::vector<Tensor>& lora_B,
                                                const std::vector<OptionalTensor>& lora_bias,
                                                const std::vector<int64_t>& member, const std::vector<double>& scaling,
                                                const std::vector<double>& dropout_p, const OptionalTensor& seed) {
  LoraLinearCheck({x, weight, bias, lora_A, lora_B, lora_bias, member, scaling, dropout_p, seed}).run();
  LoraLinearCall call(weight, lora_A, lora_B, member, scaling, dropout_p, seed);
  Problem& p = call.problem;
  const Rows rows = as_rows(x);
  call.set_rows(rows.count);
  call.set_x(rows);
  const Tensor h = empty({p.M, p.R}, call.accumulator());
  p.h = h.mutable_data_ptr();
  std::vector<Tensor> y;
  y.reserve(weight.size());
  for (size_t g = 0; g < weight.size(); ++g) {
    y.push_back(empty_rows(x, call.members[g].N, dtype_code(x)));
    call.members[g].y = y[g].mutable_data_ptr();
    if (bias[g]) call.members[g].bias = call.vector(*bias[g]);
  }
  for (size_t l = 0; l < lora_bias.size(); ++l) {
    if (lora_bias[l]) call.adapters[l].bias = call.factor(*lora_bias[l]);
  }
  if (p.M == 0) return {y, h};
  if (call.is_double()) {
    lora_linear::forward_double(p);
    return {y, h};
  }
  p.scratch = call.scratch(lora_linear::member_scratch(p));
  call.make_slices(true);
  const int64_t outputs = p.M * sum_of_N(p), base = p.base ? outputs * p.K : 0;
  const int64_t slices = lora_linear::stream_y_units(p);
  call.run(call.kernels->shrink, lora_linear::row_units(p.M) * p.L, p.M * p.K * p.R);
  call.run(call.kernels->stream_y, slices, base);
  call.run(call.kernels->expand, lora_linear::member_units(p), outputs * p.R + (slices ? slices * outputs : base));
  for (size_t g = 0; !p.base && g < weight.size(); ++g) {
    const Member& m = call.members[g];
    gemm(matrix(y[g], p.M, m.N, m.N, 1), matrix(rows.tensor, p.M, p.K, p.x_stride, 1),
         matrix(weight[g], p.K, m.N, m.weight_k, m.weight_n), m.R > 0 || m.bias);
  }
  return {y, h};
}

// The pass over dy, a panel of rows at a time: the parts of ds need room for one panel only.
void run_dy_panels(LoraLinearCall& call, int64_t N) {
  Problem& p = call.problem;
  const int64_t parts = lora_linear::ds_parts(p), panel = parts > 1 ? lora_linear::kPanelRows : p.M;
  p.ds_part = p.ds && parts > 1 ? p.ds + p.M * p.R : p.ds;
  for (p.panel0 = 0; p.panel0 < p.M; p.panel0 = p.panel1) {
    p.panel1 = std::min(p.M, p.panel0 + panel);
    const int64_t rows = p.panel1 - p.panel0;
    call.run(call.kernels->dy_pass, lora_linear::member_units(p), 2 * N * rows * p.R);
    if (p.ds_part != p.ds) call.run(call.kernels->sum_ds, lora_linear::row_units(rows), parts * rows * p.R);
  }
}

}  // namespace

void run_lora_linear_backward(LoraLinearCall& call) {
  Problem& p = call.problem;
  bool reads_dy = false, any_dA = false;
  for (const Member& m : call.members) reads_dy = reads_dy || m.dbias;
  for (const Adapter& adapter : call.adapters) {
    reads_dy = reads_dy || adapter.dB || adapter.dbias;
    any_dA = any_dA || adapter.dA;
  }
  const bool reads_x = p.dx || any_dA;
  const int64_t sums = std::max(lora_linear::member_scratch(p), lora_linear::x_pass_scratch(p));
  p.scratch = call.scratch(sums + (reads_x ? lora_linear::ds_scratch(p) : 0));
  if (reads_x) p.ds = p.scratch + sums;

  const Kernels& kernels = *call.kernels;
  const int64_t N = sum_of_N(p), low_rank = p.M * p.R;
  if (reads_x || reads_dy) run_dy_panels(call, N);
  if (!reads_x) return;
  if (p.dx) call.make_slices(false);
  const int64_t base = p.base && p.dx ? p.M * N * p.K : 0;
  const int64_t slices = lora_linear::stream_dx_units(p);
  call.run(kernels.stream_dx, slices, base);
  call.run(kernels.x_pass, lora_linear::blocks(p.K), 2 * p.K * low_rank + (slices ? slices * p.M * p.K : base));
}

namespace {

std::vector<Tensor> backward(const std::vector<Tensor>& dy, const OptionalTensor& x, const OptionalTensor& h,
                             const std::vector<Tensor>& weight, const std::vector<Tensor>& lora_A,
                             const std::vector<Tensor>& lora_B, const std::vector<int64_t>& member,
                             const std::vector<double>& scaling, const std::vector<double>& dropout_p,
                             const OptionalTensor& seed, const std::vector<bool>& needs) {
  check_backward(dy, x, h, weight, lora_A, lora_B, member, scaling, dropout_p, seed, needs);
  LoraLinearCall call(weight, lora_A, lora_B, member, scaling, dropout_p, seed);
  const std::vector<Tensor> gradients = new_gradients(dy, weight, lora_A, lora_B, needs);
  const size_t G = weight.size();
  Problem& p = call.problem;
  std::vector<Rows> dy_rows;
  dy_rows.reserve(G);
  for (size_t g = 0; g < G; ++g) {
    dy_rows.push_back(as_rows(dy[g]));
    call.members[g].dy = dy_rows[g].data();
    call.members[g].dy_stride = dy_rows[g].stride;
  }
  call.set_rows(dy_rows[0].count);
  if (p.M == 0) {
    for (Tensor gradient : gradients) torch::stable::zero_(gradient);
    return gradients;
  }
  std::optional<Rows> x_rows;
  if (x) call.set_x(x_rows.emplace(as_rows(*x)));
  if (h) p.h = const_cast<void*>(h->const_data_ptr());  // read only
  const GradientOrder at{G, lora_A.size()};
  set_outputs(call, at, gradients, needs);
  if (call.is_double()) {
    lora_linear::backward_double(p);
  } else {
    run_lora_linear_backward(call);
  }
  for (size_t g = 0; g < G; ++g) {
    const Member& m = call.members[g];
    const Tensor dy_g = matrix(dy_rows[g].tensor, p.M, m.N, m.dy_stride, 1);
    if (p.dx && !p.base) {
      gemm(matrix(gradients[0], p.M, p.K, p.K, 1), dy_g, matrix(weight[g], m.N, p.K, m.weight_n, m.weight_k), true);
    }
    if (needs[at.weight(g)]) {
      gemm(gradients[at.weight(g)], matrix(dy_rows[g].tensor, m.N, p.M, 1, m.dy_stride),
           matrix(x_rows->tensor, p.M, p.K, p.x_stride, 1), false);
    }
  }
  call.finish();
  return gradients;
}

Tensor dropout_mask(const Tensor& seed, int64_t rows, int64_t cols, double p, int64_t stream) {
  check_dropout_mask(seed, rows, cols, p);
  const Tensor mask = empty({rows, cols}, aoti_torch_dtype_bool());
  const uint64_t key = *static_cast<const uint64_t*>(seed.const_data_ptr());
  lora_linear::table().mask(static_cast<uint8_t*>(mask.mutable_data_ptr()), rows, cols,
                            make_dropout(p, key, static_cast<uint32_t>(stream)));
  return mask;
}

}  // namespace

void bind_lora_linear_cpu(torch::stable::detail::StableLibrary& library) {
  library.impl("lora_linear", TORCH_BOX(&forward));
  library.impl("lora_linear_backward", TORCH_BOX(&backward));
  library.impl("lora_dropout_mask", TORCH_BOX(&dropout_mask));
}

}  // namespace pk
