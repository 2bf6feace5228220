// bottleneck_adapter's backward on a GPU: only what `needs` asks for. bottleneck_adapter_cuda.h says which products it
// is made of; the gradients of s and of the gate come from rank-sized ones.
#include "bindings/bottleneck_adapter_cuda_call.h"

namespace pk {
namespace {

using bottleneck_adapter::Parts;
using Gradient = BottleneckGradient;

struct Backward {
  const BottleneckCall& b;
  const Rows dy;
  const Tensor& h;
  const bool serial;
  const std::vector<bool>& needs;
  const std::vector<Tensor>& gradients;

  bool wants(Gradient which) const { return needs[static_cast<size_t>(which)]; }
  void* gradient(Gradient which) const {
    return wants(which) ? gradients[static_cast<size_t>(which)].mutable_data_ptr() : nullptr;
  }
  bool wants_norm() const { return wants(Gradient::kNormWeight) || wants(Gradient::kNormBias); }
  bool wants_down() const { return wants(Gradient::kDownWeight) || wants_norm(); }
  bool wants_dh() const { return wants(Gradient::kX) || wants_down() || wants(Gradient::kDownBias); }
  bool wants_v() const { return wants_dh() || wants(Gradient::kGate); }
  bool wants_D() const { return wants(Gradient::kUpWeight) || wants(Gradient::kScale); }
  bool wants_d() const { return wants(Gradient::kUpBias) || (b.up_bias && wants(Gradient::kScale)); }
  // b is one more column of B, where anything asks for what comes of it.
  bool has_bias_column() const { return wants_d() || (b.up_bias && wants(Gradient::kGate)); }
  int64_t width() const { return b.E + (has_bias_column() ? 1 : 0); }

  double bias_factor() const { return b.a.scaling * BottleneckCall::scale_of(b.keep_output); }
  double factor() const { return bias_factor() * BottleneckCall::scale_of(b.keep_inside); }
};

// What the pass over dy gives; absent where it is not wanted.
struct UpProducts {
  OptionalTensor v;  // Acc parts [v_splits][M][width]
  int v_splits = 0, splits = 0;
  OptionalTensor memory[2];
  Parts weight{}, bias{};  // of d^T (g u), of d^T g
};

// B or b as the pass reads it: a vector s is a factor of its rows already. Zeros where there is no b.
Tensor up_factor(const Backward& w, const OptionalTensor& given, int64_t cols) {
  const CudaCall& call = w.b.call;
  if (!given) {
    Tensor none = empty({w.b.N}, w.b.per_channel ? call.accumulator_code() : dtype_code(w.b.B()), call.device);
    return torch::stable::zero_(none);
  }
  if (!w.b.per_channel) return *given;
  const Tensor out = call.scratch({w.b.N, cols});
  call.launched("scale_rows",
                bottleneck_adapter::scale_rows(call.factors, given->const_data_ptr(), w.b.scale->const_data_ptr(),
                                               w.b.N, cols, out.mutable_data_ptr(), w.b.stream()));
  return out;
}

// g u, and g as one more column.
Tensor gated_u(const Backward& w) {
  const BottleneckCall& b = w.b;
  const Tensor u = b.call.scratch({b.M, w.width()});
  const bottleneck_adapter::Activate activate{w.h.const_data_ptr(),
                                              1,
                                              nullptr,
                                              BottleneckCall::data_of(b.gate),
                                              nullptr,
                                              u.mutable_data_ptr(),
                                              b.M,
                                              b.E,
                                              w.width(),
                                              b.activation,
                                              b.keep_inside,
                                              b.seed};
  b.call.launched("activate", bottleneck_adapter::activate(b.call.factors, activate, b.stream()));
  return u;
}

// Both products from one read of d, on tensor cores.
void run_dy_pass(const Backward& w, const Rows& d, const OptionalTensor& u, const Tensor& B, const Tensor& bias,
                 Dtype factors, UpProducts& to) {
  const BottleneckCall& b = w.b;
  lora_linear::DyPass pass{};
  pass.dy = d.data();
  pass.dy_stride = d.stride;
  pass.M = b.M;
  pass.N = b.N;
  pass.h = u ? static_cast<const float*>(u->const_data_ptr()) : nullptr;
  pass.R = w.width();
  pass.adapters = BottleneckCall::adapter_of(B.const_data_ptr(), b.E, w.factor());
  if (w.has_bias_column()) {
    const float scaling = static_cast<float>(w.bias_factor());
    pass.adapters.at[pass.adapters.count++] = {
        bias.const_data_ptr(), nullptr, 1, static_cast<int>(b.E), 0, scaling, Keep{}};
  }
  to.v_splits = lora_linear::dy_column_blocks(b.N);
  to.splits = lora_linear::dy_row_chunks(b.M, b.N);
  if (w.wants_v()) {
    to.v = b.call.scratch({to.v_splits, b.M, w.width()});
    pass.ds = static_cast<float*>(to.v->mutable_data_ptr());
  }
  if (w.wants_D()) {
    to.memory[0] = b.call.scratch({to.splits, b.N, b.E});
    to.weight = {to.memory[0]->const_data_ptr(), b.N * b.E, b.E};
    pass.dB[0] = static_cast<float*>(to.memory[0]->mutable_data_ptr());
  }
  if (w.wants_d()) {
    to.memory[1] = b.call.scratch({to.splits, b.N});
    to.bias = {to.memory[1]->const_data_ptr(), b.N, 1};
    pass.dB[1] = static_cast<float*>(to.memory[1]->mutable_data_ptr());
  }
  b.call.launched("dy_pass", lora_linear::dy_pass(b.call.type, factors, pass, b.stream()));
}

// The same on the plain cores.
void run_dy_plain(const Backward& w, const Rows& d, const OptionalTensor& u, const Tensor& B, const Tensor& bias,
                  Dtype factors, UpProducts& to) {
  const BottleneckCall& b = w.b;
  const Strided rows{d.data(), b.call.type, d.stride, 1};
  const int64_t size = b.call.accumulator() == Dtype::kFloat64 ? 8 : 4;
  if (w.wants_v()) {
    to.v_splits = lora_linear::product_splits(b.M, b.E, b.N);
    to.v = b.call.scratch({to.v_splits, b.M, w.width()});
    char* const v = static_cast<char*>(to.v->mutable_data_ptr());
    b.multiply_parts(b.M, b.E, b.N, rows, by_rows(B.const_data_ptr(), factors, b.E), w.factor(), to.v_splits, v,
                     w.width());
    if (w.has_bias_column()) {
      b.multiply_parts(b.M, 1, b.N, rows, by_rows(bias.const_data_ptr(), factors, 1), w.bias_factor(), to.v_splits,
                       v + b.E * size, w.width());
    }
  }
  if (!u) return;
  to.splits = lora_linear::product_splits(b.N, w.width(), b.M);
  to.memory[0] = b.call.scratch({to.splits, b.N, w.width()});
  b.multiply_parts(b.N, w.width(), b.M, transposed(rows), b.accumulated(*u, w.width()), 1, to.splits,
                   to.memory[0]->mutable_data_ptr(), w.width());
  const char* const parts = static_cast<const char*>(to.memory[0]->const_data_ptr());
  if (w.wants_D()) to.weight = {parts, b.N * w.width(), w.width()};
  if (w.wants_d()) to.bias = {parts + b.E * size, b.N * w.width(), w.width()};
}

UpProducts run_up(const Backward& w) {
  const BottleneckCall& b = w.b;
  const CudaCall& call = b.call;
  std::optional<Rows> dropped;
  if (b.keep_output.threshold != kKeepAll) {
    dropped.emplace(Rows{empty({b.M, b.N}, dtype_code(w.dy.tensor), call.device), b.M, b.N});
    const bottleneck_adapter::DropRows drop{
        w.dy.data(), w.dy.stride, b.M, b.N, b.keep_output, b.seed, dropped->tensor.mutable_data_ptr()};
    call.launched("drop_rows", bottleneck_adapter::drop_rows(call.type, drop, b.stream()));
  }
  const Rows& d = dropped ? *dropped : w.dy;
  OptionalTensor u;
  if (w.wants_D() || w.wants_d()) u = gated_u(w);
  const Tensor B = up_factor(w, b.B(), b.E);
  const Tensor bias = w.has_bias_column() ? up_factor(w, b.up_bias, 1) : B;
  const Dtype factors = b.per_channel ? call.accumulator() : call.factors;
  UpProducts products;
  if (lora_linear::has_mma_kernels(call.type, factors)) {
    run_dy_pass(w, d, u, B, bias, factors, products);
  } else {
    run_dy_plain(w, d, u, B, bias, factors, products);
  }
  return products;
}

// Sums of the columns of an Acc matrix, for one place or two.
class ColumnSums {
 public:
  ColumnSums(const BottleneckCall& b, const Tensor& in, int64_t rows, int64_t cols)
      : b_(b), cols_(cols), chunks_(bottleneck_adapter::column_chunks(rows)), parts_(b.call.scratch({chunks_, cols})) {
    b.call.launched("column_parts", bottleneck_adapter::column_parts(b.call.factors, in.const_data_ptr(), rows, cols,
                                                                     parts_.mutable_data_ptr(), b.stream()));
  }
  void write(void* out, Dtype type) const {
    b_.call.add_parts(parts_, cols_, cols_, chunks_, out, type, cols_, 1, cols_);
  }

 private:
  const BottleneckCall& b_;
  const int64_t cols_;
  const int chunks_;
  const Tensor parts_;
};

// Gradients of B, b and s.
void run_up_gradients(const Backward& w, const UpProducts& products) {
  if (!w.wants_D() && !w.wants_d()) return;
  const BottleneckCall& b = w.b;
  const CudaCall& call = b.call;
  const bool summed = w.wants(Gradient::kScale) && !b.per_channel;
  OptionalTensor channels;
  if (summed) channels = call.scratch({b.N});
  const bottleneck_adapter::UpGradients up{products.weight,
                                           products.bias,
                                           products.splits,
                                           b.N,
                                           b.E,
                                           w.factor(),
                                           w.bias_factor(),
                                           b.B().const_data_ptr(),
                                           BottleneckCall::data_of(b.up_bias),
                                           BottleneckCall::data_of(b.scale),
                                           b.per_channel,
                                           w.gradient(Gradient::kUpWeight),
                                           w.gradient(Gradient::kUpBias),
                                           summed ? channels->mutable_data_ptr() : w.gradient(Gradient::kScale),
                                           summed ? call.accumulator() : call.factors};
  call.launched("up_gradients", bottleneck_adapter::up_gradients(call.factors, up, b.stream()));
  if (summed) ColumnSums(b, *channels, b.N, 1).write(w.gradient(Gradient::kScale), call.factors);
}

Tensor run_slope(const Backward& w, const UpProducts& products) {
  const BottleneckCall& b = w.b;
  const Tensor dh = b.call.scratch({b.M, b.E});
  const bottleneck_adapter::Slope slope{products.v->const_data_ptr(),
                                        products.v_splits,
                                        w.h.const_data_ptr(),
                                        BottleneckCall::data_of(b.gate),
                                        b.per_channel ? nullptr : BottleneckCall::data_of(b.scale),
                                        dh.mutable_data_ptr(),
                                        w.gradient(Gradient::kGate),
                                        b.M,
                                        b.E,
                                        w.width(),
                                        b.activation,
                                        b.keep_inside,
                                        b.seed};
  b.call.launched("slope", bottleneck_adapter::slope(b.call.factors, slope, b.stream()));
  return dh;
}

// dx and dA where there is no norm.
void run_x(const Backward& w, const Tensor& dh) {
  const BottleneckCall& b = w.b;
  const CudaCall& call = b.call;
  const Adapters adapters = BottleneckCall::adapter_of(b.A().const_data_ptr(), b.E, w.factor());
  const Strided dh_rows = b.accumulated(dh, b.E);
  if (void* const dA = w.gradient(Gradient::kDownWeight)) {
    if (call.tensor_cores) {
      const int chunks = lora_linear::x_row_chunks(b.M, b.K);
      const int64_t size = b.E * b.K;
      const Tensor parts = call.scratch({chunks, size});
      lora_linear::XPass pass{b.x.data(), b.x.stride, b.M,     b.K,     static_cast<const float*>(dh.const_data_ptr()),
                              b.E,        {},         nullptr, adapters};
      pass.dA[0] = static_cast<float*>(parts.mutable_data_ptr());
      call.launched("x_pass", lora_linear::x_pass(call.type, call.factors, pass, b.stream()));
      call.add_parts(parts, size, size, chunks, dA, call.factors, size, 1, size);
    } else {
      call.multiply(call.product_of(b.E, b.K, b.M, transposed(dh_rows), b.x_rows(), call.adapters[0], 1, Masked::kNone),
                    dA, call.factors, b.K);
    }
  }
  void* const dx = w.gradient(Gradient::kX);
  if (!dx) return;
  const void* const residual = w.serial ? w.dy.data() : nullptr;
  if (call.tensor_cores) {
    const lora_linear::Expand expand{dx,      b.M,      b.K,      static_cast<const float*>(dh.const_data_ptr()),
                                     b.E,     nullptr,  true,     false,
                                     nullptr, adapters, residual, w.dy.stride};
    return call.launched("expand", lora_linear::expand(call.type, call.factors, expand, b.stream()));
  }
  const Tensor sum = call.type == call.accumulator() ? w.gradients[0] : call.scratch({b.M, b.K});
  call.multiply_onto(call.product_of(b.M, b.K, b.E, dh_rows, by_rows(b.A().const_data_ptr(), call.factors, b.K),
                                     call.adapters[0], 1, Masked::kNone),
                     sum, false);
  const bottleneck_adapter::Finish finish{sum.const_data_ptr(), residual, w.dy.stride, dx, b.M, b.K, {}, nullptr};
  call.launched("finish", bottleneck_adapter::finish(call.type, call.factors, finish, b.stream()));
}

// dx, dA and the norm's gradients where there is one.
void run_normed_x(const Backward& w, const Tensor& dh, const OptionalTensor& da) {
  const BottleneckCall& b = w.b;
  const CudaCall& call = b.call;
  const Tensor reciprocal = call.scratch({b.M}), normed = b.normalized(false, reciprocal);
  const Strided dh_rows = b.accumulated(dh, b.E);
  if (w.wants_down()) {
    const int splits = lora_linear::product_splits(b.E, b.K, b.M);
    const Tensor parts = call.scratch({splits, b.E, b.K});
    b.multiply_parts(b.E, b.K, b.M, transposed(dh_rows), b.accumulated(normed, b.K), 1, splits,
                     parts.mutable_data_ptr(), b.K);
    const bottleneck_adapter::DownGradients down{parts.const_data_ptr(),
                                                 splits,
                                                 da->const_data_ptr(),
                                                 b.E,
                                                 b.K,
                                                 b.A().const_data_ptr(),
                                                 BottleneckCall::data_of(b.norm_weight),
                                                 BottleneckCall::data_of(b.norm_bias),
                                                 w.gradient(Gradient::kDownWeight),
                                                 w.gradient(Gradient::kNormWeight),
                                                 w.gradient(Gradient::kNormBias)};
    call.launched("down_gradients", bottleneck_adapter::down_gradients(call.factors, down, b.stream()));
  }
  void* const dx = w.gradient(Gradient::kX);
  if (!dx) return;
  const Tensor out_grad = call.scratch({b.M, b.K});
  call.multiply_onto(call.product_of(b.M, b.K, b.E, dh_rows, by_rows(b.A().const_data_ptr(), call.factors, b.K),
                                     call.adapters[0], 1, Masked::kNone),
                     out_grad, false);
  const bottleneck_adapter::NormSlope slope{out_grad.const_data_ptr(),
                                            normed.const_data_ptr(),
                                            reciprocal.const_data_ptr(),
                                            b.M,
                                            b.K,
                                            b.a.norm == "layer_norm",
                                            BottleneckCall::data_of(b.norm_weight),
                                            w.serial ? w.dy.data() : nullptr,
                                            w.dy.stride,
                                            dx};
  call.launched("norm_slope", bottleneck_adapter::norm_slope(call.type, call.factors, slope, b.stream()));
}

void run(const Backward& w) {
  const BottleneckCall& b = w.b;
  if (!w.wants_v() && !w.wants_D() && !w.wants_d()) return;
  const UpProducts products = run_up(w);
  run_up_gradients(w, products);
  if (!w.wants_v()) return;
  const Tensor dh = run_slope(w, products);
  OptionalTensor da;  // Acc [E]
  if (b.has_norm && w.wants_down()) da = b.call.scratch({b.E});
  void* const down_bias_grad = w.gradient(Gradient::kDownBias);
  if (da || down_bias_grad) {
    const ColumnSums sums(b, dh, b.M, b.E);
    if (da) sums.write(da->mutable_data_ptr(), b.call.accumulator());
    if (down_bias_grad) sums.write(down_bias_grad, b.call.factors);
  }
  if (!w.wants(Gradient::kX) && !w.wants_down()) return;
  b.has_norm ? run_normed_x(w, dh, da) : run_x(w, dh);
}

}  // namespace

void bottleneck_adapter_backward_cuda(const BottleneckGradients& call) {
  const BottleneckCall b("bottleneck_adapter_backward", call.arguments);
  run({b, as_rows(call.dy), call.h, call.serial, call.needs, call.gradients});
}

}  // namespace pk
