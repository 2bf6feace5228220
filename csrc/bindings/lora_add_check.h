// What the kernels of lora_add need to be safe, in the words of `check`, `check_in_place` and `check_backward` in
// peft_kernels/ops/lora_linear/add.py. The rules are lora_linear's with a residual in place of the projection.
#pragma once

#include "bindings/lora_linear_check.h"

namespace pk {

inline void check_add(const Tensor& residual, const Tensor& x, const std::vector<Tensor>& lora_A,
                      const std::vector<Tensor>& lora_B, const std::vector<OptionalTensor>& lora_bias,
                      const std::vector<double>& scaling, const std::vector<double>& dropout_p,
                      const OptionalTensor& seed, const char* op = "lora_add") {
  const std::vector<int64_t> member(lora_A.size());
  LoraLinearCheck({x, {}, {}, lora_A, lora_B, lora_bias, member, scaling, dropout_p, seed, op, &residual}).run();
}

inline void check_add_in_place(const Tensor& residual, const Tensor& x, const std::vector<Tensor>& lora_A,
                               const std::vector<Tensor>& lora_B, const std::vector<OptionalTensor>& lora_bias,
                               const std::vector<double>& scaling, const std::vector<double>& dropout_p,
                               const OptionalTensor& seed) {
  check_add(residual, x, lora_A, lora_B, lora_bias, scaling, dropout_p, seed, "lora_add_");
  STD_TORCH_CHECK(residual.is_contiguous(), "lora_add_: residual must be contiguous, as it is written to");
}

inline void check_add_backward(const Tensor& dy, const OptionalTensor& x, const OptionalTensor& h,
                               const std::vector<Tensor>& lora_A, const std::vector<Tensor>& lora_B,
                               const std::vector<double>& scaling, const std::vector<double>& dropout_p,
                               const OptionalTensor& seed, const std::vector<bool>& needs) {
  const char* const op = "lora_add_backward";
  const size_t L = lora_A.size();
  STD_TORCH_CHECK(needs.size() == 1 + 3 * L, op, ": needs must have ", 1 + 3 * L, " entries, got ", needs.size());
  STD_TORCH_CHECK(L >= 1 && lora_A[0].dim() == 2, op, ": lora_A must name at least one adapter of shape [r, K]");
  bool fits = dy.dim() >= 1 &&
              (!x || (device_of(dy) == device_of(*x) && dtype_code(dy) == dtype_code(*x) && dy.dim() == x->dim()));
  for (int64_t i = 0; x && fits && i < dy.dim() - 1; ++i) fits = dy.size(i) == x->size(i);
  STD_TORCH_CHECK(fits, op, ": dy must be of y's shape, dtype and device");
  const int64_t N = dy.size(dy.dim() - 1), K = lora_A[0].size(1), M = dy.numel() / (N > 0 ? N : 1);
  // Without x its rows are dy's: two matrices without rows stand in.
  const Tensor no_dy = matrix(dy, 0, N, N, 1), no_x = matrix(dy, 0, K, K, 1);
  check_add(x ? dy : no_dy, x ? *x : no_x, lora_A, lora_B, std::vector<OptionalTensor>(L), scaling, dropout_p, seed,
            op);
  int64_t R = 0;
  bool reads_x = false, reads_h = false;
  for (size_t l = 0; l < L; ++l) {
    R += lora_A[l].size(0);
    reads_x = reads_x || needs[1 + l];
    reads_h = reads_h || needs[1 + L + l];
  }
  STD_TORCH_CHECK(!h || (device_of(*h) == device_of(dy) && h->is_contiguous() &&
                         dtype_code(*h) == accumulator_code(dy) && h->numel() == M * R),
                  op, ": h must be the contiguous [M, R] that the forward returned");
  STD_TORCH_CHECK(x || !reads_x, op, ": x must be given for gradients of lora_A");
  STD_TORCH_CHECK(h || !reads_h, op, ": h must be given for gradients of lora_B");
}

}  // namespace pk
