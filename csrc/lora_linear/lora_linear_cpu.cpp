// The CPU kernels of lora_linear for one instruction set: compiled once per set, with PK_ISA naming it.
#include "lora_linear/backward.h"
#include "lora_linear/forward.h"

namespace pk::PK_ISA {
namespace {

void mask(uint8_t* out, int64_t rows, int64_t cols, const Dropout& dropout) {
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t k = 0; k < cols; k += kDotChunk) {
      const int64_t n = min(cols - k, kDotChunk);
      uint32_t words[kMaskWords];
      keep_words(words, dropout, row, k / 32, (n + 31) / 32);
      for (int64_t i = 0; i < n; ++i) out[row * cols + k + i] = words[i / 32] >> (i % 32) & 1;
    }
  }
}

template <class From, class To>
void convert_as(const void* from, void* to, int64_t count) {
  for (int64_t i = 0; i < count; i += kLanes) {
    store_n(static_cast<To*>(to) + i, load_n(static_cast<const From*>(from) + i, count - i), count - i);
  }
}

// Between fp32 and a 16-bit type.
void convert(Dtype from_type, const void* from, Dtype to_type, void* to, int64_t count) {
  if (from_type == Dtype::kFloat16) return convert_as<fp16, float>(from, to, count);
  if (from_type == Dtype::kBFloat16) return convert_as<bf16, float>(from, to, count);
  if (to_type == Dtype::kFloat16) return convert_as<float, fp16>(from, to, count);
  return convert_as<float, bf16>(from, to, count);
}

template <class T, class F>
constexpr lora_linear::Kernels kKernels = {shrink<T, F>, stream_y<T>,  expand<T, F>, dy_pass<T, F>,
                                           sum_ds,       stream_dx<T>, x_pass<T, F>};

}  // namespace

extern const lora_linear::Table lora_linear_table;
const lora_linear::Table lora_linear_table = {
    kKernels<float, float>,
    kKernels<fp16, fp16>,
    kKernels<bf16, bf16>,
    kKernels<fp16, float>,
    kKernels<bf16, float>,
    mask,
    convert,
};

}  // namespace pk::PK_ISA
