// What the checks of several ops say in the same words: of a dtype, a shape, a device, a seed.
#pragma once

#include <optional>
#include <string>

#include "bindings/tensors.h"
#include "common/dtype.h"

namespace pk {

// The dtypes of the ops; nullopt for all others.
inline std::optional<Dtype> dtype_of(int32_t code) {
  if (code == aoti_torch_dtype_float32()) return Dtype::kFloat32;
  if (code == aoti_torch_dtype_bfloat16()) return Dtype::kBFloat16;
  if (code == aoti_torch_dtype_float16()) return Dtype::kFloat16;
  if (code == aoti_torch_dtype_float64()) return Dtype::kFloat64;
  return std::nullopt;
}

// The dtype of what is summed over a tensor's values.
inline int32_t accumulator_code(const Tensor& tensor) {
  const bool wide = dtype_of(dtype_code(tensor)) == Dtype::kFloat64;
  return wide ? aoti_torch_dtype_float64() : aoti_torch_dtype_float32();
}

inline const char* name_of(int32_t code) {
  static const char* const names[] = {"float32", "float16", "bfloat16", "float64"};
  const std::optional<Dtype> dtype = dtype_of(code);
  if (dtype) return names[static_cast<int>(*dtype)];
  if (code == aoti_torch_dtype_int32()) return "int32";
  if (code == aoti_torch_dtype_int64()) return "int64";
  if (code == aoti_torch_dtype_uint8()) return "uint8";
  return code == aoti_torch_dtype_bool() ? "bool" : "another";
}

// The shape without its `less` last sizes.
inline std::string shape_of(const Tensor& tensor, int64_t less = 0) {
  std::string text = "[";
  for (int64_t i = 0; i < tensor.dim() - less; ++i) text += (i ? ", " : "") + std::to_string(tensor.size(i));
  return text + "]";
}

// The rules for single tensors, on the device of the op's first argument.
class TensorCheck {
 public:
  // `as` is empty, or ", as " and whose dtype it is.
  void tensor(const char* name, const Tensor& t, int32_t dtype, const char* as) const {
    if (dtype_code(t) != dtype) {
      refuse(name, " must have dtype ", name_of(dtype), as, ", got ", name_of(dtype_code(t)));
    }
    on_device(name, t);
  }

 protected:
  TensorCheck(const char* op, const char* first, const Tensor& argument)
      : op_(op), first_(first), device_(device_of(argument)) {}

  // Words that cost something are made only where the rule is broken.
  template <class... Parts>
  void refuse(const Parts&... parts) const {
    STD_TORCH_CHECK(false, op_, ": ", parts...);
  }

  void on_device(const char* name, const Tensor& t) const {
    const Device device = device_of(t);
    if (!(device == device_)) {
      refuse(name, " must be on ", first_, "'s device ", words_of(device_), ", got ", words_of(device));
    }
  }

  void dropout(double p, const OptionalTensor& seed) const {
    if (!(0 <= p && p < 1)) refuse("dropout_p must lie in [0, 1), got ", p);
    if (!seed && p != 0) {
      refuse("seed must be given where dropout_p > 0; peft_kernels.new_seed(x.device) makes one");
    }
    if (!seed) return;
    tensor("seed", *seed, aoti_torch_dtype_int64(), "");
    if (seed->dim() != 0) refuse("seed must be a 0-d tensor, got shape ", shape_of(*seed));
  }

  const char *const op_, *const first_;

 private:
  const Device device_;
};

}  // namespace pk
