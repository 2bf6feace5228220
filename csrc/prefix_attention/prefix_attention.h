// prefix_attention on the CPU, free of torch.
//   o = drop(w_X) V + g drop(w_P) P_v,   l_X = cap(scale q K^T) + mask,   l_P = cap(c scale q P_k^T) + bias
// w from l as peft_kernels/ops/prefix_attention/reference.py says, with the gradients. Arithmetic is fp32 for 16- and
// 32-bit types.
//
// A call is two phases over units of up to kRows query rows (a row is a query of a head) of one head of the keys:
//   prefix  rows of any sequences that have the same prefix  -> what the prefix gives, the state of a softmax
//   own     rows of one sequence                             -> out, from that state
// so that a prefix is read once for all rows that share it, in decoding as in training. What a row gets depends on its
// own numbers alone, bit for bit; how rows are divided into units changes nothing.
#pragma once

#include <cstdint>
#include <vector>

#include "common/dropout.h"
#include "common/dtype.h"

namespace pk::prefix_attention {

constexpr int64_t kRows = 48;   // rows of a tile: six times eight
constexpr int64_t kKeys = 128;  // keys of a tile, a multiple of 32
constexpr int64_t kMostDim = 256;
constexpr int64_t kKeyPitch = kKeys + 16;  // floats from row to row: off the powers of two, which thrash L1
constexpr int64_t kDimPitch = kMostDim + 16;
constexpr int64_t kFewRows = 16;  // query rows of a sequence up to which keys are used where they lie

enum class Composition { kMerge, kAdd, kRelu, kLinear };

// Rows of D numbers, [batch, head, row], with unit stride along D.
struct View {
  const void* data;
  int64_t batch, head, row;  // strides
};

// Numbers that are added to logits, or booleans that say which count: [batch, head, row, column]; strides of 0 repeat.
struct Mask {
  const void* data;  // null: none
  bool boolean;
  Dtype type;
  int64_t batch, head, row;
};

struct Gate {
  const void* data;  // null: 1
  Dtype type;
  int64_t row, head;
};

struct Problem {
  int64_t B, Hq, Hkv, S, T, P, D;
  int64_t prefixes, rows;  // rows: sequences
  Dtype type;
  View q, k, v, pk, pv;
  const int32_t *ids, *lengths;  // null: prefix 0, P
  const int32_t *cu_q, *cu_k;    // null: a sequence for each batch index
  Mask mask, bias;
  Gate gate, key_gate;
  Composition composition;
  double scale, softcap;
  bool causal, window_over_prefix;
  int64_t window;
  Dropout own_dropout, prefix_dropout;
  const uint64_t* seed;  // on a GPU, where it stays: the key of both; null: nothing is dropped

  void* out;               // [B, S, Hq, D]
  void *lse, *prefix_lse;  // [B, Hq, S]; the second for kAdd

  View dout, saved_out;  // backward
  void *dq, *dk, *dv;    // [B, S, Hq, D], [B, T, Hkv, D] twice; null: not wanted
  void *dpk, *dpv;       // [prefixes, Hkv, P, D]
  void *dgate, *dkey_gate;

  // Room of the phases, see set_scratch().
  float* state;       // [B, Hq, S, D]: sums of the prefix in the forward, its part of dq in the backward
  float *high, *sum;  // [B, Hq, S]: greatest logit and sum of exponentials over the prefix
  float *share, *dc;  // [B, Hq, S]: D_P, and the gradient of c
  float* keys;        // fp32 sums of dP_k and dP_v, then of dK and dV, where the type is narrower
};

// One sequence: its batch index, queries q0 ... q0 + S, keys k0 ... k0 + T, and P positions of a prefix (-1: none).
struct Sequence {
  int64_t batch, q0, S, k0, T, prefix, P;
};

// Query row `flat` of a list: query flat / group, head flat % group of the unit's head of keys.
struct Query {
  int32_t sequence, query;
};

struct Unit {
  int32_t index;       // a prefix, or a sequence
  int32_t head;        // of the keys
  int64_t begin, end;  // flat rows, of `queries` or of the sequence
};

struct Plan {
  std::vector<Sequence> sequences;
  std::vector<Query> queries;  // those that have a prefix, prefix by prefix
  std::vector<int64_t> first;  // of each prefix in `queries`, and their number
  std::vector<Unit> prefix_units, units;
};

using Phase = void (*)(const Problem&, const Plan&, int64_t begin, int64_t end);

struct Table {            // everything of one instruction set
  Phase prefix;           // unit: of Plan::prefix_units
  Phase own;              // unit: of Plan::units
  Phase prefix_backward;  // unit: a prefix and a head of keys    -> dP_k, dP_v, part of dq, share, dc
  Phase own_backward;     // unit: a sequence and a head of keys  -> dq, dK, dV
  Phase gather;           // one unit                             -> dg, dc
};

Plan make_plan(const Problem& problem);
int64_t scratch_floats(const Problem& problem, bool backward);
void set_scratch(Problem& problem, bool backward, float* scratch);

// fp64: plain loops for gradient checks.
void forward_double(const Problem& problem, const Plan& plan);
void backward_double(const Problem& problem, const Plan& plan);

const Table& table();  // of the instruction set in use, see common/instruction_set.h

constexpr int64_t blocks(int64_t count, int64_t size) {
  return (count + size - 1) / size;
}
inline int64_t group(const Problem& p) {
  return p.Hq / p.Hkv;
}
inline bool few(const Problem& p) {
  return p.S * group(p) <= kFewRows;
}
inline int64_t row_of(const Problem& p, int64_t batch, int64_t head, int64_t query) {
  return (batch * p.Hq + head) * p.S + query;
}

}  // namespace pk::prefix_attention
