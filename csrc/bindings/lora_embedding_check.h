// What the kernels of lora_embedding need to be safe, in the words of `check` and `check_backward` in
// peft_kernels/ops/lora_linear/embedding.py.
#pragma once

#include <cmath>

#include "bindings/checks.h"
#include "lora_linear/embedding.h"

namespace pk {

class LoraEmbeddingCheck : TensorCheck {
 public:
  // `rows`: the name of the [..., N] argument.
  LoraEmbeddingCheck(const char* op, const char* rows, const Tensor& residual) : TensorCheck(op, rows, residual) {
    const int32_t dtype = dtype_code(residual);
    if (!dtype_of(dtype)) {
      refuse(rows, " must have dtype float32, float16, bfloat16 or float64, got ", name_of(dtype));
    }
  }

  void run(const Tensor& residual, const Tensor& ids, const std::vector<Tensor>& lora_A,
           const std::vector<Tensor>& lora_B, const std::vector<double>& scaling,
           std::optional<int64_t> padding_idx) const {
    const int32_t code = dtype_code(ids);
    if (code != aoti_torch_dtype_int64() && code != aoti_torch_dtype_int32()) {
      refuse("ids must have dtype int64 or int32, got ", name_of(code));
    }
    on_device("ids", ids);
    const int64_t dim = ids.dim();
    bool fits = residual.dim() == dim + 1 && residual.size(dim) >= 1;
    for (int64_t i = 0; fits && i < dim; ++i) fits = residual.size(i) == ids.size(i);
    if (!fits) {
      refuse(first_, " must have the sizes of ids ", shape_of(ids), " and then embedding_dim, got shape ",
             shape_of(residual));
    }
    const size_t L = lora_A.size();
    if (L < 1) refuse("lora_A must name at least one adapter, got none");
    if (lora_B.size() != L) refuse("lora_B must have one entry per lora_A (", L, "), got ", lora_B.size());
    if (scaling.size() != L) refuse("scaling must have one entry per lora_A (", L, "), got ", scaling.size());
    for (size_t i = 0; i < L; ++i) {
      factors(i, lora_A, lora_B, residual.size(dim), dtype_of(dtype_code(residual)) == Dtype::kFloat64);
      if (!std::isfinite(scaling[i])) refuse("scaling[", i, "] must be finite, got ", scaling[i]);
    }
    const int64_t V = lora_A[0].size(1);
    if (padding_idx && !(0 <= *padding_idx && *padding_idx < V)) {
      refuse("padding_idx must lie in [0, ", V, "), got ", *padding_idx);
    }
  }

  void backward(const Tensor& dy, const Tensor& ids, const OptionalTensor& h, const std::vector<Tensor>& lora_A,
                const std::vector<bool>& needs) const {
    const size_t L = lora_A.size();
    int64_t R = 0;
    bool reads_h = false;
    for (size_t l = 0; l < L; ++l) {
      R += lora_A[l].size(0);
      reads_h = reads_h || needs[L + l];
    }
    if (!h && reads_h) refuse("h must be given for gradients of lora_B");
    if (h && !(device_of(*h) == device_of(dy) && h->is_contiguous() && dtype_code(*h) == accumulator_code(dy) &&
               h->dim() == 2 && h->size(0) == ids.numel() && h->size(1) == R)) {
      refuse("h must be the contiguous [M, R] that the forward returned");
    }
  }

  void count(const std::vector<bool>& needs, size_t L) const {
    if (needs.size() != 2 * L) refuse("needs must have ", 2 * L, " entries, got ", needs.size());
  }

  // On the CPU, where they can be read.
  void range(const lora_embedding::Ids& ids, int64_t M, int64_t V) const {
    for (int64_t m = 0; m < M; ++m) {
      if (ids[m] < 0 || ids[m] >= V) refuse("ids must lie in [0, ", V, "), got ", ids[m]);
    }
  }

 private:
  void factors(size_t i, const std::vector<Tensor>& lora_A, const std::vector<Tensor>& lora_B, int64_t N,
               bool is_double) const {
    const Tensor &A = lora_A[i], &B = lora_B[i];
    const std::string a = "lora_A[" + std::to_string(i) + "]", b = "lora_B[" + std::to_string(i) + "]";
    const int32_t dtype = dtype_code(lora_A[0]);
    const std::optional<Dtype> factor = dtype_of(dtype);
    if (!factor || (*factor == Dtype::kFloat64) != is_double) {
      if (is_double) refuse("lora_A[0] must have dtype float64, as ", first_, ", got ", name_of(dtype));
      refuse("lora_A[0] must have dtype float32, float16 or bfloat16, got ", name_of(dtype));
    }
    tensor(a.c_str(), A, dtype, ", as lora_A[0]");
    const bool first = i == 0;
    if (!(A.dim() == 2 && A.size(1) >= 1 && (first || A.size(1) == lora_A[0].size(1)))) {
      const std::string V = first ? "" : "=" + std::to_string(lora_A[0].size(1));
      refuse(a, " must have shape [r, num_embeddings", V, "], got ", shape_of(A));
    }
    constexpr int64_t kMaxRank = 512;
    const int64_t r = A.size(0);
    if (!(1 <= r && r <= kMaxRank)) refuse(a, " must have a rank r from 1 to ", kMaxRank, ", got ", r);
    tensor(b.c_str(), B, dtype, ", as lora_A[0]");
    if (!(B.dim() == 2 && B.size(0) == N && B.size(1) == r)) {
      refuse(b, " must have shape [embedding_dim=", N, ", r=", r, "], got ", shape_of(B));
    }
  }
};

}  // namespace pk
