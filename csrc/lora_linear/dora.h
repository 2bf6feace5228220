// DoRA beside lora_linear on the CPU, free of torch.
//   norm[n] = sqrt(max(0, ||W_n||^2 + <B_n, 2 s A W_n + s^2 (A A^T) B_n>)) = ||W_n + s (B A)_n||   W read once, no B A
//   y = r + b + g z,  g = m / norm, of the adapter ids[row] of a row; without one (-1) g is 1
//   dz = g dy,  dm = sum over an adapter's rows of dy z / norm,  db = sum over the rows of dy
// W [N, K], A [R, K], B [N, R]; z, r, y [M, N]; m, norm [L, N], L = 1 without ids. Sums are fp32.
//
// As in lora_linear.h, kernels run over work units, and these depend on the shape alone.
#pragma once

#include <cstdint>

#include "common/dtype.h"

namespace pk::dora {

constexpr int64_t kRows = 16;      // of W, A or z in one unit
constexpr int64_t kColumns = 512;  // of z in one unit
constexpr int64_t kMostRanks = 512;

constexpr int64_t blocks(int64_t count, int64_t size) {
  return (count + size - 1) / size;
}

struct Norm {
  int64_t N, K, R;
  Dtype type;
  const void* weight;  // element (n, k) at n * weight_n + k * weight_k; one of the strides is 1
  int64_t weight_n, weight_k;
  const void *A, *B;  // contiguous, fp32 (fp64 for fp64)
  double scaling;
  float* gram;  // [R, R] = s^2 A A^T
  void* norm;   // [N], fp32 (fp64)
};

struct Scale {
  int64_t M, N, L;
  Dtype type;             // of z, dy, residual, bias, y and dz
  const void* magnitude;  // [L, N], contiguous, fp32 (fp64), as norm; null in a backward that does not read it
  const void* norm;
  const int32_t* ids;  // [M], checked, or null
  float* gain;         // [L, N], null for fp64
  const void* z;       // [M, N], rows z_stride apart, as the others; null in a backward that does not read it
  int64_t z_stride;

  const void *residual, *bias;  // or null
  int64_t residual_stride;
  void* y;  // [M, N] contiguous

  const void* dy;
  int64_t dy_stride;
  void* dz;         // [M, N] contiguous, or null: not wanted
  void *dm, *db;    // [L, N] and [N], fp32 (fp64), or null
  float* dm_parts;  // [row_chunks()][L, N], where dm is wanted
  float* db_parts;  // [row_chunks()][N]
};

// The adapter of a row, or -1.
inline int64_t adapter_of(const Scale& p, int64_t m) {
  return p.ids ? p.ids[m] : 0;
}

// Rows whose products are summed in one part of dm and db: enough that the parts are small beside dy.
constexpr int64_t chunk_rows(int64_t L) {
  constexpr int64_t kLeast = 512;
  return kRows * L > kLeast ? kRows * L : kLeast;
}
inline int64_t row_chunks(const Scale& p) {
  return blocks(p.M, chunk_rows(p.L));
}

using NormPhase = void (*)(const Norm&, int64_t begin, int64_t end);
using ScalePhase = void (*)(const Scale&, int64_t begin, int64_t end);

struct Kernels {
  NormPhase rows;       // unit: kRows rows of W                                   -> norm
  ScalePhase scale;     // unit: kRows rows and kColumns columns                   -> y
  ScalePhase backward;  // unit: chunk_rows() rows and kColumns columns            -> dz, parts of dm and db
};

struct Table {
  NormPhase gram;                      // unit: kRows rows of A                    -> gram
  ScalePhase gains;                    // unit: kColumns columns of one adapter    -> gain
  ScalePhase sums;                     // unit: kColumns columns                   -> dm, db, parts added in order
  Kernels float32, float16, bfloat16;  // of W; of z
};

const Table& table();  // of the instruction set in use

const Kernels& kernels(Dtype type);

// fp64: plain loops for gradient checks.
void norm_double(const Norm& problem);
void scale_double(const Scale& problem);
void backward_double(const Scale& problem);

}  // namespace pk::dora
