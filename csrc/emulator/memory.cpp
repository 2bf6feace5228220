// Shared memory, asynchronous copies and atomics. Dynamic shared memory is a piece of an arena with wide forbidden
// zones on both sides, one for each block of a cluster; all shared memory is 0xFF (a NaN in every float type) until the
// block writes it, and so is what a cp.async overwrites from its issue until it lands.
#include <link.h>
#include <sys/mman.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "emulator/machine.h"
#include "emulator/race.h"

namespace emulator {
namespace {

constexpr size_t kZone = 1 << 18, kPerBlock = kZone + (1 << 18);
constexpr size_t kArena = kZone + kPerBlock * pk::kMostClusterBlocks;

#if !defined(EMULATOR_ASAN)
// The thread-local variables of the module (program or library) that the emulator is linked into.
int find_static(dl_phdr_info* info, size_t, void* found) {
  bool mine = false;
  const ElfW(Phdr)* tls = nullptr;
  for (int i = 0; i < info->dlpi_phnum; ++i) {
    const ElfW(Phdr) & segment = info->dlpi_phdr[i];
    const uintptr_t offset = reinterpret_cast<uintptr_t>(&find_static) - info->dlpi_addr - segment.p_vaddr;
    if (segment.p_type == PT_LOAD && offset < segment.p_memsz) mine = true;
    if (segment.p_type == PT_TLS) tls = &segment;
  }
  if (mine && tls != nullptr && info->dlpi_tls_data != nullptr) {
    char* begin = static_cast<char*>(info->dlpi_tls_data);
    *static_cast<Range*>(found) = {begin, begin + tls->p_memsz};
  }
  return mine;
}
#endif

void poison_dynamic() {
#if defined(EMULATOR_ASAN)
  const Range arena = shared_arena();
  __asan_poison_memory_region(arena.begin, arena.end - arena.begin);
#endif
  for (size_t rank = 0; rank < machine.blocks.size(); ++rank) {
    const Range dynamic = dynamic_range(static_cast<int>(rank));
#if defined(EMULATOR_ASAN)
    __asan_unpoison_memory_region(dynamic.begin, machine.shared_bytes);
#endif
    memset(dynamic.begin, 0xFF, machine.shared_bytes);
  }
}

void move(const Copy& copy) {
  memcpy(copy.shared, copy.global, copy.valid);
  memset(copy.shared + copy.valid, 0, copy.bytes - copy.valid);
}

}  // namespace

const Range& shared_arena() {
  static const Range range = [] {
    void* memory = mmap(nullptr, kArena, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) abort();
    return Range{static_cast<char*>(memory), static_cast<char*>(memory) + kArena};
  }();
  return range;
}

// Aligned as the kernel asks (PK_DYNAMIC_SHARED, PK_SWIZZLED_SHARED), and to no more.
Range dynamic_range(int rank) {
  char* begin = shared_arena().begin + kZone + rank * kPerBlock + machine.shared_alignment;
  return {begin, begin + machine.shared_bytes};
}

const Range& static_range() {
  static const Range range = [] {
    Range found{nullptr, nullptr};
#if !defined(EMULATOR_ASAN)
    [[maybe_unused]] static thread_local volatile char touched;
    touched = 1;  // a library's thread-local variables have no memory before one of them is used
    dl_iterate_phdr(find_static, &found);
#endif
    return found;
  }();
  return range;
}

void poison_shared() {
  const Range fixed = static_range();
  if (fixed.begin != nullptr) memset(fixed.begin, 0xFF, fixed.end - fixed.begin);
  poison_dynamic();
}

void end_shared(int rank) {
  const Range dynamic = dynamic_range(rank);
  memset(dynamic.begin, 0xFF, machine.shared_bytes);
#if defined(EMULATOR_ASAN)
  __asan_poison_memory_region(dynamic.begin, machine.shared_bytes);
#endif
}

void check_access([[maybe_unused]] const void* place, [[maybe_unused]] int bytes, [[maybe_unused]] bool write) {
#if defined(EMULATOR_ASAN)
  if (bytes == 0) return;
  if (write) {
    __asan_storeN(const_cast<void*>(place), bytes);
  } else {
    __asan_loadN(place, bytes);
  }
#endif
}

void check_shared(const void* place, [[maybe_unused]] int bytes, int alignment, const char* what, Site site) {
  char text[128];
  if (reinterpret_cast<uintptr_t>(place) % alignment != 0) {
    snprintf(text, sizeof text, "misaligned %s: shared memory address not a multiple of %d", what, alignment);
    fail(text, site);
  }
#if !defined(EMULATOR_ASAN)  // which says the same, and more
  if (!dynamic_range().holds(place, bytes) && !static_range().holds(place, bytes)) {
    snprintf(text, sizeof text, "out of bounds: %s outside of the block's shared memory", what);
    fail(text, site);
  }
#endif
}

void* dynamic_shared(size_t alignment, Site site) {
  if (machine.shared_bytes == 0) fail("out of bounds: dynamic shared memory, and the launch asked for none", site);
  if (alignment != machine.shared_alignment) {  // the first thread of the launch to ask: nobody has touched it yet
    machine.shared_alignment = alignment;
    poison_dynamic();
  }
  return dynamic_range().begin;
}

void copy_async(void* shared, const void* global, int bytes, int valid, Site site) {
  check_shared(shared, bytes, bytes, "cp.async", site);
  if (valid < 0 || valid > bytes) fail("cp.async of more bytes than its size", site);
  if (valid > 0 && reinterpret_cast<uintptr_t>(global) % bytes != 0) fail("misaligned cp.async: global address", site);
  check_access(shared, bytes, true);
  check_access(global, valid, false);
  Thread& me = *machine.running;
  race::copy_starts(shared, bytes, global, valid, __builtin_return_address(0));
  const Copies when = machine.schedule.copies;
  const bool early = when == Copies::kEarly || (when == Copies::kRandom && random_number() % 2 == 0);
  me.copies.push_back(
      {static_cast<char*>(shared), static_cast<const char*>(global), bytes, valid, me.committed, early});
  memset(shared, 0xFF, bytes);
  if (early) move(me.copies.back());
}

void copy_commit() {
  ++machine.running->committed;
}

void copy_wait(int groups_left) {
  Thread& me = *machine.running;
  size_t landed = 0;
  for (; landed < me.copies.size() && me.copies[landed].group < me.committed - groups_left; ++landed) {
    const Copy& copy = me.copies[landed];
    race::copy_lands(copy.shared, copy.bytes);
    if (!copy.moved) move(copy);
  }
  me.copies.erase(me.copies.begin(), me.copies.begin() + landed);
}

void fence() {
  race::fence();
}

void atomic_load(const void* place, void* value, size_t bytes, Site site) {
  if (reinterpret_cast<uintptr_t>(place) % bytes != 0) fail("misaligned atomic", site);
  check_access(place, static_cast<int>(bytes), true);
  race::access(place, static_cast<int>(bytes), race::Kind::kAtomic, __builtin_return_address(0));
  memcpy(value, place, bytes);
}

void atomic_store(void* place, const void* value, size_t bytes) {
  memcpy(place, value, bytes);
}

}  // namespace emulator
