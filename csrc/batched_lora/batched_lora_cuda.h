// batched_lora on an NVIDIA GPU (sm_80 and later), free of torch: what each launcher computes. See batched_lora.h for
// the layouts of route, table and pages, and for the letters.
//   route:       ids -> route                                       once per step, one block
//   pool shrink: h[p, r] = sum_k x[i, k] A[r, k]                    row i is at position p of the route's order
//   pool expand: y_g[i] += s (sum_r f(h[p, r] + a[r]) B^T[r] + b), or with a gain (1 + d) (y_g[i] + s sum_r ...) + s b
//                rounded once; in fp32 (fp64) t = s sum + y, then d t + t, then s b + that, an FMA each
// A tile of up to 16 rows of one slot is the unit of both: its factors are read once. K is summed in chunks of kChunk
// elements, and the chunks in order. h is fp32 (fp64 for fp64) and enters the second product with all its bits. Both
// have a kernel for the tensor cores, for 16-bit x and pages of x's dtype in rows of whole, aligned vectors of 16
// bytes; what else there is goes through kernels for the plain cores. Bits: what is added to a row depends on its
// slot's factors and on x's row alone. Which kernel is taken depends on dtypes, strides and alignment; how the grid and
// h are cut, on shapes, which changes no sum's order. Nothing here waits for the device, and no number inside a tensor
// is known to the host. Trusted are: the route, made by `route` (one that was made for another M or number of slots
// adds nothing); of the table, ranks up to 8 T, and pages, bias and gain rows that exist, and activations, for every
// slot that a row names. An adapter's pages past its rank are not read. A launcher launches one kernel on `stream`, and
// touches nothing else of the device's state.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "batched_lora/batched_lora.h"
#include "common/dtype.h"

namespace pk::batched_lora {

// ids [M], int32 or int64 (wide) -> route [route_size(M, adapters)]. Any M, any number of adapters from 1 on.
struct Routing {
  const void* ids;
  bool wide;
  int64_t M, adapters;
  int32_t* route;
};
cudaError_t route(const Routing& call, cudaStream_t stream);

constexpr int kMostSlices = 8;  // of one launch: they travel as kernel parameters

struct Pool {
  int64_t M, K, slots;
  const void* x;  // [M, K], rows x_stride apart
  int64_t x_stride;
  const void* pages_in;  // [pages][kPageRows][K]
  const int32_t* route;
  int slices;
  Slice slice[kMostSlices];
  void* h;    // [parts][M][h_columns()], by positions in the route's order
  int parts;  // h_parts(): 1, or one for each chunk of K
};

// h has kPageRows T_g columns for slice g, and is held in one part for each chunk of K only where there are few tiles
// and that is no more than 2^24 elements: by shapes alone, so that it can be allocated.
inline int64_t h_columns(const Pool& call) {
  int64_t columns = 0;
  for (int g = 0; g < call.slices; ++g) columns += call.slice[g].T * kPageRows;
  return columns;
}
int h_parts(const Pool& call);

// For every pair of dtypes that the operator accepts.
cudaError_t pool_shrink(Dtype x, Dtype pages, const Pool& call, cudaStream_t stream);
cudaError_t pool_expand(Dtype x, Dtype pages, const Pool& call, cudaStream_t stream);  // behind the shrink

// Both in one launch, with the same bits, where the device has sm_90 and has_cluster_kernel says so: for what the
// tensor cores' kernels take, few tiles, and ranks and chunks whose sums fit shared memory; call.h and call.parts are
// not used. x may lie where a y lies if both have the same rows and there is one slice; has_cluster_kernel refuses the
// rest.
bool has_cluster_kernel(Dtype x, Dtype pages, const Pool& call);
cudaError_t pool_cluster(Dtype x, const Pool& call, cudaStream_t stream);

// The same on the plain cores, for every pair.
cudaError_t pool_shrink_plain(Dtype x, Dtype pages, const Pool& call, cudaStream_t stream);
cudaError_t pool_expand_plain(Dtype x, Dtype pages, const Pool& call, cudaStream_t stream);

}  // namespace pk::batched_lora
