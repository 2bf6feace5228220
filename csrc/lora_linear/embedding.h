// What lora_embedding has in place of lora_linear's x, on the CPU, free of torch: the products with a one-hot x, for
// one adapter of R ranks, whose columns of h and ds begin at rank0 and whose A is [R, V]:
//   gather:  h[m, rank0 + r] = s A[r, ids[m]]
//   scatter: dA[r, v] = sum over the rows m with ids[m] = v, in order, of ds[m, rank0 + r]
// h and ds are [M, pitch], fp32 (fp64 for fp64); A and dA of the factors' dtype. The order of the rows sorts their ids,
// rows of one id as they are: a run. dA must be zero before; the column `padding` stays so.
#pragma once

#include <cstdint>

#include "common/dtype.h"

namespace pk::lora_embedding {

constexpr int64_t kUnit = 64;  // rows, or places in the order; a run is done by the unit that it begins in

struct Ids {
  const void* data;  // [M], each in [0, V)
  bool wide;         // of 8 bytes, else of 4

  int64_t operator[](int64_t m) const {
    return wide ? static_cast<const int64_t*>(data)[m] : static_cast<const int32_t*>(data)[m];
  }
};

struct Problem {
  int64_t M, V, R, rank0, pitch;
  Ids ids;
  Dtype factors;
  const void* A;
  double scaling;
  void* h;

  const int64_t* order;  // [M], scatter
  int64_t padding;       // an id, or -1: none
  const void* ds;
  void* dA;
  void* pieces;  // on a GPU: [pieces(M), R] of ds's type
};

using Phase = void (*)(const Problem&, int64_t begin, int64_t end);  // over units

struct Table {  // of one instruction set
  Phase gather, scatter;
};

const Table& table();  // of the instruction set in use, see common/instruction_set.h

// fp64: plain loops for gradient checks.
void gather_double(const Problem& problem, int64_t begin, int64_t end);
void scatter_double(const Problem& problem, int64_t begin, int64_t end);

constexpr int64_t units(int64_t rows) {
  return (rows + kUnit - 1) / kUnit;
}

// f(v, first, last) for every run that begins at a place of the units: its id and its places in the order.
template <class F>
void each_run(const Problem& p, int64_t begin, int64_t end, const F& f) {
  const int64_t stop = end * kUnit < p.M ? end * kUnit : p.M;
  int64_t i = begin * kUnit;
  while (i > 0 && i < stop && p.ids[p.order[i]] == p.ids[p.order[i - 1]]) ++i;  // another unit's
  while (i < stop) {
    const int64_t v = p.ids[p.order[i]], first = i;
    while (i < p.M && p.ids[p.order[i]] == v) ++i;
    if (v != p.padding) f(v, first, i);
  }
}

}  // namespace pk::lora_embedding
