// What the adapters add to the contraction of concat_gemm_sm90.cu, in bf16: left right^T = sum_l low_l F_l, where low
// [I, R] is fp32 (h, or ds) and F_l, of the factors' dtype, is B_l [J, R_l], or across A_l [R_l, J]. An adapter has R_l
// columns for each of the products that expand_cuda.cu makes of the same parts:
//       left    low_0 | low_1 | low_0             low = low_0 + low_1
//       right   F_0   | F_0   | F_1               F = F_0 + F_1; bf16 factors are F_0 alone, and have two products
// P counts the columns of all adapters. left [I, P] and right [J, P] have rows of whole 16 bytes, as TMA wants them,
// with zeros behind P; across, right is [P, J]. Also biases [J] = bias + sum_l s_l bias_l, fp32. Grid: a thread for 8
// neighbours of left, of right, or one of biases, in this order, in blocks of 256.
#include "common/parts.h"
#include "lora_linear/lora_linear_cuda.h"

namespace pk::lora_linear {

namespace {

constexpr int kThreads = 256;

template <class F>
constexpr int kProducts = std::is_same_v<F, bf16> ? 2 : 3;

__device__ __forceinline__ uint16_t part_of(float value, int part) {
  bf16 parts[2];
  split(value, parts);
  return part ? parts[1].bits : parts[0].bits;
}
__device__ __forceinline__ uint16_t part_of(bf16 value, int) {
  return value.bits;
}
__device__ __forceinline__ uint16_t part_of(fp16 value, int part) {
  uint32_t parts[2];
  as_bf16(parts, value.bits, value);
  return static_cast<uint16_t>(part ? parts[1] : parts[0]);
}

// One of the P columns, or, past them, adapter == count.
template <int kOfEach>
struct Column {
  int adapter, product, rank;

  __device__ __forceinline__ Column(const Adapters& adapters, int64_t column) : adapter(0), product(0), rank(0) {
    while (adapter < adapters.count && column >= kOfEach * adapters.at[adapter].R) {
      column -= kOfEach * adapters.at[adapter++].R;
    }
    if (adapter == adapters.count) return;
    product = static_cast<int>(column) / adapters.at[adapter].R;
    rank = static_cast<int>(column) % adapters.at[adapter].R;
  }
  __device__ __forceinline__ void next(const Adapters& adapters) {
    if (++rank < adapters.at[adapter].R) return;
    rank = 0;
    if (++product < kOfEach) return;
    product = 0;
    while (++adapter < adapters.count && adapters.at[adapter].R == 0) {
    }
  }
  __device__ __forceinline__ int low_part() const { return product == 1; }
  __device__ __forceinline__ int factor_part() const { return product == 2; }
};

// 8 neighbours of a row, from `column` on: value(column) each, zeros past the last.
template <int kOfEach, class Value>
__device__ __forceinline__ uint4 gather(const Adapters& adapters, Column<kOfEach> column, const Value& value) {
  uint32_t pairs[4] = {};
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    if (column.adapter == adapters.count) break;
    pairs[i / 2] |= static_cast<uint32_t>(value(column)) << 16 * (i % 2);
    column.next(adapters);
  }
  return {pairs[0], pairs[1], pairs[2], pairs[3]};
}

template <class T, class F>
__device__ __forceinline__ float bias_of(const ConcatOperands& call, int64_t j) {
  float sum = call.bias ? to_float(static_cast<const T*>(call.bias)[j]) : 0.f;
  for (int l = 0; l < call.adapters.count; ++l) {
    const CudaAdapter& adapter = call.adapters.at[l];
    if (adapter.bias) sum += adapter.scaling * to_float(static_cast<const F*>(adapter.bias)[j]);
  }
  return sum;
}

template <class T, class F, bool kAcross>
__global__ void __launch_bounds__(kThreads)
    lora_linear_forward_concat_operands_sm90_kernel(const __grid_constant__ ConcatOperands call, int64_t columns) {
  using Of = Column<kProducts<F>>;
  let_next_launch_start();
  const Adapters& adapters = call.adapters;
  const int64_t in_row = concat_stride(columns) / 8, lefts = call.I * in_row;
  const int64_t rights = kAcross ? columns * (call.J / 8) : call.J * in_row;
  int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i < lefts) {
    const float* const low = call.low + i / in_row * call.R;
    static_cast<uint4*>(call.left)[i] = gather(adapters, Of(adapters, i % in_row * 8), [&](const Of& column) {
      return part_of(low[adapters.at[column.adapter].rank0 + column.rank], column.low_part());
    });
    return;
  }
  i -= lefts;
  if (i < rights) {
    uint4& to = static_cast<uint4*>(call.right)[i];
    if constexpr (kAcross) {
      const Of column(adapters, i / (call.J / 8));
      const F* const from =
          static_cast<const F*>(adapters.at[column.adapter].factor) + column.rank * call.J + i % (call.J / 8) * 8;
      uint32_t pairs[4];
#pragma unroll
      for (int p = 0; p < 4; ++p) {
        pairs[p] = part_of(from[2 * p], column.factor_part()) |
                   static_cast<uint32_t>(part_of(from[2 * p + 1], column.factor_part())) << 16;
      }
      to = {pairs[0], pairs[1], pairs[2], pairs[3]};
    } else {
      const int64_t j = i / in_row;
      to = gather(adapters, Of(adapters, i % in_row * 8), [&](const Of& column) {
        const CudaAdapter& adapter = adapters.at[column.adapter];
        return part_of(static_cast<const F*>(adapter.factor)[j * adapter.R + column.rank], column.factor_part());
      });
    }
    return;
  }
  i -= rights;
  if (call.biases && i < call.J) call.biases[i] = bias_of<T, F>(call, i);
}

template <class T, class F>
cudaError_t run(const ConcatOperands& call, Dtype factors, cudaStream_t stream) {
  const int64_t columns = concat_columns(factors, call.adapters), in_row = concat_stride(columns) / 8;
  const int64_t threads =
      call.I * in_row + (call.across ? columns * (call.J / 8) : call.J * in_row) + (call.biases ? call.J : 0);
  if (call.across && call.J % 8 != 0) return cudaErrorInvalidValue;
  if (threads == 0) return cudaSuccess;
  if (threads > static_cast<int64_t>(INT32_MAX) * kThreads) return cudaErrorInvalidValue;
  const dim3 grid(static_cast<unsigned>((threads + kThreads - 1) / kThreads)), block(kThreads);
  if (call.across) {
    return PK_LAUNCH((lora_linear_forward_concat_operands_sm90_kernel<T, F, true>), grid, block, 0, stream, call,
                     columns);
  }
  return PK_LAUNCH((lora_linear_forward_concat_operands_sm90_kernel<T, F, false>), grid, block, 0, stream, call,
                   columns);
}

}  // namespace

int64_t concat_columns(Dtype factors, const Adapters& adapters) {
  int64_t columns = 0;
  for (int l = 0; l < adapters.count; ++l) columns += adapters.at[l].R;
  return columns * (factors == Dtype::kBFloat16 ? kProducts<bf16> : kProducts<float>);
}

cudaError_t concat_operands(Dtype x, Dtype factors, const ConcatOperands& call, cudaStream_t stream) {
  if (!has_mma_kernels(x, factors)) return cudaErrorInvalidValue;
  if (x == Dtype::kFloat16) return run<fp16, fp16>(call, factors, stream);
  return factors == Dtype::kFloat32 ? run<bf16, float>(call, factors, stream) : run<bf16, bf16>(call, factors, stream);
}

}  // namespace pk::lora_linear
