// Barriers in shared memory that count arrivals of threads and bytes of asynchronous copies (sm_90). A phase ends when
// as many threads have arrived as mbarrier_init said and all bytes that they expected have come; then the next begins.
// The first has parity 0, the second 1, the third 0 ... mbarrier_wait(barrier, p) returns when the phase of parity p is
// over, so that mbarrier_wait(barrier, 1) returns at once from a barrier of which no phase is over yet. Who waits sees
// what was done before the arrivals and what was copied. A waiter is never two phases behind, and is a thread of the
// barrier's own block.
//     producer, stage s of n:  mbarrier_wait(&empty[s], round % 2 ^ 1);  arrive_expect(&full[s], bytes); tma_load(...);
//     consumers:               mbarrier_wait(&full[s], round % 2);  read;  mbarrier_arrive(&empty[s]);
#pragma once

#include "common/launch.h"
#ifndef __CUDACC__
#include "emulator/sm90.h"
#endif

namespace pk {

using Mbarrier = uint64_t;  // in shared memory; touched by these functions only

#ifdef __CUDACC__

// One thread; then it calls mbarrier_init_fence(), and the block (the cluster, if others' copies arrive here) meets.
__device__ __forceinline__ void mbarrier_init(Mbarrier* barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
}

// For the cluster and for the copies (the asynchronous proxy).
__device__ __forceinline__ void mbarrier_init_fence() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

__device__ __forceinline__ void mbarrier_arrive(Mbarrier* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}

// Arrives, and lets the phase wait for so many bytes besides.
__device__ __forceinline__ void mbarrier_arrive_expect(Mbarrier* barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
               : "memory");
}

// Arrives at the barrier in the same place of block `rank` of the cluster, which may be one's own. Who waits there sees
// of another block what wgmma and copies have done and was waited for, but no plain loads and stores: for those there
// is .release.cluster, which puts a MEMBAR.GPU before every arrival, and .acquire.cluster, which clears the L1 behind
// every wait. A pipeline needs neither.
__device__ __forceinline__ void mbarrier_arrive_at(Mbarrier* barrier, int rank) {
  asm volatile(
      "{\n"
      ".reg .b32 there;\n"
      "mapa.shared::cluster.u32 there, %0, %1;\n"
      "mbarrier.arrive.shared::cluster.b64 _, [there];\n"
      "}" ::"r"(shared_address(barrier)),
      "r"(rank)
      : "memory");
}

// The hardware lets the thread sleep for a while in each round.
__device__ __forceinline__ void mbarrier_wait(Mbarrier* barrier, int parity) {
  asm volatile(
      "{\n"
      ".reg .pred over;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 over, [%0], %1;\n"
      "@!over bra again;\n"
      "}" ::"r"(shared_address(barrier)),
      "r"(parity)
      : "memory");
}

#else

__forceinline__ void mbarrier_init(Mbarrier* barrier, int arrivals, EMULATOR_SITE) {
  emulator::mbarrier_init(barrier, arrivals, site);
}
inline void mbarrier_init_fence() {
  emulator::mbarrier_init_fence();
}
__forceinline__ void mbarrier_arrive(Mbarrier* barrier, EMULATOR_SITE) {
  emulator::mbarrier_arrive(barrier, 0, site);
}
__forceinline__ void mbarrier_arrive_expect(Mbarrier* barrier, int bytes, EMULATOR_SITE) {
  emulator::mbarrier_arrive(barrier, bytes, site);
}
__forceinline__ void mbarrier_arrive_at(Mbarrier* barrier, int rank, EMULATOR_SITE) {
  emulator::mbarrier_arrive_at(barrier, rank, site);
}
__forceinline__ void mbarrier_wait(Mbarrier* barrier, int parity, EMULATOR_SITE) {
  emulator::mbarrier_wait(barrier, parity, site);
}

#endif

}  // namespace pk
