// Tensor-core products of one warp (sm_80), fp32 accumulation: d [16, 8] += a [16, K] b [K, 8]. Lane l = 4 g + t holds
//   d, (row, column)       (g, 2t), (g, 2t + 1), (g + 8, 2t), (g + 8, 2t + 1)
//   16-bit types, K = 16   a, pairs along k: (g, 2t), (g + 8, 2t), (g, 2t + 8), (g + 8, 2t + 8)
//                          b, pairs along k: (2t, g), (2t + 8, g)
//   tf32, K = 8            a: (g, t), (g + 8, t), (g, t + 4), (g + 8, t + 4)
//                          b: (t, g), (t + 4, g)
// and ldmatrix, which brings 8 x 8 matrices of 16-bit elements from shared memory into that layout: lane l gives the
// address (a multiple of 16) of row l % 8 of matrix l / 8, and receives of each matrix (g, 2t) and (g, 2t + 1), or of
// its transpose. a is row-major in shared memory: ldmatrix; b stored [8, K], k innermost: likewise; [K, 8]: _trans.
#pragma once

#include <type_traits>

#include "common/cp_async.h"
#include "common/dtype.h"

namespace pk {

// Rows of a tile of 16-bit elements lie kCols + 8 apart: 16 bytes over a multiple of 128 where kCols is a multiple of
// 64, so that the eight rows of an ldmatrix meet in no bank.
constexpr int tile_pitch(int cols) {
  return cols + 8;
}

#ifdef __CUDACC__

template <int kMatrices>
__device__ __forceinline__ void ldmatrix(uint32_t (&r)[kMatrices], const void* row) {
  static_assert(kMatrices == 1 || kMatrices == 2 || kMatrices == 4, "a count that ldmatrix has");
  const uint32_t address = shared_address(row);
  if constexpr (kMatrices == 1) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%0}, [%1];" : "=r"(r[0]) : "r"(address) : "memory");
  } else if constexpr (kMatrices == 2) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
                 : "=r"(r[0]), "=r"(r[1])
                 : "r"(address)
                 : "memory");
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(address)
                 : "memory");
  }
}

template <int kMatrices>
__device__ __forceinline__ void ldmatrix_trans(uint32_t (&r)[kMatrices], const void* row) {
  static_assert(kMatrices == 1 || kMatrices == 2 || kMatrices == 4, "a count that ldmatrix has");
  const uint32_t address = shared_address(row);
  if constexpr (kMatrices == 1) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x1.trans.shared.b16 {%0}, [%1];" : "=r"(r[0]) : "r"(address) : "memory");
  } else if constexpr (kMatrices == 2) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
                 : "=r"(r[0]), "=r"(r[1])
                 : "r"(address)
                 : "memory");
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(address)
                 : "memory");
  }
}

#define PK_MMA(shape_and_types)                                                                                       \
  asm volatile("mma.sync.aligned." shape_and_types " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};" \
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                                                       \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]))

template <class T>
__device__ __forceinline__ void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);
template <>
__device__ __forceinline__ void mma_m16n8k16<bf16>(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  PK_MMA("m16n8k16.row.col.f32.bf16.bf16.f32");
}
template <>
__device__ __forceinline__ void mma_m16n8k16<fp16>(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  PK_MMA("m16n8k16.row.col.f32.f16.f16.f32");
}

// Takes fp32 bits; the low 13 bits of the mantissa are ignored.
__device__ __forceinline__ void mma_m16n8k8_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  PK_MMA("m16n8k8.row.col.f32.tf32.tf32.f32");
}

#undef PK_MMA

#else

template <int kMatrices>
__forceinline__ void ldmatrix(uint32_t (&r)[kMatrices], const void* row, EMULATOR_SITE) {
  emulator::load_matrices(r, kMatrices, row, false, site);
}

template <int kMatrices>
__forceinline__ void ldmatrix_trans(uint32_t (&r)[kMatrices], const void* row, EMULATOR_SITE) {
  emulator::load_matrices(r, kMatrices, row, true, site);
}

template <class T>
__forceinline__ void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], EMULATOR_SITE) {
  static_assert(std::is_same_v<T, bf16> || std::is_same_v<T, fp16>, "a 16-bit type");
  constexpr bool kBFloat16 = std::is_same_v<T, bf16>;
  emulator::multiply(kBFloat16 ? emulator::Format::kBFloat16 : emulator::Format::kFloat16, 16, d, a, b, site);
}

__forceinline__ void mma_m16n8k8_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], EMULATOR_SITE) {
  emulator::multiply(emulator::Format::kTf32, 8, d, a, b, site);
}

#endif

}  // namespace pk
