// What the kernels of dora_norm, dora_scale and dora_scale_backward need to be safe, in the words of the checks in
// peft_kernels/ops/lora_linear/dora.py; and the memory of the gradients.
#pragma once

#include <cmath>
#include <string>

#include "bindings/checks.h"

namespace pk {

class DoraCheck : protected TensorCheck {
 protected:
  DoraCheck(const char* op, const char* first, const Tensor& argument)
      : TensorCheck(op, first, argument), first_name_(first), type_(dtype_of(dtype_code(argument))) {
    if (!type_) {
      refuse(first, " must have dtype float32, float16, bfloat16 or float64, got ", name_of(dtype_code(argument)));
    }
  }

  // A tensor of the adapter's own.
  void factor(const char* name, const Tensor& t) const {
    const std::optional<Dtype> type = dtype_of(dtype_code(t));
    const bool wide = *type_ == Dtype::kFloat64;
    if (!type || (*type == Dtype::kFloat64) != wide) {
      const std::string rule = wide ? std::string("float64, as ") + first_name_ : "float32, float16 or bfloat16";
      refuse(name, " must have dtype ", rule, ", got ", name_of(dtype_code(t)));
    }
    on_device(name, t);
  }

 private:
  const char* const first_name_;
  const std::optional<Dtype> type_;
};

class DoraNormCheck : DoraCheck {
 public:
  explicit DoraNormCheck(const Tensor& weight) : DoraCheck("dora_norm", "weight", weight), weight_(weight) {}

  void run(const Tensor& lora_A, const Tensor& lora_B, double scaling) const {
    if (weight_.dim() != 2 || weight_.size(0) < 1 || weight_.size(1) < 1) {
      refuse("weight must have shape [out_features, in_features], got ", shape_of(weight_));
    }
    const int64_t N = weight_.size(0), K = weight_.size(1);
    factor("lora_A", lora_A);
    if (lora_A.dim() != 2 || lora_A.size(1) != K) {
      refuse("lora_A must have shape [r, in_features=", K, "], got ", shape_of(lora_A));
    }
    const int64_t r = lora_A.size(0);
    if (r < 1 || r > kMaxRank) refuse("lora_A must have a rank r from 1 to ", kMaxRank, ", got ", r);
    tensor("lora_B", lora_B, dtype_code(lora_A), ", as lora_A");
    if (lora_B.dim() != 2 || lora_B.size(0) != N || lora_B.size(1) != r) {
      refuse("lora_B must have shape [out_features=", N, ", r=", r, "], got ", shape_of(lora_B));
    }
    if (!std::isfinite(scaling)) refuse("scaling must be finite, got ", scaling);
  }

 private:
  static constexpr int64_t kMaxRank = 512;

  const Tensor& weight_;
};

class DoraScaleCheck : DoraCheck {
 public:
  // name: what the op calls z, which is dy in the backward.
  DoraScaleCheck(const char* op, const char* name, const Tensor& z) : DoraCheck(op, name, z), name_(name), z_(z) {}

  void forward(const Tensor& magnitude, const Tensor& norm, const OptionalTensor& bias, const OptionalTensor& residual,
               const OptionalTensor& ids) const {
    gains(magnitude, norm, ids);
    const int64_t N = features();
    if (bias) {
      tensor("bias", *bias, dtype_code(z_), ", as z");
      if (bias->dim() != 1 || bias->size(0) != N) {
        refuse("bias must have shape [out_features=", N, "], got ", shape_of(*bias));
      }
    }
    if (residual) like("residual", *residual);
  }

  void backward(const OptionalTensor& z, const OptionalTensor& magnitude, const Tensor& norm, const OptionalTensor& ids,
                const std::vector<bool>& needs) const {
    if (needs.size() != kGradients) refuse("needs must have ", kGradients, " entries, got ", needs.size());
    gains(magnitude, norm, ids);
    if (!magnitude && (needs[0] || needs[1])) refuse("magnitude must be given for gradients of z or magnitude");
    if (!z && needs[1]) refuse("z must be given for the gradient of magnitude");
    if (z) like("z", *z);
  }

  // The numbers in ids, which are on the CPU.
  void in_range(const Tensor& ids, int64_t adapters) const {
    const int32_t* const numbers = static_cast<const int32_t*>(ids.const_data_ptr());
    const int64_t M = ids.numel();
    int64_t outside = 0, first = 0;
    for (int64_t m = M; m-- > 0;) {
      if (numbers[m] >= -1 && numbers[m] < adapters) continue;
      first = numbers[m];
      ++outside;
    }
    if (outside > 0) {
      refuse("ids must be -1 or lie in [0, ", adapters, "), got ", first, " (", outside, " of ", M, " rows)");
    }
  }

 private:
  static constexpr size_t kGradients = 3;

  int64_t features() const { return z_.size(z_.dim() - 1); }

  void like(const char* name, const Tensor& t) const {
    tensor(name, t, dtype_code(z_), (std::string(", as ") + name_).c_str());
    bool same = t.dim() == z_.dim();
    for (int64_t i = 0; same && i < t.dim(); ++i) same = t.size(i) == z_.size(i);
    if (!same) refuse(name, " must have shape ", shape_of(z_), ", as ", name_, ", got ", shape_of(t));
  }

  void row_ids(const Tensor& ids) const {
    tensor("ids", ids, aoti_torch_dtype_int32(), "");
    const int64_t dims = z_.dim() - 1, M = z_.numel() / features();
    bool fits = ids.dim() == dims;
    for (int64_t i = 0; fits && i < dims; ++i) fits = ids.size(i) == z_.size(i);
    fits = fits || (ids.dim() == 1 && ids.size(0) == M);
    if (!fits) {
      refuse("ids must have shape ", shape_of(z_, 1), ", as ", name_, " without its features, or [", M, "], got ",
             shape_of(ids));
    }
  }

  void gains(const OptionalTensor& magnitude, const Tensor& norm, const OptionalTensor& ids) const {
    if (z_.dim() < 1) refuse(name_, " must have shape [..., out_features], got a 0-d tensor");
    const int64_t N = features();
    if (N < 1) refuse(name_, " must have at least one feature, got shape ", shape_of(z_));
    tensor("norm", norm, accumulator_code(z_), ", as dora_norm returns it");
    if (!ids && (norm.dim() != 1 || norm.size(0) != N)) {
      refuse("norm must have shape [out_features=", N, "], got ", shape_of(norm));
    }
    if (ids) {
      row_ids(*ids);
      if (norm.dim() != 2 || norm.size(0) < 1 || norm.size(1) != N) {
        refuse("norm must have shape [adapters, out_features=", N, "] beside ids, got ", shape_of(norm));
      }
    }
    if (!magnitude) return;
    factor("magnitude", *magnitude);
    bool same = magnitude->dim() == norm.dim();
    for (int64_t i = 0; same && i < norm.dim(); ++i) same = magnitude->size(i) == norm.size(i);
    if (!same) refuse("magnitude must have shape ", shape_of(norm), ", as norm, got ", shape_of(*magnitude));
  }

  const char* const name_;
  const Tensor& z_;
};

// Uninitialised gradients of z, magnitude and bias; empty ones where `needs` says no.
inline std::vector<Tensor> new_dora_gradients(const Tensor& dy, const OptionalTensor& magnitude, const Tensor& norm,
                                              const std::vector<bool>& needs) {
  const Device device = device_of(dy);
  const int32_t type = dtype_code(dy), factors = dtype_code(magnitude ? *magnitude : norm);
  const int64_t N = dy.size(dy.dim() - 1);
  std::vector<Tensor> gradients;
  gradients.push_back(needs[0] ? empty_rows(dy, N, type) : empty({0}, type, device));
  gradients.push_back(needs[1] ? empty_rows(norm, N, factors) : empty({0}, factors, device));
  gradients.push_back(needs[2] ? empty({N}, type, device) : empty({0}, type, device));
  return gradients;
}

}  // namespace pk
