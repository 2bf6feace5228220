// lora_linear for CPU tensors: check, allocate, fill the Problem, run its phases; the base product of many rows is
// torch's own GEMM, called in place.
#include <cstring>
#include <tuple>

#include "bindings/lora_linear.h"
#include "bindings/lora_linear_check.h"
#include "lora_linear/lora_linear.h"

namespace pk {
namespace {

using lora_linear::Adapter;
using lora_linear::Kernels;
using lora_linear::Member;
using lora_linear::Phase;
using lora_linear::Problem;

// A Problem with what it points to, and the tensors that keep the memory alive.
class Call {
 public:
  Problem problem{};
  std::vector<Member> members;
  std::vector<Adapter> adapters;
  const Kernels* kernels = nullptr;  // null for fp64

  Call(const std::vector<Tensor>& weight, const std::vector<Tensor>& lora_A, const std::vector<Tensor>& lora_B,
       const std::vector<int64_t>& member, const std::vector<double>& scaling, const std::vector<double>& dropout_p,
       const OptionalTensor& seed)
      : members(weight.size()), adapters(lora_A.size()) {
    const Dtype type = *dtype_of(dtype_code(weight[0]));
    choose_kernels(type, *dtype_of(dtype_code(lora_A[0])));
    is_double_ = type == Dtype::kFloat64;
    for (size_t g = 0; g < weight.size(); ++g) fill_member(members[g], weight[g]);
    const uint64_t key = seed ? *static_cast<const uint64_t*>(seed->const_data_ptr()) : 0;
    for (size_t l = 0; l < lora_A.size(); ++l) {
      Adapter& adapter = adapters[l];
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
    problem.K = weight[0].size(1);
    problem.G = static_cast<int64_t>(members.size());
    problem.L = static_cast<int64_t>(adapters.size());
    problem.member = members.data();
    problem.adapter = adapters.data();
  }

  bool is_double() const { return is_double_; }
  int32_t accumulator() const { return is_double_ ? aoti_torch_dtype_float64() : aoti_torch_dtype_float32(); }

  void set_rows(int64_t rows) {
    problem.M = rows;
    problem.base = is_double_ || rows <= lora_linear::kFewRows;
    for (const Member& m : members) problem.base = problem.base && (is_double_ || m.weight_k == 1 || m.weight_n == 1);
  }

  void set_x(const Rows& x) {
    problem.x = x.data();
    problem.x_stride = x.stride;
    alive_.push_back(x.tensor);
  }

  // Memory of a parameter: contiguous, and widened to fp32 where no kernel takes its type.
  const void* factor(const Tensor& tensor) {
    Tensor contiguous = tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
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
    alive_.push_back(tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor));
    return alive_.back().const_data_ptr();
  }

  // Where a kernel writes the gradient of a factor: into it, or into an fp32 copy that finish() narrows.
  void* factor_gradient(const Tensor& gradient) {
    if (!widened_) return gradient.mutable_data_ptr();
    narrowed_.emplace_back(empty({gradient.numel()}, aoti_torch_dtype_float32()), gradient);
    return narrowed_.back().first.mutable_data_ptr();
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

  void run(Phase phase, int64_t units, int64_t work) const {
    parallel(units, work, [&](int64_t begin, int64_t end) { phase(problem, begin, end); });
  }

 private:
  void choose_kernels(Dtype type, Dtype factors) {
    if (type == Dtype::kFloat64) return;
    kernels = lora_linear::kernels(type, factors);
    if (kernels) return;
    widened_ = factors;
    kernels = lora_linear::kernels(type, Dtype::kFloat32);
  }

  static void fill_member(Member& member, const Tensor& weight) {
    member = {};
    member.N = weight.size(0);
    member.weight = weight.const_data_ptr();
    member.weight_n = weight.stride(0);
    member.weight_k = weight.stride(1);
    // The stride of a dimension of size 1 says nothing.
    if (weight.size(1) == 1 && member.weight_n != 1) member.weight_k = 1;
    if (member.N == 1 && member.weight_k != 1) member.weight_n = 1;
  }

  std::optional<Dtype> widened_;
  std::vector<std::pair<Tensor, Tensor>> narrowed_;
  std::vector<Tensor> alive_;
  bool is_double_ = false;
};

int64_t sum_of_N(const Problem& p) {
  int64_t sum = 0;
  for (int64_t g = 0; g < p.G; ++g) sum += p.member[g].N;
  return sum;
}

std::tuple<std::vector<Tensor>, Tensor> forward(
    const Tensor& x, const std::vector<Tensor>& weight, const std::vector<OptionalTensor>& bias,
    const std::vector<Tensor>& lora_A, const std::vector<Tensor>& lora_B, const std::vector<OptionalTensor>& lora_bias,
    const std::vector<int64_t>& member, const std::vector<double>& scaling, const std::vector<double>& dropout_p,
    const OptionalTensor& seed) {
  LoraLinearCheck({x, weight, bias, lora_A, lora_B, lora_bias, member, scaling, dropout_p, seed}).run();
  Call call(weight, lora_A, lora_B, member, scaling, dropout_p, seed);
  Problem& p = call.problem;
  const Rows rows = as_rows(x);
  call.set_rows(rows.count);
  call.set_x(rows);
  const Tensor h = empty({p.M, p.R}, call.accumulator());
  p.h = h.mutable_data_ptr();
  std::vector<Tensor> y;
  y.reserve(weight.size());
  for (size_t g = 0; g < weight.size(); ++g) {
    y.push_back(empty_rows(x, call.members[g].N, dtype_code(x)));
    call.members[g].y = y[g].mutable_data_ptr();
    if (bias[g]) call.members[g].bias = call.vector(*bias[g]);
  }
  for (size_t l = 0; l < lora_bias.size(); ++l) {
    if (lora_bias[l]) call.adapters[l].bias = call.factor(*lora_bias[l]);
  }
  if (p.M == 0) return {y, h};
  if (call.is_double()) {
    lora_linear::forward_double(p);
    return {y, h};
  }
  p.scratch = call.scratch(lora_linear::member_scratch(p));
  call.run(call.kernels->shrink, lora_linear::row_units(p) * p.L, p.M * p.K * p.R);
  call.run(call.kernels->expand, lora_linear::member_units(p), p.M * sum_of_N(p) * (p.R + (p.base ? p.K : 0)));
  for (size_t g = 0; !p.base && g < weight.size(); ++g) {
    const Member& m = call.members[g];
    gemm(matrix(y[g], p.M, m.N, m.N, 1), matrix(rows.tensor, p.M, p.K, p.x_stride, 1),
         matrix(weight[g], p.K, m.N, m.weight_k, m.weight_n), m.R > 0 || m.bias);
  }
  return {y, h};
}

// The gradients, in the order of `needs`: x, weights, biases, lora_As, lora_Bs, lora_biases.
class Gradients {
 public:
  std::vector<Tensor> all;

  Gradients(const std::vector<Tensor>& dy, const std::vector<Tensor>& weight, const std::vector<Tensor>& lora_A,
            const std::vector<Tensor>& lora_B, const std::vector<bool>& needs)
      : needs_(needs) {
    all.reserve(needs.size());
    const int32_t dtype = dtype_code(weight[0]), factor_dtype = dtype_code(lora_A[0]);
    all.push_back(needs[0] ? empty_rows(dy[0], weight[0].size(1), dtype) : empty({0}, dtype));
    for (const Tensor& w : weight) add({w.size(0), w.size(1)}, dtype);
    for (const Tensor& w : weight) add({w.size(0)}, dtype);
    for (const Tensor& a : lora_A) add({a.size(0), a.size(1)}, factor_dtype);
    for (const Tensor& b : lora_B) add({b.size(0), b.size(1)}, factor_dtype);
    for (const Tensor& b : lora_B) add({b.size(0)}, factor_dtype);
  }

  bool needed(size_t i) const { return needs_[i]; }

 private:
  void add(std::initializer_list<int64_t> sizes, int32_t dtype) {
    const bool needed = needs_[all.size()];
    all.push_back(needed ? empty(sizes, dtype) : empty({0}, dtype));
  }

  const std::vector<bool>& needs_;
};

void check_backward(const std::vector<Tensor>& dy, const OptionalTensor& x, const OptionalTensor& h,
                    const std::vector<Tensor>& weight, const std::vector<Tensor>& lora_A,
                    const std::vector<Tensor>& lora_B, const std::vector<int64_t>& member,
                    const std::vector<double>& scaling, const std::vector<double>& dropout_p,
                    const OptionalTensor& seed, const std::vector<bool>& needs) {
  const size_t G = weight.size(), L = lora_A.size();
  STD_TORCH_CHECK(dy.size() == G && G >= 1, "lora_linear_backward: dy must have one entry per weight (", G, "), got ",
                  dy.size());
  STD_TORCH_CHECK(needs.size() == 1 + 2 * G + 3 * L, "lora_linear_backward: needs must have ", 1 + 2 * G + 3 * L,
                  " entries, got ", needs.size());
  const std::vector<OptionalTensor> no_bias(G), no_lora_bias(L);
  // Without x its rows are judged by dy's: weight[0] stands in, whose last size is K and whose dtype is x's.
  const Tensor& like_x = x ? *x : weight[0];
  LoraLinearCheck({like_x, weight, no_bias, lora_A, lora_B, no_lora_bias, member, scaling, dropout_p, seed}).run();
  const int64_t M = as_rows(dy[0]).count;
  for (size_t g = 0; g < G; ++g) {
    const bool fits = dy[g].is_cpu() && dtype_code(dy[g]) == dtype_code(weight[g]) && dy[g].dim() >= 1 &&
                      dy[g].size(dy[g].dim() - 1) == weight[g].size(0) && dy[g].numel() == M * weight[g].size(0);
    STD_TORCH_CHECK(fits, "lora_linear_backward: dy[", g, "] must be of y[", g, "]'s shape and dtype");
  }
  STD_TORCH_CHECK(!x || x->numel() == M * weight[0].size(1), "lora_linear_backward: x must have as many rows as dy");
  int64_t R = 0;
  for (const Tensor& a : lora_A) R += a.size(0);
  const int32_t h_dtype =
      dtype_of(dtype_code(weight[0])) == Dtype::kFloat64 ? aoti_torch_dtype_float64() : aoti_torch_dtype_float32();
  STD_TORCH_CHECK(!h || (h->is_cpu() && h->is_contiguous() && dtype_code(*h) == h_dtype && h->numel() == M * R),
                  "lora_linear_backward: h must be the contiguous [M, R] that the forward returned");
  bool reads_x = false, reads_h = false;
  for (size_t g = 0; g < G; ++g) reads_x = reads_x || needs[1 + g];
  for (size_t l = 0; l < L; ++l) {
    reads_x = reads_x || needs[1 + 2 * G + l];
    reads_h = reads_h || needs[1 + 2 * G + L + l];
  }
  STD_TORCH_CHECK(x || !reads_x, "lora_linear_backward: x must be given for gradients of weight or lora_A");
  STD_TORCH_CHECK(h || !reads_h, "lora_linear_backward: h must be given for gradients of lora_B");
}

std::vector<Tensor> backward(const std::vector<Tensor>& dy, const OptionalTensor& x, const OptionalTensor& h,
                             const std::vector<Tensor>& weight, const std::vector<Tensor>& lora_A,
                             const std::vector<Tensor>& lora_B, const std::vector<int64_t>& member,
                             const std::vector<double>& scaling, const std::vector<double>& dropout_p,
                             const OptionalTensor& seed, const std::vector<bool>& needs) {
  check_backward(dy, x, h, weight, lora_A, lora_B, member, scaling, dropout_p, seed, needs);
  Call call(weight, lora_A, lora_B, member, scaling, dropout_p, seed);
  Gradients gradients(dy, weight, lora_A, lora_B, needs);
  const size_t G = weight.size(), L = lora_A.size();
  Problem& p = call.problem;
  call.set_rows(as_rows(dy[0]).count);
  if (p.M == 0) {
    for (const Tensor& gradient : gradients.all) torch::stable::zero_(const_cast<Tensor&>(gradient));
    return gradients.all;
  }
  if (x) call.set_x(as_rows(*x));
  if (h) p.h = const_cast<void*>(h->const_data_ptr());  // read only
  std::vector<Rows> dy_rows;
  dy_rows.reserve(G);
  bool any_dA = false, any_dB = false, any_bias = false;
  for (size_t g = 0; g < G; ++g) {
    Member& m = call.members[g];
    dy_rows.push_back(as_rows(dy[g]));
    m.dy = dy_rows[g].data();
    m.dy_stride = dy_rows[g].stride;
    if (needs[1 + G + g]) m.dbias = gradients.all[1 + G + g].mutable_data_ptr();
    any_bias = any_bias || m.dbias;
  }
  for (size_t l = 0; l < L; ++l) {
    Adapter& adapter = call.adapters[l];
    const size_t dA = 1 + 2 * G + l, dB = dA + L, dbias = dB + L;
    if (needs[dA]) adapter.dA = call.factor_gradient(gradients.all[dA]);
    if (needs[dB]) adapter.dB = call.factor_gradient(gradients.all[dB]);
    if (needs[dbias]) adapter.dbias = call.factor_gradient(gradients.all[dbias]);
    any_dA = any_dA || adapter.dA;
    any_dB = any_dB || adapter.dB;
    any_bias = any_bias || adapter.dbias;
  }
  if (needs[0]) p.dx = gradients.all[0].mutable_data_ptr();
  if (call.is_double()) {
    lora_linear::backward_double(p);
  } else {
    const bool x_pass = p.dx || any_dA;
    int64_t most_blocks = 0, most_scratch = lora_linear::member_scratch(p);
    for (const Member& m : call.members) most_blocks = std::max(most_blocks, lora_linear::blocks(m.N));
    most_scratch = std::max(most_scratch, lora_linear::x_pass_scratch(p));
    p.scratch = call.scratch(most_scratch + (x_pass ? most_blocks * p.M * p.R : 0));
    if (x_pass) p.ds = p.scratch + most_scratch;
    const int64_t N = sum_of_N(p), low_rank = p.M * p.R;
    if (x_pass || any_dB || any_bias) call.run(call.kernels->dy_pass, lora_linear::member_units(p), 2 * N * low_rank);
    if (x_pass && most_blocks > 1) call.run(call.kernels->sum_ds, lora_linear::row_units(p), most_blocks * low_rank);
    if (x_pass) {
      const int64_t base = p.base && p.dx ? p.M * N * p.K : 0;
      call.run(call.kernels->x_pass, lora_linear::blocks(p.K), 2 * p.K * low_rank + base);
    }
    for (size_t g = 0; p.dx && !p.base && g < G; ++g) {
      const Member& m = call.members[g];
      gemm(matrix(gradients.all[0], p.M, p.K, p.K, 1), matrix(dy_rows[g].tensor, p.M, m.N, m.dy_stride, 1),
           matrix(weight[g], m.N, p.K, m.weight_n, m.weight_k), true);
    }
  }
  const Rows x_rows = x ? as_rows(*x) : Rows{dy[0], 0, 0};
  for (size_t g = 0; g < G; ++g) {
    if (!needs[1 + g]) continue;
    gemm(gradients.all[1 + g], matrix(dy_rows[g].tensor, call.members[g].N, p.M, 1, call.members[g].dy_stride),
         matrix(x_rows.tensor, p.M, p.K, x_rows.stride, 1), false);
  }
  call.finish();
  return gradients.all;
}

Tensor dropout_mask(const Tensor& seed, int64_t rows, int64_t cols, double p, int64_t stream) {
  STD_TORCH_CHECK(seed.dim() == 0 && dtype_code(seed) == aoti_torch_dtype_int64(),
                  "lora_dropout_mask: seed must be a 0-d int64 tensor");
  STD_TORCH_CHECK(rows >= 0 && cols >= 0 && 0 <= p && p < 1, "lora_dropout_mask: rows and cols must be 0 or more and p "
                  "in [0, 1), got ", rows, ", ", cols, ", ", p);
  const Tensor mask = empty({rows, cols}, aoti_torch_dtype_bool());
  const uint64_t key = *static_cast<const uint64_t*>(seed.const_data_ptr());
  lora_linear::table().mask(static_cast<uint8_t*>(mask.mutable_data_ptr()), rows, cols,
                            make_dropout(p, key, static_cast<uint32_t>(stream)));
  return mask;
}

}  // namespace

void bind_lora_linear_cpu(torch::stable::detail::StableLibrary& library) {
  library.impl("lora_linear", TORCH_BOX(&forward));
  library.impl("lora_linear_backward", TORCH_BOX(&backward));
  library.impl("lora_dropout_mask", TORCH_BOX(&dropout_mask));
}

}  // namespace pk
