// CUDA C++ on the CPU: what a .cu file sees when g++ compiles it in place of nvcc. Each CUDA thread is a fiber
// (machine.h), blocks run one after another (the blocks of a cluster together), and every word that makes threads meet
// is a call that can switch fibers. The device primitives of csrc/common include this file, and sm90.h; kernels and
// launchers do not.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <math.h>

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <tuple>

#undef __shared__
#undef __launch_bounds__
#undef __grid_constant__
#define __launch_bounds__(...)
#define __grid_constant__
// One block runs at a time, in one OS thread: a static variable is its shared memory (so not in a cluster).
// Thread-local ones lie together, so that they can be poisoned before each block; AddressSanitizer guards only the
// others.
#if defined(__SANITIZE_ADDRESS__)
#define __shared__ static
#else
#define __shared__ static thread_local
#endif

namespace emulator {

// When a cp.async lands: at the wait that orders it, at once, or either at random. A copy to an mbarrier is late when
// it lands only after no thread can go on without it; a wgmma when it reads its operands at its wait.
enum class Copies { kLate, kEarly, kRandom };

// Seed 0 runs threads and blocks in order; any other shuffles the threads at every step and the blocks of a launch.
struct Schedule {
  uint64_t seed = 0;
  Copies copies = Copies::kLate;
};
void set_schedule(Schedule schedule);

// The line of the kernel that calls, as default argument of whatever can fail.
struct Site {
  const char* file;
  int line;
  static constexpr Site here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) { return {file, line}; }
};

// What the primitives are made of (machine.cpp, warp.cpp, memory.cpp).

enum class Format { kBFloat16, kFloat16, kTf32 };

// cluster_blocks is 0 for a kernel of every architecture, at least 1 for one of sm_90 alone.
cudaError_t run(const char* kernel, const void* entry, dim3 grid, dim3 block, size_t shared_bytes, bool overlapped,
                int cluster_blocks, const std::function<void()>& thread);
void barrier(Site site);
void warp_barrier(unsigned mask, Site site);
void shuffle(unsigned mask, void* result, const void* value, size_t bytes, int source, Site site);
unsigned ballot(unsigned mask, bool vote, Site site);
void load_matrices(uint32_t* result, int count, const void* row, bool transposed, Site site);
void multiply(Format format, int depth, float* d, const uint32_t* a, const uint32_t* b, Site site);
void copy_async(void* shared, const void* global, int bytes, int valid, Site site);
void copy_commit();
void copy_wait(int groups_left);
void* dynamic_shared(size_t alignment, Site site);
void wait_for_previous_launch();
void fence();
// Between the two no other thread runs, so the caller computes the new value from the old one as it likes.
void atomic_load(const void* place, void* value, size_t bytes, Site site);
void atomic_store(void* place, const void* value, size_t bytes);
int lane();

template <class... Parameters, class... Arguments>
cudaError_t launch(const char* name, bool overlapped, int cluster_blocks, void (*kernel)(Parameters...), dim3 grid,
                   dim3 block, size_t shared_bytes, cudaStream_t, Arguments&&... arguments) {
  const std::tuple<Parameters...> held(std::forward<Arguments>(arguments)...);
  const void* const entry = reinterpret_cast<const void*>(kernel);
  return run(name, entry, grid, block, shared_bytes, overlapped, cluster_blocks, [&] { std::apply(kernel, held); });
}

template <class T, class Update>
__forceinline__ T atomic(T* place, Update update, Site site) {
  T before;
  atomic_load(place, &before, sizeof(T), site);
  const T after = update(before);
  atomic_store(place, &after, sizeof(T));
  return before;
}

template <class T>
T shuffled(unsigned mask, T value, int source, Site site) {
  T result;
  shuffle(mask, &result, &value, sizeof(T), source, site);
  return result;
}

template <class T>
struct Plain {  // keeps the second argument of an atomic out of template deduction: atomicAdd(&count, 1)
  using type = T;
};

}  // namespace emulator

// CUDA's own words.

extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;
constexpr int warpSize = 32;

#define EMULATOR_SITE emulator::Site site = emulator::Site::here()

inline void __syncthreads(EMULATOR_SITE) {
  emulator::barrier(site);
}
inline void __syncwarp(unsigned mask = ~0u, EMULATOR_SITE) {
  emulator::warp_barrier(mask, site);
}
inline void __threadfence() {
  emulator::fence();
}

template <class T>
inline T __shfl_sync(unsigned mask, T value, int source, int width = 32, EMULATOR_SITE) {
  const int first = emulator::lane() & ~(width - 1);
  return emulator::shuffled(mask, value, first + (source & (width - 1)), site);
}
template <class T>
inline T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32, EMULATOR_SITE) {
  const int lane = emulator::lane(), source = lane ^ bits;
  return emulator::shuffled(mask, value, source < (lane & ~(width - 1)) + width ? source : lane, site);
}
template <class T>
inline T __shfl_down_sync(unsigned mask, T value, unsigned by, int width = 32, EMULATOR_SITE) {
  const int lane = emulator::lane(), source = lane + static_cast<int>(by);
  return emulator::shuffled(mask, value, source < (lane & ~(width - 1)) + width ? source : lane, site);
}
template <class T>
inline T __shfl_up_sync(unsigned mask, T value, unsigned by, int width = 32, EMULATOR_SITE) {
  const int lane = emulator::lane(), source = lane - static_cast<int>(by);
  return emulator::shuffled(mask, value, source >= (lane & ~(width - 1)) ? source : lane, site);
}
inline unsigned __ballot_sync(unsigned mask, bool vote, EMULATOR_SITE) {
  return emulator::ballot(mask, vote, site);
}
inline bool __any_sync(unsigned mask, bool vote, EMULATOR_SITE) {
  return emulator::ballot(mask, vote, site) != 0;
}
inline bool __all_sync(unsigned mask, bool vote, EMULATOR_SITE) {
  return emulator::ballot(mask, vote, site) == mask;
}

template <class T>
__forceinline__ T atomicAdd(T* place, typename emulator::Plain<T>::type value, EMULATOR_SITE) {
  return emulator::atomic(place, [=](T before) { return static_cast<T>(before + value); }, site);
}
template <class T>
__forceinline__ T atomicMax(T* place, typename emulator::Plain<T>::type value, EMULATOR_SITE) {
  return emulator::atomic(place, [=](T before) { return before < value ? value : before; }, site);
}
template <class T>
__forceinline__ T atomicExch(T* place, typename emulator::Plain<T>::type value, EMULATOR_SITE) {
  return emulator::atomic(place, [=](T) { return value; }, site);
}
template <class T>
__forceinline__ T atomicCAS(T* place, typename emulator::Plain<T>::type expected,
                            typename emulator::Plain<T>::type value, EMULATOR_SITE) {
  return emulator::atomic(place, [=](T before) { return before == expected ? value : before; }, site);
}

// Cache hints: plain accesses here, so that the sanitizers see them where they are written.
template <class T>
inline T __ldg(const T* place) {
  return *place;
}
template <class T>
inline T __ldcs(const T* place) {
  return *place;
}
template <class T>
inline T __ldcg(const T* place) {
  return *place;
}
template <class T>
inline void __stcs(T* place, T value) {
  *place = value;
}
template <class T>
inline void __stcg(T* place, T value) {
  *place = value;
}
inline float __uint_as_float(unsigned bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}
inline unsigned __float_as_uint(float value) {
  unsigned bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
}
inline int __popc(unsigned bits) {
  return __builtin_popcount(bits);
}
inline int __ffs(int bits) {
  return __builtin_ffs(bits);
}
inline int __clz(int bits) {
  return bits == 0 ? 32 : __builtin_clz(static_cast<unsigned>(bits));
}
