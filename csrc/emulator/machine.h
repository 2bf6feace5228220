// The state of the emulated GPU, seen by the emulator's own files only. One fiber per CUDA thread of the running
// cluster (one block, where the launch has no clusters), all in one OS thread; a fiber runs until it returns or has to
// wait for others.
#pragma once

#include <cstdint>
#include <vector>

#include "common/cluster.h"
#include "emulator/emulator.h"

#if defined(EMULATOR_ASAN)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
extern "C" void __asan_loadN(const void* place, size_t bytes);
extern "C" void __asan_storeN(void* place, size_t bytes);
#endif

namespace emulator {

constexpr int kMaxThreads = 1024, kMaxFibers = kMaxThreads * pk::kMostClusterBlocks;

struct Copy {  // a cp.async that no wait has covered yet
  char* shared;
  const char* global;
  int bytes, valid, group;
  bool moved;
};

struct Thread {
  uint3 index;
  int number, lane, warp;  // number and warp: through the cluster, whose blocks begin at multiples of 32
  int rank;                // its block
  bool returned, waited_for_previous;
  const char* waits_for;  // nullptr: it can run
  Site site;
  const void* argument;  // of the warp operation it waits in
  std::vector<Copy> copies;
  int committed;  // groups of copies
  int cluster_arrivals, cluster_waits;
  void* stack_pointer;
  void* fake_stack;  // AddressSanitizer's
};

// Lanes that have reached a warp operation and wait for the rest of its mask.
struct Gathering {
  const char* operation;
  unsigned mask, arrived;
  Site site;
};

struct Warp {
  unsigned alive;
  std::vector<Gathering> gatherings;
};

struct NamedBarrier {
  int threads, arrived;
};

struct Block {
  uint3 index;
  int alive, at_barrier;
  Site barrier_site;
  NamedBarrier named[16];
};

struct Machine {
  Schedule schedule;
  uint64_t random_state;
  const char* kernel;
  const std::function<void()>* body;
  std::vector<Block> blocks;    // of the cluster
  std::vector<Thread> threads;  // block_fibers for each; what is left of the last warp has returned from the start
  std::vector<Warp> warps;
  Thread* running;
  int block_threads, block_fibers, alive;
  bool overlapped;  // this launch did not wait for the one before it
  bool waited;      // some thread of it has, or it had not to
  // Blocks are numbered through all launches, from 1; first_block is the first of the cluster. The launches from
  // overlapped_from on may not have ended when this one begins; those of them before unwaited_until may not even have
  // when a thread has waited for the launch before this one, since that one did not wait and may have ended first.
  uint32_t first_block = 1, launch_start, overlapped_from, unwaited_until;
  std::vector<uint64_t> block_order;  // of this launch, by linear index
  size_t shared_bytes, shared_alignment;
};
extern Machine machine;

inline Block& my_block() {
  return machine.blocks[machine.running->rank];
}
inline int number_in_block(const Thread& thread) {
  return thread.number - thread.rank * machine.block_fibers;
}

uint64_t random_number();
[[noreturn]] void fail(const char* what, Site site);
void wait(const char* reason, Site site);  // returns when another thread has cleared waits_for

struct Range {
  char* begin;
  char* end;
  bool holds(const void* place, size_t bytes = 1) const {
    return place >= begin && static_cast<const char*>(place) + bytes <= end;
  }
};
const Range& stacks();
bool same_site(Site a, Site b);
Range dynamic_range(int rank);  // of a block of the cluster
inline Range dynamic_range() {
  return dynamic_range(machine.running->rank);
}
const Range& shared_arena();  // all of them and the forbidden zones around them
const Range& static_range();  // empty with AddressSanitizer, where static shared memory is like any global
void poison_shared();         // what the blocks before have left becomes NaN
void end_shared(int rank);    // and what a block leaves that ends before the others of its cluster
size_t static_shared_of(const void* kernel);
void check_access(const void* place, int bytes, bool write);
void check_shared(const void* place, int bytes, int alignment, const char* what, Site site);

// cluster.cpp
void start_cluster();
void check_return();  // the running thread is about to

// transfers.cpp
void start_transfers();
bool land_a_transfer();          // false: none is under way
void check_transfers(int rank);  // the block ends
void describe_mbarriers();       // those that threads wait for

// wgmma.cpp
void start_products();
void check_products();  // the running thread is about to return

}  // namespace emulator
