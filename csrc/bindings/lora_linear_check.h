// What the kernels of lora_linear need to be safe, in the words of `check` in peft_kernels/ops/lora_linear/op.py.
#pragma once

#include <cmath>

#include "bindings/checks.h"

namespace pk {

struct ForwardArguments {
  const Tensor& x;
  const std::vector<Tensor>& weight;
  const std::vector<OptionalTensor>& bias;
  const std::vector<Tensor>& lora_A;
  const std::vector<Tensor>& lora_B;
  const std::vector<OptionalTensor>& lora_bias;
  const std::vector<int64_t>& member;
  const std::vector<double>& scaling;
  const std::vector<double>& dropout_p;
  const OptionalTensor& seed;
  const char* op = "lora_linear";    // what a message begins with
  const Tensor* residual = nullptr;  // lora_add: stands in place of weight and bias, which are empty
};

class LoraLinearCheck {
 public:
  explicit LoraLinearCheck(const ForwardArguments& arguments) : a_(arguments), device_(device_of(arguments.x)) {}

  void run() const {
    base();
    const size_t L = a_.lora_A.size();
    require(L >= 1, "lora_A must name at least one adapter, got none");
    same_length("lora_B", a_.lora_B.size(), L);
    same_length("lora_bias", a_.lora_bias.size(), L);
    same_length("member", a_.member.size(), L);
    same_length("scaling", a_.scaling.size(), L);
    same_length("dropout_p", a_.dropout_p.size(), L);
    for (size_t i = 0; i < L; ++i) adapter(i);
    for (size_t i = 0; i < L; ++i) numbers(i);
  }

 protected:
  static constexpr int64_t kMaxRank = 512;

  template <class... Parts>
  void require(bool condition, const Parts&... parts) const {
    if (!condition) STD_TORCH_CHECK(false, a_.op, ": ", parts...);
  }

  void same_length(const char* name, size_t length, size_t L) const {
    require(length == L, name, " must have one entry per lora_A (", L, "), got ", length);
  }

  // Index and rule are turned into words only where the rule is broken.
  void on_device(const char* name, size_t i, const Tensor& tensor) const {
    const Device device = device_of(tensor);
    if (device == device_) return;
    require(false, name, "[", i, "] must be on x's device ", words_of(device_), ", got ", words_of(device));
  }
  void has_dtype(const char* name, size_t i, const Tensor& tensor, int32_t wanted, const char* as) const {
    const int32_t code = dtype_code(tensor);
    if (code != wanted) {
      require(false, name, "[", i, "] must have dtype ", name_of(wanted), ", as ", as, ", got ", name_of(code));
    }
  }
  static bool is_matrix(const Tensor& tensor, int64_t rows, int64_t cols) {
    return tensor.dim() == 2 && tensor.size(0) == rows && tensor.size(1) == cols;
  }
  static bool is_vector(const Tensor& tensor, int64_t size) { return tensor.dim() == 1 && tensor.size(0) == size; }

  void base() const {
    const int32_t dtype = dtype_code(a_.x);
    if (!dtype_of(dtype)) {
      require(false, "x must have dtype float32, float16, bfloat16 or float64, got ", name_of(dtype));
    }
    require(a_.x.dim() >= 1, "x must have shape [..., in_features], got a 0-d tensor");
    const int64_t K = a_.x.size(a_.x.dim() - 1);
    if (K < 1) require(false, "x must have at least one feature, got shape ", shape_of(a_.x));
    if (a_.residual) return residual(dtype);
    require(!a_.weight.empty(), "weight must name at least one projection, got none");
    require(a_.bias.size() == a_.weight.size(), "bias must have one entry per weight (", a_.weight.size(), "), got ",
            a_.bias.size());
    for (size_t g = 0; g < a_.weight.size(); ++g) {
      const Tensor& w = a_.weight[g];
      on_device("weight", g, w);
      has_dtype("weight", g, w, dtype, "x");
      if (!(w.dim() == 2 && w.size(1) == K && w.size(0) >= 1)) {
        require(false, "weight[", g, "] must have shape [out_features, in_features=", K, "], got ", shape_of(w));
      }
      if (!a_.bias[g]) continue;
      on_device("bias", g, *a_.bias[g]);
      has_dtype("bias", g, *a_.bias[g], dtype, "weight");
      if (!is_vector(*a_.bias[g], w.size(0))) {
        require(false, "bias[", g, "] must have shape [out_features=", w.size(0), "], got ", shape_of(*a_.bias[g]));
      }
    }
  }

  void residual(int32_t x_dtype) const {
    const Tensor& r = *a_.residual;
    const int32_t dtype = dtype_code(r);
    require(dtype == x_dtype, "residual must have dtype ", name_of(x_dtype), ", as x, got ", name_of(dtype));
    const Device device = device_of(r);
    if (!(device == device_)) {
      require(false, "residual must be on x's device ", words_of(device_), ", got ", words_of(device));
    }
    const int64_t dim = a_.x.dim();
    bool fits = r.dim() == dim && r.size(dim - 1) >= 1;
    for (int64_t i = 0; fits && i < dim - 1; ++i) fits = r.size(i) == a_.x.size(i);
    if (!fits) {
      require(false, "residual must have x's leading sizes ", shape_of(a_.x, 1), " and then out_features, got shape ",
              shape_of(r));
    }
  }

  int64_t out_features(int64_t g) const {
    return a_.residual ? a_.residual->size(a_.residual->dim() - 1) : a_.weight[g].size(0);
  }

  void adapter(size_t i) const {
    const Tensor &A = a_.lora_A[i], &B = a_.lora_B[i];
    const int64_t G = a_.residual ? 1 : static_cast<int64_t>(a_.weight.size()), g = a_.member[i];
    require(0 <= g && g < G, "member[", i, "] must lie in [0, ", G, "), got ", g);
    on_device("lora_A", i, A);
    const int32_t dtype = dtype_code(a_.lora_A[0]);
    const bool x_is_double = dtype_of(dtype_code(a_.x)) == Dtype::kFloat64;
    const std::optional<Dtype> factor = dtype_of(dtype);
    if (!factor || (*factor == Dtype::kFloat64) != x_is_double) {
      const char* rule = x_is_double ? "float64, as x" : "float32, float16 or bfloat16";
      require(false, "lora_A[0] must have dtype ", rule, ", got ", name_of(dtype));
    }
    has_dtype("lora_A", i, A, dtype, "lora_A[0]");
    const int64_t K = a_.x.size(a_.x.dim() - 1), N = out_features(g);
    if (!(A.dim() == 2 && A.size(1) == K)) {
      require(false, "lora_A[", i, "] must have shape [r, in_features=", K, "], got ", shape_of(A));
    }
    const int64_t r = A.size(0);
    require(1 <= r && r <= kMaxRank, "lora_A[", i, "] must have a rank r from 1 to ", kMaxRank, ", got ", r);
    on_device("lora_B", i, B);
    has_dtype("lora_B", i, B, dtype, "lora_A[0]");
    if (!is_matrix(B, N, r)) {
      require(false, "lora_B[", i, "] must have shape [out_features=", N, ", r=", r, "], got ", shape_of(B));
    }
    if (!a_.lora_bias[i]) return;
    const Tensor& bias = *a_.lora_bias[i];
    on_device("lora_bias", i, bias);
    has_dtype("lora_bias", i, bias, dtype, "lora_A[0]");
    if (!is_vector(bias, N)) {
      require(false, "lora_bias[", i, "] must have shape [out_features=", N, "], got ", shape_of(bias));
    }
  }

  void numbers(size_t i) const {
    require(std::isfinite(a_.scaling[i]), "scaling[", i, "] must be finite, got ", a_.scaling[i]);
    const double p = a_.dropout_p[i];
    require(0 <= p && p < 1, "dropout_p[", i, "] must lie in [0, 1), got ", p);
    require(p == 0 || a_.seed.has_value(),
            "seed must be given where dropout_p > 0; peft_kernels.new_seed(x.device) makes one");
    if (!a_.seed) return;
    const int32_t dtype = dtype_code(*a_.seed);
    if (dtype != aoti_torch_dtype_int64()) require(false, "seed must have dtype int64, got ", name_of(dtype));
    const Device device = device_of(*a_.seed);
    if (!(device == device_)) {
      require(false, "seed must be on x's device ", words_of(device_), ", got ", words_of(device));
    }
    if (a_.seed->dim() != 0) require(false, "seed must be a 0-d tensor, got shape ", shape_of(*a_.seed));
  }

  const ForwardArguments& a_;
  const Device device_;
};

inline void check_dropout_mask(const Tensor& seed, int64_t rows, int64_t cols, double p) {
  STD_TORCH_CHECK(seed.dim() == 0 && dtype_code(seed) == aoti_torch_dtype_int64(),
                  "lora_dropout_mask: seed must be a 0-d int64 tensor");
  STD_TORCH_CHECK(rows >= 0 && cols >= 0 && 0 <= p && p < 1,
                  "lora_dropout_mask: rows and cols must be 0 or more and p in [0, 1), got ", rows, ", ", cols, ", ",
                  p);
}

}  // namespace pk
