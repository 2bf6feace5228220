// One launch per device primitive of csrc/common, each of one warp, for test_primitives_cuda.cpp.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "tests/primitives_values.h"

namespace pk::test {

// out[m][l] = register m of lane l after ldmatrix of `count` 8 x 8 matrices, `matrices` [count, 8, 8].
cudaError_t load_matrices(int count, bool transposed, const uint16_t* matrices, uint32_t* out);

// d [16, 8] += a [16, 16] b; b is [8, 16], or with `transposed` [16, 8] and brought by ldmatrix_trans. Raw 16-bit
// elements.
cudaError_t multiply(Type type, bool transposed, const uint16_t* a, const uint16_t* b, float* d);

// d [16, 8] += a [16, 8] b [8, 8] in tf32.
cudaError_t multiply_tf32(const float* a, const float* b, float* d);

// Lane l copies l % (size + 1) of `size` = 4, 8 or 16 bytes of from [32, size] into to [32, size], and zeroes the rest.
cudaError_t copy(int size, const uint8_t* from, uint8_t* to);

// out [kExchanges, 32] of x [32]: xor 5, up 3, down 3, broadcast 7, xor 1 within 8, up 2 within 8, warp_sum of 32 and
// of 4, warp_max, ballot of x > 0, any and all of x > 0.
constexpr int kExchanges = 12;
cudaError_t exchange(const int* x, int* out);

}  // namespace pk::test
