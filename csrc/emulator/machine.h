// The state of the emulated GPU, seen by the emulator's own files only. One fiber per CUDA thread of the running block,
// all in one OS thread; a fiber runs until it returns or has to wait for others.
#pragma once

#include <cstdint>
#include <vector>

#include "emulator/emulator.h"

#if defined(EMULATOR_ASAN)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
extern "C" void __asan_loadN(const void* place, size_t bytes);
extern "C" void __asan_storeN(void* place, size_t bytes);
#endif

namespace emulator {

constexpr int kMaxThreads = 1024;

struct Copy {  // a cp.async that no wait has covered yet
  char* shared;
  const char* global;
  int bytes, valid, group;
  bool moved;
};

struct Thread {
  uint3 index;
  int number, lane, warp;
  bool returned, waited_for_previous;
  const char* waits_for;  // nullptr: it can run
  Site site;
  const void* argument;  // of the warp operation it waits in
  std::vector<Copy> copies;
  int committed;  // groups of copies
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

struct Machine {
  Schedule schedule;
  uint64_t random_state;
  const char* kernel;
  const std::function<void()>* body;
  std::vector<Thread> threads;
  std::vector<Warp> warps;
  Thread* running;
  int alive, at_barrier;
  Site barrier_site;
  bool overlapped;                                // this launch did not wait for the one before it
  uint32_t block, launch_start, previous_launch;  // blocks are numbered through all launches, from 1
  std::vector<uint64_t> block_order;              // of this launch, by linear index
  size_t shared_bytes;
};
extern Machine machine;

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
Range dynamic_range();        // of this launch
const Range& shared_arena();  // it and the forbidden zones around it
const Range& static_range();  // empty with AddressSanitizer, where static shared memory is like any global
void poison_shared();         // what the block before has left becomes NaN
size_t static_shared_of(const void* kernel);
void check_access(const void* place, int bytes, bool write);
void check_shared(const void* place, int bytes, int alignment, const char* what, Site site);

}  // namespace emulator
