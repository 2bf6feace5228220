// bottleneck_adapter for CPU tensors: allocate, fill the Problem, run its steps, which are lent torch's GEMM.
#include "bindings/bottleneck_adapter.h"

#include "bindings/bottleneck_adapter_call.h"
#include "bottleneck_adapter/bottleneck_adapter.h"

namespace pk {
namespace {

using bottleneck_adapter::Matrix;
using bottleneck_adapter::Norm;
using bottleneck_adapter::Problem;

Tensor tensor_of(const Matrix& m) {
  const int64_t sizes[2] = {m.rows, m.cols}, strides[2] = {m.row_stride, m.col_stride};
  AtenTensorHandle handle;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_create_tensor_from_blob(
      m.data, 2, sizes, strides, 0, aoti_torch_dtype_float32(), aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}

void library_gemm(const Matrix& c, const Matrix& a, const Matrix& b, float alpha, bool accumulate) {
  const Tensor out = tensor_of(c);
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_addmm_out(out.get(), out.get(), tensor_of(a).get(), tensor_of(b).get(),
                                                         accumulate ? 1.0 : 0.0, alpha));
}

// A Problem filled from tensors, and the tensors that keep the memory alive.
class BottleneckCall {
 public:
  Problem problem{};

  explicit BottleneckCall(const BottleneckArguments& a) {
    alive_.reserve(kMostTensors);
    Problem& p = problem;
    p.type = *dtype_of(dtype_code(a.x));
    p.factors = *dtype_of(dtype_code(a.down_weight));
    p.E = a.down_weight.size(0);
    p.K = a.down_weight.size(1);
    p.N = a.up_weight.size(0);
    p.x = rows(a.x, p.M, p.x_stride);
    p.A = data(a.down_weight);
    p.a = data(a.down_bias);
    p.B = data(a.up_weight);
    p.b = data(a.up_bias);
    p.scale = data(a.scale);
    p.scales = a.scale ? a.scale->size(0) : 0;
    p.gate = data(a.gate);
    p.norm = a.norm == "layer_norm" ? Norm::kLayer : a.norm == "rms_norm" ? Norm::kRms : Norm::kNone;
    p.norm_weight = data(a.norm_weight);
    p.norm_bias = data(a.norm_bias);
    p.eps = a.eps;
    p.scaling = a.scaling;
    while (a.activation != kBottleneckActivations[p.activation]) ++p.activation;
    const uint64_t key = a.seed ? *static_cast<const uint64_t*>(a.seed->const_data_ptr()) : 0;
    p.dropout = make_dropout(a.dropout_p, key, 0);
    p.drops_output = a.dropout_on == "output";
  }

  bool is_double() const { return problem.type == Dtype::kFloat64; }

  // The tensor as a matrix whose rows are contiguous.
  const void* rows(const Tensor& tensor, int64_t& count, int64_t& stride) {
    const Rows found = as_rows(tensor);
    count = found.count;
    stride = found.stride;
    alive_.push_back(found.tensor);
    return found.data();
  }

  void run(bool backward) {
    if (suits_gemm(problem)) problem.gemm = library_gemm;
    const Tensor scratch = empty({bottleneck_adapter::scratch_floats(problem, backward)}, aoti_torch_dtype_float32());
    set_scratch(problem, backward, static_cast<float*>(scratch.mutable_data_ptr()));
    for (const bottleneck_adapter::Step& step : backward ? backward_steps(problem) : forward_steps(problem)) {
      parallel(step.units, step.work, [&](int64_t begin, int64_t end) { step.phase(problem, begin, end); });
    }
  }

 private:
  const void* data(const Tensor& tensor) {
    alive_.push_back(dense(tensor));
    return alive_.back().const_data_ptr();
  }
  const void* data(const OptionalTensor& tensor) { return tensor ? data(*tensor) : nullptr; }

  static constexpr size_t kMostTensors = 10;

  std::vector<Tensor> alive_;
};

std::tuple<Tensor, Tensor> forward(const BottleneckArguments& a) {
  BottleneckCall call(a);
  Problem& p = call.problem;
  const Tensor y = empty_rows(a.x, p.N, dtype_code(a.x));
  const Tensor h = empty({p.M, p.E}, call.is_double() ? aoti_torch_dtype_float64() : aoti_torch_dtype_float32());
  if (p.M == 0) return {y, h};
  p.y = y.mutable_data_ptr();
  p.h = h.mutable_data_ptr();
  p.residual = call.rows(a.residual ? *a.residual : a.x, p.M, p.residual_stride);
  if (call.is_double()) {
    bottleneck_adapter::forward_double(p);
  } else {
    call.run(false);
  }
  return {y, h};
}

// Gives the steps their outputs; what is not needed stays null.
void set_outputs(Problem& p, const std::vector<Tensor>& gradients, const std::vector<bool>& needs) {
  void** const outputs[kBottleneckGradients] = {&p.dx,     &p.dA,    &p.da,           &p.dB,        &p.db,
                                                &p.dscale, &p.dgate, &p.dnorm_weight, &p.dnorm_bias};
  for (size_t i = 0; i < kBottleneckGradients; ++i) {
    if (needs[i]) *outputs[i] = gradients[i].mutable_data_ptr();
  }
}

void backward(const BottleneckGradients& b) {
  BottleneckCall call(b.arguments);
  Problem& p = call.problem;
  p.dy = call.rows(b.dy, p.M, p.dy_stride);
  p.h = const_cast<void*>(b.h.const_data_ptr());  // read only
  p.serial = b.serial;
  set_outputs(p, b.gradients, b.needs);
  if (call.is_double()) {
    bottleneck_adapter::backward_double(p);
  } else {
    call.run(true);
  }
}

}  // namespace

void bind_bottleneck_adapter_cpu(torch::stable::detail::StableLibrary& library) {
  library.impl("bottleneck_adapter", TORCH_BOX(&call_bottleneck<forward>));
  library.impl("bottleneck_adapter_backward", TORCH_BOX(&call_bottleneck_backward<backward>));
}

}  // namespace pk
