// The products of lora_embedding with a one-hot x:
//   gather   h[m, rank0 + r] = s A[r, ids[m]]                           a row of threads for each m
//   scatter  dA[r, v] = sum over the run of id v of ds[m, rank0 + r]    a row of threads for each place in the order,
//   of
//            which those work where a run begins
// The threads of a row, 32 at most, take the ranks in turn: neighbours read and write neighbours of h and ds. A run
// that goes on over a multiple of kPiece places has its parts from there summed before, by a launch of their own: one
// id in every row makes no chain as long as the rows. fp32, fp64 for fp64. Bound by memory: a number of A, or of dA,
// costs a sector of 32 bytes.
#include "common/launch.h"
#include "common/typed.h"
#include "lora_linear/embedding_cuda.h"

namespace pk::lora_embedding {
namespace {

constexpr int kThreads = 256;

__device__ __forceinline__ int64_t id_at(const Problem& call, int64_t m) {
  return call.ids.wide ? static_cast<const int64_t*>(call.ids.data)[m] : static_cast<const int32_t*>(call.ids.data)[m];
}

__device__ __forceinline__ int64_t row_of_threads() {
  return int64_t{blockIdx.x} * blockDim.y + threadIdx.y;
}

template <class Acc>
__global__ void __launch_bounds__(kThreads, 4)
    lora_embedding_forward_gather_kernel(const __grid_constant__ Problem call) {
  const int64_t m = row_of_threads();
  if (m >= call.M) return;
  const int64_t v = id_at(call, m);
  const bool known = v >= 0 && v < call.V;
  Acc* const h = static_cast<Acc*>(call.h) + m * call.pitch + call.rank0;
  for (int64_t r = threadIdx.x; r < call.R; r += blockDim.x) {
    const Acc value = known ? load<Acc>(call.A, call.factors, r * call.V + v) : Acc{0};
    h[r] = static_cast<Acc>(call.scaling) * value;
  }
}

__device__ __forceinline__ int64_t id_in_order(const Problem& call, int64_t place) {
  return id_at(call, call.order[place]);
}
__device__ __forceinline__ bool is_counted(const Problem& call, int64_t v) {
  return v >= 0 && v < call.V && v != call.padding;
}

// The rows of id v from a place on, to the end of its piece.
template <class Acc>
__device__ __forceinline__ Acc sum_in_piece(const Problem& call, int64_t v, int64_t place, int64_t r) {
  const Acc* const ds = static_cast<const Acc*>(call.ds) + call.rank0 + r;
  const int64_t end = (place / kPiece + 1) * kPiece, stop = end < call.M ? end : call.M;
  Acc sum = 0;
#pragma unroll 4
  for (; place < stop; ++place) {
    const int64_t m = call.order[place];
    if (id_at(call, m) != v) break;
    sum += ds[m * call.pitch];
  }
  return sum;
}

template <class Acc>
__global__ void __launch_bounds__(kThreads, 4)
    lora_embedding_backward_pieces_kernel(const __grid_constant__ Problem call) {
  const int64_t piece = row_of_threads(), place = piece * kPiece;
  if (piece == 0 || place >= call.M) return;
  const int64_t v = id_in_order(call, place);
  if (!is_counted(call, v) || id_in_order(call, place - 1) != v) return;  // begins here: no part of a longer run
  Acc* const sums = static_cast<Acc*>(call.pieces) + piece * call.R;
  for (int64_t r = threadIdx.x; r < call.R; r += blockDim.x) sums[r] = sum_in_piece<Acc>(call, v, place, r);
}

template <class Acc>
__global__ void __launch_bounds__(kThreads, 4)
    lora_embedding_backward_scatter_kernel(const __grid_constant__ Problem call) {
  const int64_t place = row_of_threads();
  if (place >= call.M) return;
  const int64_t v = id_in_order(call, place);
  if (!is_counted(call, v) || (place > 0 && id_in_order(call, place - 1) == v)) return;
  for (int64_t r = threadIdx.x; r < call.R; r += blockDim.x) {
    Acc sum = sum_in_piece<Acc>(call, v, place, r);
    for (int64_t piece = place / kPiece + 1; piece * kPiece < call.M; ++piece) {
      if (id_in_order(call, piece * kPiece) != v) break;
      sum += static_cast<const Acc*>(call.pieces)[piece * call.R + r];
    }
    store<Acc>(call.dA, call.factors, r * call.V + v, sum);
  }
}

// Blocks with a row of threads for each of `rows`; false where a grid has not as many.
bool grid_of(const Problem& call, int64_t rows, dim3* grid, dim3* block) {
  unsigned ranks = 1;
  while (ranks < 32 && ranks < call.R) ranks *= 2;
  *block = dim3(ranks, kThreads / ranks);
  const int64_t blocks = (rows + block->y - 1) / block->y;
  *grid = dim3(static_cast<unsigned>(blocks));
  return blocks <= INT32_MAX;
}

}  // namespace

cudaError_t gather(const Problem& call, bool is_double, cudaStream_t stream) {
  dim3 grid, block;
  if (!grid_of(call, call.M, &grid, &block)) return cudaErrorInvalidValue;
  if (is_double) return PK_LAUNCH(lora_embedding_forward_gather_kernel<double>, grid, block, 0, stream, call);
  return PK_LAUNCH(lora_embedding_forward_gather_kernel<float>, grid, block, 0, stream, call);
}

cudaError_t sum_pieces(const Problem& call, bool is_double, cudaStream_t stream) {
  dim3 grid, block;
  if (!grid_of(call, pieces(call.M), &grid, &block)) return cudaErrorInvalidValue;
  if (is_double) return PK_LAUNCH(lora_embedding_backward_pieces_kernel<double>, grid, block, 0, stream, call);
  return PK_LAUNCH(lora_embedding_backward_pieces_kernel<float>, grid, block, 0, stream, call);
}

cudaError_t scatter(const Problem& call, bool is_double, cudaStream_t stream) {
  dim3 grid, block;
  if (!grid_of(call, call.M, &grid, &block)) return cudaErrorInvalidValue;
  if (is_double) return PK_LAUNCH(lora_embedding_backward_scatter_kernel<double>, grid, block, 0, stream, call);
  return PK_LAUNCH(lora_embedding_backward_scatter_kernel<float>, grid, block, 0, stream, call);
}

}  // namespace pk::lora_embedding
