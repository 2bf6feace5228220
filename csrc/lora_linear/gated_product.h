// gated_product on the CPU, free of torch, over n numbers that lie side by side:
//   y = f(gate) up,   dgate = dy up f'(gate),   dup = dy f(gate)
// Arithmetic is fp32 for all 16- and 32-bit types, each result is rounded once. A unit is kUnit numbers, whatever the
// number of threads.
#pragma once

#include <cstdint>

#include "common/activation.h"
#include "common/dtype.h"

namespace pk::gated_product {

constexpr int64_t kUnit = 1 << 13;
constexpr int64_t kCost = 16;  // of one number, in multiplications

struct Problem {
  int64_t n;
  Dtype type;      // of all that follows
  int activation;  // of common/activation.h
  const void *gate, *up;
  void* y;  // forward

  const void* dy;  // backward
  void *dgate, *dup;
};

using Phase = void (*)(const Problem&, int64_t begin, int64_t end);  // over units

struct Table {  // of one instruction set
  Phase forward, backward;
};

const Table& table();  // of the instruction set in use, see common/instruction_set.h

// fp64: plain loops for gradient checks.
void forward_double(const Problem& problem, int64_t begin, int64_t end);
void backward_double(const Problem& problem, int64_t begin, int64_t end);

constexpr int64_t units(int64_t n) {
  return (n + kUnit - 1) / kUnit;
}

}  // namespace pk::gated_product
