// The device primitives of csrc/common, one warp each, so that the emulator and a GPU can be held to the same answers.
#include "common/cp_async.h"
#include "common/mma.h"
#include "common/warp.h"
#include "tests/primitives_kernels.h"

namespace pk::test {
namespace {

template <int kCount, bool kTransposed>
__global__ void load_matrices_kernel(const uint16_t* matrices, uint32_t* out) {
  __shared__ __align__(16) uint16_t held[4 * 64];
  const int lane = lane_index();
  for (int i = lane; i < 4 * 64; i += 32) held[i] = i < kCount * 64 ? matrices[i] : 0;
  __syncwarp();
  uint32_t r[kCount];
  if constexpr (kTransposed) {
    ldmatrix_trans(r, held + lane * 8);
  } else {
    ldmatrix(r, held + lane * 8);
  }
  for (int m = 0; m < kCount; ++m) out[m * 32 + lane] = r[m];
}

template <class T, bool kTransposed>
__global__ void multiply_kernel(const uint16_t* a, const uint16_t* b, float* d) {
  __shared__ __align__(16) uint16_t a_tile[16 * 16], b_tile[16 * 8];
  const int lane = lane_index(), g = lane / 4, t = lane % 4;
  for (int i = lane; i < 16 * 16; i += 32) a_tile[i] = a[i];
  for (int i = lane; i < 16 * 8; i += 32) b_tile[i] = b[i];
  __syncwarp();
  uint32_t a_registers[4], b_registers[2];
  ldmatrix(a_registers, a_tile + lane % 16 * 16 + lane / 16 * 8);
  if constexpr (kTransposed) {
    ldmatrix_trans(b_registers, b_tile + lane % 16 * 8);
  } else {
    ldmatrix(b_registers, b_tile + lane % 8 * 16 + lane / 8 % 2 * 8);
  }
  float sum[4];
  for (int e = 0; e < 4; ++e) sum[e] = d[(g + e / 2 * 8) * 8 + 2 * t + e % 2];
  mma_m16n8k16<T>(sum, a_registers, b_registers);
  for (int e = 0; e < 4; ++e) d[(g + e / 2 * 8) * 8 + 2 * t + e % 2] = sum[e];
}

__device__ uint32_t bits(const float* x) {
  return *reinterpret_cast<const uint32_t*>(x);
}

__global__ void multiply_tf32_kernel(const float* a, const float* b, float* d) {
  const int lane = lane_index(), g = lane / 4, t = lane % 4;
  const uint32_t a_registers[4] = {bits(a + g * 8 + t), bits(a + (g + 8) * 8 + t), bits(a + g * 8 + t + 4),
                                   bits(a + (g + 8) * 8 + t + 4)};
  const uint32_t b_registers[2] = {bits(b + t * 8 + g), bits(b + (t + 4) * 8 + g)};
  float sum[4];
  for (int e = 0; e < 4; ++e) sum[e] = d[(g + e / 2 * 8) * 8 + 2 * t + e % 2];
  mma_m16n8k8_tf32(sum, a_registers, b_registers);
  for (int e = 0; e < 4; ++e) d[(g + e / 2 * 8) * 8 + 2 * t + e % 2] = sum[e];
}

template <int kSize>
__global__ void copy_kernel(const uint8_t* from, uint8_t* to) {
  __shared__ __align__(16) uint8_t held[32 * 16];
  const int lane = lane_index();
  cp_async<kSize>(held + lane * kSize, from + lane * kSize, lane % (kSize + 1));
  cp_async_commit();
  cp_async_wait<0>();
  for (int i = 0; i < kSize; ++i) to[lane * kSize + i] = held[lane * kSize + i];
}

__global__ void exchange_kernel(const int* x, int* out) {
  const int lane = lane_index(), value = x[lane];
  const int results[kExchanges] = {__shfl_xor_sync(kFullWarp, value, 5),
                                   __shfl_up_sync(kFullWarp, value, 3),
                                   __shfl_down_sync(kFullWarp, value, 3),
                                   __shfl_sync(kFullWarp, value, 7),
                                   __shfl_xor_sync(kFullWarp, value, 1, 8),
                                   __shfl_up_sync(kFullWarp, value, 2, 8),
                                   warp_sum(value),
                                   warp_sum<4>(value),
                                   warp_max(value),
                                   static_cast<int>(__ballot_sync(kFullWarp, value > 0)),
                                   __any_sync(kFullWarp, value > 0) != 0,
                                   __all_sync(kFullWarp, value > 0) != 0};
  for (int i = 0; i < kExchanges; ++i) out[i * 32 + lane] = results[i];
}

}  // namespace

cudaError_t load_matrices(int count, bool transposed, const uint16_t* matrices, uint32_t* out) {
  const auto run = [&](auto kernel) { return PK_LAUNCH(kernel, dim3(1), dim3(32), 0, nullptr, matrices, out); };
  if (count == 1) return run(transposed ? load_matrices_kernel<1, true> : load_matrices_kernel<1, false>);
  if (count == 2) return run(transposed ? load_matrices_kernel<2, true> : load_matrices_kernel<2, false>);
  return run(transposed ? load_matrices_kernel<4, true> : load_matrices_kernel<4, false>);
}

cudaError_t multiply(Type type, bool transposed, const uint16_t* a, const uint16_t* b, float* d) {
  const auto run = [&](auto kernel) { return PK_LAUNCH(kernel, dim3(1), dim3(32), 0, nullptr, a, b, d); };
  if (type == Type::kBFloat16) return run(transposed ? multiply_kernel<bf16, true> : multiply_kernel<bf16, false>);
  return run(transposed ? multiply_kernel<fp16, true> : multiply_kernel<fp16, false>);
}

cudaError_t multiply_tf32(const float* a, const float* b, float* d) {
  return PK_LAUNCH(multiply_tf32_kernel, dim3(1), dim3(32), 0, nullptr, a, b, d);
}

cudaError_t copy(int size, const uint8_t* from, uint8_t* to) {
  const auto run = [&](auto kernel) { return PK_LAUNCH(kernel, dim3(1), dim3(32), 0, nullptr, from, to); };
  return run(size == 4 ? copy_kernel<4> : size == 8 ? copy_kernel<8> : copy_kernel<16>);
}

cudaError_t exchange(const int* x, int* out) {
  return PK_LAUNCH(exchange_kernel, dim3(1), dim3(32), 0, nullptr, x, out);
}

}  // namespace pk::test
