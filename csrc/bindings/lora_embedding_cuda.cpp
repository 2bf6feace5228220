// lora_embedding on a GPU: columns of A by id, then what lora_add does with h and ds. Nothing here waits for the device
// or reads from it; the order of the ids is torch's own sort.
#include <tuple>

#include "bindings/lora_embedding_call.h"
#include "bindings/lora_linear.h"
#include "bindings/lora_linear_cuda_call.h"
#include "lora_linear/embedding_cuda.h"

namespace pk {
namespace {

using lora_embedding::Problem;

std::tuple<Tensor, Tensor> forward(const Tensor& residual, const Tensor& ids, const std::vector<Tensor>& lora_A,
                                   const std::vector<Tensor>& lora_B, const std::vector<double>& scaling,
                                   const std::optional<int64_t>& padding_idx) {
  const char* const op = "lora_embedding";
  LoraEmbeddingCheck(op, "residual", residual).run(residual, ids, lora_A, lora_B, scaling, padding_idx);
  CudaCall call(op, residual, without_columns(lora_A), lora_B, scaling, std::vector<double>(lora_A.size()), {});
  const Rows rows = as_rows(residual);
  call.M = rows.count;
  const Tensor y = empty_rows(residual, residual.size(residual.dim() - 1), dtype_code(residual));
  const Tensor h = call.scratch({call.M, call.R});
  if (call.M == 0) return {y, h};
  LoraEmbeddingShares(ids, lora_A, padding_idx).each_gather(scaling, h, [&](const Problem& share) {
    call.launched("gather", lora_embedding::gather(share, call.type == Dtype::kFloat64, call.on.stream()));
  });
  lora_expand_cuda(call, y, rows, h);
  return {y, h};
}

std::vector<Tensor> backward(const Tensor& dy, const Tensor& ids, const OptionalTensor& h,
                             const std::vector<Tensor>& lora_A, const std::vector<Tensor>& lora_B,
                             const std::vector<double>& scaling, const std::optional<int64_t>& padding_idx,
                             const std::vector<bool>& needs) {
  const char* const op = "lora_embedding_backward";
  const size_t L = lora_A.size();
  const LoraEmbeddingCheck check(op, "dy", dy);
  check.count(needs, L);
  check.run(dy, ids, lora_A, lora_B, scaling, padding_idx);
  check.backward(dy, ids, h, lora_A, needs);
  CudaCall call(op, dy, without_columns(lora_A), lora_B, scaling, std::vector<double>(L), {});
  const std::vector<Tensor> gradients = new_factor_gradients(lora_A, lora_B, needs);
  const Rows rows = as_rows(dy);
  call.M = rows.count;
  if (call.M == 0) {
    for (Tensor gradient : gradients) torch::stable::zero_(gradient);
    return gradients;
  }
  // In lora_add's order: x first, the biases last.
  const Tensor none = empty({0}, dtype_code(lora_A[0]), call.device);
  std::vector<bool> wanted(1 + 3 * L);
  std::vector<Tensor> all(1 + 3 * L, none);
  std::copy(needs.begin(), needs.end(), wanted.begin() + 1);
  std::copy(gradients.begin(), gradients.end(), all.begin() + 1);
  const OptionalTensor ds = lora_expand_backward_cuda(call, rows, h, wanted, all);
  LoraEmbeddingShares(ids, lora_A, padding_idx).each_scatter(needs, gradients, [&](size_t, Problem& share) {
    share.ds = ds->const_data_ptr();
    const int64_t count = lora_embedding::pieces(share.M);
    OptionalTensor pieces;  // of a run that is in one there are none
    if (count > 1) {
      pieces = call.scratch({count, share.R});
      share.pieces = pieces->mutable_data_ptr();
      call.launched("pieces", lora_embedding::sum_pieces(share, call.type == Dtype::kFloat64, call.on.stream()));
    }
    call.launched("scatter", lora_embedding::scatter(share, call.type == Dtype::kFloat64, call.on.stream()));
  });
  return gradients;
}

}  // namespace

void bind_lora_embedding_cuda(torch::stable::detail::StableLibrary& library) {
  library.impl("lora_embedding", TORCH_BOX(&forward));
  library.impl("lora_embedding_backward", TORCH_BOX(&backward));
}

}  // namespace pk
