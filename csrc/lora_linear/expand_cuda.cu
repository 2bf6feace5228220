// The low-rank part of a layer's output, and bias:
//   out[m, n] = sum_l keep_l mask_l[m, n] (sum_r low[m, rank0_l + r] F_l(r, n)) + bias[n] + sum_l s_l bias_l[n]
// and a residual, where there is one; for bottleneck_adapter's y with gate, scale and mask, as Gated says.
// out, bias [N]: T, bf16 or fp16; low [M, R] fp32; F_l: the factors' dtype, B_l [N, R_l] for y, A_l [R_l, N] for dx.
// Grid: one block of 8 warps for each 64 x 128 tile of out, a warp 32 x 32 of it; neighbours in the grid are neighbours
// along n. The block goes through the adapters in steps of 16 ranks; the values of the next step are fetched into
// registers while this one is multiplied. low enters as two bf16 parts, fp32 and fp16 factors too: 16 bits are more
// than the result holds, so the product of the two small parts is left out. fp32 accumulation, rounded once.
#include "common/mma_tiles.h"
#include "lora_linear/lora_linear_cuda.h"

namespace pk::lora_linear {

namespace {

constexpr int kRows = 64, kCols = 128, kStep = 16, kThreads = 256, kLowParts = 2;
constexpr int kLowPart = kRows * tile_pitch(kStep), kOutPitch = tile_pitch(kCols);

template <class F, bool kAcross>
struct Shape {
  static constexpr int kFactorParts = std::is_same_v<F, bf16> ? 1 : 2;
  static constexpr int kPitch = tile_pitch(kAcross ? kCols : kStep);
  static constexpr int kFactorPart = (kAcross ? kStep : kCols) * kPitch;
  static constexpr int kBuffer = kLowParts * kLowPart + kFactorParts * kFactorPart;
  static constexpr int kOperands = 2 * kBuffer, kOut = kRows * kOutPitch;
  static constexpr int kElements = kOperands > kOut ? kOperands : kOut;  // out takes the place of the operands
};

// 16 ranks of one adapter.
struct Step {
  int adapter, rank;

  __device__ __forceinline__ void skip_empty(const Adapters& adapters) {
    while (adapter < adapters.count && rank >= adapters.at[adapter].R) {
      ++adapter;
      rank = 0;
    }
  }
};

// kCount neighbours, those past `valid` as zeros; in vectors of 16 bytes where they are whole and aligned.
template <class E, int kCount>
__device__ __forceinline__ void load_run(E (&to)[kCount], const E* from, int valid) {
  if (valid >= kCount && reinterpret_cast<uintptr_t>(from) % 16 == 0) {
#pragma unroll
    for (int i = 0; i < kCount; i += 16 / sizeof(E)) {
      const uint4 vector = *reinterpret_cast<const uint4*>(from + i);
      memcpy(to + i, &vector, 16);
    }
  } else {
#pragma unroll
    for (int i = 0; i < kCount; ++i) to[i] = i < valid ? from[i] : E{};
  }
}

// Writes neighbours as bf16 parts, one tile per part. `to` is aligned to the run.
template <int kParts, int kCount, class E>
__device__ __forceinline__ void store_run(bf16* to, int part_size, const E (&from)[kCount]) {
  uint32_t pairs[kParts][kCount / 2];
#pragma unroll
  for (int i = 0; i < kCount; i += 2) {
    uint32_t parts[kParts];
    if constexpr (sizeof(E) == 4) {
      split_pair<bf16>(from[i], from[i + 1], parts);
    } else {
      as_bf16(parts, pack(from[i], from[i + 1]), E{});
    }
#pragma unroll
    for (int p = 0; p < kParts; ++p) pairs[p][i / 2] = parts[p];
  }
#pragma unroll
  for (int p = 0; p < kParts; ++p) {
    if constexpr (kCount == 8) {
      *reinterpret_cast<uint4*>(to + p * part_size) = {pairs[p][0], pairs[p][1], pairs[p][2], pairs[p][3]};
    } else {
      *reinterpret_cast<uint2*>(to + p * part_size) = {pairs[p][0], pairs[p][1]};
    }
  }
}

// What one thread brings of a step: 4 ranks of a row of low, and 8 neighbours of the factor.
template <class F, bool kAcross>
struct Operands {
  using S = Shape<F, kAcross>;
  float low[4];
  F factor[8];

  // m and n are the block's first row and column of out, rows and cols what is left of it from there.
  __device__ __forceinline__ void fetch(const Expand& call, const Step& step, int64_t m, int64_t n, int rows,
                                        int cols) {
    const CudaAdapter& adapter = call.adapters.at[step.adapter];
    const int thread = threadIdx.x, row = thread / 4, rank = step.rank + thread % 4 * 4, R = adapter.R;
    load_run(low, call.low + (m + row) * call.R + adapter.rank0 + rank, row < rows ? R - rank : 0);
    const F* const from = static_cast<const F*>(adapter.factor);
    if constexpr (kAcross) {
      const int r = step.rank + thread / 16, col = thread % 16 * 8;
      load_run(factor, from + r * call.N + n + col, r < R ? cols - col : 0);
    } else {
      const int r = step.rank + thread % 2 * 8, col = thread / 2;
      load_run(factor, from + (n + col) * R + r, col < cols ? R - r : 0);
    }
  }

  __device__ __forceinline__ void store(bf16* buffer) const {
    const int thread = threadIdx.x;
    store_run<kLowParts>(buffer + thread / 4 * tile_pitch(kStep) + thread % 4 * 4, kLowPart, low);
    bf16* const to = buffer + kLowParts * kLowPart +
                     (kAcross ? thread / 16 * S::kPitch + thread % 16 * 8 : thread / 2 * S::kPitch + thread % 2 * 8);
    store_run<S::kFactorParts>(to, S::kFactorPart, factor);
  }
};

// sum += low F of 16 ranks, for the warp's 32 x 32.
template <class F, bool kAcross>
__device__ __forceinline__ void multiply(float (&sum)[2][4][4], const bf16* buffer) {
  using S = Shape<F, kAcross>;
  const int lane = lane_index(), row0 = warp_index() / 4 * 32, col0 = warp_index() % 4 * 32;
  uint32_t right[S::kFactorParts][4][2];
#pragma unroll
  for (int p = 0; p < S::kFactorParts; ++p) {
    const bf16* const tile = buffer + kLowParts * kLowPart + p * S::kFactorPart;
#pragma unroll
    for (int j = 0; j < 4; j += 2) {
      uint32_t pair[4];
      if constexpr (kAcross) {
        ldmatrix_trans(pair, tile + lane % 16 * S::kPitch + col0 + 8 * j + lane / 16 * 8);
      } else {
        ldmatrix(pair, tile + (col0 + 8 * j + lane / 16 * 8 + lane % 8) * S::kPitch + lane / 8 % 2 * 8);
      }
#pragma unroll
      for (int e = 0; e < 4; ++e) right[p][j + e / 2][e % 2] = pair[e];
    }
  }
#pragma unroll
  for (int i = 0; i < 2; ++i) {
#pragma unroll
    for (int p = 0; p < kLowParts; ++p) {
      uint32_t left[4];
      ldmatrix(left, buffer + p * kLowPart + (row0 + 16 * i + lane % 16) * tile_pitch(kStep) + lane / 16 * 8);
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        mma_m16n8k16<bf16>(sum[i][j], left, right[0][j]);
        if constexpr (S::kFactorParts == 2) {
          if (p == 0) mma_m16n8k16<bf16>(sum[i][j], left, right[1][j]);
        }
      }
    }
  }
}

// sum += keep.scale mask own, and own = 0. The warp's columns are one group of 32: a call of Philox serves a row of it.
__device__ __forceinline__ void add_kept(float (&sum)[2][4][4], float (&own)[2][4][4], const Keep& keep,
                                         const uint64_t* seed_at, int64_t row, int64_t col) {
  const bool drops = keep.threshold != kKeepAll;
  const uint64_t seed = drops ? *seed_at : 0;
  // Both halves of a word are compared in its upper half, where what lies below does not count; words of 0 are kept.
  const uint32_t threshold = drops ? keep.threshold << 16 : ~0u;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    Philox4 words = {};
    if (drops) words = keep_words(seed, keep.stream, row + 8 * i, col / 32);
#pragma unroll
    for (int j = 0; j < 4; ++j) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        float &to = sum[i / 2][j][i % 2 * 2 + e], &from = own[i / 2][j][i % 2 * 2 + e];
        const bool kept = (e ? words.word[j] : words.word[j] << 16) < threshold;
        to = kept ? fmaf(from, keep.scale, to) : to;
        from = 0.f;
      }
    }
  }
}

template <class T, class F>
__device__ __forceinline__ float bias_of(const Expand& call, int64_t n) {
  if (n >= call.N) return 0.f;
  float sum = call.bias ? to_float(static_cast<const T*>(call.bias)[n]) : 0.f;
  for (int l = 0; l < call.adapters.count; ++l) {
    const CudaAdapter& adapter = call.adapters.at[l];
    if (adapter.bias) sum += adapter.scaling * to_float(static_cast<const F*>(adapter.bias)[n]);
  }
  return sum;
}

// sum += a matrix, which begins at the lane's first element; rows and cols are what is left of it from there.
template <class T>
__device__ __forceinline__ void add_rows(float (&sum)[2][4][4], const T* from, int64_t ld, int rows, int cols) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int row = 8 * i, col = 8 * j + e;
        if (row < rows && col < cols) sum[i / 2][j][i % 2 * 2 + e] += to_float(from[row * ld + col]);
      }
    }
  }
}

// sum = scaling gate scale keep mask (sum_scale sum + bias); bias and scale are those of the block's columns, row is
// the lane's first one, col0 the warp's first column, of out and within the block.
template <class F>
__device__ __forceinline__ void gate_sums(float (&sum)[2][4][4], const Expand& call, const float* bias,
                                          const float* scale, int64_t row, int64_t n0, int col0) {
  const Gated& gated = call.gated;
  const bool drops = gated.keep.threshold != kKeepAll;
  const uint64_t seed = drops ? *call.seed : 0;
  const float sum_scale = static_cast<float>(gated.sum_scale), scaling = static_cast<float>(gated.scaling);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int64_t m = row + 8 * i;
    const F* const gate = static_cast<const F*>(gated.gate);
    const float factor = gate && m < call.M ? scaling * to_float(gate[m]) : scaling;
    Philox4 words = {};
    if (drops) words = keep_words(seed, gated.keep.stream, m, (n0 + col0) / 32);
#pragma unroll
    for (int j = 0; j < 4; ++j) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int col = col0 + lane_index() % 4 * 2 + 8 * j + e;
        const uint32_t random = e ? words.word[j] >> 16 : words.word[j] & 0xFFFFu;
        float& value = sum[i / 2][j][i % 2 * 2 + e];
        value = random < gated.keep.threshold ? (sum_scale * value + bias[col]) * gated.keep.scale : 0.f;
        value *= factor * scale[col];
      }
    }
  }
}

// What every column of the block has: its bias and its part of s.
template <class F>
__device__ __forceinline__ void load_columns(float& bias, float& scale, const Expand& call, int64_t n) {
  const Gated& gated = call.gated;
  const F *const biases = static_cast<const F*>(gated.bias), *const scales = static_cast<const F*>(gated.scale);
  bias = biases && n < call.N ? to_float(biases[n]) : 0.f;
  scale = scales && n < call.N ? to_float(scales[gated.per_channel ? n : 0]) : 1.f;
}

// Writes the tile of out from shared memory, whole rows of it.
template <class T>
__device__ __forceinline__ void write_out(const Expand& call, const T* tile, int64_t m0, int64_t n0, int rows,
                                          int cols) {
  constexpr int kPerRow = kCols / 8, kRowStep = kThreads / kPerRow;
  const int row0 = threadIdx.x / kPerRow, col = threadIdx.x % kPerRow * 8;
  T* to = static_cast<T*>(call.out) + (m0 + row0) * call.N + n0 + col;
  const T* from = tile + row0 * kOutPitch + col;
  const bool vector = col + 8 <= cols && call.N % 8 == 0 && reinterpret_cast<uintptr_t>(call.out) % 16 == 0;
#pragma unroll
  for (int i = 0; i < kRows / kRowStep; ++i, to += kRowStep * call.N, from += kRowStep * kOutPitch) {
    if (row0 + i * kRowStep >= rows) break;
    if (vector) {
      *reinterpret_cast<uint4*>(to) = *reinterpret_cast<const uint4*>(from);
    } else {
#pragma unroll 1
      for (int e = 0; e < 8 && col + e < cols; ++e) to[e] = from[e];
    }
  }
}

// Serves the forward (y, B) and, `across`, the backward (dx, A). Only the latter has masks, and so a sum per adapter.
// kGated: the forward of bottleneck_adapter.
template <class T, class F, bool kAcross, bool kGated>
__global__ void __launch_bounds__(kThreads, 2)
    lora_linear_forward_expand_kernel(const __grid_constant__ Expand call, unsigned col_tiles) {
  using S = Shape<F, kAcross>;
  __shared__ __align__(16) T shared[S::kElements];
  bf16* const operand_tiles = reinterpret_cast<bf16*>(shared);
  __shared__ __align__(16) float bias[kCols], scales[kGated ? kCols : 1];
  const int64_t m0 = static_cast<int64_t>(blockIdx.x / col_tiles) * kRows;
  const int64_t n0 = static_cast<int64_t>(blockIdx.x % col_tiles) * kCols;
  const int lane = lane_index(), row = warp_index() / 4 * 32 + lane / 4, col0 = warp_index() % 4 * 32;
  const int rows = call.M - m0 < kRows ? static_cast<int>(call.M - m0) : kRows;
  const int cols = call.N - n0 < kCols ? static_cast<int>(call.N - n0) : kCols;
  float sum[2][4][4] = {}, own[2][4][4] = {};
  if (threadIdx.x < kCols) {
    if constexpr (kGated) {
      load_columns<F>(bias[threadIdx.x], scales[threadIdx.x], call, n0 + threadIdx.x);
    } else {
      bias[threadIdx.x] = bias_of<T, F>(call, n0 + threadIdx.x);
    }
  }

  Operands<F, kAcross> operands;
  Step step = {0, 0};
  step.skip_empty(call.adapters);
  if (step.adapter < call.adapters.count) operands.fetch(call, step, m0, n0, rows, cols);
  for (int parity = 0; step.adapter < call.adapters.count; parity ^= 1) {
    bf16* const buffer =
        operand_tiles + parity * S::kBuffer;  // last read before the barrier of the step before this one
    operands.store(buffer);
    const int adapter = step.adapter;
    step.rank += kStep;
    step.skip_empty(call.adapters);
    if (step.adapter < call.adapters.count) operands.fetch(call, step, m0, n0, rows, cols);
    __syncthreads();
    if constexpr (kAcross) {
      multiply<F, kAcross>(own, buffer);
      const Keep& keep = call.adapters.at[adapter].keep;
      if (step.adapter != adapter) add_kept(sum, own, keep, call.seed, m0 + row, n0 + col0);
    } else {
      multiply<F, kAcross>(sum, buffer);
    }
  }

  const int col = col0 + lane % 4 * 2;
  if constexpr (kGated) {
    __syncthreads();  // without adapters there was none, and bias and scales must be there
    gate_sums<F>(sum, call, bias, scales, m0 + row, n0, col0);
  }
  if (call.residual) {
    const T* const from = static_cast<const T*>(call.residual) + (m0 + row) * call.residual_stride + n0 + col;
    add_rows(sum, from, call.residual_stride, rows - row, cols - col);
  }
  __syncthreads();  // the operands have been read, the bias is there
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    const float2 add = kGated ? float2{0.f, 0.f} : *reinterpret_cast<const float2*>(bias + col + 8 * j);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float* const value = sum[i / 2][j] + i % 2 * 2;
      *reinterpret_cast<uint32_t*>(shared + (row + 8 * i) * kOutPitch + col + 8 * j) =
          round_pair<T>(value[0] + add.x, value[1] + add.y);
    }
  }
  __syncthreads();
  write_out(call, shared, m0, n0, rows, cols);
}

template <class T, class F>
cudaError_t run(Expand call, cudaStream_t stream) {
  if ((call.residual && call.accumulate) || (call.is_gated && call.across)) return cudaErrorInvalidValue;
  if (call.accumulate) {  // out is its own residual
    call.residual = call.out;
    call.residual_stride = call.N;
  }
  const int64_t row_tiles = (call.M + kRows - 1) / kRows, col_tiles = (call.N + kCols - 1) / kCols;
  if (row_tiles * col_tiles == 0) return cudaSuccess;
  if (row_tiles * col_tiles > INT32_MAX) return cudaErrorInvalidValue;
  const dim3 grid(static_cast<unsigned>(row_tiles * col_tiles)), block(kThreads);
  const unsigned cols = static_cast<unsigned>(col_tiles);
  if (call.across) {
    return PK_LAUNCH((lora_linear_forward_expand_kernel<T, F, true, false>), grid, block, 0, stream, call, cols);
  }
  for (int l = 0; l < call.adapters.count; ++l) {
    if (call.adapters.at[l].keep.threshold != kKeepAll) return cudaErrorInvalidValue;  // y has no masks
  }
  if (call.is_gated) {
    return PK_LAUNCH((lora_linear_forward_expand_kernel<T, F, false, true>), grid, block, 0, stream, call, cols);
  }
  return PK_LAUNCH((lora_linear_forward_expand_kernel<T, F, false, false>), grid, block, 0, stream, call, cols);
}

}  // namespace

cudaError_t expand(Dtype x, Dtype factors, const Expand& call, cudaStream_t stream) {
  if (x == Dtype::kBFloat16 && factors == Dtype::kBFloat16) return run<bf16, bf16>(call, stream);
  if (x == Dtype::kFloat16 && factors == Dtype::kFloat16) return run<fp16, fp16>(call, stream);
  if (x == Dtype::kBFloat16 && factors == Dtype::kFloat32) return run<bf16, float>(call, stream);
  return cudaErrorInvalidValue;
}

}  // namespace pk::lora_linear
