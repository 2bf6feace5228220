// What the kernels of bottleneck_adapter need to be safe, in the words of `check` and `check_backward` in
// peft_kernels/ops/bottleneck_adapter/op.py; and the memory of the gradients.
#pragma once

#include <cmath>
#include <initializer_list>
#include <iterator>
#include <string>

#include "bindings/checks.h"
#include "common/activation.h"

namespace pk {

// In the order of the schema.
struct BottleneckArguments {
  const Tensor& x;
  const OptionalTensor& residual;
  const Tensor& down_weight;
  const OptionalTensor& down_bias;
  const Tensor& up_weight;
  const OptionalTensor& up_bias;
  const OptionalTensor& scale;
  const OptionalTensor& gate;
  const OptionalTensor& norm_weight;
  const OptionalTensor& norm_bias;
  const std::string& activation;
  double scaling;
  const std::string& norm;
  double eps;
  double dropout_p;
  const std::string& dropout_on;
  const OptionalTensor& seed;
};

constexpr const char* kBottleneckActivations[] = {"identity", "relu", "gelu",    "gelu_tanh",
                                                  "silu",     "tanh", "sigmoid", "leaky_relu"};
static_assert(std::size(kBottleneckActivations) == kActivations);

class BottleneckCheck : TensorCheck {
 public:
  explicit BottleneckCheck(const BottleneckArguments& arguments)
      : TensorCheck("bottleneck_adapter", "x", arguments.x), a_(arguments) {}

  void run() const {
    adapter();
    if (a_.residual) {
      rows("residual", *a_.residual);
    } else {
      serial();
    }
  }
  void run_backward(const Tensor& dy, bool is_serial) const {
    adapter();
    rows("dy", dy);
    if (is_serial) serial();
  }

 private:
  static constexpr int64_t kMostBottleneck = 1024;

  void adapter() const {
    weights();
    numbers();
    vectors();
  }

  void weights() const {
    const Tensor &x = a_.x, &A = a_.down_weight, &B = a_.up_weight;
    const std::optional<Dtype> type = dtype_of(dtype_code(x)), factors = dtype_of(dtype_code(A));
    if (!type) refuse("x must have dtype float32, float16, bfloat16 or float64, got ", name_of(dtype_code(x)));
    if (x.dim() < 1) refuse("x must have shape [..., in_features], got a 0-d tensor");
    const int64_t K = x.size(x.dim() - 1);
    if (K < 1) refuse("x must have at least one feature, got shape ", shape_of(x));
    const bool wide = type == Dtype::kFloat64;
    if (!factors || (*factors == Dtype::kFloat64) != wide) {
      const char* const rule = wide ? "float64, as x" : "float32, float16 or bfloat16";
      refuse("down_weight must have dtype ", rule, ", got ", name_of(dtype_code(A)));
    }
    on_device("down_weight", A);
    if (A.dim() != 2 || A.size(1) != K) {
      refuse("down_weight must have shape [bottleneck, in_features=", K, "], got ", shape_of(A));
    }
    const int64_t E = A.size(0);
    if (E < 1 || E > kMostBottleneck) refuse("down_weight must have from 1 to ", kMostBottleneck, " rows, got ", E);
    tensor("up_weight", B, dtype_code(A), ", as down_weight");
    if (B.dim() != 2 || B.size(1) != E || B.size(0) < 1) {
      refuse("up_weight must have shape [out_features, bottleneck=", E, "], got ", shape_of(B));
    }
  }

  template <size_t kCount>
  void one_of(const char* name, const std::string& value, const char* const (&allowed)[kCount]) const {
    for (const char* one : allowed) {
      if (value == one) return;
    }
    std::string words;
    for (const char* one : allowed) words += (words.empty() ? "" : ", ") + std::string(one);
    refuse(name, " must be one of ", words, ", got '", value, "'");
  }

  void numbers() const {
    static constexpr const char* kNorms[] = {"none", "layer_norm", "rms_norm"};
    static constexpr const char* kDropouts[] = {"bottleneck", "output"};
    one_of("activation", a_.activation, kBottleneckActivations);
    one_of("norm", a_.norm, kNorms);
    one_of("dropout_on", a_.dropout_on, kDropouts);
    if (!std::isfinite(a_.scaling)) refuse("scaling must be finite, got ", a_.scaling);
    if (!(std::isfinite(a_.eps) && a_.eps >= 0)) refuse("eps must be finite and not negative, got ", a_.eps);
    dropout(a_.dropout_p, a_.seed);
  }

  void vector(const char* name, const OptionalTensor& t, int64_t size, const char* words) const {
    if (!t) return;
    tensor(name, *t, dtype_code(a_.down_weight), ", as down_weight");
    if (t->dim() != 1 || t->size(0) != size) {
      refuse(name, " must have shape [", words, "=", size, "], got ", shape_of(*t));
    }
  }

  // The first `dims` sizes of t are x's, and t has `more` beyond them.
  bool has_rows_of_x(const Tensor& t, int64_t more) const {
    const int64_t dims = a_.x.dim() - 1;
    bool same = t.dim() == dims + more;
    for (int64_t i = 0; same && i < dims; ++i) same = t.size(i) == a_.x.size(i);
    return same;
  }

  void vectors() const {
    const int64_t E = a_.down_weight.size(0), K = a_.down_weight.size(1), N = a_.up_weight.size(0);
    vector("down_bias", a_.down_bias, E, "bottleneck");
    vector("up_bias", a_.up_bias, N, "out_features");
    if (a_.gate) {
      tensor("gate", *a_.gate, dtype_code(a_.down_weight), ", as down_weight");
      if (!has_rows_of_x(*a_.gate, 0)) {
        refuse("gate must have shape ", shape_of(a_.x, 1), ", as x without its features, got ", shape_of(*a_.gate));
      }
    }
    vector("norm_weight", a_.norm_weight, K, "in_features");
    vector("norm_bias", a_.norm_bias, K, "in_features");
    if (a_.scale) {
      tensor("scale", *a_.scale, dtype_code(a_.down_weight), ", as down_weight");
      const bool fits = a_.scale->dim() == 1 && (a_.scale->size(0) == 1 || a_.scale->size(0) == N);
      if (!fits) refuse("scale must have shape [1] or [out_features=", N, "], got ", shape_of(*a_.scale));
    }
    if (a_.norm == "none") {
      if (a_.norm_weight) refuse("norm_weight must be None where norm is 'none'");
      if (a_.norm_bias) refuse("norm_bias must be None where norm is 'none'");
    }
    if (a_.norm == "rms_norm" && a_.norm_bias) refuse("norm_bias must be None where norm is 'rms_norm'");
  }

  void serial() const {
    const int64_t K = a_.down_weight.size(1), N = a_.up_weight.size(0);
    if (N != K) {
      refuse("residual must be given where out_features=", N, " is not in_features=", K, ": x cannot stand for it");
    }
  }

  // t is of y's shape and x's dtype.
  void rows(const char* name, const Tensor& t) const {
    const int64_t N = a_.up_weight.size(0);
    tensor(name, t, dtype_code(a_.x), ", as x");
    if (!has_rows_of_x(t, 1) || t.size(t.dim() - 1) != N) {
      const std::string batch = shape_of(a_.x, 1), more = batch == "[]" ? "" : ", ";
      refuse(name, " must have shape ", batch.substr(0, batch.size() - 1), more, N, "], as x with out_features=", N,
             ", got ", shape_of(t));
    }
  }

  const BottleneckArguments& a_;
};

// Places in `needs` and in the result of the backward.
enum class BottleneckGradient : size_t {
  kX,
  kDownWeight,
  kDownBias,
  kUpWeight,
  kUpBias,
  kScale,
  kGate,
  kNormWeight,
  kNormBias,
};
constexpr size_t kBottleneckGradients = 9;

// `a` as the backward has it: no residual, no down_bias.
inline void check_bottleneck_backward(const Tensor& dy, const Tensor& h, const BottleneckArguments& a, bool serial,
                                      const std::vector<bool>& needs) {
  constexpr const char* kOp = "bottleneck_adapter_backward: ";
  STD_TORCH_CHECK(needs.size() == kBottleneckGradients, kOp, "needs must have ", kBottleneckGradients, " entries, got ",
                  needs.size());
  BottleneckCheck(a).run_backward(dy, serial);
  const int64_t M = a.x.numel() / a.x.size(a.x.dim() - 1), E = a.down_weight.size(0);
  const bool fits = device_of(h) == device_of(a.x) && h.is_contiguous() && h.dim() == 2 && h.size(0) == M &&
                    h.size(1) == E && dtype_code(h) == accumulator_code(a.x);
  STD_TORCH_CHECK(fits, kOp, "h must be the contiguous [M, bottleneck] that the forward returned");
  const auto wants = [&](BottleneckGradient which) { return needs[static_cast<size_t>(which)]; };
  STD_TORCH_CHECK(a.scale || !wants(BottleneckGradient::kScale), kOp, "scale must be given for its gradient");
  STD_TORCH_CHECK(a.gate || !wants(BottleneckGradient::kGate), kOp, "gate must be given for its gradient");
  const bool normed = wants(BottleneckGradient::kNormWeight) || wants(BottleneckGradient::kNormBias);
  STD_TORCH_CHECK(a.norm != "none" || !normed, kOp,
                  "norm must not be 'none' for gradients of norm_weight or norm_bias");
}

// Uninitialised gradients; empty ones where `needs` says no.
inline std::vector<Tensor> new_bottleneck_gradients(const BottleneckArguments& a, const std::vector<bool>& needs) {
  const Device device = device_of(a.x);
  const int32_t type = dtype_code(a.x), factors = dtype_code(a.down_weight);
  const int64_t E = a.down_weight.size(0), K = a.down_weight.size(1), N = a.up_weight.size(0);
  std::vector<Tensor> all;
  all.reserve(needs.size());
  const auto add = [&](const std::vector<int64_t>& sizes, int32_t dtype) {
    const int64_t none = 0;
    all.push_back(needs[all.size()] ? empty(sizes.data(), static_cast<int64_t>(sizes.size()), dtype, device)
                                    : empty(&none, 1, dtype, device));
  };
  const auto x_sizes = a.x.sizes();
  std::vector<int64_t> shape(x_sizes.begin(), x_sizes.end());
  add(shape, type);
  add({E, K}, factors);
  add({E}, factors);
  add({N, E}, factors);
  add({N}, factors);
  add({a.scale ? a.scale->size(0) : 1}, factors);
  shape.pop_back();
  add(shape, factors);
  add({K}, factors);
  add({K}, factors);
  return all;
}

}  // namespace pk
