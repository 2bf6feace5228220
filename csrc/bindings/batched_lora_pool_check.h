// What the kernels of batched_lora_ need to be safe, in the words of `check` in
// peft_kernels/ops/batched_lora/pooled.py. The numbers inside route and table are checked by make_work() on the CPU,
// and trusted on a GPU.
#pragma once

#include <string>

#include "batched_lora/batched_lora.h"
#include "bindings/checks.h"

namespace pk {

struct PoolArguments {
  const std::vector<Tensor>& y;
  const Tensor& x;
  const Tensor& route;
  const Tensor& pages_in;
  const std::vector<Tensor>& pages_out;
  const std::vector<Tensor>& table;
  const std::vector<Tensor>& scaling;
  const std::vector<Tensor>& down_bias;
};

// Null where no slot has one.
inline const void* down_biases(const Tensor& down_bias) {
  return down_bias.dim() == 2 ? down_bias.const_data_ptr() : nullptr;
}

class PoolCheck {
 public:
  explicit PoolCheck(const PoolArguments& arguments) : a_(arguments), device_(device_of(arguments.x)) {}

  void run() const {
    x();
    const size_t G = a_.y.size();
    require(G >= 1, "y must name at least one output, got none");
    same_length("pages_out", a_.pages_out.size(), G);
    same_length("table", a_.table.size(), G);
    same_length("scaling", a_.scaling.size(), G);
    same_length("down_bias", a_.down_bias.size(), G);
    pages("pages_in", a_.pages_in, a_.x.size(1), "in_features");
    for (size_t g = 0; g < G; ++g) slice(g);
    require(dtype_code(a_.route) == aoti_torch_dtype_int32(), "route must have dtype int32, got another");
    const int64_t M = a_.x.size(0), slots = a_.table[0].size(0);
    const int64_t size = batched_lora::route_size(M, slots);
    on_device("route", a_.route);
    require(a_.route.dim() == 1 && a_.route.size(0) == size && a_.route.is_contiguous(),
            "route must be contiguous, of shape [", size, "] for M=", M, " and adapters=", slots, ", got ",
            [&] { return shape_of(a_.route); });
  }

 private:
  // Words that cost something are given as functions, called only where the rule is broken.
  template <class Part>
  static auto word(const Part& part) {
    if constexpr (std::is_invocable_v<Part>) {
      return part();
    } else {
      return part;
    }
  }
  template <class... Parts>
  static void require(bool condition, const Parts&... parts) {
    if (!condition) STD_TORCH_CHECK(false, "batched_lora_: ", word(parts)...);
  }

  static std::string numbered(const char* name, size_t g) { return std::string(name) + "[" + std::to_string(g) + "]"; }

  static void same_length(const char* name, size_t length, size_t G) {
    require(length == G, name, " must have one entry per y (", G, "), got ", length);
  }
  void on_device(const std::string& name, const Tensor& t) const {
    const Device device = device_of(t);
    require(
        device == device_, name, " must be on x's device ", [&] { return words_of(device_); }, ", got ",
        [&] { return words_of(device); });
  }
  void tensor(const std::string& name, const Tensor& t, int32_t dtype, const char* as) const {
    require(dtype_code(t) == dtype, name, " must have dtype ", name_of(dtype), as, ", got ", name_of(dtype_code(t)));
    on_device(name, t);
  }
  static bool unit_stride(const Tensor& t) { return t.size(1) == 1 || t.stride(1) == 1; }

  void x() const {
    const int32_t dtype = dtype_code(a_.x);
    require(dtype_of(dtype).has_value(), "x must have dtype float32, float16, bfloat16 or float64, got ",
            name_of(dtype));
    require(a_.x.dim() == 2 && a_.x.size(1) >= 1, "x must have shape [M, in_features], got ",
            [&] { return shape_of(a_.x); });
    require(unit_stride(a_.x), "x must have unit stride along in_features, got stride ", a_.x.stride(1));
  }

  void pages(const std::string& name, const Tensor& t, int64_t width, const char* words) const {
    const int32_t x = dtype_code(a_.x), dtype = dtype_code(a_.pages_in);
    if (&t == &a_.pages_in) {
      const bool fits = dtype == x || (dtype == aoti_torch_dtype_float32() && x != aoti_torch_dtype_float64());
      const std::string rule =
          std::string(name_of(x)) + ", as x" + (x == aoti_torch_dtype_float64() ? "" : ", or float32");
      require(fits, name, " must have dtype ", rule, ", got ", name_of(dtype));
    }
    tensor(name, t, dtype, ", as pages_in");
    require(t.dim() == 3 && t.size(1) == batched_lora::kPageRows && t.size(2) == width && t.is_contiguous(), name,
            " must be contiguous, of shape [pages, 8, ", words, "=", width, "], got ", [&] { return shape_of(t); });
  }

  void slice(size_t g) const {
    const Tensor &y = a_.y[g], &table = a_.table[g], &scaling = a_.scaling[g], &down_bias = a_.down_bias[g];
    const int64_t M = a_.x.size(0);
    const std::string name = numbered("y", g);
    tensor(name, y, dtype_code(a_.x), ", as x");
    require(y.dim() == 2 && y.size(0) == M && y.size(1) >= 1, name, " must have shape [M=", M, ", out_features], got ",
            [&] { return shape_of(y); });
    require(unit_stride(y) && (M <= 1 || y.stride(0) >= y.size(1)), name,
            " must have unit stride along out_features and rows that do not overlap, got strides [", y.stride(0), ", ",
            y.stride(1), "]");
    pages(numbered("pages_out", g), a_.pages_out[g], y.size(1), "out_features");
    tensor(numbered("table", g), table, aoti_torch_dtype_int32(), "");
    const bool first = g == 0 || (table.dim() == 2 && table.size(0) == a_.table[0].size(0));
    require(first && table.dim() == 2 && table.size(1) >= 6 && table.size(1) % 2 == 0 && table.is_contiguous(),
            numbered("table", g), " must be contiguous, of shape [slots, 4 + 2 T], T >= 1, slots as in table[0], got ",
            [&] { return shape_of(table); });
    const int32_t wide = accumulator_code(a_.x);
    tensor(numbered("scaling", g), scaling, wide, "");
    const int64_t slots = table.size(0);
    require(scaling.dim() == 1 && scaling.size(0) == slots && scaling.is_contiguous(), numbered("scaling", g),
            " must be contiguous, of shape [slots=", slots, "], got ", [&] { return shape_of(scaling); });
    tensor(numbered("down_bias", g), down_bias, wide, "");
    const int64_t ranks = batched_lora::kPageRows * ((table.size(1) - batched_lora::kTablePages) / 2);
    const bool none = down_bias.dim() == 1 && down_bias.size(0) == 0;
    const bool fits = down_bias.dim() == 2 && down_bias.size(0) == slots && down_bias.size(1) == ranks;
    require((none || fits) && down_bias.is_contiguous(), numbered("down_bias", g),
            " must be contiguous, of shape [0] or [slots=", slots, ", 8 T=", ranks, "], got ",
            [&] { return shape_of(down_bias); });
  }

  const PoolArguments& a_;
  const Device device_;
};

}  // namespace pk
