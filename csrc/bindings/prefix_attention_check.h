// What the kernels of prefix_attention need to be safe, in the words of `check`, `check_values` and `check_backward` in
// peft_kernels/ops/prefix_attention/op.py.
#pragma once

#include <cmath>
#include <iterator>
#include <string>

#include "bindings/checks.h"

namespace pk {

constexpr const char* kCompositions[] = {"merge", "add", "relu", "linear"};

// In the order of the schema.
struct PrefixArguments {
  const Tensor &query, &key, &value, &prefix_key, &prefix_value;
  const OptionalTensor &prefix_ids, &prefix_lengths, &attn_mask, &prefix_bias, &gate, &key_gate, &cu_seqlens_q,
      &cu_seqlens_k;
  const std::string& composition;
  double scale;
  bool is_causal;
  int64_t sliding_window;
  bool window_over_prefix;
  double softcap, dropout_p;
  const OptionalTensor& seed;

  int64_t rows() const { return cu_seqlens_q ? cu_seqlens_q->size(0) - 1 : query.size(0); }
};

class PrefixCheck : public TensorCheck {
 public:
  explicit PrefixCheck(const PrefixArguments& arguments)
      : TensorCheck("prefix_attention", "query", arguments.query), a_(arguments) {}

  void run() const {
    own();
    packed();
    prefixes();
    masks();
    numbers();
  }

  // What can be read without waiting for a device: on the CPU.
  void values() const {
    integers("prefix_ids", a_.prefix_ids, -1, a_.prefix_key.size(0) - 1);
    integers("prefix_lengths", a_.prefix_lengths, 0, a_.prefix_key.size(2));
    rising("cu_seqlens_q", a_.cu_seqlens_q, a_.query.size(2));
    rising("cu_seqlens_k", a_.cu_seqlens_k, a_.key.size(2));
  }

  void same_shape(const char* name, const Tensor& t, const Tensor& other, const char* as) const {
    bool same = t.dim() == other.dim();
    for (int64_t i = 0; same && i < t.dim(); ++i) same = t.size(i) == other.size(i);
    if (!same) refuse(name, " must have shape ", shape_of(other), ", as ", as, ", got ", shape_of(t));
  }

 private:
  static constexpr int64_t kMaxHeadDim = 256;

  void own() const {
    const Tensor &q = a_.query, &k = a_.key;
    if (!dtype_of(dtype_code(q))) {
      refuse("query must have dtype float32, float16, bfloat16 or float64, got ", name_of(dtype_code(q)));
    }
    if (q.dim() != 4) refuse("query must have shape [batch, heads, queries, head_dim], got ", shape_of(q));
    const int64_t B = q.size(0), H = q.size(1), D = q.size(3);
    if (H < 1) refuse("query must have at least one head, got shape ", shape_of(q));
    if (D < 8 || D > kMaxHeadDim || D % 8) {
      refuse("head_dim must be a multiple of 8 from 8 to ", kMaxHeadDim, ", got ", D);
    }
    tensor("key", k, dtype_code(q), ", as query");
    if (k.dim() != 4 || k.size(0) != B || k.size(3) != D || k.size(1) < 1) {
      refuse("key must have shape [batch=", B, ", kv_heads, keys, head_dim=", D, "], got ", shape_of(k));
    }
    if (H % k.size(1)) refuse("key must have a number of heads that divides query's ", H, ", got ", k.size(1));
    tensor("value", a_.value, dtype_code(q), ", as query");
    same_shape("value", a_.value, k, "key");
  }

  void vector(const char* name, const OptionalTensor& t, const char* words, int64_t size) const {
    if (!t) return;
    tensor(name, *t, aoti_torch_dtype_int32(), "");
    if (t->dim() != 1 || t->size(0) != size) {
      refuse(name, " must have shape [", words, "=", size, "], got ", shape_of(*t));
    }
  }

  void packed() const {
    if (a_.cu_seqlens_q.has_value() != a_.cu_seqlens_k.has_value()) {
      refuse("cu_seqlens_q and cu_seqlens_k must be given together");
    }
    if (!a_.cu_seqlens_q) return;
    if (a_.query.size(0) != 1) {
      refuse("query must have a batch of 1 where sequences are packed, got ", a_.query.size(0));
    }
    const auto ends = [&](const char* name, const Tensor& t) {
      tensor(name, t, aoti_torch_dtype_int32(), "");
      if (t.dim() != 1 || t.size(0) < 1) refuse(name, " must be [sequences + 1], got ", shape_of(t));
    };
    ends("cu_seqlens_q", *a_.cu_seqlens_q);
    ends("cu_seqlens_k", *a_.cu_seqlens_k);
    if (a_.cu_seqlens_k->size(0) != a_.cu_seqlens_q->size(0)) {
      refuse("cu_seqlens_k must have shape as cu_seqlens_q, got ", shape_of(*a_.cu_seqlens_k));
    }
  }

  void prefixes() const {
    const Tensor& pk = a_.prefix_key;
    const int64_t Hkv = a_.key.size(1), D = a_.key.size(3);
    tensor("prefix_key", pk, dtype_code(a_.query), ", as query");
    if (pk.dim() != 4 || pk.size(1) != Hkv || pk.size(3) != D) {
      refuse("prefix_key must have shape [prefixes, kv_heads=", Hkv, ", prefix_length, head_dim=", D, "], got ",
             shape_of(pk));
    }
    tensor("prefix_value", a_.prefix_value, dtype_code(a_.query), ", as query");
    same_shape("prefix_value", a_.prefix_value, pk, "prefix_key");
    const int64_t n = pk.size(0);
    if (!a_.prefix_ids && n != 1) {
      refuse("prefix_ids must be given where there are ", n, " prefixes: None is for one that every row has");
    }
    vector("prefix_ids", a_.prefix_ids, "rows", a_.rows());
    vector("prefix_lengths", a_.prefix_lengths, "prefixes", n);
  }

  struct Size {
    const char* name;
    int64_t size;
  };

  // Every size is 1 or the one wanted; the last is the wanted one if `exact`.
  template <size_t kSizes>
  void broadcasts(const char* name, const Tensor& t, const Size (&sizes)[kSizes], bool exact) const {
    bool fits = t.dim() == static_cast<int64_t>(kSizes);
    std::string words;
    for (size_t i = 0; i < kSizes; ++i) {
      const bool free = !exact || i + 1 < kSizes;
      if (fits) fits = t.size(i) == sizes[i].size || (free && t.size(i) == 1);
      words += std::string(i ? ", " : "") + (free ? "1 or " : "") + sizes[i].name + "=" + std::to_string(sizes[i].size);
    }
    if (!fits) refuse(name, " must have shape [", words, "], got ", shape_of(t));
  }

  void additive(const char* name, const Tensor& t, bool boolean) const {
    const int32_t code = dtype_code(t), type = dtype_code(a_.query), wide = accumulator_code(a_.query);
    if (code != type && code != wide && !(boolean && code == aoti_torch_dtype_bool())) {
      const std::string more = wide == type ? "" : std::string(" or ") + name_of(wide);
      refuse(name, " must have dtype ", boolean ? "bool or " : "", name_of(type), more, ", got ", name_of(code));
    }
    on_device(name, t);
  }

  void masks() const {
    const int64_t B = a_.query.size(0), H = a_.query.size(1), S = a_.query.size(2);
    const bool packed = a_.cu_seqlens_q.has_value();
    if (a_.attn_mask) {
      if (packed) refuse("attn_mask must be None where cu_seqlens_q says which keys a sequence has");
      additive("attn_mask", *a_.attn_mask, true);
      broadcasts("attn_mask", *a_.attn_mask, {{"batch", B}, {"heads", H}, {"queries", S}, {"keys", a_.key.size(2)}},
                 true);
    }
    if (a_.prefix_bias) {
      if (packed) refuse("prefix_bias must be None where cu_seqlens_q is given");
      additive("prefix_bias", *a_.prefix_bias, false);
      broadcasts("prefix_bias", *a_.prefix_bias,
                 {{"batch", B}, {"heads", H}, {"queries", S}, {"prefix_length", a_.prefix_key.size(2)}}, true);
    }
    const auto gate = [&](const char* name, const OptionalTensor& t) {
      if (!t) return;
      additive(name, *t, false);
      broadcasts(name, *t, {{"rows", a_.rows()}, {"heads", H}}, false);
    };
    gate("gate", a_.gate);
    gate("key_gate", a_.key_gate);
  }

  void numbers() const {
    bool known = false;
    for (const char* name : kCompositions) known = known || a_.composition == name;
    if (!known) refuse("composition must be one of merge, add, relu, linear, got '", a_.composition, "'");
    if (a_.prefix_bias && a_.composition != "merge" && a_.composition != "add") {
      refuse("prefix_bias must be None where composition is '", a_.composition, "': its prefix has no softmax");
    }
    if (!std::isfinite(a_.scale)) refuse("scale must be finite, got ", a_.scale);
    if (a_.sliding_window < 0) {
      refuse("sliding_window must not be negative (0: none), got ", a_.sliding_window);
    }
    if (!(std::isfinite(a_.softcap) && a_.softcap >= 0)) {
      refuse("softcap must be finite, not negative, got ", a_.softcap);
    }
    dropout(a_.dropout_p, a_.seed);
  }

  void integers(const char* name, const OptionalTensor& t, int64_t low, int64_t high) const {
    if (!t) return;
    const Tensor numbers = dense(*t);
    const auto* values = static_cast<const int32_t*>(numbers.const_data_ptr());
    for (int64_t i = 0; i < numbers.numel(); ++i) {
      if (values[i] < low || values[i] > high) {
        refuse(name, " must lie in [", low, ", ", high, "], got ", values[i]);
      }
    }
  }
  void rising(const char* name, const OptionalTensor& t, int64_t size) const {
    if (!t) return;
    const Tensor numbers = dense(*t);
    const auto* ends = static_cast<const int32_t*>(numbers.const_data_ptr());
    const int64_t count = numbers.numel();
    bool rises = ends[0] == 0 && ends[count - 1] == size;
    std::string words;
    for (int64_t i = 0; i < count; ++i) {
      rises = rises && (i == 0 || ends[i] >= ends[i - 1]);
      words += (i ? ", " : "") + std::to_string(ends[i]);
    }
    if (!rises) refuse(name, " must rise from 0 to ", size, ", got [", words, "]");
  }

  const PrefixArguments& a_;
};

constexpr size_t kPrefixGradients = 7;  // query, key, value, prefix_key, prefix_value, gate, key_gate

inline void check_prefix_backward(const Tensor& dout, const Tensor& out, const Tensor& lse, const Tensor& prefix_lse,
                                  const PrefixArguments& a, const std::vector<bool>& needs) {
  constexpr const char* kOp = "prefix_attention_backward: ";
  const PrefixCheck check(a);
  check.run();
  STD_TORCH_CHECK(needs.size() == kPrefixGradients, kOp, "needs must have ", kPrefixGradients, " entries, got ",
                  needs.size());
  const std::pair<const char*, const Tensor&> both[] = {{"dout", dout}, {"out", out}};
  for (const auto& [name, tensor] : both) {
    check.tensor(name, tensor, dtype_code(a.query), ", as query");
    check.same_shape(name, tensor, a.query, "query");
  }
  const int64_t rows = a.query.size(0) * a.query.size(1) * a.query.size(2);
  const int64_t own = a.composition == "add" ? rows : 0;
  const auto sums = [&](const Tensor& t, int64_t count) {
    return dtype_code(t) == accumulator_code(a.query) && device_of(t) == device_of(a.query) && t.is_contiguous() &&
           t.numel() == count;
  };
  STD_TORCH_CHECK(sums(lse, rows), kOp, "lse must be the contiguous [B, Hq, S] that the forward returned");
  STD_TORCH_CHECK(sums(prefix_lse, own), kOp, "prefix_lse must be what the forward returned");
  STD_TORCH_CHECK(a.gate || !needs[5], kOp, "gate must be given for its gradient");
  STD_TORCH_CHECK(a.key_gate || !needs[6], kOp, "key_gate must be given for its gradient");
}

}  // namespace pk
