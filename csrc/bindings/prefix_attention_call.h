// The operators of prefix_attention from the schema's arguments on, for any device: a call as its kernels take it, and
// its outputs. Nothing here reads what is on a GPU.
#pragma once

#include <algorithm>
#include <tuple>

#include "bindings/prefix_attention_check.h"
#include "prefix_attention/prefix_attention.h"

namespace pk {

using prefix_attention::Composition;
using prefix_attention::Problem;

// A Problem filled from tensors, and the tensors that keep the memory alive.
class PrefixCall {
 public:
  Problem problem{};

  explicit PrefixCall(const PrefixArguments& a) {
    Problem& p = problem;
    p.type = *dtype_of(dtype_code(a.query));
    p.B = a.query.size(0);
    p.Hq = a.query.size(1);
    p.S = a.query.size(2);
    p.D = a.query.size(3);
    p.Hkv = a.key.size(1);
    p.T = a.key.size(2);
    p.prefixes = a.prefix_key.size(0);
    p.P = a.prefix_key.size(2);
    p.rows = a.rows();
    p.q = view(a.query);
    p.k = view(a.key);
    p.v = view(a.value);
    p.pk = view(a.prefix_key);
    p.pv = view(a.prefix_value);
    p.ids = integers(a.prefix_ids);
    p.lengths = integers(a.prefix_lengths);
    p.cu_q = integers(a.cu_seqlens_q);
    p.cu_k = integers(a.cu_seqlens_k);
    p.mask = mask(a.attn_mask);
    p.bias = mask(a.prefix_bias);
    p.gate = gate(a.gate);
    p.key_gate = gate(a.key_gate);
    int composition = 0;
    while (a.composition != kCompositions[composition]) ++composition;
    p.composition = static_cast<Composition>(composition);
    p.scale = a.scale;
    p.softcap = a.softcap;
    p.causal = a.is_causal;
    p.window = std::min(a.sliding_window, int64_t{1} << 40);  // so that 64 bits hold what is added to it
    p.window_over_prefix = a.window_over_prefix;
    p.own_dropout = make_dropout(a.dropout_p, 0, 0);
    p.prefix_dropout = make_dropout(a.dropout_p, 0, 1);
    p.seed = a.seed ? static_cast<const uint64_t*>(a.seed->const_data_ptr()) : nullptr;
  }

  // Rows with unit stride: the tensor itself, or a copy.
  prefix_attention::View view(const Tensor& tensor) {
    const bool in_place = tensor.stride(3) == 1;
    alive_.push_back(in_place ? tensor : torch::stable::contiguous(tensor));
    const Tensor& t = alive_.back();
    return {t.const_data_ptr(), stride(t, 0), stride(t, 1), stride(t, 2)};
  }

 private:
  static int64_t stride(const Tensor& tensor, int64_t dim) { return tensor.size(dim) == 1 ? 0 : tensor.stride(dim); }

  const int32_t* integers(const OptionalTensor& tensor) {
    if (!tensor) return nullptr;
    alive_.push_back(dense(*tensor));
    return static_cast<const int32_t*>(alive_.back().const_data_ptr());
  }

  prefix_attention::Mask mask(const OptionalTensor& tensor) {
    if (!tensor) return {};
    alive_.push_back(tensor->size(3) == 1 || tensor->stride(3) == 1 ? *tensor : torch::stable::contiguous(*tensor));
    const Tensor& t = alive_.back();
    const bool boolean = dtype_code(t) == aoti_torch_dtype_bool();
    return {t.const_data_ptr(), boolean,      boolean ? Dtype::kFloat32 : *dtype_of(dtype_code(t)),
            stride(t, 0),       stride(t, 1), stride(t, 2)};
  }

  prefix_attention::Gate gate(const OptionalTensor& tensor) {
    if (!tensor) return {};
    alive_.push_back(dense(*tensor));
    const Tensor& t = alive_.back();
    return {t.const_data_ptr(), *dtype_of(dtype_code(t)), t.size(0) == 1 ? 0 : t.size(1), t.size(1) == 1 ? 0 : 1};
  }

  std::vector<Tensor> alive_;
};

// Uninitialised [B, H, S, D] that lies in memory as [B, S, H, D].
inline Tensor by_token(const Tensor& like) {
  const int64_t B = like.size(0), H = like.size(1), S = like.size(2), D = like.size(3);
  const Tensor memory = empty({B, S, H, D}, dtype_code(like), device_of(like));
  return torch::stable::transpose(memory, 1, 2);
}

using PrefixOutputs = std::tuple<Tensor, Tensor, Tensor>;

// out, lse and prefix_lse, uninitialised; the call's kernels write them.
inline PrefixOutputs prefix_outputs(PrefixCall& call, const Tensor& query) {
  Problem& p = call.problem;
  const int32_t wide = accumulator_code(query);
  const Device device = device_of(query);
  const bool adds = p.composition == Composition::kAdd;
  const Tensor out = by_token(query), lse = empty({p.B, p.Hq, p.S}, wide, device);
  const Tensor prefix_lse = adds ? empty({p.B, p.Hq, p.S}, wide, device) : empty({0}, wide, device);
  p.out = out.mutable_data_ptr();
  p.lse = lse.mutable_data_ptr();
  p.prefix_lse = prefix_lse.mutable_data_ptr();
  return {out, lse, prefix_lse};
}

struct PrefixGradients {
  const PrefixArguments& a;
  const Tensor &dout, &out, &lse, &prefix_lse;
  const std::vector<bool>& needs;
};

// The gradients that are needed, uninitialised, and empty tensors; the call's kernels write them, and read the rest.
inline std::vector<Tensor> prefix_gradients(PrefixCall& call, const PrefixGradients& g) {
  Problem& p = call.problem;
  const PrefixArguments& a = g.a;
  const Device device = device_of(a.query);
  void** const outputs[kPrefixGradients] = {&p.dq, &p.dk, &p.dv, &p.dpk, &p.dpv, &p.dgate, &p.dkey_gate};
  const Tensor* const inputs[kPrefixGradients] = {&a.query,
                                                  &a.key,
                                                  &a.value,
                                                  &a.prefix_key,
                                                  &a.prefix_value,
                                                  a.gate ? &*a.gate : nullptr,
                                                  a.key_gate ? &*a.key_gate : nullptr};
  std::vector<Tensor> gradients;
  for (size_t i = 0; i < kPrefixGradients; ++i) {
    if (!g.needs[i]) {
      gradients.push_back(empty({0}, dtype_code(a.query), device));
      continue;
    }
    const auto sizes = inputs[i]->sizes();
    gradients.push_back(i < 3
                            ? by_token(*inputs[i])
                            : empty(sizes.data(), static_cast<int64_t>(sizes.size()), dtype_code(*inputs[i]), device));
    *outputs[i] = gradients.back().mutable_data_ptr();
  }
  p.dout = call.view(g.dout);
  p.saved_out = call.view(g.out);
  p.lse = const_cast<void*>(g.lse.const_data_ptr());  // read only
  p.prefix_lse = const_cast<void*>(g.prefix_lse.const_data_ptr());
  return gradients;
}

// The kernels of the two operators: `forward(PrefixArguments)`, `backward(PrefixGradients)`, after the checks of
// shapes.
template <auto forward>
PrefixOutputs call_prefix(const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& prefix_key,
                          const Tensor& prefix_value, const OptionalTensor& prefix_ids,
                          const OptionalTensor& prefix_lengths, const OptionalTensor& attn_mask,
                          const OptionalTensor& prefix_bias, const OptionalTensor& gate, const OptionalTensor& key_gate,
                          const OptionalTensor& cu_seqlens_q, const OptionalTensor& cu_seqlens_k,
                          const std::string& composition, double scale, bool is_causal, int64_t sliding_window,
                          bool window_over_prefix, double softcap, double dropout_p, const OptionalTensor& seed) {
  const PrefixArguments arguments{
      query,     key,         value,          prefix_key,         prefix_value, prefix_ids,   prefix_lengths,
      attn_mask, prefix_bias, gate,           key_gate,           cu_seqlens_q, cu_seqlens_k, composition,
      scale,     is_causal,   sliding_window, window_over_prefix, softcap,      dropout_p,    seed};
  PrefixCheck(arguments).run();
  return forward(arguments);
}

template <auto backward>
std::vector<Tensor> call_prefix_backward(const Tensor& dout, const Tensor& query, const Tensor& key,
                                         const Tensor& value, const Tensor& prefix_key, const Tensor& prefix_value,
                                         const OptionalTensor& prefix_ids, const OptionalTensor& prefix_lengths,
                                         const OptionalTensor& attn_mask, const OptionalTensor& prefix_bias,
                                         const OptionalTensor& gate, const OptionalTensor& key_gate,
                                         const OptionalTensor& cu_seqlens_q, const OptionalTensor& cu_seqlens_k,
                                         const Tensor& out, const Tensor& lse, const Tensor& prefix_lse,
                                         const std::string& composition, double scale, bool is_causal,
                                         int64_t sliding_window, bool window_over_prefix, double softcap,
                                         double dropout_p, const OptionalTensor& seed, const std::vector<bool>& needs) {
  const PrefixArguments arguments{
      query,     key,         value,          prefix_key,         prefix_value, prefix_ids,   prefix_lengths,
      attn_mask, prefix_bias, gate,           key_gate,           cu_seqlens_q, cu_seqlens_k, composition,
      scale,     is_causal,   sliding_window, window_over_prefix, softcap,      dropout_p,    seed};
  check_prefix_backward(dout, out, lse, prefix_lse, arguments, needs);
  return backward({arguments, dout, out, lse, prefix_lse, needs});
}

std::vector<Tensor> prefix_attention_backward_cuda(const PrefixGradients& gradients);

}  // namespace pk
