// Clusters (sm_90): neighbouring blocks along x that run at the same time and read and write each other's dynamic
// shared memory. cluster_sync() orders what all threads of all its blocks did before it against what they do after it,
// for shared and global memory; arrive and wait are its halves. Every thread of the cluster calls each, the 32 of a
// warp together. A block must not end while another one may still touch its shared memory: a cluster_sync() stands
// last. Kernels with clusters have no static shared memory.
#pragma once

#include <type_traits>

#include "common/launch.h"
#ifndef __CUDACC__
#include "emulator/sm90.h"
#endif

namespace pk {

// More blocks than this only some GPUs allow, and only if a kernel asks for it.
constexpr int kMostClusterBlocks = 8;

#ifdef __CUDACC__

__device__ __forceinline__ int cluster_rank() {
  int rank;
  asm volatile("mov.u32 %0, %%cluster_ctaid.x;" : "=r"(rank));
  return rank;
}

__device__ __forceinline__ int cluster_blocks() {
  int blocks;
  asm volatile("mov.u32 %0, %%cluster_nctaid.x;" : "=r"(blocks));
  return blocks;
}

__device__ __forceinline__ void cluster_arrive() {
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
}

__device__ __forceinline__ void cluster_wait() {
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}

__device__ __forceinline__ void cluster_sync() {
  cluster_arrive();
  cluster_wait();
}

// The place that `mine` is in this block's dynamic shared memory, in that of block `rank` of the cluster.
template <class T>
__device__ __forceinline__ T* of_block(T* mine, int rank) {
  uint64_t address;
  asm volatile("mapa.u64 %0, %1, %2;" : "=l"(address) : "l"(mine), "r"(rank));
  return reinterpret_cast<T*>(address);
}

#else

inline int cluster_rank() {
  return emulator::cluster_rank();
}
inline int cluster_blocks() {
  return emulator::cluster_blocks();
}
inline void cluster_arrive(EMULATOR_SITE) {
  emulator::cluster_arrive(site);
}
inline void cluster_wait(EMULATOR_SITE) {
  emulator::cluster_wait(site);
}
inline void cluster_sync(EMULATOR_SITE) {
  emulator::cluster_arrive(site);
  emulator::cluster_wait(site);
}
template <class T>
inline T* of_block(T* mine, int rank, EMULATOR_SITE) {
  return static_cast<T*>(emulator::of_block(const_cast<std::remove_cv_t<T>*>(mine), rank, site));
}

#endif

}  // namespace pk

#ifdef __CUDACC__

// Dynamic shared memory aligned to 1024 bytes, as tiles with a 128-byte swizzle need it. A kernel names it once.
#define PK_SWIZZLED_SHARED(T, name)                                   \
  extern __shared__ __align__(1024) unsigned char pk_dynamic_1024_[]; \
  T* const name = reinterpret_cast<T*>(pk_dynamic_1024_)

// cudaError_t PK_LAUNCH_CLUSTER(kernel, blocks of a cluster, overlapped, grid, block, shared_bytes, stream,
// arguments...): grid.x is a multiple of the blocks; with 1 block it launches a kernel of sm_90 without clusters.
#define PK_LAUNCH_CLUSTER(kernel, cluster_blocks, overlapped, ...) \
  ::pk::launch(overlapped, cluster_blocks, kernel, __VA_ARGS__)

#else

#define PK_SWIZZLED_SHARED(T, name) \
  T* const name = static_cast<T*>(emulator::dynamic_shared(1024, emulator::Site::here()))
#define PK_LAUNCH_CLUSTER(kernel, cluster_blocks, overlapped, ...) \
  emulator::launch(#kernel, overlapped, cluster_blocks, kernel, __VA_ARGS__)

#endif
