// DoRA on an NVIDIA GPU, free of torch: what each launcher computes. dora.h has the formulas.
//   norm:      a shrink of lora_linear_cuda.h (tensor cores), or norm_rows (plain cores, every dtype and layout),
//              makes W A^T and the squares of W's rows: W is read once for every 64 ranks. Two products make
//              s^2 B (A A^T), and norm_finish adds it all up.
//   scale:     one pass over z
//   backward:  one pass over dy and z: dz, and parts of dm and db, which lora_linear's `sum` adds in order
// dora_cuda and not dora, whose namespace has types and chunks of these names for the CPU.
// Arithmetic in fp32 (fp64 for fp64). How work is split depends on the shape alone. A launcher launches one kernel.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "common/dtype.h"

namespace pk::dora_cuda {

// low[n, r] = sum_k W[n, k] A[r, k], squares[n] = sum_k W[n, k]^2
struct NormRows {
  const void* weight;  // [N, K], element (n, k) at n * weight_n + k * weight_k
  Dtype type;
  int64_t weight_n, weight_k;
  const void* A;  // [R, K] contiguous
  Dtype factors;
  int64_t N, K, R;
  void *low, *squares;  // [N, R], [N], fp32 (fp64)
};
cudaError_t norm_rows(const NormRows& call, cudaStream_t stream);

// norm[n] = sqrt(max(0, sum_p squares[p, n] + sum_r B[n, r] (scale sum_p low[p, n, r] + cross[n, r])))
struct NormFinish {
  const void *low, *squares;  // [splits][N, R], [splits][N]
  int splits;
  double scale;       // 2 s
  const void* cross;  // [N, R] = s^2 B (A A^T)
  const void* B;      // [N, R] contiguous, of the factors' dtype
  int64_t N, R;
  void* norm;
};
cudaError_t norm_finish(Dtype factors, const NormFinish& call, cudaStream_t stream);

// The magnitudes over the norms, [L, N] each, contiguous. ids [M], null: all rows have 0; one that is out of range
// counts as none, whose gain is 1.
struct Gains {
  const void* magnitude;
  Dtype type;  // of magnitude
  const void* norm;
  const int32_t* ids;
  int64_t L;
};

// y = r + b + g z
struct Scale {
  const void* z;  // [M, N], rows z_stride apart, unit stride along N
  int64_t z_stride, M, N;
  Gains gains;
  const void* bias;      // [N] of z's dtype, or null
  const void* residual;  // [M, N], rows residual_stride apart, or null
  int64_t residual_stride;
  void* y;  // [M, N] contiguous
};
cudaError_t scale(Dtype type, const Scale& call, cudaStream_t stream);

// dz = g dy; dm [row_chunks()][L, N]: parts of sum dy z / norm; db [row_chunks() * owners()][N]: parts of sum dy, each
// of the rows that one adapter has, or none.
struct ScaleBackward {
  const void* dy;  // [M, N], rows dy_stride apart, unit stride along N
  int64_t dy_stride;
  const void* z;  // likewise; null where no dm is wanted
  int64_t z_stride, M, N;
  Gains gains;  // magnitude: null where no dz is wanted
  void* dz;     // [M, N] contiguous, of dy's dtype, or null
  void *dm, *db;
};
constexpr int64_t owners(const Gains& gains) {
  return gains.ids ? gains.L + 1 : 1;
}
// Enough rows that the parts are small beside dy.
constexpr int64_t chunk_rows(int64_t L) {
  constexpr int64_t kLeast = 256, kEachAdapter = 16;
  return L * kEachAdapter > kLeast ? L * kEachAdapter : kLeast;
}
constexpr int64_t row_chunks(int64_t M, int64_t L) {
  return (M + chunk_rows(L) - 1) / chunk_rows(L);
}
cudaError_t scale_backward(Dtype type, const ScaleBackward& call, cudaStream_t stream);

}  // namespace pk::dora_cuda
