// What lora_linear_backward is given and what it returns: its check, the order of the gradients and their memory.
#pragma once

#include "bindings/lora_linear_check.h"

namespace pk {

// Places in `needs` and in the result: x first, then G weights, G biases, L lora_As, L lora_Bs, L lora_biases.
struct GradientOrder {
  size_t G, L;

  size_t weight(size_t g) const { return 1 + g; }
  size_t bias(size_t g) const { return 1 + G + g; }
  size_t lora_A(size_t l) const { return 1 + 2 * G + l; }
  size_t lora_B(size_t l) const { return 1 + 2 * G + L + l; }
  size_t lora_bias(size_t l) const { return 1 + 2 * G + 2 * L + l; }
};

// h is as wide as all ranks together if h_width does not say otherwise.
inline void check_backward(const std::vector<Tensor>& dy, const OptionalTensor& x, const OptionalTensor& h,
                           const std::vector<Tensor>& weight, const std::vector<Tensor>& lora_A,
                           const std::vector<Tensor>& lora_B, const std::vector<int64_t>& member,
                           const std::vector<double>& scaling, const std::vector<double>& dropout_p,
                           const OptionalTensor& seed, const std::vector<bool>& needs, const char* op = "lora_linear",
                           std::optional<int64_t> h_width = std::nullopt) {
  const size_t G = weight.size(), L = lora_A.size();
  STD_TORCH_CHECK(dy.size() == G && G >= 1, op, "_backward: dy must have one entry per weight (", G, "), got ",
                  dy.size());
  STD_TORCH_CHECK(needs.size() == 1 + 2 * G + 3 * L, op, "_backward: needs must have ", 1 + 2 * G + 3 * L,
                  " entries, got ", needs.size());
  const std::vector<OptionalTensor> no_bias(G), no_lora_bias(L);
  // Without x its rows are judged by dy's: weight[0] stands in, whose last size is K and whose dtype is x's.
  const Tensor& like_x = x ? *x : weight[0];
  LoraLinearCheck({like_x, weight, no_bias, lora_A, lora_B, no_lora_bias, member, scaling, dropout_p, seed, op}).run();
  const Device device = device_of(weight[0]);
  const int64_t M = dy[0].numel() / weight[0].size(0);
  for (size_t g = 0; g < G; ++g) {
    const bool fits = device_of(dy[g]) == device && dtype_code(dy[g]) == dtype_code(weight[g]) && dy[g].dim() >= 1 &&
                      dy[g].size(dy[g].dim() - 1) == weight[g].size(0) && dy[g].numel() == M * weight[g].size(0);
    STD_TORCH_CHECK(fits, op, "_backward: dy[", g, "] must be of y[", g, "]'s shape, dtype and device");
  }
  STD_TORCH_CHECK(!x || x->numel() == M * weight[0].size(1), op, "_backward: x must have as many rows as dy");
  int64_t R = h_width.value_or(0);
  for (size_t l = 0; l < L && !h_width; ++l) R += lora_A[l].size(0);
  STD_TORCH_CHECK(!h || (device_of(*h) == device && h->is_contiguous() &&
                         dtype_code(*h) == accumulator_code(weight[0]) && h->numel() == M * R),
                  op, "_backward: h must be the contiguous [M, R] that the forward returned");
  const GradientOrder at{G, L};
  bool reads_x = false, reads_h = false;
  for (size_t g = 0; g < G; ++g) reads_x = reads_x || needs[at.weight(g)];
  for (size_t l = 0; l < L; ++l) {
    reads_x = reads_x || needs[at.lora_A(l)];
    reads_h = reads_h || needs[at.lora_B(l)];
  }
  STD_TORCH_CHECK(x || !reads_x, op, "_backward: x must be given for gradients of weight or lora_A");
  STD_TORCH_CHECK(h || !reads_h, op, "_backward: h must be given for gradients of lora_B");
}

// Uninitialised gradients in the order of `needs`; empty ones where it says no. lora_add has no weight.
inline std::vector<Tensor> new_gradients(const std::vector<Tensor>& dy, const std::vector<Tensor>& weight,
                                         const std::vector<Tensor>& lora_A, const std::vector<Tensor>& lora_B,
                                         const std::vector<bool>& needs) {
  std::vector<Tensor> all;
  all.reserve(needs.size());
  const Device device = device_of(dy[0]);
  const int32_t dtype = dtype_code(dy[0]), factor_dtype = dtype_code(lora_A[0]);
  const auto add = [&](std::initializer_list<int64_t> sizes, int32_t code) {
    all.push_back(needs[all.size()] ? empty(sizes, code, device) : empty({0}, code, device));
  };
  all.push_back(needs[0] ? empty_rows(dy[0], lora_A[0].size(1), dtype) : empty({0}, dtype, device));
  for (const Tensor& w : weight) add({w.size(0), w.size(1)}, dtype);
  for (const Tensor& w : weight) add({w.size(0)}, dtype);
  for (const Tensor& a : lora_A) add({a.size(0), a.size(1)}, factor_dtype);
  for (const Tensor& b : lora_B) add({b.size(0), b.size(1)}, factor_dtype);
  for (const Tensor& b : lora_B) add({b.size(0)}, factor_dtype);
  return all;
}

}  // namespace pk
