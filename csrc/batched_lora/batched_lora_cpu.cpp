// The CPU kernels of batched_lora for one instruction set: compiled once per set, with PK_ISA naming it.
#include "batched_lora/pieces.h"

namespace pk::PK_ISA {
namespace {

template <class T, class F>
void shrink(const Problem& p, int64_t begin, int64_t end) {
  const Piece* piece = piece_of(p, begin, &Piece::shrink);
  int64_t q = (begin - piece->shrink) / p.parts, part = (begin - piece->shrink) % p.parts;
  for (int64_t unit = begin; unit < end; ++unit) {
    const Piece& now = *piece;
    const int64_t now_q = q, now_part = part;
    if (++part == p.parts) part = 0, ++q;
    if (q == now.pages()) q = 0, ++piece;
    shrink_unit<T, F>(p, now, now_q, now_part, unit + 1 < end ? first_of_A<F>(p, *piece, q, part) : Ahead<F>{});
  }
}

void sum(const Problem& p, int64_t begin, int64_t end) {
  for (int64_t unit = begin; unit < end; ++unit) sum_unit(p, p.piece[unit]);
}

template <class T, class F>
void expand(const Problem& p, int64_t begin, int64_t end) {
  const Piece* piece = piece_of(p, begin, &Piece::expand);
  int64_t n0 = (begin - piece->expand) * kBlock;
  for (int64_t unit = begin; unit < end; ++unit) {
    const Piece& now = *piece;
    const int64_t now_n0 = n0;
    n0 += kBlock;
    if (n0 >= p.slice[now.slice].N) n0 = 0, ++piece;
    expand_unit<T, F>(p, now, now_n0, unit + 1 < end ? first_of_B<F>(p, *piece, 0, n0) : Ahead<F>{});
  }
}

template <class T, class F>
constexpr batched_lora::Kernels kKernels = {shrink<T, F>, sum, expand<T, F>};

}  // namespace

extern const batched_lora::Table batched_lora_table;
const batched_lora::Table batched_lora_table = {
    kKernels<float, float>, kKernels<fp16, fp16>, kKernels<bf16, bf16>, kKernels<fp16, float>, kKernels<bf16, float>,
};

}  // namespace pk::PK_ISA
