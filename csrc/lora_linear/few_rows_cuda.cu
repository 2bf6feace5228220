// Forward of lora_linear for M <= 16 rows: y_g = x W_g^T + sum_{l in g} h_l B_l^T + bias_g + sum_l s_l bias_l, and
// h [M, R] = the sum of the shrink's parts [splits][M, R]; x [M, K], W_g [N_g, K], B_l [N_g, R_l].
// Bound by reading W, which is read once. blockIdx.x -> 8, 16 or 32 columns of one member; the eight warps share out K
// and are added in order. x is the left operand of mma.sync, padded to 16 rows; both operands come from global memory
// without a stop: lane t of a row takes 8 neighbours, which serve as columns 2t, 2t + 1, 2t + 8, 2t + 9 of two k16
// steps, in x and W alike, and the order of a sum's terms is free. fp32 sums; h B^T in fp32, nothing of it rounded.
// The launch overlaps the shrink: only after W is read does a block wait for it.
#include "lora_linear/mma_tiles.h"

namespace pk::lora_linear {
namespace {

constexpr int kWarps = 8, kThreads = 32 * kWarps;
constexpr int kRankChunk = 64;       // ranks of h and B in shared memory at a time
constexpr int kFillingBlocks = 256;  // two for each multiprocessor of the large GPUs

// d += x W^T over this warp's share of K, columns n0 ... n0 + 8 kTiles of a member. kDepth groups of 32 columns of K
// are loaded together: with eight vectors of W a thread, two blocks keep 64 KiB in flight.
template <class T, int kTiles>
__device__ __forceinline__ void stream(float (&d)[kTiles][4], const FewRows& call, const FewRowsMember& member,
                                       int64_t n0) {
  constexpr int kDepth = 8 / kTiles;
  const int row = lane_index() / 4, col = lane_index() % 4 * 8;
  const T* const x = static_cast<const T*>(call.x) + row * call.x_stride + col;
  const T* const weight = static_cast<const T*>(member.weight) + (n0 + row) * member.weight_stride + col;
  for (int64_t k = warp_index() * kDepth * 32; k < call.K; k += kWarps * kDepth * 32) {
    uint4 left[kDepth][2] = {}, right[kDepth][kTiles] = {};
#pragma unroll
    for (int s = 0; s < kDepth; ++s) {
      const int64_t at = k + 32 * s;
      if (at + col >= call.K) continue;
#pragma unroll
      for (int j = 0; j < kTiles; ++j) {
        if (n0 + 8 * j + row >= member.N) continue;
        right[s][j] = __ldcs(reinterpret_cast<const uint4*>(weight + 8 * j * member.weight_stride + at));
      }
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        if (row + 8 * i < call.M) left[s][i] = __ldg(reinterpret_cast<const uint4*>(x + 8 * i * call.x_stride + at));
      }
    }
#pragma unroll
    for (int s = 0; s < kDepth; ++s) {
      const uint4 top = left[s][0], low = left[s][1];
#pragma unroll
      for (int j = 0; j < kTiles; ++j) {
        mma_m16n8k16<T>(d[j], {top.x, low.x, top.y, low.y}, {right[s][j].x, right[s][j].y});
        mma_m16n8k16<T>(d[j], {top.z, low.z, top.w, low.w}, {right[s][j].z, right[s][j].w});
      }
    }
  }
}

__device__ __forceinline__ float sum_parts(const FewRows& call, int64_t m, int64_t r) {
  float sum = 0.f;
#pragma unroll 4
  for (int split = 0; split < call.splits; ++split) sum += call.parts[(split * call.M + m) * call.R + r];
  return sum;
}

// The blocks of the launch share out h; adapters begin with different blocks.
__device__ __forceinline__ void store_h(const FewRows& call) {
  if (call.h == call.parts) return;
  for (int l = 0; l < call.adapters.count; ++l) {
    const int R = call.adapters.at[l].R, rank0 = call.adapters.at[l].rank0;
    const int64_t share = (blockIdx.x + l) % gridDim.x;
    for (int64_t i = share * kThreads + threadIdx.x; i < call.M * R; i += gridDim.x * kThreads) {
      const int64_t m = i / R, r = rank0 + i % R;
      call.h[m * call.R + r] = sum_parts(call, m, r);
    }
  }
}

template <class T, class F, int kTiles>
__global__ void __launch_bounds__(kThreads, 2)
    lora_linear_forward_few_rows_kernel(const __grid_constant__ FewRows call) {
  constexpr int kCols = 8 * kTiles, kOutputs = kTiles == 4 ? 2 : 1;  // the most outputs of a thread
  __shared__ float sums[kWarps][16][kCols], h[16][kRankChunk], factor[kCols][kRankChunk + 1];
  int g = 0;
  int64_t n0 = static_cast<int64_t>(blockIdx.x) * kCols;
  for (; n0 >= call.member[g].N; ++g) n0 -= (call.member[g].N + kCols - 1) / kCols * kCols;
  const FewRowsMember& member = call.member[g];
  const int cols = static_cast<int>(member.N - n0 < kCols ? member.N - n0 : kCols), M = static_cast<int>(call.M);

  float d[kTiles][4] = {};
  stream<T>(d, call, member, n0);
  const int lane = lane_index();
#pragma unroll
  for (int i = 0; i < 4 * kTiles; ++i) {
    sums[warp_index()][lane / 4 + i % 4 / 2 * 8][i / 4 * 8 + lane % 4 * 2 + i % 2] = d[i / 4][i % 4];
  }

  // Outputs are given to threads; where they are few, `share` neighbouring lanes have one and share out its ranks.
  int share = 1;
  while (share < 32 && 2 * share * M * kCols <= kThreads) share *= 2;
  const int part = threadIdx.x % share;
  float value[kOutputs] = {};
  wait_for_previous_launch();
  for (int l = 0; l < call.adapters.count; ++l) {
    const CudaAdapter& adapter = call.adapters.at[l];
    if (adapter.member != g) continue;
    const F* const from = static_cast<const F*>(adapter.factor) + n0 * adapter.R;
    for (int rank = 0; rank < adapter.R; rank += kRankChunk) {
      const int ranks = adapter.R - rank < kRankChunk ? adapter.R - rank : kRankChunk;
      __syncthreads();
      for (int i = threadIdx.x; i < cols * ranks; i += kThreads) {
        factor[i / ranks][i % ranks] = to_float(from[i / ranks * adapter.R + rank + i % ranks]);
      }
      for (int i = threadIdx.x; i < M * ranks; i += kThreads) {
        h[i / ranks][i % ranks] = sum_parts(call, i / ranks, adapter.rank0 + rank + i % ranks);
      }
      __syncthreads();
#pragma unroll
      for (int o = 0; o < kOutputs; ++o) {
        const int index = (threadIdx.x + o * kThreads) / share, m = index / kCols, n = index % kCols;
        if (m >= M || n >= cols) continue;
#pragma unroll 4
        for (int r = part; r < ranks; r += share) value[o] += h[m][r] * factor[n][r];
      }
    }
  }
  __syncthreads();
#pragma unroll
  for (int o = 0; o < kOutputs; ++o) {
    for (int by = share / 2; by > 0; by /= 2) value[o] += __shfl_xor_sync(kFullWarp, value[o], by);
    const int index = (threadIdx.x + o * kThreads) / share, m = index / kCols, n = index % kCols;
    if (part > 0 || m >= M || n >= cols) continue;
    float sum = value[o];
    for (int w = 0; w < kWarps; ++w) sum += sums[w][m][n];
    if (member.bias) sum += to_float(static_cast<const T*>(member.bias)[n0 + n]);
    for (int l = 0; l < call.adapters.count; ++l) {
      const CudaAdapter& adapter = call.adapters.at[l];
      if (adapter.member != g || !adapter.bias) continue;
      sum += adapter.scaling * to_float(static_cast<const F*>(adapter.bias)[n0 + n]);
    }
    static_cast<T*>(member.y)[m * member.N + n0 + n] = from_float<T>(sum);
  }
  store_h(call);
}

int64_t block_count(const FewRows& call, int tiles) {
  int64_t blocks = 0;
  for (int g = 0; g < call.members; ++g) blocks += (call.member[g].N + 8 * tiles - 1) / (8 * tiles);
  return blocks;
}

template <class T, class F>
cudaError_t few_rows_pair(const FewRows& call, cudaStream_t stream) {
  const auto run = [&](auto kernel, int tiles) {
    const dim3 grid(static_cast<unsigned>(block_count(call, tiles)));
    return PK_LAUNCH_OVERLAPPED(kernel, grid, dim3(kThreads), 0, stream, call);
  };
  if (block_count(call, 4) >= kFillingBlocks) return run(lora_linear_forward_few_rows_kernel<T, F, 4>, 4);
  if (block_count(call, 2) >= kFillingBlocks) return run(lora_linear_forward_few_rows_kernel<T, F, 2>, 2);
  return run(lora_linear_forward_few_rows_kernel<T, F, 1>, 1);
}

}  // namespace

// x and every W are read 16 bytes at a time along K. Ranks and N are free.
bool has_few_rows_kernel(Dtype x, Dtype factors, const FewRows& call) {
  bool has = has_mma_kernels(x, factors) && call.M >= 1 && call.M <= kFewRowsCuda && call.K % 8 == 0 &&
             call.members <= kMostMembers && vector_rows(call.x, call.x_stride, 2);
  for (int g = 0; has && g < call.members; ++g) {
    has = call.member[g].N > 0 && vector_rows(call.member[g].weight, call.member[g].weight_stride, 2);
  }
  return has;
}

cudaError_t few_rows(Dtype x, Dtype factors, const FewRows& call, cudaStream_t stream) {
  if (!has_few_rows_kernel(x, factors, call)) return cudaErrorInvalidValue;
  if (x == Dtype::kFloat16) return few_rows_pair<fp16, fp16>(call, stream);
  return factors == Dtype::kFloat32 ? few_rows_pair<bf16, float>(call, stream)
                                    : few_rows_pair<bf16, bf16>(call, stream);
}

}  // namespace pk::lora_linear
