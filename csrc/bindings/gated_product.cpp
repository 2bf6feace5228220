// gated_product for CPU tensors: check, allocate, run the kernel over units of fixed size.
#include "lora_linear/gated_product.h"

#include "bindings/gated_product_check.h"
#include "bindings/lora_linear.h"

namespace pk {
namespace {

using gated_product::Phase;
using gated_product::Problem;

void run(const Problem& p, Phase phase, Phase of_double) {
  const Phase chosen = p.type == Dtype::kFloat64 ? of_double : phase;
  parallel(gated_product::units(p.n), p.n * gated_product::kCost,
           [&](int64_t begin, int64_t end) { chosen(p, begin, end); });
}

Tensor forward(const Tensor& gate, const Tensor& up, const std::string& activation) {
  const GatedProductCheck check("gated_product", gate);
  check.like_gate("up", up);
  const Tensor g = dense(gate), u = dense(up), y = result_like(gate);
  const Problem p{gate.numel(),       *dtype_of(dtype_code(gate)), check.number_of(activation),
                  g.const_data_ptr(), u.const_data_ptr(),          y.mutable_data_ptr()};
  run(p, gated_product::table().forward, gated_product::forward_double);
  return y;
}

std::tuple<Tensor, Tensor> backward(const Tensor& dy, const Tensor& gate, const Tensor& up,
                                    const std::string& activation) {
  const GatedProductCheck check("gated_product_backward", gate);
  check.like_gate("up", up);
  check.like_gate("dy", dy);
  const Tensor g = dense(gate), u = dense(up), d = dense(dy), dgate = result_like(gate), dup = result_like(gate);
  const Problem p{gate.numel(),       *dtype_of(dtype_code(gate)), check.number_of(activation),
                  g.const_data_ptr(), u.const_data_ptr(),          nullptr,
                  d.const_data_ptr(), dgate.mutable_data_ptr(),    dup.mutable_data_ptr()};
  run(p, gated_product::table().backward, gated_product::backward_double);
  return {dgate, dup};
}

}  // namespace

void bind_gated_product_cpu(torch::stable::detail::StableLibrary& library) {
  library.impl("gated_product", TORCH_BOX(&forward));
  library.impl("gated_product_backward", TORCH_BOX(&backward));
}

}  // namespace pk
