// Tensor-core products of a warp group (sm_90a; 128 threads, the first a multiple of 128), fp32 accumulation, operands
// in shared memory: d [64, N] += a [64, 16] b [16, N]. Lane l of warp w holds in d[i] (row, column) =
//   (16 (w % 4) + l / 4 + 8 (i / 2 % 2), 8 (i / 4) + 2 (l % 4) + i % 2).
// An operand is a tile of 16-bit elements as tma_load leaves it, 128-byte swizzled, from a multiple of 1024 bytes on:
//   kContraction   [rows][64]: 64 elements along k lie together; rows are those of a, or the columns of b
//   kOutput        b only, [N / 64][tile_rows][64]: boxes of tile_rows rows along k, 64 columns of b lie together
// It runs asynchronously:  wgmma_fence(d);  for (k) wgmma_m64k16<...>(d, wgmma_step<...>(a, k), wgmma_step<...>(b, k));
// wgmma_commit();  ...  wgmma_wait<0>(d);  until the wait neither d nor the tiles may be touched. All 128 threads call
// every function here alike. Tiles that plain stores have written need async_proxy_fence() and a barrier before.
#pragma once

#include <type_traits>

#include "common/dtype.h"
#include "common/launch.h"
#ifndef __CUDACC__
#include "emulator/sm90.h"
#endif

namespace pk {

// Which dimension lies together in shared memory: what the PTX manual calls K-major and MN-major.
enum class Major { kContraction, kOutput };

// The operand 16 k elements further along the contraction: k < 4 in kContraction (a row has 64), k < tile_rows / 16 in
// kOutput. Addresses are in units of 16 bytes.
template <Major kMajor>
__host__ __device__ constexpr uint64_t wgmma_step(uint64_t operand, int k) {
  return operand + static_cast<uint64_t>(k * (kMajor == Major::kContraction ? 2 : 128));
}

// Descriptor of a tile at `address` of shared memory, by the PTX manual's "matrix descriptor": bits 0-13 the address,
// 16-29 and 32-45 the leading and the stride byte offset, all / 16, 62-63 the swizzle (1: 128 bytes). The stride offset
// is from 8 rows to the next 8; the leading one from 64 columns to the next 64, of no meaning in kContraction.
template <Major kMajor>
__host__ __device__ constexpr uint64_t wgmma_descriptor(uint32_t address, int tile_rows) {
  const uint64_t leading = kMajor == Major::kContraction ? 1 : static_cast<uint64_t>(tile_rows) * 128 / 16;
  return static_cast<uint64_t>((address & 0x3FFFFu) >> 4) | leading << 16 | uint64_t{1024 / 16} << 32 |
         uint64_t{1} << 62;
}

#ifdef __CUDACC__

template <Major kMajor>
__device__ __forceinline__ uint64_t wgmma_operand(const void* tile, int tile_rows = 0) {
  return wgmma_descriptor<kMajor>(shared_address(tile), tile_rows);
}

// Before the first product, and after every wait before the next one: what the threads did with d is then done.
__device__ __forceinline__ void wgmma_fence() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

// Ends a group of products.
__device__ __forceinline__ void wgmma_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

// Waits until at most kLeft of the newest groups are not done.
template <int kLeft>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kLeft) : "memory");
}

// Keeps the compiler from moving what it does with d across this place.
template <int kCount>
__device__ __forceinline__ void pin_registers(float (&d)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(d[i])::"memory");
}

// The two around d: what is done with d before stays before, and after stays after.
template <int kCount>
__device__ __forceinline__ void wgmma_fence(float (&d)[kCount]) {
  pin_registers(d);
  wgmma_fence();
}
template <int kLeft, int kCount>
__device__ __forceinline__ void wgmma_wait(float (&d)[kCount]) {
  wgmma_wait<kLeft>();
  pin_registers(d);
}

#define PK_OUT4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define PK_OUT16(i) PK_OUT4(i), PK_OUT4(i + 4), PK_OUT4(i + 8), PK_OUT4(i + 12)
// clang-format off
#define PK_WGMMA_N128(types)                                                                                          \
  asm volatile(                                                                                                       \
      "{\n.reg .pred accumulate;\nsetp.ne.b32 accumulate, %66, 0;\n"                                                  \
      "wgmma.mma_async.sync.aligned.m64n128k16.f32." types " {"                                                       \
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, "                              \
      "%18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, "                              \
      "%34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, "                              \
      "%50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"                                          \
      "}, %64, %65, accumulate, 1, 1, 0, %67;\n}"                                                                     \
      : PK_OUT16(0), PK_OUT16(16), PK_OUT16(32), PK_OUT16(48)                                                         \
      : "l"(a), "l"(b), "r"(static_cast<int>(accumulate)), "n"(kTransposed))
#define PK_WGMMA_N256(types)                                                                                          \
  asm volatile(                                                                                                       \
      "{\n.reg .pred accumulate;\nsetp.ne.b32 accumulate, %130, 0;\n"                                                 \
      "wgmma.mma_async.sync.aligned.m64n256k16.f32." types " {"                                                       \
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, "                              \
      "%18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, "                              \
      "%34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, "                              \
      "%50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, %64, %65, "                              \
      "%66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, %80, %81, "                              \
      "%82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, %96, %97, "                              \
      "%98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, "                                  \
      "%111, %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, "                                \
      "%124, %125, %126, %127"                                                                                        \
      "}, %128, %129, accumulate, 1, 1, 0, %131;\n}"                                                                  \
      : PK_OUT16(0), PK_OUT16(16), PK_OUT16(32), PK_OUT16(48), PK_OUT16(64), PK_OUT16(80), PK_OUT16(96), PK_OUT16(112)\
      : "l"(a), "l"(b), "r"(static_cast<int>(accumulate)), "n"(kTransposed))
// clang-format on

// d = a b where `accumulate` is false: the same for all threads.
template <class T, int kN, Major kB>
__device__ __forceinline__ void wgmma_m64k16(float (&d)[kN / 2], uint64_t a, uint64_t b, bool accumulate = true) {
  static_assert(std::is_same_v<T, bf16> || std::is_same_v<T, fp16>, "a 16-bit type");
  static_assert(kN == 128 || kN == 256, "a width that is spelled here");
  constexpr int kTransposed = kB == Major::kOutput;
  if constexpr (kN == 128) {
    if constexpr (std::is_same_v<T, bf16>) {
      PK_WGMMA_N128("bf16.bf16");
    } else {
      PK_WGMMA_N128("f16.f16");
    }
  } else {
    if constexpr (std::is_same_v<T, bf16>) {
      PK_WGMMA_N256("bf16.bf16");
    } else {
      PK_WGMMA_N256("f16.f16");
    }
  }
}

#undef PK_WGMMA_N256
#undef PK_WGMMA_N128
#undef PK_OUT16
#undef PK_OUT4

// Registers of each thread of the warp group, 24 ... 256 in steps of 8: waits until others have given enough away.
// All have at first what ptxas chooses: the smaller of what __launch_bounds__(threads, 1) leaves and the largest count
// that the kernel asks for; and no more than that together. Without the 1 ptxas ignores both.
template <int kRegisters>
__device__ __forceinline__ void take_registers() {
  static_assert(kRegisters >= 24 && kRegisters <= 256 && kRegisters % 8 == 0, "a count that setmaxnreg has");
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
__device__ __forceinline__ void give_registers() {
  static_assert(kRegisters >= 24 && kRegisters <= 256 && kRegisters % 8 == 0, "a count that setmaxnreg has");
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// A __syncthreads() of `threads` threads, whole warps, that name the same id, 1 ... 15 (0 is __syncthreads' own).
__device__ __forceinline__ void named_barrier(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

#else

template <Major kMajor>
inline uint64_t wgmma_operand(const void* tile, int tile_rows = 0, EMULATOR_SITE) {
  return wgmma_descriptor<kMajor>(emulator::shared_address(tile, site), tile_rows);
}
inline void wgmma_fence(EMULATOR_SITE) {
  emulator::product_fence(site);
}
template <int kCount>
inline void wgmma_fence(float (&)[kCount], EMULATOR_SITE) {
  emulator::product_fence(site);
}
inline void wgmma_commit(EMULATOR_SITE) {
  emulator::product_commit(site);
}
template <int kLeft>
inline void wgmma_wait(EMULATOR_SITE) {
  emulator::product_wait(kLeft, site);
}
template <int kLeft, int kCount>
inline void wgmma_wait(float (&)[kCount], EMULATOR_SITE) {
  emulator::product_wait(kLeft, site);
}
template <int kCount>
inline void pin_registers(float (&)[kCount]) {}

template <class T, int kN, Major kB>
__forceinline__ void wgmma_m64k16(float (&d)[kN / 2], uint64_t a, uint64_t b, bool accumulate = true, EMULATOR_SITE) {
  static_assert(std::is_same_v<T, bf16> || std::is_same_v<T, fp16>, "a 16-bit type");
  static_assert(kN == 128 || kN == 256, "a width that is spelled here");
  const auto format = std::is_same_v<T, bf16> ? emulator::Format::kBFloat16 : emulator::Format::kFloat16;
  emulator::start_product(format, kN, kB == Major::kOutput, d, a, b, accumulate, site);
}

template <int kRegisters>
inline void take_registers(EMULATOR_SITE) {
  static_assert(kRegisters >= 24 && kRegisters <= 256 && kRegisters % 8 == 0, "a count that setmaxnreg has");
  emulator::set_registers(kRegisters, true, site);
}
template <int kRegisters>
inline void give_registers(EMULATOR_SITE) {
  static_assert(kRegisters >= 24 && kRegisters <= 256 && kRegisters % 8 == 0, "a count that setmaxnreg has");
  emulator::set_registers(kRegisters, false, site);
}
inline void named_barrier(int id, int threads, EMULATOR_SITE) {
  emulator::named_barrier(id, threads, site);
}

#endif

}  // namespace pk
