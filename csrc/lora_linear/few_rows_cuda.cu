// Forward of lora_linear for M <= 16 rows: y_g = x W_g^T + sum_{l in g} h_l B_l^T + bias_g + sum_l s_l bias_l, and
// h [M, R] = the sum of the shrink's parts [splits][M, R]; x [M, K], W_g [N_g, K], B_l [N_g, R_l].
// Bound by reading W, which is read once. blockIdx.x -> 8, 16 or 32 columns of one member; the eight warps share out K
// and are added in order. x is the left operand of mma.sync, padded to 16 rows; both operands come from global memory
// without a stop: lane t of a row takes 8 neighbours, which serve as columns 2t, 2t + 1, 2t + 8, 2t + 9 of two k16
// steps, in x and W alike, and the order of a sum's terms is free. fp32 sums; h B^T in fp32, nothing of it rounded.
// The launch overlaps the shrink: only after W is read does a block wait for it.
#include "common/mma_tiles.h"
#include "lora_linear/lora_linear_cuda.h"

namespace pk::lora_linear {
namespace {

constexpr int kWarps = 8, kThreads = 32 * kWarps;
constexpr int kRankChunk = 32;  // ranks of h and B in shared memory at a time
constexpr int kFillingBlocks = 2 * kMultiprocessors;

// d += x W^T over this warp's share of K, for `cols` of the 8 kTiles columns from n0 on. kDepth groups of 32 columns of
// K are loaded together: with eight vectors of W a thread, two blocks keep 64 KiB in flight.
template <class T, int kTiles>
__device__ __forceinline__ void stream(float (&d)[kTiles][4], const FewRows& call, const FewRowsMember& member,
                                       int64_t n0, int cols) {
  constexpr int kDepth = 8 / kTiles;
  const int row = lane_index() / 4, col = lane_index() % 4 * 8, K = static_cast<int>(call.K);
  const T *x[2], *weight[kTiles];
#pragma unroll
  for (int i = 0; i < 2; ++i) x[i] = static_cast<const T*>(call.x) + (row + 8 * i) * call.x_stride + col;
#pragma unroll
  for (int j = 0; j < kTiles; ++j) {
    weight[j] = static_cast<const T*>(member.weight) + (n0 + row + 8 * j) * member.weight_stride + col;
  }
#pragma unroll 1  // or it is unrolled for sm_100 and later, into more registers than there are
  for (int k = warp_index() * kDepth * 32; k < K; k += kWarps * kDepth * 32) {
    uint4 left[kDepth][2] = {}, right[kDepth][kTiles] = {};
#pragma unroll
    for (int s = 0; s < kDepth; ++s) {
      const int at = k + 32 * s;
      const bool inside = at + col < K;
#pragma unroll
      for (int j = 0; j < kTiles; ++j) {
        if (inside && row + 8 * j < cols) right[s][j] = __ldcs(reinterpret_cast<const uint4*>(weight[j] + at));
      }
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        if (inside && row + 8 * i < call.M) left[s][i] = __ldg(reinterpret_cast<const uint4*>(x[i] + at));
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

struct Chunk {  // up to kRankChunk ranks of one adapter
  int adapter, rank;
};

// The first chunk of member g from (adapter, rank) on; past the adapters where there is none.
__device__ __forceinline__ Chunk chunk_from(const FewRows& call, int g, Chunk at) {
  while (at.adapter < call.adapters.count) {
    const CudaAdapter& adapter = call.adapters.at[at.adapter];
    if (adapter.member == g && at.rank < adapter.R) break;
    at = {at.adapter + 1, 0};
  }
  return at;
}

// This thread's elements of B in the chunk, [8 kTiles][kRankChunk] shared out in order. They are asked for long before
// they are needed: they come from memory.
template <class F, int kHeld>
__device__ __forceinline__ void fetch(F (&held)[kHeld], const FewRows& call, Chunk chunk, int64_t n0, int cols) {
  if (chunk.adapter >= call.adapters.count) return;
  const CudaAdapter& adapter = call.adapters.at[chunk.adapter];
  const int r = threadIdx.x % kRankChunk, n = threadIdx.x / kRankChunk;
  const F* const from = static_cast<const F*>(adapter.factor) + (n0 + n) * adapter.R + chunk.rank + r;
#pragma unroll
  for (int i = 0; i < kHeld; ++i) {
    const int row = i * (kThreads / kRankChunk);
    held[i] = chunk.rank + r < adapter.R && n + row < cols ? from[row * adapter.R] : F{};
  }
}

// h of the chunk: the parts, in order. The first block of a member keeps it for the caller.
__device__ __forceinline__ void sum_parts(float (&h)[16][kRankChunk], const FewRows& call, Chunk chunk, bool keep) {
  const int left = call.adapters.at[chunk.adapter].R - chunk.rank, r = threadIdx.x % kRankChunk;
  for (int m = threadIdx.x / kRankChunk; m < call.M; m += kThreads / kRankChunk) {
    const int64_t place = m * call.R + call.adapters.at[chunk.adapter].rank0 + chunk.rank + r;
    float sum = 0.f;
#pragma unroll 8
    for (int split = 0; split < call.splits; ++split) {
      if (r < left) sum += call.parts[split * call.M * call.R + place];
    }
    h[m][r] = sum;
    if (keep && r < left) call.h[place] = sum;
  }
}

template <class T, class F, int kTiles>
__global__ void __launch_bounds__(kThreads, 2)
    lora_linear_forward_few_rows_kernel(const __grid_constant__ FewRows call) {
  constexpr int kCols = 8 * kTiles, kHeld = kCols * kRankChunk / kThreads;
  constexpr int kOutputs = kTiles == 4 ? 2 : 1;  // the most outputs of a thread
  __shared__ float sums[kWarps][16][kCols], h[16][kRankChunk], factor[kCols][kRankChunk + 1];
  int g = 0;
  int64_t n0 = static_cast<int64_t>(blockIdx.x) * kCols;
  for (; n0 >= call.member[g].N; ++g) n0 -= (call.member[g].N + kCols - 1) / kCols * kCols;
  const FewRowsMember& member = call.member[g];
  const int cols = static_cast<int>(member.N - n0 < kCols ? member.N - n0 : kCols), M = static_cast<int>(call.M);

  F held[kHeld] = {};
  Chunk chunk = chunk_from(call, g, {0, 0});
  fetch(held, call, chunk, n0, cols);
  float d[kTiles][4] = {};
  stream<T>(d, call, member, n0, cols);
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
  while (chunk.adapter < call.adapters.count) {
#pragma unroll
    for (int i = 0; i < kHeld; ++i) {
      const int index = threadIdx.x + i * kThreads;
      factor[index / kRankChunk][index % kRankChunk] = to_float(held[i]);
    }
    sum_parts(h, call, chunk, n0 == 0 && call.h != call.parts);
    chunk = chunk_from(call, g, {chunk.adapter, chunk.rank + kRankChunk});
    fetch(held, call, chunk, n0, cols);
    __syncthreads();
#pragma unroll
    for (int o = 0; o < kOutputs; ++o) {
      const int index = (threadIdx.x + o * kThreads) / share, m = index / kCols, n = index % kCols;
      if (m >= M) continue;
#pragma unroll 4
      for (int r = part; r < kRankChunk; r += share) value[o] += h[m][r] * factor[n][r];
    }
    __syncthreads();
  }
  __syncthreads();
#pragma unroll
  for (int o = 0; o < kOutputs; ++o) {
    for (int by = share / 2; by > 0; by /= 2) value[o] += __shfl_xor_sync(kFullWarp, value[o], by);
    const int index = (threadIdx.x + o * kThreads) / share, m = index / kCols, n = index % kCols;
    if (part > 0 || m >= M || n >= cols) continue;
    float sum = value[o];
#pragma unroll
    for (int w = 0; w < kWarps; ++w) sum += sums[w][m][n];
    if (member.bias) sum += to_float(static_cast<const T*>(member.bias)[n0 + n]);
#pragma unroll 1
    for (int l = 0; l < call.adapters.count; ++l) {
      const CudaAdapter& adapter = call.adapters.at[l];
      if (adapter.member != g || !adapter.bias) continue;
      sum += adapter.scaling * to_float(static_cast<const F*>(adapter.bias)[n0 + n]);
    }
    static_cast<T*>(member.y)[m * member.N + n0 + n] = from_float<T>(sum);
  }
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
