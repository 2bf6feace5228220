// The products of lora_embedding with a one-hot x:
//   gather   h[m, rank0 + r] = s A[r, ids[m]]                            thread -> one number of h, neighbours along r
//   scatter  dA[r, v] = sum over the run of id v of ds[m, rank0 + r]      thread -> one place in the order and one
//   rank,
//            neighbours along r; it works where a run begins, and reads rows of ds whole with its neighbours
// fp32, fp64 for fp64. Bound by memory: a number of A, or of dA, costs a sector of 32 bytes.
#include "common/launch.h"
#include "common/typed.h"
#include "lora_linear/embedding_cuda.h"

namespace pk::lora_embedding {
namespace {

constexpr int kThreads = 256;

__device__ __forceinline__ int64_t id_at(const Problem& call, int64_t m) {
  return call.ids.wide ? static_cast<const int64_t*>(call.ids.data)[m] : static_cast<const int32_t*>(call.ids.data)[m];
}

template <class Acc>
__global__ void __launch_bounds__(kThreads) lora_embedding_forward_gather_kernel(const __grid_constant__ Problem call) {
  const int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x, m = i / call.R, r = i % call.R;
  if (m >= call.M) return;
  const int64_t v = id_at(call, m);
  const bool known = v >= 0 && v < call.V;
  const Acc value = known ? load<Acc>(call.A, call.factors, r * call.V + v) : Acc{0};
  static_cast<Acc*>(call.h)[m * call.pitch + call.rank0 + r] = static_cast<Acc>(call.scaling) * value;
}

template <class Acc>
__global__ void __launch_bounds__(kThreads)
    lora_embedding_backward_scatter_kernel(const __grid_constant__ Problem call) {
  const int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x, r = i % call.R;
  int64_t place = i / call.R;
  if (place >= call.M) return;
  const int64_t v = id_at(call, call.order[place]);
  if (v < 0 || v >= call.V || v == call.padding) return;
  if (place > 0 && id_at(call, call.order[place - 1]) == v) return;
  const Acc* const ds = static_cast<const Acc*>(call.ds) + call.rank0 + r;
  Acc sum = 0;
#pragma unroll 4
  for (; place < call.M; ++place) {
    const int64_t m = call.order[place];
    if (id_at(call, m) != v) break;
    sum += ds[m * call.pitch];
  }
  store<Acc>(call.dA, call.factors, r * call.V + v, sum);
}

// A thread for each row, or place, and rank. 0: nothing to do; -1: more than a grid has.
int64_t blocks_of(const Problem& call) {
  const int64_t blocks = (call.M * call.R + kThreads - 1) / kThreads;
  return blocks > INT32_MAX ? -1 : blocks;
}

}  // namespace

cudaError_t gather(const Problem& call, bool is_double, cudaStream_t stream) {
  const int64_t blocks = blocks_of(call);
  if (blocks <= 0) return blocks ? cudaErrorInvalidValue : cudaSuccess;
  const dim3 grid(static_cast<unsigned>(blocks)), block(kThreads);
  if (is_double) return PK_LAUNCH(lora_embedding_forward_gather_kernel<double>, grid, block, 0, stream, call);
  return PK_LAUNCH(lora_embedding_forward_gather_kernel<float>, grid, block, 0, stream, call);
}

cudaError_t scatter(const Problem& call, bool is_double, cudaStream_t stream) {
  const int64_t blocks = blocks_of(call);
  if (blocks <= 0) return blocks ? cudaErrorInvalidValue : cudaSuccess;
  const dim3 grid(static_cast<unsigned>(blocks)), block(kThreads);
  if (is_double) return PK_LAUNCH(lora_embedding_backward_scatter_kernel<double>, grid, block, 0, stream, call);
  return PK_LAUNCH(lora_embedding_backward_scatter_kernel<float>, grid, block, 0, stream, call);
}

}  // namespace pk::lora_embedding
