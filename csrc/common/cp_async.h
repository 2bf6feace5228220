// Asynchronous copies from global to shared memory (sm_80): each thread's copies form groups in the order of its
// commits; a wait covers the calling thread's copies only, so a barrier stands between it and readers in other threads.
#pragma once

#include "common/launch.h"

namespace pk {

#ifdef __CUDACC__

// Copies `valid` bytes of kBytes (4, 8 or 16; both addresses multiples of it) and zeroes the rest; with valid = 0 the
// global address is not read, but must still be a pointer into some allocation. 16 bytes go past the first-level cache.
template <int kBytes>
__device__ __forceinline__ void cp_async(void* shared, const void* global, int valid = kBytes) {
  static_assert(kBytes == 4 || kBytes == 8 || kBytes == 16, "a size that cp.async has");
  if constexpr (kBytes == 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(global), "r"(valid)
                 : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(shared_address(shared)), "l"(global),
                 "n"(kBytes), "r"(valid)
                 : "memory");
  }
}

__device__ __forceinline__ void cp_async_commit() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}

// Waits until at most kGroupsLeft of this thread's newest groups are in flight.
template <int kGroupsLeft>
__device__ __forceinline__ void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kGroupsLeft) : "memory");
}

#else

template <int kBytes>
__forceinline__ void cp_async(void* shared, const void* global, int valid = kBytes, EMULATOR_SITE) {
  static_assert(kBytes == 4 || kBytes == 8 || kBytes == 16, "a size that cp.async has");
  emulator::copy_async(shared, global, kBytes, valid, site);
}

__forceinline__ void cp_async_commit() {
  emulator::copy_commit();
}

template <int kGroupsLeft>
__forceinline__ void cp_async_wait() {
  emulator::copy_wait(kGroupsLeft);
}

#endif

// Can the rows of a matrix be read 16 bytes at a time? The last, partial vector of a row is zero-filled, not read over.
inline bool vector_rows(const void* data, int64_t ld, int bytes_each) {
  return reinterpret_cast<uintptr_t>(data) % 16 == 0 && ld * bytes_each % 16 == 0;
}

}  // namespace pk
