// What the kernels of gated_product need to be safe, in the words of `check` in
// peft_kernels/ops/lora_linear/gated.py.
#pragma once

#include "bindings/checks.h"
#include "common/activation.h"

namespace pk {

class GatedProductCheck : TensorCheck {
 public:
  GatedProductCheck(const char* op, const Tensor& gate) : TensorCheck(op, "gate", gate), gate_(gate) {
    const int32_t dtype = dtype_code(gate);
    if (!dtype_of(dtype)) {
      refuse("gate must have dtype float32, float16, bfloat16 or float64, got ", name_of(dtype));
    }
  }

  void like_gate(const char* name, const Tensor& t) const {
    tensor(name, t, dtype_code(gate_), ", as gate");
    const auto sizes = gate_.sizes(), own = t.sizes();
    bool same = sizes.size() == own.size();
    for (size_t i = 0; same && i < sizes.size(); ++i) same = sizes[i] == own[i];
    if (!same) refuse(name, " must have gate's shape ", shape_of(gate_), ", got ", shape_of(t));
  }

  // The activation's number in common/activation.h.
  int number_of(const std::string& activation) const {
    if (activation == "silu") return kSilu;
    if (activation == "gelu") return kGelu;
    if (activation == "gelu_tanh") return kGeluTanh;
    if (activation != "relu") refuse("activation must be one of silu, gelu, gelu_tanh, relu, got '", activation, "'");
    return kRelu;
  }

 private:
  const Tensor& gate_;
};

// Uninitialised and contiguous.
inline Tensor result_like(const Tensor& tensor) {
  const auto sizes = tensor.sizes();
  return empty(sizes.data(), static_cast<int64_t>(sizes.size()), dtype_code(tensor), device_of(tensor));
}

}  // namespace pk
