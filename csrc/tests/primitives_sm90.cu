// The device primitives of sm_90a, each in a kernel that is as small as it can be (primitives_sm90.h).
#include "common/cluster.h"
#include "common/dtype.h"
#include "common/tma.h"
#include "common/wgmma.h"
#include "tests/primitives_sm90.h"

namespace pk::test {
namespace {

constexpr int kExchangeThreads = 64;

__global__ void exchange_sm90_kernel(const int* x, int* out) {
  PK_DYNAMIC_SHARED(int, slots);  // [2][64]: mine, and from the block before
  const int t = static_cast<int>(threadIdx.x), rank = cluster_rank(), blocks = cluster_blocks();
  slots[t] = x[rank * kExchangeThreads + t];
  cluster_arrive();  // the others have begun when this is over
  cluster_wait();
  of_block(slots, (rank + 1) % blocks)[kExchangeThreads + t] = slots[t];
  int sum = 0;
  for (int r = 0; r < blocks; ++r) sum += (r + 1) * of_block(slots, r)[t];
  cluster_sync();  // also: nobody ends before its memory has been read
  out[rank * kExchangeThreads + t] = sum + 100 * slots[kExchangeThreads + t];
}

__global__ void box_sm90_kernel(const __grid_constant__ TensorMap map, const uint16_t* matrix, int box_rows, int row,
                                int col, uint16_t* out) {
  PK_SWIZZLED_SHARED(unsigned char, shared);
  uint16_t* const tile = reinterpret_cast<uint16_t*>(shared);
  uint16_t* const run = tile + box_rows * kSwizzledColumns;
  Mbarrier* const arrived = reinterpret_cast<Mbarrier*>(run + 8);
  const int t = static_cast<int>(threadIdx.x);
  if (t == 0) {
    tma_prefetch(&map);
    mbarrier_init(arrived, 1);
    mbarrier_init_fence();
  }
  __syncthreads();
  if (t == 0) {
    mbarrier_arrive_expect(arrived, box_rows * kSwizzledColumns * 2 + 16);
    tma_load(tile, &map, arrived, col, row);
    bulk_load(run, matrix, 16, arrived);
  }
  mbarrier_wait(arrived, 0);
  for (int i = t; i < box_rows * kSwizzledColumns + 8; i += static_cast<int>(blockDim.x)) out[i] = tile[i];
}

// Rows 0 ... rows - 1, columns first ... first + 63 of a row-major matrix, by plain stores as a tma_load would leave
// them.
template <class T>
__device__ void store_tile(unsigned char* tile, const T* matrix, int rows, int ld, int first) {
  for (int i = static_cast<int>(threadIdx.x); i < rows * kSwizzledColumns; i += static_cast<int>(blockDim.x)) {
    const int row = i / kSwizzledColumns, col = i % kSwizzledColumns;
    *reinterpret_cast<T*>(tile + swizzled_offset(row, col)) = matrix[row * ld + first + col];
  }
}

// One warp group. Shared memory: a as boxes [K / 64][64 rows], b as boxes [K / 64][N rows] or [N / 64][K rows], and an
// mbarrier.
template <class T, int kN, Major kB>
__global__ void __launch_bounds__(128, 1)
    product_sm90_kernel(const __grid_constant__ TensorMap a_map, const __grid_constant__ TensorMap b_map, const T* a,
                        const T* b, float* d, int K, bool by_stores, bool accumulate) {
  PK_SWIZZLED_SHARED(unsigned char, a_tiles);
  constexpr bool kAlongOutput = kB == Major::kOutput;
  constexpr int kABytes = 64 * 128;
  unsigned char* const b_tiles = a_tiles + K / 64 * kABytes;
  const int b_boxes = kAlongOutput ? kN / 64 : K / 64, b_rows = kAlongOutput ? K : kN, b_bytes = b_rows * 128;
  Mbarrier* const arrived = reinterpret_cast<Mbarrier*>(b_tiles + b_boxes * b_bytes);
  const int t = static_cast<int>(threadIdx.x);
  if (t == 0) {
    mbarrier_init(arrived, 1);
    mbarrier_init_fence();
  }
  __syncthreads();
  if (by_stores) {
    for (int i = 0; i < K / 64; ++i) store_tile(a_tiles + i * kABytes, a, 64, K, i * 64);
    for (int i = 0; i < b_boxes; ++i) store_tile(b_tiles + i * b_bytes, b, b_rows, kAlongOutput ? kN : K, i * 64);
    async_proxy_fence();
    __syncthreads();
  } else {
    if (t == 0) {
      mbarrier_arrive_expect(arrived, K / 64 * kABytes + b_boxes * b_bytes);
      for (int i = 0; i < K / 64; ++i) tma_load(a_tiles + i * kABytes, &a_map, arrived, i * 64, 0);
      for (int i = 0; i < b_boxes; ++i) tma_load(b_tiles + i * b_bytes, &b_map, arrived, i * 64, 0);
    }
    mbarrier_wait(arrived, 0);
  }
  const int warp = t / 32, lane = t % 32;
  const auto place = [&](int i) {
    return (16 * warp + lane / 4 + 8 * (i / 2 % 2)) * kN + 8 * (i / 4) + 2 * (lane % 4) + i % 2;
  };
  float sum[kN / 2];
#pragma unroll
  for (int i = 0; i < kN / 2; ++i) sum[i] = d[place(i)];
  wgmma_fence(sum);
  for (int k = 0; k < K / 16; ++k) {
    const uint64_t a_box = wgmma_operand<Major::kContraction>(a_tiles + k / 4 * kABytes);
    const uint64_t b_step = kAlongOutput ? wgmma_step<kB>(wgmma_operand<kB>(b_tiles, K), k)
                                         : wgmma_step<kB>(wgmma_operand<kB>(b_tiles + k / 4 * b_bytes), k % 4);
    wgmma_m64k16<T, kN, kB>(sum, wgmma_step<Major::kContraction>(a_box, k % 4), b_step, accumulate || k > 0);
  }
  wgmma_commit();
  wgmma_wait<0>(sum);
#pragma unroll
  for (int i = 0; i < kN / 2; ++i) d[place(i)] = sum[i];
}

template <class T, int kN, Major kB>
cudaError_t product_of(const Product& product, const T* a, const T* b, float* d, cudaStream_t stream) {
  constexpr bool kAlongOutput = kB == Major::kOutput;
  const int K = product.K;
  TensorMap a_map, b_map;
  cudaError_t error = make_tensor_map(&a_map, a, 64, K, K, 64, 64);
  if (error == cudaSuccess) {
    error = kAlongOutput ? make_tensor_map(&b_map, b, K, kN, kN, K, 64) : make_tensor_map(&b_map, b, kN, K, K, kN, 64);
  }
  if (error != cudaSuccess) return error;
  const size_t bytes = static_cast<size_t>(64 + kN) * K * 2 + sizeof(Mbarrier);
  return PK_LAUNCH_CLUSTER((product_sm90_kernel<T, kN, kB>), 1, false, dim3(1), dim3(128), bytes, stream, a_map, b_map,
                           a, b, d, K, product.by_stores, product.accumulate);
}

template <class T>
cudaError_t product_of(const Product& product, const uint16_t* a, const uint16_t* b, float* d, cudaStream_t stream) {
  const T *x = reinterpret_cast<const T*>(a), *y = reinterpret_cast<const T*>(b);
  if (product.N == 128) {
    return product.along_output ? product_of<T, 128, Major::kOutput>(product, x, y, d, stream)
                                : product_of<T, 128, Major::kContraction>(product, x, y, d, stream);
  }
  return product.along_output ? product_of<T, 256, Major::kOutput>(product, x, y, d, stream)
                              : product_of<T, 256, Major::kContraction>(product, x, y, d, stream);
}

}  // namespace

cudaError_t exchange(int blocks, const int* x, int* out, cudaStream_t stream) {
  return PK_LAUNCH_CLUSTER(exchange_sm90_kernel, blocks, false, dim3(blocks), dim3(kExchangeThreads),
                           2 * kExchangeThreads * sizeof(int), stream, x, out);
}

cudaError_t box(const uint16_t* matrix, int rows, int cols, int row_stride, int box_rows, int row, int col,
                uint16_t* out, cudaStream_t stream) {
  TensorMap map;
  const cudaError_t error = make_tensor_map(&map, matrix, rows, cols, row_stride, box_rows, kSwizzledColumns);
  if (error != cudaSuccess) return error;
  const size_t bytes = box_rows * kSwizzledColumns * 2 + 16 + sizeof(Mbarrier);
  return PK_LAUNCH_CLUSTER(box_sm90_kernel, 1, false, dim3(1), dim3(64), bytes, stream, map, matrix, box_rows, row, col,
                           out);
}

cudaError_t product(const Product& product, const uint16_t* a, const uint16_t* b, float* d, cudaStream_t stream) {
  return product.type == Type::kBFloat16 ? product_of<bf16>(product, a, b, d, stream)
                                         : product_of<fp16>(product, a, b, d, stream);
}

}  // namespace pk::test
