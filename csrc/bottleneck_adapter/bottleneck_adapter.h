// bottleneck_adapter on the CPU, free of torch.
//   y = r + g s drop_o(u B^T + b),   u = drop_b(f(h)),   h = n(x) A^T + a
// M rows of x, K in_features, N out_features, E bottleneck; peft_kernels/ops/bottleneck_adapter/reference.py has the
// gradients. Arithmetic is fp32 for all 16- and 32-bit types, whatever pair x and the factors make.
//
// A call is a list of steps; a step is one phase over work units, which depend on the shape alone, never on the number
// of threads, so results are the same bit for bit however many there are. Few rows (M <= kFewRows) use the factors
// where they lie; more rows are worth packing them; where the caller lends a library's GEMM (suits_gemm()), the units
// call it and do the rest between two calls, while their rows are in the cache.
#pragma once

#include <cstdint>
#include <vector>

#include "common/activation.h"
#include "common/dropout.h"
#include "common/dtype.h"

namespace pk::bottleneck_adapter {

constexpr int64_t kRows = 48;              // rows of a tile: six times eight
constexpr int64_t kColumns = 128;          // columns of a tile, and how much of a long sum it takes at a time
constexpr int64_t kPitch = kColumns + 16;  // floats from row to row: off the powers of two, which thrash L1
constexpr int64_t kWide = 256;             // bottlenecks of one unit where there are many rows
constexpr int64_t kWidePitch = kWide + 16;
constexpr int64_t kNarrow = 32;          // and where there are few, so that there is work for all threads
constexpr int64_t kOneThread = 1 << 19;  // multiplications below which one thread does them
constexpr int64_t kFewRows = 32;
constexpr int64_t kMostBottlenecks = 1024;
constexpr int64_t kLeastPanel = 8 * kRows;
constexpr int64_t kGemmRows = 256;  // rows and columns that a GEMM of one unit makes
constexpr int64_t kGemmColumns = 256;
constexpr int64_t kLowColumns = 32;     // its bottlenecks come in multiples of this, as dropout's mask does
constexpr int64_t kGemmWork = 1 << 20;  // multiplications from which a GEMM is worth its call

enum class Norm { kNone, kLayer, kRms };

struct Matrix {  // of fp32
  float* data;
  int64_t rows, cols, row_stride, col_stride;
};
// c = alpha a b, or c += alpha a b. Called by many threads at once.
using Gemm = void (*)(const Matrix& c, const Matrix& a, const Matrix& b, float alpha, bool accumulate);

struct Problem {
  int64_t M, K, N, E;
  Dtype type, factors;  // of x, residual, y, dy, dx; of everything else but h
  const void* x;        // [M, K], rows x_stride apart
  int64_t x_stride;
  const void *A, *a;  // [E, K], [E] or null
  const void *B, *b;  // [N, E], [N] or null
  const void* scale;  // [scales] or null
  int64_t scales;     // 0, 1 or N
  const void* gate;   // [M] or null
  Norm norm;
  const void *norm_weight, *norm_bias;  // [K] or null
  double eps, scaling;
  int activation;   // Activation
  Dropout dropout;  // of one of the two masks
  bool drops_output;
  void* h;  // [M, E], fp32 (fp64 for fp64)

  const void* residual;  // [M, N], rows residual_stride apart; forward
  int64_t residual_stride;
  void* y;  // [M, N]

  const void* dy;  // [M, N], rows dy_stride apart; backward
  int64_t dy_stride;
  bool serial;                                                                // dx has dy as well
  void *dx, *dA, *da, *dB, *db, *dscale, *dgate, *dnorm_weight, *dnorm_bias;  // null: not wanted

  Gemm gemm;  // null: none

  // Room of the steps, see set_scratch().
  float *packed_A, *packed_B;  // forward: A^T [K][pitch(E)]; backward: B in fp32, or null where it is;
                               // with a GEMM: s B where s is a vector
  float* u;                    // [M, E]; in the backward times g
  float* dh;                   // [M, E]
  float* statistics;           // [M][2], mean and reciprocal deviation
  float* partial;              // [M][bottleneck units + 1] of dg, then [column units of N] of ds
  float* sums;                 // of the column units
  float* raw;                  // [M, K], dh A before the norm's slope; dx itself if that is fp32
};

using Phase = void (*)(const Problem&, int64_t begin, int64_t end);

struct Table {    // everything of one instruction set
  Phase measure;  // unit: kRows rows                      -> statistics
  Phase pack;     // unit: kColumns columns of A           -> packed_A
  Phase shrink;   // unit: unit_rows(), some bottlenecks   -> h, u
  Phase expand;   // unit: kColumns columns, panel_rows()  -> y
  Phase widen;    // unit: kColumns rows of B              -> packed_B
  Phase slope;    // unit: unit_rows(), some bottlenecks   -> u, dh, parts of dg
  Phase up;       // unit: kColumns columns of dy          -> dB, db, ds or its part
  Phase down;     // unit: kColumns columns of x           -> dA, the norm's gradients, dx or what it is made of
  Phase norm_dx;  // unit: kRows rows                      -> dx
  Phase sums;     // unit: kColumns bottlenecks            -> da
  Phase gather;   // one unit                              -> dg and ds of their parts
  // With a GEMM.
  Phase scale_B;      // unit: kColumns rows of B         -> packed_B
  Phase gemm_shrink;  // unit: low_rows(), low_columns()  -> h, u
  Phase gemm_expand;  // unit: kGemmRows, kGemmColumns    -> y
  Phase gemm_slope;   // unit: low_rows(), low_columns()  -> u, dh
  Phase gemm_dB;      // unit: kGemmColumns columns of dy -> dB, or what `up` makes it of
  Phase gemm_dx;      // unit: kGemmRows, kGemmColumns    -> dx
  Phase gemm_dA;      // unit: kGemmColumns columns of x  -> dA
};

struct Step {
  Phase phase;
  int64_t units, work;  // work in multiplications
};

std::vector<Step> forward_steps(const Problem& problem);
std::vector<Step> backward_steps(const Problem& problem);

// Floats of room that the steps need; set_scratch() deals them out.
int64_t scratch_floats(const Problem& problem, bool backward);
void set_scratch(Problem& problem, bool backward, float* scratch);

// fp64: plain loops for gradient checks.
void forward_double(const Problem& problem);
void backward_double(const Problem& problem);

const Table& table();  // of the instruction set in use, see common/instruction_set.h

constexpr int64_t blocks(int64_t count, int64_t size) {
  return (count + size - 1) / size;
}
constexpr int64_t pitch(int64_t columns) {
  return (columns + 15) / 16 * 16 + 16;
}
inline bool few(const Problem& p) {
  return p.M <= kFewRows;
}
// Rows of one unit of the phases that go by rows: an even number of units, as alike as can be.
inline int64_t unit_rows(const Problem& p) {
  const int64_t units = (blocks(p.M, kRows) + 1) / 2 * 2;
  return few(p) ? kRows : blocks(blocks(p.M, units), 2) * 2;
}
inline int64_t row_units(const Problem& p) {
  return blocks(p.M, unit_rows(p));
}
inline int64_t bottleneck_width(const Problem& p) {
  const int64_t longest = p.K > p.N ? p.K : p.N;
  return few(p) && p.M * p.E * longest >= kOneThread ? kNarrow : kWide;
}
inline int64_t bottleneck_units(const Problem& p) {
  return blocks(p.E, bottleneck_width(p));
}

// Rows of one unit of the expansion: two panels at most, since each packs B^T anew.
inline int64_t panel_rows(const Problem& p) {
  const int64_t half = blocks(blocks(p.M, 2), kRows) * kRows;
  return half > kLeastPanel ? half : kLeastPanel;
}
inline int64_t expand_units(const Problem& p) {
  return blocks(p.N, kColumns) * blocks(p.M, panel_rows(p));
}

// Does a GEMM suit a problem whose arguments are set? Every step with a GEMM has several units then and work for
// several threads, so that the GEMM is called where the threads are taken already, and its sums do not depend on how
// many there are.
inline bool suits_gemm(const Problem& p) {
  const bool plain = p.type == Dtype::kFloat32 && p.factors == Dtype::kFloat32 && p.norm == Norm::kNone && !p.dgate;
  const int64_t narrow = p.K < p.N ? p.K : p.N;
  return plain && !(p.drops_output && p.dropout.active()) && !few(p) && p.E > kLowColumns && narrow > kGemmColumns &&
         p.M * p.E * narrow >= kGemmWork;
}

// Rows and bottlenecks of one unit that makes h or dh with a GEMM: few rows are not cut, since each cut packs A anew.
inline int64_t low_rows(const Problem& p) {
  return p.M < kGemmRows ? p.M : kGemmRows / 2;
}
inline int64_t low_columns(const Problem& p) {
  return p.M < kGemmRows ? blocks(blocks(p.E, 2), kLowColumns) * kLowColumns : p.E;
}
inline int64_t low_units(const Problem& p) {
  return blocks(p.M, low_rows(p)) * blocks(p.E, low_columns(p));
}
inline int64_t wide_units(const Problem& p, int64_t columns) {
  return blocks(p.M, kGemmRows) * blocks(columns, kGemmColumns);
}
// Is s, one fp32 number, 0? As its alpha a GEMM would not look at the product then, and hide its NaN.
inline bool has_no_scale(const Problem& p) {
  return p.scaling == 0 || (p.scales == 1 && *static_cast<const float*>(p.scale) == 0);
}
// Does the GEMM leave nothing to do for dB?
inline bool gemm_ends_dB(const Problem& p) {
  return p.gemm && p.dB && p.scales <= 1 && !p.dscale && !has_no_scale(p);
}

// Room of one unit, see `sums`.
inline int64_t up_floats(const Problem& p) {
  return kPitch + kColumns * pitch(p.E);
}
inline int64_t down_floats(const Problem& p) {
  return (2 + 2 * p.E) * kPitch;
}

// What the backward has to make.
inline bool wants_dh(const Problem& p) {
  return p.dx || p.dA || p.da || p.dnorm_weight || p.dnorm_bias;
}
inline bool wants_up(const Problem& p) {
  return p.dB || p.dscale;
}
inline bool wants_out(const Problem& p) {  // dh A
  return p.dx || p.dnorm_weight || p.dnorm_bias;
}
inline bool wants_raw(const Problem& p) {
  return p.dx && p.norm != Norm::kNone;
}

}  // namespace pk::bottleneck_adapter
