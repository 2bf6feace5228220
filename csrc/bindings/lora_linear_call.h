// A call of lora_linear's CPU kernels: the Problem filled from tensors, its factors in a type that a kernel takes, room
// for intermediate results.
#pragma once

#include <cstring>
#include <utility>

#include "bindings/lora_linear_check.h"
#include "bindings/lora_linear_gradients.h"
#include "lora_linear/lora_linear.h"

namespace pk {

inline int64_t size_of(Dtype dtype) {
  return dtype == Dtype::kFloat64 ? 8 : dtype == Dtype::kFloat32 ? 4 : 2;
}

// A Problem with what it points to, and the tensors that keep the memory alive.
class LoraLinearCall {
 public:
  lora_linear::Problem problem{};
  std::vector<lora_linear::Member> members;
  std::vector<lora_linear::Adapter> adapters;
  const lora_linear::Kernels* kernels = nullptr;  // null for fp64

  LoraLinearCall(const std::vector<Tensor>& weight, const std::vector<Tensor>& lora_A,
                 const std::vector<Tensor>& lora_B, const std::vector<int64_t>& member,
                 const std::vector<double>& scaling, const std::vector<double>& dropout_p, const OptionalTensor& seed)
      : LoraLinearCall(weight.size(), weight[0], lora_A, lora_B, member, scaling, dropout_p, seed) {
    for (size_t g = 0; g < weight.size(); ++g) fill_member(members[g], weight[g]);
  }

  // lora_add: one member without a weight. `like` has the dtype of x.
  LoraLinearCall(const Tensor& like, const std::vector<Tensor>& lora_A, const std::vector<Tensor>& lora_B,
                 const std::vector<double>& scaling, const std::vector<double>& dropout_p, const OptionalTensor& seed)
      : LoraLinearCall(1, like, lora_A, lora_B, std::vector<int64_t>(lora_A.size()), scaling, dropout_p, seed) {
    members[0].N = lora_B[0].size(0);
  }

  bool is_double() const { return is_double_; }
  int32_t accumulator() const { return is_double_ ? aoti_torch_dtype_float64() : aoti_torch_dtype_float32(); }

  void set_rows(int64_t rows) {
    problem.M = rows;
    problem.base = is_double_ || rows <= lora_linear::kFewRows;
    for (const lora_linear::Member& m : members)
      problem.base = problem.base && m.weight && (is_double_ || m.weight_k == 1 || m.weight_n == 1);
  }

  void set_x(const Rows& x) {
    problem.x = x.data();
    problem.x_stride = x.stride;
    alive_.push_back(x.tensor);
  }

  // Memory of a parameter: contiguous, and widened to fp32 where no kernel takes its type.
  const void* factor(const Tensor& tensor) {
    Tensor contiguous = dense(tensor);
    if (widened_) {
      const Tensor wide = empty({contiguous.numel()}, aoti_torch_dtype_float32());
      lora_linear::table().convert(*widened_, contiguous.const_data_ptr(), Dtype::kFloat32, wide.mutable_data_ptr(),
                                   wide.numel());
      contiguous = wide;
    }
    alive_.push_back(contiguous);
    return contiguous.const_data_ptr();
  }

  const void* vector(const Tensor& tensor) {
    alive_.push_back(dense(tensor));
    return alive_.back().const_data_ptr();
  }

  // Where a kernel writes the gradient of a factor: into it, or into an fp32 copy that finish() narrows.
  void* factor_gradient(const Tensor& gradient) {
    if (!widened_) return gradient.mutable_data_ptr();
    narrowed_.emplace_back(empty({gradient.numel()}, aoti_torch_dtype_float32()), gradient);
    return narrowed_.back().first.mutable_data_ptr();
  }

  void zero_factor_gradient(void* gradient, int64_t numbers) const {
    if (gradient) std::memset(gradient, 0, numbers * factor_size_);
  }

  void finish() const {
    for (const auto& [wide, narrow] : narrowed_) {
      lora_linear::table().convert(Dtype::kFloat32, wide.const_data_ptr(), *widened_, narrow.mutable_data_ptr(),
                                   wide.numel());
    }
  }

  float* scratch(int64_t floats) {
    alive_.push_back(empty({floats}, aoti_torch_dtype_float32()));
    return static_cast<float*>(alive_.back().mutable_data_ptr());
  }

  // Room for the slices of the members whose base product streams W across the sum, in a few-row call.
  void make_slices(bool forward) {
    for (lora_linear::Member& m : members) {
      if (!problem.base || (forward ? m.weight_k : m.weight_n) == 1) continue;
      const int64_t length = forward ? problem.K : m.N, columns = forward ? m.N : problem.K;
      m.streamed = scratch(lora_linear::slices(length) * problem.M * lora_linear::pitch(columns));
    }
  }

  void run(lora_linear::Phase phase, int64_t units, int64_t work) const {
    parallel(units, work, [&](int64_t begin, int64_t end) { phase(problem, begin, end); });
  }

 private:
  LoraLinearCall(size_t G, const Tensor& like, const std::vector<Tensor>& lora_A, const std::vector<Tensor>& lora_B,
                 const std::vector<int64_t>& member, const std::vector<double>& scaling,
                 const std::vector<double>& dropout_p, const OptionalTensor& seed)
      : members(G), adapters(lora_A.size()) {
    const Dtype type = *dtype_of(dtype_code(like));
    choose_kernels(type, *dtype_of(dtype_code(lora_A[0])));
    is_double_ = type == Dtype::kFloat64;
    const uint64_t key = seed ? *static_cast<const uint64_t*>(seed->const_data_ptr()) : 0;
    for (size_t l = 0; l < lora_A.size(); ++l) {
      lora_linear::Adapter& adapter = adapters[l];
      adapter = {};
      adapter.member = member[l];
      adapter.R = lora_A[l].size(0);
      adapter.rank0 = problem.R;
      adapter.A = factor(lora_A[l]);
      adapter.B = factor(lora_B[l]);
      adapter.scaling = scaling[l];
      adapter.dropout = make_dropout(dropout_p[l], key, static_cast<uint32_t>(l));
      problem.R += adapter.R;
      members[member[l]].R += adapter.R;
    }
    problem.K = lora_A[0].size(1);
    problem.G = static_cast<int64_t>(members.size());
    problem.L = static_cast<int64_t>(adapters.size());
    problem.member = members.data();
    problem.adapter = adapters.data();
  }

  void choose_kernels(Dtype type, Dtype factors) {
    factor_size_ = size_of(factors);
    if (type == Dtype::kFloat64) return;
    kernels = lora_linear::kernels(type, factors);
    if (kernels) return;
    widened_ = factors;
    factor_size_ = sizeof(float);
    kernels = lora_linear::kernels(type, Dtype::kFloat32);
  }

  static void fill_member(lora_linear::Member& member, const Tensor& weight) {
    member.N = weight.size(0);
    member.weight = weight.const_data_ptr();
    member.weight_n = weight.stride(0);
    member.weight_k = weight.stride(1);
    // The stride of a dimension of size 1 says nothing.
    if (weight.size(1) == 1 && member.weight_n != 1) member.weight_k = 1;
    if (member.N == 1 && member.weight_k != 1) member.weight_n = 1;
  }

  std::optional<Dtype> widened_;
  int64_t factor_size_ = 0;  // of what kernels see
  std::vector<std::pair<Tensor, Tensor>> narrowed_;
  std::vector<Tensor> alive_;
  bool is_double_ = false;
};

// Gives the phases their outputs; an output that is not needed stays null.
inline void set_outputs(LoraLinearCall& call, const GradientOrder& at, const std::vector<Tensor>& gradients,
                        const std::vector<bool>& needs) {
  if (needs[0]) call.problem.dx = gradients[0].mutable_data_ptr();
  for (size_t g = 0; g < at.G; ++g) {
    if (needs[at.bias(g)]) call.members[g].dbias = gradients[at.bias(g)].mutable_data_ptr();
  }
  for (size_t l = 0; l < at.L; ++l) {
    lora_linear::Adapter& adapter = call.adapters[l];
    if (needs[at.lora_A(l)]) adapter.dA = call.factor_gradient(gradients[at.lora_A(l)]);
    if (needs[at.lora_B(l)]) adapter.dB = call.factor_gradient(gradients[at.lora_B(l)]);
    if (needs[at.lora_bias(l)]) adapter.dbias = call.factor_gradient(gradients[at.lora_bias(l)]);
  }
}

// All gradients but the weights', which are a GEMM, and the base part of dx of many rows, which is another.
void run_lora_linear_backward(LoraLinearCall& call);

}  // namespace pk
