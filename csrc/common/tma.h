// Copies from global to shared memory by the copy engine (sm_90): one thread asks for a whole box of a matrix, or for a
// run of bytes, and an mbarrier gets the bytes when they have come (mbarrier_arrive_expect says how many).
//
// A box of box_rows x 64 16-bit elements lies in shared memory as rows of 128 bytes, from a multiple of 1024 on, with
// its 16-byte chunks swizzled: chunk c of row r is at chunk c ^ (r % 8) (swizzled_offset), which is what wgmma.h reads.
// Elements outside the matrix come as zeros, and their bytes count.
#pragma once

#include <cuda.h>

#include "common/mbarrier.h"

namespace pk {

using TensorMap = CUtensorMap;  // a kernel's parameter, or in a struct that is one: const __grid_constant__

constexpr int kSwizzledColumns = 64;  // 16-bit elements in 128 bytes

// Where element (row, column) of a box lies, in bytes from its beginning.
__host__ __device__ constexpr int swizzled_offset(int row, int column) {
  return row * 128 + ((column / 8 ^ row % 8) * 16 + column % 8 * 2);
}

#ifdef __CUDACC__

// The driver's, or null where there is none. Asked of the runtime, so that nothing is linked with the driver's library.
using TensorMapEncoder = decltype(&cuTensorMapEncodeTiled);
inline TensorMapEncoder tensor_map_encoder() {
  static const TensorMapEncoder encode = [] {
    void* found = nullptr;
    cudaDriverEntryPointQueryResult result = cudaDriverEntryPointSymbolNotFound;
#if CUDART_VERSION >= 12050
    cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault, &result);
#else
    cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &found, cudaEnableDefault, &result);
#endif
    return reinterpret_cast<TensorMapEncoder>(result == cudaDriverEntryPointSuccess ? found : nullptr);
  }();
  return encode;
}

// Of a row-major matrix of 16-bit elements: `data` a multiple of 16 bytes, `row_stride` (elements) of 8; boxes have at
// most 256 rows and box_cols = 64. cudaErrorInvalidValue where the driver refuses.
inline cudaError_t make_tensor_map(TensorMap* map, const void* data, int64_t rows, int64_t cols, int64_t row_stride,
                                   int box_rows, int box_cols) {
  const TensorMapEncoder encode = tensor_map_encoder();
  if (encode == nullptr) return cudaErrorNotSupported;
  if (rows < 1 || cols < 1 || box_cols != kSwizzledColumns) return cudaErrorInvalidValue;
  const cuuint64_t extents[2] = {static_cast<cuuint64_t>(cols), static_cast<cuuint64_t>(rows)};
  const cuuint64_t strides[1] = {static_cast<cuuint64_t>(row_stride) * 2};  // bytes, of all but the innermost
  const cuuint32_t box[2] = {static_cast<cuuint32_t>(box_cols), static_cast<cuuint32_t>(box_rows)}, every[2] = {1, 1};
  const CUresult made = encode(map, CU_TENSOR_MAP_DATA_TYPE_UINT16, 2, const_cast<void*>(data), extents, strides, box,
                               every, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                               CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return made == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

// The box whose first element is (row, col), which may lie outside. One thread calls it.
__device__ __forceinline__ void tma_load(void* shared, const TensorMap* map, Mbarrier* barrier, int col, int row) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], [%2];" ::"r"(
          shared_address(shared)),
      "l"(map), "r"(shared_address(barrier)), "r"(col), "r"(row)
      : "memory");
}

// The same box into several blocks of the cluster, bit r of `blocks` for block r: in each to the place that `shared` is
// in this block, and its bytes come to the barrier in the place of `barrier` there. The L2 is asked for it once. The
// blocks have begun, and have initialised their barriers (cluster_sync()).
__device__ __forceinline__ void tma_load_multicast(void* shared, const TensorMap* map, Mbarrier* barrier, int col,
                                                   int row, uint16_t blocks) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster "
      "[%0], [%1, {%3, %4}], [%2], %5;" ::"r"(shared_address(shared)),
      "l"(map), "r"(shared_address(barrier)), "r"(col), "r"(row), "h"(blocks)
      : "memory");
}

__device__ __forceinline__ void tma_prefetch(const TensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

// `bytes` and both addresses are multiples of 16. One thread calls it.
__device__ __forceinline__ void bulk_load(void* shared, const void* global, int bytes, Mbarrier* barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                   shared_address(shared)),
               "l"(global), "r"(bytes), "r"(shared_address(barrier))
               : "memory");
}

// Makes what this thread has written to shared memory by plain stores (and cp.async) visible to wgmma and to the copies
// of this file. Where other threads start those, a barrier follows.
__device__ __forceinline__ void async_proxy_fence() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

#else

using emulator::make_tensor_map;
inline auto tensor_map_encoder() {
  return &emulator::make_tensor_map;
}

__forceinline__ void tma_load(void* shared, const TensorMap* map, Mbarrier* barrier, int col, int row, EMULATOR_SITE) {
  emulator::tensor_load(shared, map, barrier, col, row, site);
}
__forceinline__ void tma_load_multicast(void* shared, const TensorMap* map, Mbarrier* barrier, int col, int row,
                                        uint16_t blocks, EMULATOR_SITE) {
  emulator::tensor_load_multicast(shared, map, barrier, col, row, blocks, site);
}
inline void tma_prefetch(const TensorMap* map, EMULATOR_SITE) {
  emulator::check_tensor_map(map, site);
}
__forceinline__ void bulk_load(void* shared, const void* global, int bytes, Mbarrier* barrier, EMULATOR_SITE) {
  emulator::bulk_load(shared, global, bytes, barrier, site);
}
inline void async_proxy_fence() {
  emulator::async_proxy_fence();
}

#endif

}  // namespace pk
