// What the forward and the backward of lora_linear share on a GPU: the adapters as launches take them, scratch memory
// on the call's device, plain-core products, and launches whose errors become words.
#pragma once

#include <algorithm>
#include <initializer_list>
#include <vector>

#include "bindings/cuda_device.h"
#include "bindings/lora_linear_check.h"
#include "lora_linear/lora_linear_cuda.h"

namespace pk {

using lora_linear::Adapters;
using lora_linear::Keep;
using lora_linear::Masked;
using lora_linear::Product;
using lora_linear::Strided;
using lora_linear::Sum;

// Which of an adapter's two a launch reads. Where it is B, nothing is dropped: dropout lies between x and A.
enum class Factor { kA, kB };

// Everything is allocated by shape, on the current stream of the tensors' device: memory that is let go at the end of a
// call is not reused before its kernels are done.
class CudaCall {
 public:
  struct Adapter {
    Tensor A, B;  // contiguous
    OptionalTensor bias;
    int64_t R, rank0;
    size_t member;
    double scaling;
    Keep keep;

    bool drops() const { return keep.threshold != kKeepAll; }
  };

  const char* const op;
  const Device device;
  const OnDevice on;
  const Dtype type, factors;  // of x, of the factors
  const bool tensor_cores;
  int64_t M = 0, R = 0;
  const int64_t K;
  std::vector<Adapter> adapters;
  std::vector<std::vector<size_t>> of_member;  // indices of its adapters

  CudaCall(const char* op, const std::vector<Tensor>& weight, const std::vector<Tensor>& lora_A,
           const std::vector<Tensor>& lora_B, const std::vector<int64_t>& member, const std::vector<double>& scaling,
           const std::vector<double>& dropout_p, const OptionalTensor& seed)
      : CudaCall(op, weight.size(), weight[0], lora_A, lora_B, member, scaling, dropout_p, seed) {}

  // One member without a weight; `like` has the dtype and the device of x.
  CudaCall(const char* op, const Tensor& like, const std::vector<Tensor>& lora_A, const std::vector<Tensor>& lora_B,
           const std::vector<double>& scaling, const std::vector<double>& dropout_p, const OptionalTensor& seed)
      : CudaCall(op, 1, like, lora_A, lora_B, std::vector<int64_t>(lora_A.size()), scaling, dropout_p, seed) {}

  CudaCall(const char* op, size_t members, const Tensor& like, const std::vector<Tensor>& lora_A,
           const std::vector<Tensor>& lora_B, const std::vector<int64_t>& member, const std::vector<double>& scaling,
           const std::vector<double>& dropout_p, const OptionalTensor& seed)
      : op(op),
        device(device_of(like)),
        on(device),
        type(*dtype_of(dtype_code(like))),
        factors(*dtype_of(dtype_code(lora_A[0]))),
        tensor_cores(lora_linear::has_mma_kernels(type, factors)),
        K(lora_A[0].size(1)),
        of_member(members),
        seed_(seed ? static_cast<const uint64_t*>(seed->const_data_ptr()) : nullptr) {
    adapters.reserve(lora_A.size());
    for (size_t l = 0; l < lora_A.size(); ++l) {
      const size_t g = static_cast<size_t>(member[l]);
      adapters.push_back({dense(lora_A[l]), dense(lora_B[l]), std::nullopt, lora_A[l].size(0), R, g, scaling[l],
                          lora_linear::make_keep(dropout_p[l], static_cast<uint32_t>(l))});
      of_member[g].push_back(l);
      R += lora_A[l].size(0);
    }
  }

  Dtype accumulator() const { return type == Dtype::kFloat64 ? Dtype::kFloat64 : Dtype::kFloat32; }
  int32_t accumulator_code() const {
    return type == Dtype::kFloat64 ? aoti_torch_dtype_float64() : aoti_torch_dtype_float32();
  }

  std::vector<size_t> all() const {
    std::vector<size_t> indices(adapters.size());
    for (size_t l = 0; l < indices.size(); ++l) indices[l] = l;
    return indices;
  }

  Tensor scratch(std::initializer_list<int64_t> sizes) const { return empty(sizes, accumulator_code(), device); }

  void launched(const char* kernel, cudaError_t error) const {
    STD_TORCH_CHECK(error == cudaSuccess, op, ": the kernel ", kernel, " could not be launched on device ",
                    device.index, ": ", words_of(error));
  }

  // f(adapters [first, end) of `which` for one launch, first): as many launches as there have to be.
  template <class F>
  void in_launches(const std::vector<size_t>& which, Factor factor, const F& f) const {
    for (size_t first = 0; first < which.size(); first += lora_linear::kMostAdapters) {
      Adapters chosen;
      for (size_t i = first; i < which.size() && chosen.count < lora_linear::kMostAdapters; ++i) {
        const Adapter& a = adapters[which[i]];
        const Tensor& read = factor == Factor::kA ? a.A : a.B;
        chosen.at[chosen.count++] = {read.const_data_ptr(),
                                     a.bias ? a.bias->const_data_ptr() : nullptr,
                                     static_cast<int>(a.R),
                                     static_cast<int>(a.rank0),
                                     static_cast<int>(a.member),
                                     static_cast<float>(a.scaling),
                                     factor == Factor::kA ? a.keep : Keep{}};
      }
      f(chosen, first);
    }
  }

  const uint64_t* seed_of(const Adapters& chosen) const {
    for (int i = 0; i < chosen.count; ++i) {
      if (chosen.at[i].keep.threshold != kKeepAll) return seed_;
    }
    return nullptr;
  }

  // [I, K] [K, J] with an adapter's dropout on one of the three; `multiply` fills in the rest.
  Product product_of(int64_t I, int64_t J, int64_t terms, Strided left, Strided right, const Adapter& adapter,
                     double scale, Masked masked) const {
    Product call{};
    call.I = I;
    call.J = J;
    call.K = terms;
    call.left = left;
    call.right = right;
    call.scale = scale;
    call.masked = adapter.drops() ? masked : Masked::kNone;
    call.keep = adapter.keep;
    call.seed = seed_;
    return call;
  }

  // Element (i, j) at i * out_row + j of `out`, rounded once to `out_type`.
  void multiply(Product call, void* out, Dtype out_type, int64_t out_row) const {
    call.splits = lora_linear::product_splits(call.I, call.J, call.K);
    if (call.splits == 1 && out_type == accumulator()) {
      call.out = out;
      call.out_row = out_row;
      return launched("product", lora_linear::product(call, on.stream()));
    }
    const Tensor parts = scratch({call.splits, call.I, call.J});
    call.out = parts.mutable_data_ptr();
    call.out_row = call.J;
    call.out_split = call.I * call.J;
    launched("product", lora_linear::product(call, on.stream()));
    add_parts(parts, call.out_split, call.J, call.splits, out, out_type, out_row, call.I, call.J);
  }

  // out (+)= a product in one piece, of the accumulator's dtype and contiguous.
  void multiply_onto(Product call, const Tensor& out, bool accumulate) const {
    call.splits = 1;
    call.out = out.mutable_data_ptr();
    call.out_row = call.J;
    call.accumulate = accumulate;
    launched("product", lora_linear::product(call, on.stream()));
  }

  void add_parts(const Tensor& parts, int64_t in_split, int64_t in_row, int splits, void* out, Dtype out_type,
                 int64_t out_row, int64_t rows, int64_t cols) const {
    const Sum call{parts.const_data_ptr(), in_split, in_row, splits, out, out_type, out_row, rows, cols, 1, 0, {}};
    launched("sum", lora_linear::sum(call, on.stream()));
  }

 private:
  const uint64_t* const seed_;  // on the device; null: not given
};

// A contiguous matrix of `cols` columns, and its transpose.
inline Strided by_rows(const void* data, Dtype type, int64_t cols) {
  return {data, type, cols, 1};
}
inline Strided transposed(const Strided& matrix) {
  return {matrix.data, matrix.type, matrix.col, matrix.row};
}

// Columns rank0 ... of the [M, R] tensor h or ds.
inline Strided columns_of(const CudaCall& call, const Tensor& low, int64_t rank0) {
  const int64_t bytes = call.accumulator() == Dtype::kFloat64 ? 8 : 4;
  return {static_cast<const char*>(low.const_data_ptr()) + rank0 * bytes, call.accumulator(), call.R, 1};
}

std::vector<Tensor> lora_linear_backward_cuda(const std::vector<Tensor>& dy, const OptionalTensor& x,
                                              const OptionalTensor& h, const std::vector<Tensor>& weight,
                                              const std::vector<Tensor>& lora_A, const std::vector<Tensor>& lora_B,
                                              const std::vector<int64_t>& member, const std::vector<double>& scaling,
                                              const std::vector<double>& dropout_p, const OptionalTensor& seed,
                                              const std::vector<bool>& needs);
std::vector<Tensor> lora_add_backward_cuda(const Tensor& dy, const OptionalTensor& x, const OptionalTensor& h,
                                           const std::vector<Tensor>& lora_A, const std::vector<Tensor>& lora_B,
                                           const std::vector<double>& scaling, const std::vector<double>& dropout_p,
                                           const OptionalTensor& seed, const std::vector<bool>& needs);

// y = residual + h B^T + biases, of a call without weights; y may be the residual's memory.
void lora_expand_cuda(CudaCall& call, const Tensor& y, const Rows& residual, const Tensor& h);
// Launches `gemm`, of which out, I, J, the direction and the members are given, with the adapters `which` in its
// contraction: their operands are written before, from `low` (h or ds), and the biases, `bias` among them (or null).
// False, and nothing is launched, where that is not made for this call.
bool lora_concat_cuda(const CudaCall& call, lora_linear::ConcatGemm gemm, const std::vector<size_t>& which,
                      const Tensor& low, const void* bias);
// dB of such a call, with `needs` and `gradients` in lora_add's order, and ds [M, R] where a dA is needed, which the
// caller makes of it. M >= 1.
OptionalTensor lora_expand_backward_cuda(CudaCall& call, const Rows& dy, const OptionalTensor& h,
                                         const std::vector<bool>& needs, const std::vector<Tensor>& gradients);

}  // namespace pk
