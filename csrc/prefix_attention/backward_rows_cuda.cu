// What the backward of prefix_attention needs beside its products:
//   totals       D = rowsum(dO o);  a warp to a row
//   prefix_sums  dP_k and dP_v from their parts, rounded once;  a thread to an element
//   gates        dg or dc from a number per row;  a block to a number of the gate
// Accumulation in fp32, fp64 for fp64; one fixed order.
#include "common/launch.h"
#include "common/typed.h"
#include "common/warp.h"
#include "prefix_attention/backward_tiles.h"

namespace pk::prefix_attention {
namespace {

constexpr int kRowThreads = 256, kRowWarps = kRowThreads / 32;

unsigned blocks_of(int64_t count, int64_t each) {
  return static_cast<unsigned>((count + each - 1) / each);
}

template <class Acc>
__global__ void __launch_bounds__(kRowThreads, 4) prefix_attention_backward_totals_kernel(const Backward call) {
  const Problem& p = call.problem;
  const int64_t m = static_cast<int64_t>(blockIdx.x) * kRowWarps + warp_index();
  if (m >= p.B * p.Hq * p.S) return;
  const int64_t batch = m / p.S / p.Hq, head = m / p.S % p.Hq, query = m % p.S;
  const int64_t d_row = batch * p.dout.batch + head * p.dout.head + query * p.dout.row;
  const int64_t o_row = batch * p.saved_out.batch + head * p.saved_out.head + query * p.saved_out.row;
  Acc sum = 0;
  for (int64_t d = lane_index(); d < p.D; d += 32) {
    sum += load<Acc>(p.dout.data, p.type, d_row + d) * load<Acc>(p.saved_out.data, p.type, o_row + d);
  }
  sum = warp_sum(sum);
  if (lane_index() == 0) static_cast<Acc*>(call.total)[m] = sum;
}

template <class Acc>
__global__ void __launch_bounds__(kRowThreads) prefix_attention_backward_prefix_sums_kernel(const Backward call) {
  const Problem& p = call.problem;
  const int64_t size = p.prefixes * p.Hkv * p.P * p.D, i = static_cast<int64_t>(blockIdx.x) * kRowThreads + threadIdx.x;
  void* const out = blockIdx.y == 0 ? p.dpk : p.dpv;
  if (i >= size || !out) return;
  const Acc* const parts = static_cast<const Acc*>(call.parts) + blockIdx.y * call.splits * size + i;
  Acc sum = 0;
  for (int split = 0; split < call.splits; ++split) sum += parts[split * size];
  store<Acc>(out, p.type, i, sum);
}

// Numbers of the rows of a gate's sequences and heads: each thread takes every 256th query, then all are added up.
template <class Acc>
__global__ void __launch_bounds__(kRowThreads)
    prefix_attention_backward_gates_kernel(const Backward call, const Gate gate, const Acc* numbers, void* out) {
  __shared__ Acc sums[kRowWarps];
  const Problem& p = call.problem;
  const int64_t heads = gate.head ? p.Hq : 1, row = blockIdx.x / heads, head = blockIdx.x % heads;
  Acc sum = 0;
  for (int64_t r = gate.row ? row : 0; r < (gate.row ? row + 1 : p.rows); ++r) {
    const Sequence s = sequence_of(p, r);
    for (int64_t h = gate.head ? head : 0; s.P > 0 && h < (gate.head ? head + 1 : p.Hq); ++h) {
      const Acc* const from = numbers + (s.batch * p.Hq + h) * p.S + s.q0;
      for (int64_t i = threadIdx.x; i < s.S; i += kRowThreads) sum += from[i];
    }
  }
  sum = warp_sum(sum);
  if (lane_index() == 0) sums[warp_index()] = sum;
  __syncthreads();
  if (threadIdx.x > 0) return;
  for (int w = 1; w < kRowWarps; ++w) sum += sums[w];
  store<Acc>(out, gate.type, blockIdx.x, sum);
}

}  // namespace

cudaError_t backward_totals(const Backward& call, cudaStream_t stream) {
  const Problem& p = call.problem;
  const dim3 grid(blocks_of(p.B * p.Hq * p.S, kRowWarps)), block(kRowThreads);
  if (p.type == Dtype::kFloat64) {
    return PK_LAUNCH(prefix_attention_backward_totals_kernel<double>, grid, block, 0, stream, call);
  }
  return PK_LAUNCH(prefix_attention_backward_totals_kernel<float>, grid, block, 0, stream, call);
}

cudaError_t backward_prefix_sums(const Backward& call, cudaStream_t stream) {
  const Problem& p = call.problem;
  const dim3 grid(blocks_of(p.prefixes * p.Hkv * p.P * p.D, kRowThreads), 2), block(kRowThreads);
  if (p.type == Dtype::kFloat64) {
    return PK_LAUNCH(prefix_attention_backward_prefix_sums_kernel<double>, grid, block, 0, stream, call);
  }
  return PK_LAUNCH(prefix_attention_backward_prefix_sums_kernel<float>, grid, block, 0, stream, call);
}

cudaError_t backward_gates(const Backward& call, const Gate& gate, const void* numbers, void* out,
                           cudaStream_t stream) {
  const Problem& p = call.problem;
  const dim3 grid(static_cast<unsigned>((gate.row ? p.rows : 1) * (gate.head ? p.Hq : 1))), block(kRowThreads);
  if (p.type == Dtype::kFloat64) {
    return PK_LAUNCH(prefix_attention_backward_gates_kernel<double>, grid, block, 0, stream, call, gate,
                     static_cast<const double*>(numbers), out);
  }
  return PK_LAUNCH(prefix_attention_backward_gates_kernel<float>, grid, block, 0, stream, call, gate,
                   static_cast<const float*>(numbers), out);
}

}  // namespace pk::prefix_attention
