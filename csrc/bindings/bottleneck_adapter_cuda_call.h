// What the forward and the backward of bottleneck_adapter share on a GPU: a call of lora_linear's launchers with one
// adapter, whose A and B are the down and the up projection, and the rest of the arguments as the kernels take them.
#pragma once

#include "bindings/bottleneck_adapter_call.h"
#include "bindings/lora_linear_cuda_call.h"
#include "bottleneck_adapter/bottleneck_adapter_cuda.h"

namespace pk {

class BottleneckCall {
 public:
  const BottleneckArguments& a;
  const Rows x;
  const int64_t M, K, N, E;
  CudaCall call;                                                                 // its `adapters` hold A and B
  const OptionalTensor down_bias, up_bias, scale, gate, norm_weight, norm_bias;  // contiguous
  const bool per_channel, has_norm;
  const int activation;                 // of common/activation.h
  const Keep keep_inside, keep_output;  // of the bottleneck, of what is added to the residual
  const uint64_t* const seed;           // on the device; null: not given

  BottleneckCall(const char* op, const BottleneckArguments& a)
      : a(a),
        x(as_rows(a.x)),
        M(x.count),
        K(a.down_weight.size(1)),
        N(a.up_weight.size(0)),
        E(a.down_weight.size(0)),
        call(op, x.tensor, {a.down_weight}, {a.up_weight}, {a.scaling}, {0}, a.seed),
        down_bias(contiguous(a.down_bias)),
        up_bias(contiguous(a.up_bias)),
        scale(contiguous(a.scale)),
        gate(contiguous(a.gate)),
        norm_weight(contiguous(a.norm_weight)),
        norm_bias(contiguous(a.norm_bias)),
        per_channel(scale && scale->size(0) > 1),
        has_norm(a.norm != "none"),
        activation(activation_of(a.activation)),
        keep_inside(lora_linear::make_keep(a.dropout_on == "bottleneck" ? a.dropout_p : 0, 0)),
        keep_output(lora_linear::make_keep(a.dropout_on == "output" ? a.dropout_p : 0, 0)),
        seed(a.seed ? static_cast<const uint64_t*>(a.seed->const_data_ptr()) : nullptr) {
    call.M = M;
  }

  cudaStream_t stream() const { return call.on.stream(); }
  const Tensor& A() const { return call.adapters[0].A; }
  const Tensor& B() const { return call.adapters[0].B; }
  Strided x_rows() const { return {x.data(), call.type, x.stride, 1}; }
  Strided accumulated(const Tensor& tensor, int64_t cols) const {
    return by_rows(tensor.const_data_ptr(), call.accumulator(), cols);
  }
  static const void* data_of(const OptionalTensor& tensor) { return tensor ? tensor->const_data_ptr() : nullptr; }
  static double scale_of(const Keep& keep) { return static_cast<double>(kKeepAll) / keep.threshold; }

  // The adapter of a launch; `scaling` is what low-rank values carry.
  static Adapters adapter_of(const void* factor, int64_t R, double scaling) {
    Adapters adapters;
    adapters.count = 1;
    adapters.at[0] = {factor, nullptr, static_cast<int>(R), 0, 0, static_cast<float>(scaling), Keep{}};
    return adapters;
  }

  // [splits][I][row] parts of left right in columns 0 ... J of `parts`, where there are as many parts.
  void multiply_parts(int64_t I, int64_t J, int64_t terms, Strided left, Strided right, double factor, int splits,
                      void* parts, int64_t row) const {
    Product product = call.product_of(I, J, terms, left, right, call.adapters[0], factor, Masked::kNone);
    product.splits = splits;
    product.out = parts;
    product.out_row = row;
    product.out_split = I * row;
    call.launched("product", lora_linear::product(product, stream()));
  }

  // n(x), with the norm's weight and bias where `affine`.
  Tensor normalized(bool affine, const OptionalTensor& reciprocal) const {
    const Tensor out = call.scratch({M, K});
    const bottleneck_adapter::Normalize norm{x.data(),
                                             x.stride,
                                             M,
                                             K,
                                             a.norm == "layer_norm",
                                             a.eps,
                                             affine ? data_of(norm_weight) : nullptr,
                                             affine ? data_of(norm_bias) : nullptr,
                                             out.mutable_data_ptr(),
                                             reciprocal ? reciprocal->mutable_data_ptr() : nullptr};
    call.launched("normalize", bottleneck_adapter::normalize(call.type, call.factors, norm, stream()));
    return out;
  }

 private:
  static OptionalTensor contiguous(const OptionalTensor& tensor) {
    return tensor ? OptionalTensor(dense(*tensor)) : std::nullopt;
  }
  static int activation_of(const std::string& name) {
    int index = 0;
    while (name != kBottleneckActivations[index]) ++index;
    return index;
  }
};

void bottleneck_adapter_backward_cuda(const BottleneckGradients& call);

}  // namespace pk
