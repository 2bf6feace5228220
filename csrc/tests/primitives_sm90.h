// Launches of the device primitives of sm_90a (csrc/common: cluster.h, mbarrier.h, tma.h, wgmma.h), for
// test_primitives_sm90_cuda.cpp.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "tests/primitives_values.h"

namespace pk::test {

// One cluster of `blocks` blocks, 64 threads each. x [blocks, 64]: of every thread, out [blocks, 64] =
// sum over r of (r + 1) x[r, its number], read from the other blocks, + 100 times x of the block before, which that
// block has written here.
cudaError_t exchange(int blocks, const int* x, int* out, cudaStream_t stream);

// What lies in shared memory, [box_rows, 64], after a tma_load of the box at (row, col) of a matrix [rows, cols] whose
// rows are row_stride apart; then 16 bytes of a bulk_load from the matrix' beginning.
cudaError_t box(const uint16_t* matrix, int rows, int cols, int row_stride, int box_rows, int row, int col,
                uint16_t* out, cudaStream_t stream);

// d [64, N] = a [64, K] b, K a multiple of 64 of at most 128, added to d where `accumulate`. b is [N, K], or with
// `along_output` [K, N]. N is 128 or 256. by_stores: the tiles come by plain stores, not by tma_load. Raw elements.
struct Product {
  Type type;
  int N, K;
  bool along_output, by_stores, accumulate;
};
cudaError_t product(const Product& product, const uint16_t* a, const uint16_t* b, float* d, cudaStream_t stream);

}  // namespace pk::test
