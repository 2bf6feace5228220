// gated_product on a GPU: check, allocate, one launch. Nothing here waits for the device or reads from it.
#include "lora_linear/gated_product_cuda.h"

#include "bindings/cuda_device.h"
#include "bindings/gated_product_check.h"
#include "bindings/lora_linear.h"

namespace pk {
namespace {

void launched(const char* op, const Tensor& tensor, cudaError_t error) {
  STD_TORCH_CHECK(error == cudaSuccess, op, ": the kernel could not be launched on device ", device_of(tensor).index,
                  ": ", words_of(error));
}

Tensor forward(const Tensor& gate, const Tensor& up, const std::string& activation) {
  const GatedProductCheck check("gated_product", gate);
  check.like_gate("up", up);
  const int number = check.number_of(activation);
  const OnDevice on(device_of(gate));
  const Tensor g = dense(gate), u = dense(up), y = result_like(gate);
  if (gate.numel() == 0) return y;
  const gated_product::Product call{gate.numel(), g.const_data_ptr(), u.const_data_ptr(), y.mutable_data_ptr(), number};
  launched("gated_product", gate, gated_product::product(*dtype_of(dtype_code(gate)), call, on.stream()));
  return y;
}

std::tuple<Tensor, Tensor> backward(const Tensor& dy, const Tensor& gate, const Tensor& up,
                                    const std::string& activation) {
  const GatedProductCheck check("gated_product_backward", gate);
  check.like_gate("up", up);
  check.like_gate("dy", dy);
  const int number = check.number_of(activation);
  const OnDevice on(device_of(gate));
  const Tensor g = dense(gate), u = dense(up), d = dense(dy), dgate = result_like(gate), dup = result_like(gate);
  if (gate.numel() == 0) return {dgate, dup};
  const gated_product::Gradients call{gate.numel(),
                                      d.const_data_ptr(),
                                      g.const_data_ptr(),
                                      u.const_data_ptr(),
                                      dgate.mutable_data_ptr(),
                                      dup.mutable_data_ptr(),
                                      number};
  launched("gated_product_backward", gate, gated_product::gradients(*dtype_of(dtype_code(gate)), call, on.stream()));
  return {dgate, dup};
}

}  // namespace

void bind_gated_product_cuda(torch::stable::detail::StableLibrary& library) {
  library.impl("gated_product", TORCH_BOX(&forward));
  library.impl("gated_product_backward", TORCH_BOX(&backward));
}

}  // namespace pk
