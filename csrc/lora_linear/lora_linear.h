// lora_linear on the CPU, free of torch.
//   y_g = x W_g^T + b_g + sum_{l in g} s_l ((drop_l(x) A_l^T) B_l^T + b_Bl)
// and lora_add, where a residual stands in place of x W_g^T + b_g: there is no weight then, and `base` is false. In
// lora_embedding there is no x either and K is 0: h is given, and what would be done with x and A is embedding.h's.
// M rows of x, K in_features, N_g out_features of member g, R the sum of all adapters' ranks R_l.
// Accumulation is fp32. Sixteen-bit factors go with x of the same type; fp32 factors go with any x and stay fp32.
//
// Kernels run over work units, and units depend on the shape alone, never on the number of threads, so results are the
// same bit for bit however many threads there are. Few rows (M <= kFewRows): the kernels add the base product too, and
// read W once. More rows: they leave the adapters' part in y (or dx), and a library GEMM adds the base.
#pragma once

#include <cstdint>

#include "common/dropout.h"
#include "common/dtype.h"

namespace pk::lora_linear {

constexpr int64_t kBlock = 256;          // columns of y, dy, x or dx in one unit
constexpr int64_t kRowBlock = 16;        // rows at a time inside a unit; rows of one unit of the shrink
constexpr int64_t kFewRows = 16;         // the most rows that stream W instead of calling a GEMM
constexpr int64_t kPitch = kBlock + 16;  // floats from row to row of a tile: off the powers of two, which thrash L1
constexpr int64_t kPanelRows = 2048;     // rows whose parts of ds are held at a time: 4 ceil(N / kBlock) R bytes each

constexpr int64_t blocks(int64_t columns) {
  return (columns + kBlock - 1) / kBlock;
}

// A product with few rows whose W lies across the sum is cut along the sum: each slice reads whole rows of W, in the
// order of memory, into sums of its own, [M][pitch(columns)]; the units of the next phase add the slices in order.
constexpr int64_t kSlices = 8, kSliceRows = 128;
constexpr int64_t slice_rows(int64_t length) {
  const int64_t rows = (length + kSlices - 1) / kSlices;
  return rows > kSliceRows ? rows : kSliceRows;
}
constexpr int64_t slices(int64_t length) {
  return (length + slice_rows(length) - 1) / slice_rows(length);
}
constexpr int64_t pitch(int64_t columns) {
  return (columns + 15) / 16 * 16 + 16;
}

struct Member {        // one projection
  int64_t N;           // out_features
  const void* weight;  // [N, K], element (n, k) at n * weight_n + k * weight_k
  int64_t weight_n, weight_k;
  const void* bias;      // [N] or null
  const void* residual;  // [M, N], rows residual_stride apart, or null; y may lie where it lies
  int64_t residual_stride;
  void* y;         // [M, N], forward
  const void* dy;  // [M, N], rows dy_stride apart, backward
  int64_t dy_stride;
  void* dbias;      // [N] or null: not wanted
  int64_t R;        // sum of its adapters' ranks
  float* streamed;  // [slices(length)][M][pitch(columns)] in a few-row call whose product streams W, else null
};

struct Adapter {
  int64_t member;
  int64_t R, rank0;  // its columns of h and ds are rank0 ... rank0 + R
  const void* A;     // [R, K]
  const void* B;     // [N, R]
  const void* bias;  // [N] or null
  double scaling;
  Dropout dropout;
  void* dA;     // [R, K] or null: not wanted
  void* dB;     // [N, R] or null
  void* dbias;  // [N] or null
};

struct Problem {
  int64_t M, K, R;
  int64_t G, L;            // members, adapters
  const Member* member;    // [G]
  const Adapter* adapter;  // [L]
  const void* x;           // [M, K], rows x_stride apart
  int64_t x_stride;
  const int32_t* rows;     // [M], the row that each row of x stands for in the dropout masks; null: itself
  void* h;                 // [M, R] = s drop(x) A^T, side by side; fp32 (fp64 for fp64)
  float* ds;               // [M, R] = s dy B, or null: not wanted
  float* ds_part;          // [units of a member][panel rows, R]: parts of the panel's ds
  int64_t panel0, panel1;  // rows of the dy pass and of the sum of ds that follows it
  void* dx;                // [M, K] or null
  bool base;               // few rows: the kernels add x W^T to y, or dy W to dx
  float* scratch;          // member_scratch(), or x_pass_scratch() floats if that is more
};

inline int64_t mask_row(const Problem& p, int64_t m) {
  return p.rows ? p.rows[m] : m;
}

// A range of units [begin, end) of one phase.
using Phase = void (*)(const Problem&, int64_t begin, int64_t end);

struct Kernels {
  Phase shrink;     // unit: kRowBlock rows and one adapter         -> h
  Phase stream_y;   // unit: a slice of x W^T of one member          -> its sums
  Phase expand;     // unit: kBlock columns of one member           -> y, with the base if few rows
  Phase dy_pass;    // unit: kBlock columns of one member           -> the panel's ds (a part per unit), dB, bias sums
  Phase sum_ds;     // unit: kRowBlock rows of the panel            -> ds, parts added in order
  Phase stream_dx;  // unit: a slice of dy W of one member           -> its sums
  Phase x_pass;     // unit: kBlock columns of x                    -> dx, with the base if few rows, and dA
};

struct Table {                                // everything of one instruction set
  Kernels float32, float16, bfloat16;         // x and factors of one type
  Kernels float16_float32, bfloat16_float32;  // fp32 factors
  void (*mask)(uint8_t* out, int64_t rows, int64_t cols, const Dropout& dropout);
  void (*convert)(Dtype from_type, const void* from, Dtype to_type, void* to, int64_t count);
};

const Table& table();  // of the instruction set in use, see common/instruction_set.h

const Kernels* kernels(Dtype x, Dtype factors);  // null: no kernels for the pair

// fp64: plain loops for gradient checks. Where there is a weight, its product is always included.
void forward_double(const Problem& problem);
void backward_double(const Problem& problem);
void ds_double(const Problem& problem, const Adapter& adapter, double* ds);  // [M, R_l] = s dy B

// Units and scratch of the phases.
inline int64_t member_units(const Problem& p) {
  int64_t units = 0;
  for (int64_t g = 0; g < p.G; ++g) units += blocks(p.member[g].N);
  return units;
}
inline int64_t stream_y_units(const Problem& p) {
  int64_t units = 0;
  for (int64_t g = 0; g < p.G; ++g) units += p.member[g].streamed ? slices(p.K) : 0;
  return units;
}
inline int64_t stream_dx_units(const Problem& p) {
  int64_t units = 0;
  for (int64_t g = 0; g < p.G; ++g) units += p.member[g].streamed ? slices(p.member[g].N) : 0;
  return units;
}
inline int64_t row_units(int64_t rows) {
  return (rows + kRowBlock - 1) / kRowBlock;
}

// Per member unit: B^T of its adapters, [R_g][kPitch]; in the backward dB^T and the sums of dy's columns, which grow
// from panel to panel.
inline int64_t member_scratch(const Problem& p) {
  int64_t floats = 0;
  for (int64_t g = 0; g < p.G; ++g) floats += blocks(p.member[g].N) * (p.member[g].R + 1) * kPitch;
  return floats;
}
// ds, and its parts for one panel where there is more than one.
inline int64_t ds_parts(const Problem& p) {
  int64_t parts = 1;
  for (int64_t g = 0; g < p.G; ++g) parts = blocks(p.member[g].N) > parts ? blocks(p.member[g].N) : parts;
  return parts;
}
inline int64_t ds_scratch(const Problem& p) {
  const int64_t panel = p.M < kPanelRows ? p.M : kPanelRows;
  return (p.M + (ds_parts(p) > 1 ? ds_parts(p) * panel : 0)) * p.R;
}
// Per unit of the x pass: dA, [R][kPitch].
inline int64_t x_pass_scratch(const Problem& p) {
  return blocks(p.K) * p.R * kPitch;
}

}  // namespace pk::lora_linear
