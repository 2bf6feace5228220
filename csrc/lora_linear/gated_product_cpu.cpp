// The CPU kernels of gated_product for one instruction set: compiled once per set, with PK_ISA naming it.
#include "common/activation_vec.h"
#include "lora_linear/gated_product.h"

namespace pk::PK_ISA {
namespace {

using gated_product::kUnit;
using gated_product::Problem;

template <class T>
void product_of(const Problem& p, int64_t begin, int64_t end) {
  const T *const gate = static_cast<const T*>(p.gate), *const up = static_cast<const T*>(p.up);
  T* const y = static_cast<T*>(p.y);
  const int64_t last = min(end * kUnit, p.n);
  with_activation(p.activation, [&](auto f) __attribute__((always_inline)) {
    for (int64_t i = begin * kUnit; i < last; i += kLanes) {
      const int64_t n = last - i;
      store_n(y + i, activated<decltype(f)::value>(load_n(gate + i, n), nullptr) * load_n(up + i, n), n);
    }
  });
}

template <class T>
void gradients_of(const Problem& p, int64_t begin, int64_t end) {
  const T *const gate = static_cast<const T*>(p.gate), *const up = static_cast<const T*>(p.up),
                 *const dy = static_cast<const T*>(p.dy);
  T *const dgate = static_cast<T*>(p.dgate), *const dup = static_cast<T*>(p.dup);
  const int64_t last = min(end * kUnit, p.n);
  with_activation(p.activation, [&](auto f) __attribute__((always_inline)) {
    for (int64_t i = begin * kUnit; i < last; i += kLanes) {
      const int64_t n = last - i;
      const vf d = load_n(dy + i, n);
      vf slope;
      const vf open = activated<decltype(f)::value>(load_n(gate + i, n), &slope);
      store_n(dgate + i, d * load_n(up + i, n) * slope, n);
      store_n(dup + i, d * open, n);
    }
  });
}

void forward(const Problem& p, int64_t begin, int64_t end) {
  if (p.type == Dtype::kFloat32) return product_of<float>(p, begin, end);
  if (p.type == Dtype::kBFloat16) return product_of<bf16>(p, begin, end);
  product_of<fp16>(p, begin, end);
}

void backward(const Problem& p, int64_t begin, int64_t end) {
  if (p.type == Dtype::kFloat32) return gradients_of<float>(p, begin, end);
  if (p.type == Dtype::kBFloat16) return gradients_of<bf16>(p, begin, end);
  gradients_of<fp16>(p, begin, end);
}

}  // namespace

extern const gated_product::Table gated_product_table;
const gated_product::Table gated_product_table = {forward, backward};

}  // namespace pk::PK_ISA
