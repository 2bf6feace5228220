// bottleneck_adapter on an NVIDIA GPU, free of torch: what lies between the launchers of lora_linear
// (lora_linear_cuda.h), of which the op is composed. Forward
//   normalize:  n(x), where there is a norm
//   [shrink]:   parts of n(x) A^T                     activate: h = their sum + a,  u = drop(f(h)) without its scale
//   [expand]:   y = r + s g drop_o(u B^T + b);        finish: the same from u B^T, where there is no such kernel
// and backward, with d = drop_o(dy) without its scale (drop_rows, where it drops)
//   activate:   g u                                   scale_rows: s B, where s is a vector
//   [dy pass]:  v = d (s B), d^T (g u)                up_gradients: dB, db, ds
//   slope:      dh = f'(h) . drop(g v), dg            column_parts, [sum]: da
//   [x pass]:   dh^T n(x), which is dA without a norm; with one, down_gradients: dA and the norm's gradients
//   [expand]:   dh A [+ dy], which is dx without a norm; with one, norm_slope
// b is one more column of B here, with g for its column of g u: column E of v is then d (s b), of d^T (g u) db.
// The scales of both dropouts are factors of what the products give.
// Acc is fp64 where the factors are, else fp32; "factors" is the dtype of every parameter of the adapter. A launcher
// launches one kernel on `stream`. Every sum has one fixed order.
#pragma once

#include "lora_linear/lora_linear_cuda.h"

namespace pk::bottleneck_adapter {

using lora_linear::Gated;
using lora_linear::Keep;

// h = sum of parts + bias; u[m, e] = gate[m] mask[m, e] f(h[m, e]), and u[m, E] = gate[m] where u_row > E.
struct Activate {
  const void* parts;  // Acc [splits][M][E]; h itself in the backward
  int splits;
  const void* bias;  // [E] or null
  const void* gate;  // [M] or null: 1
  void* h;           // Acc [M][E]; null: not wanted
  void* u;           // Acc [M][u_row]
  int64_t M, E, u_row;
  int activation;  // of common/activation.h
  Keep keep;
  const uint64_t* seed;
};
cudaError_t activate(Dtype factors, const Activate& call, cudaStream_t stream);

// v = scale[0] sum of parts; dh = f'(h) gate mask v; dgate[m] = sum_e v u / gate + v[m, E], the latter where v_row > E.
struct Slope {
  const void* parts;  // Acc [splits][M][v_row]
  int splits;
  const void* h;      // Acc [M][E]
  const void* gate;   // [M] or null
  const void* scale;  // [1] or null
  void* dh;           // Acc [M][E]
  void* dgate;        // [M] or null
  int64_t M, E, v_row;
  int activation;  // of common/activation.h
  Keep keep;
  const uint64_t* seed;
};
cudaError_t slope(Dtype factors, const Slope& call, cudaStream_t stream);

// The whole forward in one launch, of 16-bit x and factors of the same type and E <= 256; or, with `parts`, what comes
// behind the shrink that wrote them, which it may overlap: then x and A are not read. Both for any M; has_fused_kernel
// and has_few_rows_kernel say for which they are meant, by shape and types alone. x, residual: rows a stride apart,
// unit stride along them.
struct Fused {
  const void* x;
  int64_t x_stride, M, K;
  const void *A, *down_bias;  // [E, K]; [E] or null
  int64_t E;
  const void* B;  // [N, E]
  int64_t N;
  const void* residual;
  int64_t residual_stride;
  float* h;        // [M][E]: x A^T + down_bias
  void* y;         // [M][N]
  int activation;  // of common/activation.h
  Keep keep;       // of the bottleneck; its scale is a factor of gated.sum_scale
  Gated gated;
  const uint64_t* seed;
  const float* parts = nullptr;  // [splits][M][E], of x A^T
  int splits = 0;
};
bool has_fused_kernel(Dtype x, Dtype factors, int64_t M, int64_t E);
bool has_few_rows_kernel(Dtype x, Dtype factors, int64_t M, int64_t N, int64_t E);
cudaError_t fused(Dtype x, const Fused& call, cudaStream_t stream);

// The whole forward of up to 16 rows in one launch, by clusters of blocks, where the device has sm_90 and
// has_few_rows_cluster_kernel says so: without `parts`, E <= 64, rows of whole, aligned vectors of 16 bytes.
bool has_few_rows_cluster_kernel(Dtype x, Dtype factors, const Fused& call);
cudaError_t few_rows_cluster(Dtype x, const Fused& call, cudaStream_t stream);

// With D and d the sums of their parts and s[n] = scale[n or 0]:
//   up_weight_grad[n, e] = weight_factor s D[n, e]            up_bias_grad[n] = bias_factor s d[n]
//   scale_grad[n] = weight_factor sum_e B[n, e] D[n, e] + bias_factor b[n] d[n]
struct Parts {
  const void* data;  // Acc, element (n, e) of part p at p * split + n * row + e; null: not there
  int64_t split, row;
};
struct UpGradients {
  Parts weight, bias;
  int splits;
  int64_t N, E;
  double weight_factor, bias_factor;
  const void *up_weight, *up_bias;  // [N, E]; [N] or null
  const void* scale;                // [N] where `per_channel`, else [1]; or null: 1
  bool per_channel;
  void *up_weight_grad, *up_bias_grad;  // of the factors' dtype; null: not wanted
  void* scale_grad;                     // [N] of scale_type; null: not wanted
  Dtype scale_type;
};
cudaError_t up_gradients(Dtype factors, const UpGradients& call, cudaStream_t stream);

// out[n, e] = scale[n] in[n, e], Acc [rows][cols].
cudaError_t scale_rows(Dtype factors, const void* in, const void* scale, int64_t rows, int64_t cols, void* out,
                       cudaStream_t stream);

// out[chunk, j] = sum of in[i, j] over the chunk's rows i, in Acc [rows][cols], out Acc [column_chunks(rows)][cols].
int column_chunks(int64_t rows);
cudaError_t column_parts(Dtype factors, const void* in, int64_t rows, int64_t cols, void* out, cudaStream_t stream);

// out = residual + (gated, as of Expand) from sum = u B^T; rounded once. out may be sum.
struct Finish {
  const void* sum;       // Acc [M][N]
  const void* residual;  // [M, N] of x's dtype, rows residual_stride apart; or null
  int64_t residual_stride;
  void* out;  // [M][N] of x's dtype
  int64_t M, N;
  Gated gated;
  const uint64_t* seed;
};
cudaError_t finish(Dtype x, Dtype factors, const Finish& call, cudaStream_t stream);

// out[m, n] = in[m, n] where kept, else 0; both of x's dtype, out contiguous.
struct DropRows {
  const void* in;
  int64_t stride, M, N;
  Keep keep;
  const uint64_t* seed;
  void* out;
};
cudaError_t drop_rows(Dtype x, const DropRows& call, cudaStream_t stream);

// out = (x - mean) reciprocal . weight + bias, reciprocal[m] = 1 / sqrt(mean of (x - mean)^2 + eps); mean is 0 where
// not `centred`.
struct Normalize {
  const void* x;
  int64_t x_stride, M, K;
  bool centred;
  double eps;
  const void *weight, *bias;  // [K] or null
  void* out;                  // Acc [M][K]
  void* reciprocal;           // Acc [M] or null
};
cudaError_t normalize(Dtype x, Dtype factors, const Normalize& call, cudaStream_t stream);

// With q = out_grad . weight: dx = reciprocal (q - mean(q) - normed mean(q normed)) + residual.
struct NormSlope {
  const void *out_grad, *normed, *reciprocal;  // Acc [M][K], [M][K], [M]
  int64_t M, K;
  bool centred;          // else without mean(q)
  const void* weight;    // [K] or null
  const void* residual;  // [M, K] of x's dtype, rows residual_stride apart; or null
  int64_t residual_stride;
  void* dx;  // [M][K] of x's dtype
};
cudaError_t norm_slope(Dtype x, Dtype factors, const NormSlope& call, cudaStream_t stream);

// With D the sum of the parts of dh^T normed:
//   down_weight_grad[e, k] = weight[k] D[e, k] + bias[k] da[e]
//   weight_grad[k] = sum_e A[e, k] D[e, k],  bias_grad[k] = sum_e A[e, k] da[e]
struct DownGradients {
  const void* parts;  // Acc [splits][E][K]
  int splits;
  const void* da;  // Acc [E]
  int64_t E, K;
  const void* down_weight;                           // A [E, K]
  const void *weight, *bias;                         // of the norm: [K] or null
  void *down_weight_grad, *weight_grad, *bias_grad;  // null: not wanted
};
cudaError_t down_gradients(Dtype factors, const DownGradients& call, cudaStream_t stream);

}  // namespace pk::bottleneck_adapter
