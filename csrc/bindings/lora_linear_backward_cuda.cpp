// lora_linear's backward on a GPU: only what `needs` asks for. dx holds the adapters' part first and each projection's
// GEMM is added on top of it in place, or on sm_90, where that is wanted, one kernel computes both; weight gradients
// are GEMMs; what a kernel splits is summed in a fixed order.
#include "bindings/lora_add_check.h"
#include "bindings/lora_linear_cuda_call.h"
#include "bindings/lora_linear_gradients.h"

namespace pk {
namespace {

using lora_linear::DyPass;
using lora_linear::Expand;
using lora_linear::XPass;

struct Backward {
  CudaCall& call;
  const std::vector<Rows>& dy;
  const Rows* x;                      // null: not given
  const Tensor* h;                    // null: not given
  const std::vector<Tensor>& weight;  // none for lora_add
  const std::vector<bool>& needs;
  const std::vector<Tensor>& gradients;
  const GradientOrder at;
  OptionalTensor ds;  // [M, R], where anything reads it

  int64_t N(size_t g) const { return dy[g].tensor.size(dy[g].tensor.dim() - 1); }
  bool needs_ds(size_t l) const { return needs[0] || needs[at.lora_A(l)]; }
  bool needs_dB(size_t l) const { return needs[at.lora_B(l)]; }
  void* gradient(size_t index) const { return gradients[index].mutable_data_ptr(); }
  Strided dy_of(size_t g) const { return {dy[g].data(), call.type, dy[g].stride, 1}; }
  Strided x_rows() const { return {x->data(), call.type, x->stride, 1}; }
};

// Parts of a factor's gradient: the gradient itself where there is one part of its own dtype.
struct Parts {
  Tensor tensor;
  int count;
  bool in_place;

  float* data() const { return static_cast<float*>(tensor.mutable_data_ptr()); }
};

Parts parts_of(const CudaCall& call, const Tensor& gradient, int count) {
  const bool in_place = count == 1 && call.factors == Dtype::kFloat32;
  return {in_place ? gradient : call.scratch({count, gradient.numel()}), count, in_place};
}

void add_parts(const CudaCall& call, const Parts& parts, const Tensor& gradient) {
  if (parts.in_place) return;
  const int64_t numel = gradient.numel();
  call.add_parts(parts.tensor, numel, numel, parts.count, gradient.mutable_data_ptr(), call.factors, numel, 1, numel);
}

// Columns of ds that neighbouring adapters of `which` own are summed by one launch.
void add_ds_parts(const Backward& b, const Tensor& parts, int splits, const std::vector<size_t>& which, size_t first,
                  int count) {
  const CudaCall& call = b.call;
  for (size_t i = first, end = first + static_cast<size_t>(count); i < end;) {
    const int64_t rank0 = call.adapters[which[i]].rank0;
    int64_t columns = 0;
    for (; i < end && call.adapters[which[i]].rank0 == rank0 + columns; ++i) columns += call.adapters[which[i]].R;
    const lora_linear::Sum sum{columns_of(call, parts, rank0).data,
                               call.M * call.R,
                               call.R,
                               splits,
                               const_cast<void*>(columns_of(call, *b.ds, rank0).data),
                               Dtype::kFloat32,
                               call.R,
                               call.M,
                               columns,
                               1,
                               0,
                               {}};
    call.launched("sum", lora_linear::sum(sum, call.on.stream()));
  }
}

// ds and dB of one member's adapters.
void run_dy_pass(const Backward& b, size_t g) {
  const CudaCall& call = b.call;
  std::vector<size_t> which;
  bool any_ds = false, any_dB = false;
  for (const size_t l : call.of_member[g]) {
    if (b.needs_ds(l) || b.needs_dB(l)) which.push_back(l);
    any_ds = any_ds || b.needs_ds(l);
    any_dB = any_dB || b.needs_dB(l);
  }
  const int splits = lora_linear::dy_column_blocks(b.N(g));
  OptionalTensor ds_parts;
  if (any_ds && !which.empty()) ds_parts = splits > 1 ? call.scratch({splits, call.M, call.R}) : *b.ds;
  call.in_launches(which, Factor::kB, [&](const Adapters& chosen, size_t first) {
    DyPass pass{};
    pass.dy = b.dy[g].data();
    pass.dy_stride = b.dy[g].stride;
    pass.M = call.M;
    pass.N = b.N(g);
    pass.h = any_dB ? static_cast<const float*>(b.h->const_data_ptr()) : nullptr;
    pass.ds = any_ds ? static_cast<float*>(ds_parts->mutable_data_ptr()) : nullptr;
    pass.R = call.R;
    pass.adapters = chosen;
    std::vector<std::pair<Parts, Tensor>> sums;
    for (int i = 0; i < chosen.count; ++i) {
      const size_t l = which[first + static_cast<size_t>(i)];
      if (!b.needs_dB(l)) continue;
      const Tensor& gradient = b.gradients[b.at.lora_B(l)];
      const int chunks = lora_linear::dy_row_chunks(call.M, b.N(g));
      sums.emplace_back(parts_of(call, gradient, chunks), gradient);
      pass.dB[i] = sums.back().first.data();
    }
    call.launched("dy_pass", lora_linear::dy_pass(call.type, call.factors, pass, call.on.stream()));
    for (const auto& [parts, gradient] : sums) add_parts(call, parts, gradient);
    if (any_ds && splits > 1) add_ds_parts(b, *ds_parts, splits, which, first, chosen.count);
  });
}

// dA of all adapters that want one, if there is an x.
void run_x_pass(const Backward& b) {
  const CudaCall& call = b.call;
  if (!b.x) return;
  std::vector<size_t> which;
  for (size_t l = 0; l < call.adapters.size(); ++l) {
    if (b.needs[b.at.lora_A(l)]) which.push_back(l);
  }
  call.in_launches(which, Factor::kA, [&](const Adapters& chosen, size_t first) {
    XPass pass{};
    pass.x = b.x->data();
    pass.x_stride = b.x->stride;
    pass.M = call.M;
    pass.K = call.K;
    pass.ds = static_cast<const float*>(b.ds->const_data_ptr());
    pass.R = call.R;
    pass.seed = call.seed_of(chosen);
    pass.adapters = chosen;
    std::vector<std::pair<Parts, Tensor>> sums;
    for (int i = 0; i < chosen.count; ++i) {
      const size_t l = which[first + static_cast<size_t>(i)];
      const Tensor& gradient = b.gradients[b.at.lora_A(l)];
      sums.emplace_back(parts_of(call, gradient, lora_linear::x_row_chunks(call.M, call.K)), gradient);
      pass.dA[i] = sums.back().first.data();
    }
    call.launched("x_pass", lora_linear::x_pass(call.type, call.factors, pass, call.on.stream()));
    for (const auto& [parts, gradient] : sums) add_parts(call, parts, gradient);
  });
}

// dx = the adapters' part.
void run_expand(const Backward& b) {
  const CudaCall& call = b.call;
  call.in_launches(call.all(), Factor::kA, [&](const Adapters& chosen, size_t first) {
    const Expand expand{b.gradient(0),
                        call.M,
                        call.K,
                        static_cast<const float*>(b.ds->const_data_ptr()),
                        call.R,
                        nullptr,
                        true,
                        first > 0,
                        call.seed_of(chosen),
                        chosen};
    call.launched("expand", lora_linear::expand(call.type, call.factors, expand, call.on.stream()));
  });
}

// All of dx by one GEMM over the members' contractions, one after the other, and the adapters'. Its sums can be masked
// once: where an adapter drops and is not alone, expand goes before. False where dx has the adapters' part alone yet.
bool run_dx(const Backward& b) {
  const CudaCall& call = b.call;
  lora_linear::ConcatGemm gemm{};
  bool wanted = sm90_wanted(call.on) && !b.weight.empty() && b.weight.size() <= lora_linear::kMostConcatMembers;
  for (size_t g = 0; wanted && g < b.weight.size(); ++g) {
    const Tensor& weight = b.weight[g];
    wanted = weight.stride(1) == 1;
    gemm.member[gemm.members++] = {b.dy[g].data(), weight.const_data_ptr(), b.dy[g].stride, weight.stride(0), b.N(g)};
  }
  gemm.out = b.gradient(0);
  gemm.I = call.M;
  gemm.J = call.K;
  gemm.across = true;
  const bool alone = call.adapters.size() == 1;
  const bool drops = std::any_of(call.adapters.begin(), call.adapters.end(), [](const auto& a) { return a.drops(); });
  if (wanted && (alone || !drops) && lora_concat_cuda(call, gemm, call.all(), *b.ds, nullptr)) return true;
  run_expand(b);
  gemm.accumulate = true;
  return wanted && lora_concat_cuda(call, gemm, {}, *b.ds, nullptr);
}

// True where dx has the base products too.
bool run_tensor_cores(const Backward& b) {
  for (size_t g = 0; g < b.dy.size(); ++g) run_dy_pass(b, g);
  run_x_pass(b);
  return b.needs[0] && run_dx(b);
}

void run_plain(const Backward& b) {
  const CudaCall& call = b.call;
  for (size_t l = 0; l < call.adapters.size(); ++l) {
    const CudaCall::Adapter& a = call.adapters[l];
    const int64_t N = b.N(a.member);
    const Strided dy = b.dy_of(a.member);
    if (b.needs_ds(l)) {
      const Strided B = by_rows(a.B.const_data_ptr(), call.factors, a.R), ds = columns_of(call, *b.ds, a.rank0);
      call.multiply(call.product_of(call.M, a.R, N, dy, B, a, a.scaling, Masked::kNone), const_cast<void*>(ds.data),
                    call.accumulator(), call.R);
    }
    if (b.needs_dB(l)) {
      const Strided h = columns_of(call, *b.h, a.rank0);
      call.multiply(call.product_of(N, a.R, call.M, transposed(dy), h, a, 1, Masked::kNone), b.gradient(b.at.lora_B(l)),
                    call.factors, a.R);
    }
    if (b.x && b.needs[b.at.lora_A(l)]) {
      const Strided ds = columns_of(call, *b.ds, a.rank0);
      call.multiply(call.product_of(a.R, call.K, call.M, transposed(ds), b.x_rows(), a, 1, Masked::kRight),
                    b.gradient(b.at.lora_A(l)), call.factors, call.K);
    }
  }
  if (!b.needs[0]) return;
  const bool in_place = call.type == call.accumulator();
  const Tensor dx = in_place ? b.gradients[0] : call.scratch({call.M, call.K});
  for (size_t l = 0; l < call.adapters.size(); ++l) {
    const CudaCall::Adapter& a = call.adapters[l];
    const Strided ds = columns_of(call, *b.ds, a.rank0), A = by_rows(a.A.const_data_ptr(), call.factors, call.K);
    call.multiply_onto(call.product_of(call.M, call.K, a.R, ds, A, a, 1, Masked::kOut), dx, l > 0);
  }
  if (!in_place) call.add_parts(dx, 0, call.K, 1, b.gradient(0), call.type, call.K, call.M, call.K);
}

// Gradients of biases, and all that is a library GEMM; dx may be complete.
void run_rest(const Backward& b, bool has_dx) {
  const CudaCall& call = b.call;
  const auto column_sum = [&](size_t g, double scale, size_t index, Dtype type) {
    if (!b.needs[index]) return;
    call.launched("column_sum", lora_linear::column_sum(b.dy_of(g), call.M, b.N(g), scale, b.gradient(index), type,
                                                        call.on.stream()));
  };
  for (size_t l = 0; l < call.adapters.size(); ++l) {
    const CudaCall::Adapter& a = call.adapters[l];
    column_sum(a.member, a.scaling, b.at.lora_bias(l), call.factors);
  }
  for (size_t g = 0; g < b.weight.size(); ++g) {
    column_sum(g, 1, b.at.bias(g), call.type);
    const Tensor& weight = b.weight[g];
    const int64_t N = b.N(g), stride = b.dy[g].stride;
    if (b.needs[0] && !has_dx) {
      cuda_gemm(matrix(b.gradients[0], call.M, call.K, call.K, 1), matrix(b.dy[g].tensor, call.M, N, stride, 1),
                matrix(weight, N, call.K, weight.stride(0), weight.stride(1)), true);
    }
    if (b.needs[b.at.weight(g)]) {
      cuda_gemm(b.gradients[b.at.weight(g)], matrix(b.dy[g].tensor, N, call.M, 1, stride),
                matrix(b.x->tensor, call.M, call.K, b.x->stride, 1), false);
    }
  }
}

// All gradients, from rows of dy and x; there is at least one. Returns ds.
OptionalTensor run(CudaCall& call, const std::vector<Rows>& dy, const OptionalTensor& x, const OptionalTensor& h,
                   const std::vector<Tensor>& weight, const std::vector<bool>& needs,
                   const std::vector<Tensor>& gradients) {
  std::optional<Rows> x_rows;
  if (x) x_rows.emplace(as_rows(*x));
  Backward b{call,  dy,        x_rows ? &*x_rows : nullptr,           h ? &*h : nullptr, weight,
             needs, gradients, {weight.size(), call.adapters.size()}, std::nullopt};
  bool any_ds = false;
  for (size_t l = 0; l < call.adapters.size(); ++l) any_ds = any_ds || b.needs_ds(l);
  if (any_ds) b.ds = call.scratch({call.M, call.R});
  bool has_dx = false;
  if (call.tensor_cores) {
    has_dx = run_tensor_cores(b);
  } else {
    run_plain(b);
  }
  run_rest(b, has_dx);
  return b.ds;
}

}  // namespace

OptionalTensor lora_expand_backward_cuda(CudaCall& call, const Rows& dy, const OptionalTensor& h,
                                         const std::vector<bool>& needs, const std::vector<Tensor>& gradients) {
  return run(call, {dy}, std::nullopt, h, {}, needs, gradients);
}

std::vector<Tensor> lora_linear_backward_cuda(const std::vector<Tensor>& dy, const OptionalTensor& x,
                                              const OptionalTensor& h, const std::vector<Tensor>& weight,
                                              const std::vector<Tensor>& lora_A, const std::vector<Tensor>& lora_B,
                                              const std::vector<int64_t>& member, const std::vector<double>& scaling,
                                              const std::vector<double>& dropout_p, const OptionalTensor& seed,
                                              const std::vector<bool>& needs) {
  check_backward(dy, x, h, weight, lora_A, lora_B, member, scaling, dropout_p, seed, needs);
  CudaCall call("lora_linear_backward", weight, lora_A, lora_B, member, scaling, dropout_p, seed);
  const std::vector<Tensor> gradients = new_gradients(dy, weight, lora_A, lora_B, needs);
  std::vector<Rows> dy_rows;
  dy_rows.reserve(dy.size());
  for (const Tensor& d : dy) dy_rows.push_back(as_rows(d));
  call.M = dy_rows[0].count;
  if (call.M == 0) {
    for (Tensor gradient : gradients) torch::stable::zero_(gradient);
    return gradients;
  }
  run(call, dy_rows, x, h, weight, needs, gradients);
  return gradients;
}

std::vector<Tensor> lora_add_backward_cuda(const Tensor& dy, const OptionalTensor& x, const OptionalTensor& h,
                                           const std::vector<Tensor>& lora_A, const std::vector<Tensor>& lora_B,
                                           const std::vector<double>& scaling, const std::vector<double>& dropout_p,
                                           const OptionalTensor& seed, const std::vector<bool>& needs) {
  check_add_backward(dy, x, h, lora_A, lora_B, scaling, dropout_p, seed, needs);
  CudaCall call("lora_add_backward", dy, lora_A, lora_B, scaling, dropout_p, seed);
  const std::vector<Tensor> gradients = new_gradients({dy}, {}, lora_A, lora_B, needs);
  const std::vector<Rows> dy_rows{as_rows(dy)};
  call.M = dy_rows[0].count;
  if (call.M > 0) {
    run(call, dy_rows, x, h, {}, needs, gradients);
  } else {
    for (Tensor gradient : gradients) torch::stable::zero_(gradient);
  }
  return gradients;
}

}  // namespace pk
