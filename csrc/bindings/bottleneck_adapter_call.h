// bottleneck_adapter and its backward as PyTorch calls them: arguments in the order of the schema, gathered and checked
// before a backend sees them.
#pragma once

#include <tuple>

#include "bindings/bottleneck_adapter_check.h"

namespace pk {

struct BottleneckGradients {
  const Tensor& dy;
  const Tensor& h;
  const BottleneckArguments& arguments;  // no residual, no down_bias
  const bool serial;                     // x is the residual
  const std::vector<bool>& needs;
  const std::vector<Tensor>& gradients;  // to be filled where `needs` says so
};

// kRun: BottleneckArguments -> (y, h).
template <auto kRun>
std::tuple<Tensor, Tensor> call_bottleneck(const Tensor& x, const OptionalTensor& residual, const Tensor& down_weight,
                                           const OptionalTensor& down_bias, const Tensor& up_weight,
                                           const OptionalTensor& up_bias, const OptionalTensor& scale,
                                           const OptionalTensor& gate, const OptionalTensor& norm_weight,
                                           const OptionalTensor& norm_bias, const std::string& activation,
                                           double scaling, const std::string& norm, double eps, double dropout_p,
                                           const std::string& dropout_on, const OptionalTensor& seed) {
  const BottleneckArguments arguments{x,     residual, down_weight, down_bias,  up_weight,  up_bias,
                                      scale, gate,     norm_weight, norm_bias,  activation, scaling,
                                      norm,  eps,      dropout_p,   dropout_on, seed};
  BottleneckCheck(arguments).run();
  return kRun(arguments);
}

// kRun: BottleneckGradients -> nothing, with one row at least.
template <auto kRun>
std::vector<Tensor> call_bottleneck_backward(const Tensor& dy, const Tensor& x, const Tensor& h,
                                             const Tensor& down_weight, const Tensor& up_weight,
                                             const OptionalTensor& up_bias, const OptionalTensor& scale,
                                             const OptionalTensor& gate, const OptionalTensor& norm_weight,
                                             const OptionalTensor& norm_bias, const std::string& activation,
                                             double scaling, const std::string& norm, double eps, double dropout_p,
                                             const std::string& dropout_on, const OptionalTensor& seed, bool serial,
                                             const std::vector<bool>& needs) {
  const OptionalTensor none;
  const BottleneckArguments arguments{x,     none, down_weight, none,       up_weight,  up_bias,
                                      scale, gate, norm_weight, norm_bias,  activation, scaling,
                                      norm,  eps,  dropout_p,   dropout_on, seed};
  check_bottleneck_backward(dy, h, arguments, serial, needs);
  const std::vector<Tensor> gradients = new_bottleneck_gradients(arguments, needs);
  if (x.numel() > 0) {
    kRun(BottleneckGradients{dy, h, arguments, serial, needs, gradients});
  } else {
    for (Tensor gradient : gradients) torch::stable::zero_(gradient);
  }
  return gradients;
}

}  // namespace pk
