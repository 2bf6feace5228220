// prefix_attention for CPU tensors: check, allocate, fill the Problem, run its phases.
#include "prefix_attention/prefix_attention.h"

#include <tuple>

#include "bindings/prefix_attention.h"
#include "bindings/prefix_attention_check.h"

namespace pk {
namespace {

using namespace prefix_attention;

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
    p.window = a.sliding_window;
    p.window_over_prefix = a.window_over_prefix;
    const uint64_t key = a.seed ? *static_cast<const uint64_t*>(a.seed->const_data_ptr()) : 0;
    p.own_dropout = make_dropout(a.dropout_p, key, 0);
    p.prefix_dropout = make_dropout(a.dropout_p, key, 1);
  }

  bool is_double() const { return problem.type == Dtype::kFloat64; }

  // Rows with unit stride: the tensor itself, or a copy.
  View view(const Tensor& tensor) {
    const bool in_place = tensor.stride(3) == 1;
    alive_.push_back(in_place ? tensor : torch::stable::contiguous(tensor));
    const Tensor& t = alive_.back();
    return {t.const_data_ptr(), t.stride(0), t.stride(1), t.stride(2)};
  }

  void run(bool backward) {
    Problem& p = problem;
    const Plan plan = make_plan(p);
    if (is_double()) return backward ? backward_double(p, plan) : forward_double(p, plan);
    const Tensor scratch = empty({scratch_floats(p, backward)}, aoti_torch_dtype_float32());
    set_scratch(p, backward, static_cast<float*>(scratch.mutable_data_ptr()));
    const Table& t = table();
    const int64_t prefix = static_cast<int64_t>(plan.queries.size()) * p.Hq * p.P * p.D;
    const int64_t own = p.B * p.Hq * p.S * p.T * p.D;
    const auto phase = [&](Phase f, int64_t units, int64_t work) {
      parallel(units, work, [&](int64_t begin, int64_t end) { f(p, plan, begin, end); });
    };
    if (!backward) {
      phase(t.prefix, static_cast<int64_t>(plan.prefix_units.size()), 2 * prefix);
      phase(t.own, static_cast<int64_t>(plan.units.size()), 2 * own);
      return;
    }
    phase(t.prefix_backward, p.prefixes * p.Hkv, 5 * prefix);
    if (p.dq || p.dk || p.dv) phase(t.own_backward, p.rows * p.Hkv, 5 * own);
    phase(t.gather, p.dgate || p.dkey_gate ? 1 : 0, 0);
  }

 private:
  const int32_t* integers(const OptionalTensor& tensor) {
    if (!tensor) return nullptr;
    alive_.push_back(dense(*tensor));
    return static_cast<const int32_t*>(alive_.back().const_data_ptr());
  }

  Mask mask(const OptionalTensor& tensor) {
    if (!tensor) return {};
    alive_.push_back(tensor->size(3) == 1 || tensor->stride(3) == 1 ? *tensor : torch::stable::contiguous(*tensor));
    const Tensor& t = alive_.back();
    const bool boolean = dtype_code(t) == aoti_torch_dtype_bool();
    const auto stride = [&](int64_t dim) { return t.size(dim) == 1 ? 0 : t.stride(dim); };
    return {t.const_data_ptr(), boolean,   boolean ? Dtype::kFloat32 : *dtype_of(dtype_code(t)),
            stride(0),          stride(1), stride(2)};
  }

  Gate gate(const OptionalTensor& tensor) {
    if (!tensor) return {};
    alive_.push_back(dense(*tensor));
    const Tensor& t = alive_.back();
    return {t.const_data_ptr(), *dtype_of(dtype_code(t)), t.size(0) == 1 ? 0 : t.size(1), t.size(1) == 1 ? 0 : 1};
  }

  std::vector<Tensor> alive_;
};

// Uninitialised [B, H, S, D] that lies in memory as [B, S, H, D].
Tensor by_token(const Tensor& like) {
  const int64_t B = like.size(0), H = like.size(1), S = like.size(2), D = like.size(3);
  const Tensor memory = empty({B, S, H, D}, dtype_code(like));
  return torch::stable::transpose(memory, 1, 2);
}

std::tuple<Tensor, Tensor, Tensor> forward(const Tensor& query, const Tensor& key, const Tensor& value,
                                           const Tensor& prefix_key, const Tensor& prefix_value,
                                           const OptionalTensor& prefix_ids, const OptionalTensor& prefix_lengths,
                                           const OptionalTensor& attn_mask, const OptionalTensor& prefix_bias,
                                           const OptionalTensor& gate, const OptionalTensor& key_gate,
                                           const OptionalTensor& cu_seqlens_q, const OptionalTensor& cu_seqlens_k,
                                           const std::string& composition, double scale, bool is_causal,
                                           int64_t sliding_window, bool window_over_prefix, double softcap,
                                           double dropout_p, const OptionalTensor& seed) {
  const PrefixArguments arguments{
      query,     key,         value,          prefix_key,         prefix_value, prefix_ids,   prefix_lengths,
      attn_mask, prefix_bias, gate,           key_gate,           cu_seqlens_q, cu_seqlens_k, composition,
      scale,     is_causal,   sliding_window, window_over_prefix, softcap,      dropout_p,    seed};
  const PrefixCheck check(arguments);
  check.run();
  check.values();
  PrefixCall call(arguments);
  Problem& p = call.problem;
  const Tensor out = by_token(query);
  const int32_t wide = accumulator_code(query);
  const Tensor lse = empty({p.B, p.Hq, p.S}, wide);
  const bool adds = p.composition == Composition::kAdd;
  const Tensor prefix_lse = adds ? empty({p.B, p.Hq, p.S}, wide) : empty({0}, wide);
  p.out = out.mutable_data_ptr();
  p.lse = lse.mutable_data_ptr();
  p.prefix_lse = prefix_lse.mutable_data_ptr();
  call.run(false);
  return {out, lse, prefix_lse};
}

std::vector<Tensor> backward(const Tensor& dout, const Tensor& query, const Tensor& key, const Tensor& value,
                             const Tensor& prefix_key, const Tensor& prefix_value, const OptionalTensor& prefix_ids,
                             const OptionalTensor& prefix_lengths, const OptionalTensor& attn_mask,
                             const OptionalTensor& prefix_bias, const OptionalTensor& gate,
                             const OptionalTensor& key_gate, const OptionalTensor& cu_seqlens_q,
                             const OptionalTensor& cu_seqlens_k, const Tensor& out, const Tensor& lse,
                             const Tensor& prefix_lse, const std::string& composition, double scale, bool is_causal,
                             int64_t sliding_window, bool window_over_prefix, double softcap, double dropout_p,
                             const OptionalTensor& seed, const std::vector<bool>& needs) {
  const PrefixArguments arguments{
      query,     key,         value,          prefix_key,         prefix_value, prefix_ids,   prefix_lengths,
      attn_mask, prefix_bias, gate,           key_gate,           cu_seqlens_q, cu_seqlens_k, composition,
      scale,     is_causal,   sliding_window, window_over_prefix, softcap,      dropout_p,    seed};
  check_prefix_backward(dout, out, lse, prefix_lse, arguments, needs);
  PrefixCheck(arguments).values();
  PrefixCall call(arguments);
  Problem& p = call.problem;
  void** const outputs[kPrefixGradients] = {&p.dq, &p.dk, &p.dv, &p.dpk, &p.dpv, &p.dgate, &p.dkey_gate};
  const Tensor* const inputs[kPrefixGradients] = {
      &query, &key, &value, &prefix_key, &prefix_value, gate ? &*gate : nullptr, key_gate ? &*key_gate : nullptr};
  std::vector<Tensor> gradients;
  for (size_t i = 0; i < kPrefixGradients; ++i) {
    if (!needs[i]) {
      gradients.push_back(empty({0}, dtype_code(query)));
      continue;
    }
    const auto sizes = inputs[i]->sizes();
    gradients.push_back(i < 3 ? by_token(*inputs[i])
                              : empty(sizes.data(), static_cast<int64_t>(sizes.size()), dtype_code(*inputs[i]), cpu()));
    *outputs[i] = gradients.back().mutable_data_ptr();
  }
  p.dout = call.view(dout);
  p.saved_out = call.view(out);
  p.lse = const_cast<void*>(lse.const_data_ptr());  // read only
  p.prefix_lse = const_cast<void*>(prefix_lse.const_data_ptr());
  call.run(true);
  return gradients;
}

}  // namespace

void bind_prefix_attention_cpu(torch::stable::detail::StableLibrary& library) {
  library.impl("prefix_attention", TORCH_BOX(&forward));
  library.impl("prefix_attention_backward", TORCH_BOX(&backward));
}

}  // namespace pk
