// The CPU kernels of batched_lora for one instruction set: compiled once per set, with PK_ISA naming it.
#include "batched_lora/pieces.h"

namespace pk::PK_ISA {
namespace {

template <class T, class F>
void shrink(const Problem& p, int64_t begin, int64_t end) {
  const Piece* piece = piece_of(p, begin, &Piece::shrink);
  for (int64_t unit = begin; unit < end; ++unit) {
    while (unit >= piece->shrink + piece->pages() * p.parts) ++piece;
    const int64_t within = unit - piece->shrink;
    shrink_unit<T, F>(p, *piece, within / p.parts, within % p.parts);
  }
}

void sum(const Problem& p, int64_t begin, int64_t end) {
  for (int64_t unit = begin; unit < end; ++unit) sum_unit(p, p.piece[unit]);
}

void activate(const Problem& p, int64_t begin, int64_t end) {
  for (int64_t unit = begin; unit < end; ++unit) activate_unit(p, p.piece[unit]);
}

template <class T, class F>
void expand(const Problem& p, int64_t begin, int64_t end) {
  const Piece* piece = piece_of(p, begin, &Piece::expand);
  for (int64_t unit = begin; unit < end; ++unit) {
    while ((unit - piece->expand) * piece->block >= p.slice[piece->slice].N) ++piece;
    expand_unit<T, F>(p, *piece, (unit - piece->expand) * piece->block);
  }
}

template <class T, class F>
constexpr batched_lora::Kernels kKernels = {shrink<T, F>, sum, activate, expand<T, F>};

}  // namespace

extern const batched_lora::Table batched_lora_table;
const batched_lora::Table batched_lora_table = {
    kKernels<float, float>, kKernels<fp16, fp16>, kKernels<bf16, bf16>, kKernels<fp16, float>, kKernels<bf16, float>,
};

}  // namespace pk::PK_ISA
