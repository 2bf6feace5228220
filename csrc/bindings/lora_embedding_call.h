// What the backends of lora_embedding make of its arguments: the call of lora_linear without x, each adapter's share of
// the products with a one-hot x, memory for the gradients.
#pragma once

#include <optional>
#include <vector>

#include "bindings/lora_embedding_check.h"
#include "lora_linear/embedding.h"

namespace pk {

// lora_A as lora_linear's phases see it: the ranks, and no columns. A itself is read by ids.
inline std::vector<Tensor> without_columns(const std::vector<Tensor>& lora_A) {
  std::vector<Tensor> ranks;
  ranks.reserve(lora_A.size());
  for (const Tensor& a : lora_A) ranks.push_back(matrix(a, a.size(0), 0, 1, 1));
  return ranks;
}

// One adapter's share of a call; what a phase does not use stays null. A contiguous copy of
// an A lives as long as what is done with the share.
class LoraEmbeddingShares {
 public:
  LoraEmbeddingShares(const Tensor& ids, const std::vector<Tensor>& lora_A, std::optional<int64_t> padding_idx)
      : ids_(dense(ids)), lora_A_(lora_A), M_(ids.numel()), padding_(padding_idx.value_or(-1)) {
    for (const Tensor& a : lora_A) pitch_ += a.size(0);
  }

  lora_embedding::Ids ids() const { return {ids_.const_data_ptr(), dtype_code(ids_) == aoti_torch_dtype_int64()}; }

  // f(share) for each adapter, to gather h.
  template <class F>
  void each_gather(const std::vector<double>& scaling, const Tensor& h, const F& f) const {
    each([&](size_t l, lora_embedding::Problem& share) {
      const Tensor A = dense(lora_A_[l]);
      share.A = A.const_data_ptr();
      share.scaling = scaling[l];
      share.h = h.mutable_data_ptr();
      f(share);
    });
  }

  // f(l, share) for each adapter whose dA is wanted, zero as yet; f sets ds.
  template <class F>
  void each_scatter(const std::vector<bool>& needs, const std::vector<Tensor>& gradients, const F& f) const {
    bool any = false;
    for (size_t l = 0; l < lora_A_.size(); ++l) any = any || needs[l];
    if (!any) return;
    const Tensor order = sorting_order(ids_);
    each([&](size_t l, lora_embedding::Problem& share) {
      if (!needs[l]) return;
      Tensor dA = gradients[l];
      torch::stable::zero_(dA);
      share.order = static_cast<const int64_t*>(order.const_data_ptr());
      share.dA = dA.mutable_data_ptr();
      f(l, share);
    });
  }

 private:
  template <class F>
  void each(const F& f) const {
    int64_t rank0 = 0;
    for (size_t l = 0; l < lora_A_.size(); ++l) {
      lora_embedding::Problem share{};
      share.M = M_;
      share.V = lora_A_[l].size(1);
      share.R = lora_A_[l].size(0);
      share.rank0 = rank0;
      share.pitch = pitch_;
      share.ids = ids();
      share.factors = *dtype_of(dtype_code(lora_A_[l]));
      share.padding = padding_;
      f(l, share);
      rank0 += share.R;
    }
  }

  const Tensor ids_;
  const std::vector<Tensor>& lora_A_;
  const int64_t M_, padding_;
  int64_t pitch_ = 0;
};

// Uninitialised gradients of (*lora_A, *lora_B); empty ones where `needs` says no.
inline std::vector<Tensor> new_factor_gradients(const std::vector<Tensor>& lora_A, const std::vector<Tensor>& lora_B,
                                                const std::vector<bool>& needs) {
  std::vector<Tensor> all;
  all.reserve(needs.size());
  for (const std::vector<Tensor>* factors : {&lora_A, &lora_B}) {
    for (const Tensor& t : *factors) {
      const Device device = device_of(t);
      const bool need = needs[all.size()];
      all.push_back(need ? empty({t.size(0), t.size(1)}, dtype_code(t), device) : empty({0}, dtype_code(t), device));
    }
  }
  return all;
}

}  // namespace pk
