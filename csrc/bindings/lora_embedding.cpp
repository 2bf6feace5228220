// lora_embedding for CPU tensors: columns of A by id, then lora_linear's phases on one member that has a residual,
// h as it is given, and neither x nor weight.
#include <tuple>

#include "bindings/lora_embedding_call.h"
#include "bindings/lora_linear.h"
#include "bindings/lora_linear_call.h"

namespace pk {
namespace {

using lora_embedding::Problem;

constexpr int64_t kCost = 16;  // of one number that is fetched from a column of A, in multiplications

std::tuple<Tensor, Tensor> forward(const Tensor& residual, const Tensor& ids, const std::vector<Tensor>& lora_A,
                                   const std::vector<Tensor>& lora_B, const std::vector<double>& scaling,
                                   const std::optional<int64_t>& padding_idx) {
  const LoraEmbeddingCheck check("lora_embedding", "residual", residual);
  check.run(residual, ids, lora_A, lora_B, scaling, padding_idx);
  const LoraEmbeddingShares shares(ids, lora_A, padding_idx);
  check.range(shares.ids(), ids.numel(), lora_A[0].size(1));
  LoraLinearCall call(residual, without_columns(lora_A), lora_B, scaling, std::vector<double>(lora_A.size()), {});
  lora_linear::Problem& p = call.problem;
  lora_linear::Member& member = call.members[0];
  const Rows rows = as_rows(residual);
  call.set_rows(rows.count);
  member.residual = rows.data();
  member.residual_stride = rows.stride;
  const Tensor y = empty_rows(residual, member.N, dtype_code(residual)), h = empty({p.M, p.R}, call.accumulator());
  member.y = y.mutable_data_ptr();
  p.h = h.mutable_data_ptr();
  if (p.M == 0) return {y, h};
  const lora_embedding::Table& table = lora_embedding::table();
  const lora_embedding::Phase gather = call.is_double() ? lora_embedding::gather_double : table.gather;
  shares.each_gather(scaling, h, [&](const Problem& share) {
    parallel(lora_embedding::units(p.M), p.M * share.R * kCost,
             [&](int64_t begin, int64_t end) { gather(share, begin, end); });
  });
  if (call.is_double()) {
    lora_linear::forward_double(p);
    return {y, h};
  }
  p.scratch = call.scratch(lora_linear::member_scratch(p));
  call.run(call.kernels->expand, lora_linear::member_units(p), p.M * member.N * p.R);
  return {y, h};
}

std::vector<Tensor> backward(const Tensor& dy, const Tensor& ids, const OptionalTensor& h,
                             const std::vector<Tensor>& lora_A, const std::vector<Tensor>& lora_B,
                             const std::vector<double>& scaling, const std::optional<int64_t>& padding_idx,
                             const std::vector<bool>& needs) {
  const size_t L = lora_A.size();
  const LoraEmbeddingCheck check("lora_embedding_backward", "dy", dy);
  check.count(needs, L);
  check.run(dy, ids, lora_A, lora_B, scaling, padding_idx);
  check.backward(dy, ids, h, lora_A, needs);
  const LoraEmbeddingShares shares(ids, lora_A, padding_idx);
  check.range(shares.ids(), ids.numel(), lora_A[0].size(1));
  const std::vector<Tensor> gradients = new_factor_gradients(lora_A, lora_B, needs);
  LoraLinearCall call(dy, without_columns(lora_A), lora_B, scaling, std::vector<double>(L), {});
  lora_linear::Problem& p = call.problem;
  const Rows rows = as_rows(dy);
  call.members[0].dy = rows.data();
  call.members[0].dy_stride = rows.stride;
  call.set_rows(rows.count);
  if (p.M == 0) {
    for (Tensor gradient : gradients) torch::stable::zero_(gradient);
    return gradients;
  }
  if (h) p.h = const_cast<void*>(h->const_data_ptr());  // read only
  for (size_t l = 0; l < L; ++l) {
    // K is 0: what wants dA has its ds computed, and the pass over x has nothing to do.
    if (needs[l]) call.adapters[l].dA = gradients[l].mutable_data_ptr();
    if (needs[L + l]) call.adapters[l].dB = call.factor_gradient(gradients[L + l]);
  }
  if (call.is_double()) {
    lora_linear::backward_double(p);
  } else {
    run_lora_linear_backward(call);
  }
  call.finish();
  shares.each_scatter(needs, gradients, [&](size_t l, Problem& share) {
    std::vector<double> ds;
    if (call.is_double()) {
      ds.resize(p.M * share.R);
      lora_linear::ds_double(p, call.adapters[l], ds.data());
      share.ds = ds.data();
      share.pitch = share.R;
      share.rank0 = 0;
    } else {
      share.ds = p.ds;
    }
    const lora_embedding::Table& table = lora_embedding::table();
    const lora_embedding::Phase scatter = call.is_double() ? lora_embedding::scatter_double : table.scatter;
    parallel(lora_embedding::units(p.M), p.M * share.R * kCost,
             [&](int64_t begin, int64_t end) { scatter(share, begin, end); });
  });
  return gradients;
}

}  // namespace

void bind_lora_embedding_cpu(torch::stable::detail::StableLibrary& library) {
  library.impl("lora_embedding", TORCH_BOX(&forward));
  library.impl("lora_embedding_backward", TORCH_BOX(&backward));
}

}  // namespace pk
