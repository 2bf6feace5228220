// The backward of prefix_attention on an NVIDIA GPU, free of torch. With D = rowsum(dO o) and
// D_P = rowsum(w_P drop(dO P_v^T)), weights are made again from lse, tile by tile, and never stored:
//   totals    D
//   shares    D_P, the gradient of c per row, and what the gradients of weights lose (see Backward): a pass over the
//             prefix, for what is not `merge` or has gates whose gradients are wanted
//   queries   dq, of a tile of rows: over the prefix, then over own keys
//   keys      dK and dV, of a tile of own keys: over the rows of the sequence
//   prefixes  parts of dP_k and dP_v, of a tile of a prefix: over the rows that have it, in the order of the batch
//   [sums]    dP_k and dP_v, from their parts
//   gates     dg or dc, from the numbers of the rows
// A row is a query of a head; the heads that share a head of keys lie side by side in a tile. Arithmetic is fp32, fp64
// for fp64. Every sum has one fixed order, and how work is split depends on shapes alone. ids, lengths and cu_seqlens
// are bounded where they are read. A launcher launches one kernel on `stream`.
#pragma once

#include <cuda_runtime.h>

#include "prefix_attention/prefix_attention.h"

namespace pk::prefix_attention {

// `problem` as the forward's launchers take it, with gradients that lie as prefix_attention.h says.
struct Backward {
  Problem problem;
  // Acc [B, Hq, S]
  void* total;        // D
  void* own_less;     // dl = w (dw - less) of own keys: D - g D_P, or D of `merge`, where it may be `total`
  void* prefix_less;  // of a prefix with a softmax: g D_P, or D
  void *share, *dc;   // D_P, the gradient of c
  void* parts;        // Acc [2][splits][prefixes][Hkv][P][D]: of dP_k and dP_v
  int splits;
};

cudaError_t backward_totals(const Backward& call, cudaStream_t stream);
cudaError_t backward_shares(const Backward& call, cudaStream_t stream);
cudaError_t backward_queries(const Backward& call, cudaStream_t stream);
cudaError_t backward_keys(const Backward& call, cudaStream_t stream);

int prefix_splits(const Problem& problem);
cudaError_t backward_prefixes(const Backward& call, cudaStream_t stream);
cudaError_t backward_prefix_sums(const Backward& call, cudaStream_t stream);

// out: contiguous, of the gate's dtype, a number for each of the gate's; from Acc [B, Hq, S] numbers of rows.
cudaError_t backward_gates(const Backward& call, const Gate& gate, const void* numbers, void* out, cudaStream_t stream);

}  // namespace pk::prefix_attention
