// Races between CUDA threads. g++ -fsanitize=thread puts a call before every load and store of the kernels; here are
// those calls, in place of ThreadSanitizer's own. Each byte remembers its last write and up to two reads that are not
// ordered among each other; an access must have seen (clocks.h) those that it conflicts with. Reported too: reads of
// shared memory that the block has not written, touching what a cp.async in flight will overwrite, what the hardware
// reads past the threads' caches without a proxy fence, and shared memory of a block that may not have begun or have
// ended.
#if defined(EMULATOR_RACE)
#include "emulator/race.h"

#include <dlfcn.h>
#include <link.h>

#include <cstdio>
#include <cstring>
#include <memory>
#include <set>
#include <string>
#include <tuple>
#include <unordered_map>

#include "emulator/clocks.h"
#include "emulator/machine.h"

namespace emulator::race {
namespace {

struct Access {
  uint32_t block = 0, time = 0;  // block: the first of the cluster
  int32_t pc = 0;                // from the address of `anchor`
  uint16_t thread = 0;           // or agent
  Kind kind = Kind::kRead;
};

struct Cell {
  Access write, reads[2];
};

constexpr uintptr_t kPageBytes = 512;
struct Page {
  uintptr_t number;
  Cell cells[kPageBytes];
};

void anchor() {}

Clocks clocks;
std::unordered_map<uintptr_t, std::unique_ptr<Page>> pages;
Page* recent[64];
std::set<std::tuple<const char*, int32_t, int32_t>> reported;
constexpr size_t kMostReports = 10;

Cell& cell_of(uintptr_t place) {
  const uintptr_t number = place / kPageBytes;
  Page*& page = recent[number % 64];
  if (page == nullptr || page->number != number) {
    std::unique_ptr<Page>& held = pages[number];
    if (held == nullptr) {
      held = std::make_unique<Page>();
      held->number = number;
    }
    page = held.get();
  }
  return page->cells[place % kPageBytes];
}

// file:line of the kernel: the primitives are inlined into it, and passed over.
std::string source_line(int32_t pc) {
  const uintptr_t address = reinterpret_cast<uintptr_t>(&anchor) + pc - 1;
  Dl_info info;
  link_map* module = nullptr;
  if (!dladdr1(reinterpret_cast<void*>(address), &info, reinterpret_cast<void**>(&module), RTLD_DL_LINKMAP)) return "?";
  const char* file = module->l_name[0] != '\0' ? module->l_name : "/proc/self/exe";
  char resolved[4096] = {};
  if (realpath(file, resolved) == nullptr) return "?";
  char command[4200], line[1024];
  snprintf(command, sizeof command, "addr2line -i -e '%s' 0x%zx", resolved,
           static_cast<size_t>(address - module->l_addr));
  std::string found = "?";
  if (FILE* lines = popen(command, "r")) {
    bool in_kernel = false;
    while (fgets(line, sizeof line, lines) != nullptr) {
      const char* slash = strrchr(line, '/');
      if (!in_kernel) found = slash != nullptr ? slash + 1 : line;
      in_kernel |= strstr(line, "/csrc/emulator/") == nullptr && strstr(line, "/csrc/common/") == nullptr;
    }
    pclose(lines);
  }
  return found.substr(0, found.find_first_of(" \n"));
}

std::string described(const Access& access) {
  static const char* const names[] = {
      "read", "write", "atomic", "cp.async", "mbarrier operation", "tma_load or bulk_load", "wgmma"};
  const std::string name = names[static_cast<int>(access.kind)], at = " at " + source_line(access.pc);
  if (access.kind == Kind::kTransfer || access.kind == Kind::kProduct) return name + at;  // by no thread
  if (access.block < machine.launch_start) return name + " by a thread of an earlier launch" + at;
  const size_t block = access.block - machine.launch_start + access.thread / machine.block_fibers;
  return name + " by thread " + std::to_string(access.thread % machine.block_fibers) + " of block " +
         std::to_string(machine.block_order[block]) + at;
}

// The block in whose dynamic shared memory a place lies, or -1.
int owner(const void* place, int bytes = 1) {
  for (size_t rank = 0; rank < machine.blocks.size(); ++rank) {
    if (dynamic_range(static_cast<int>(rank)).holds(place, bytes)) return static_cast<int>(rank);
  }
  return -1;
}

void report(const char* what, const Access& before, const Access& now, uintptr_t place, bool shared) {
  if (!reported.insert({what, before.pc, now.pc}).second || reported.size() > kMostReports) return;
  const int rank = owner(reinterpret_cast<void*>(place));
  const bool in_dynamic = rank >= 0;
  fprintf(stderr, "emulator: %s\n  kernel %s, %s memory %s0x%zx\n  %s\n", what, machine.kernel,
          shared ? "shared" : "global", in_dynamic ? "+ " : "",
          in_dynamic ? place - reinterpret_cast<uintptr_t>(dynamic_range(rank).begin) : place, described(now).c_str());
  if (before.block != 0) fprintf(stderr, "  after %s\n", described(before).c_str());
}

// Has `witness`, the thread that does it or asks the hardware for it, seen what was before?
bool ordered(const Access& before, const Access& now, bool shared, int witness) {
  if (before.block == 0) return true;
  if (before.kind == now.kind && (now.kind == Kind::kAtomic || now.kind == Kind::kMbarrier)) return true;
  if (shared && before.block != now.block) return true;  // the memory of a block that is gone
  if (before.block < machine.launch_start) {
    const uint32_t unseen_until = machine.running->waited_for_previous ? machine.unwaited_until : machine.launch_start;
    return before.block < machine.overlapped_from || before.block >= unseen_until;
  }
  return clocks.seen(witness, before.block, before.thread, before.time);
}

void remember_read(Cell& cell, const Access& now, bool shared, int witness) {
  for (Access& read : cell.reads) {
    if ((read.thread == now.thread && read.block == now.block) || ordered(read, now, shared, witness)) {
      read = now;
      return;
    }
  }
  // Two of different warps: whoever writes without a barrier is then unordered with one of them at least.
  if (cell.reads[0].thread / 32 == cell.reads[1].thread / 32) cell.reads[1] = now;
}

// Inlined into the loops over bytes, where most of the time of this build is spent.
__attribute__((always_inline)) inline void visit(uintptr_t place, const Access& now, bool shared, int witness) {
  Cell& cell = cell_of(place);
  const bool reads = now.kind != Kind::kWrite && now.kind != Kind::kCopy && now.kind != Kind::kTransfer;
  const bool by_hardware = now.kind == Kind::kTransfer || now.kind == Kind::kProduct;
  const bool written = cell.write.block == now.block;
  if (shared && reads && !written) report("read of unwritten shared memory", {}, now, place, shared);
  if (shared && cell.write.kind == Kind::kCopy && written) {
    report("cp.async still in flight: no wait covers it", cell.write, now, place, shared);
  } else if (!ordered(cell.write, now, shared, witness)) {
    report("race", cell.write, now, place, shared);
  } else if (by_hardware && written && !clocks.is_agent(cell.write.thread) &&
             !clocks.proxied(witness, cell.write.thread, cell.write.time)) {
    report("no async_proxy_fence between", cell.write, now, place, shared);
  }
  if (now.kind == Kind::kRead || now.kind == Kind::kProduct) return remember_read(cell, now, shared, witness);
  if (now.kind == Kind::kMbarrier) return;  // against mbarrier_init, which stays the last write
  for (const Access& read : cell.reads) {
    if (!ordered(read, now, shared, witness)) report("race", read, now, place, shared);
  }
  cell = Cell{now, {}};
}

Access access_now(Kind kind, const void* pc) {
  const int thread = machine.running->number;
  const intptr_t offset = reinterpret_cast<intptr_t>(pc) - reinterpret_cast<intptr_t>(&anchor);
  return {machine.first_block, clocks.now(thread), static_cast<int32_t>(offset), static_cast<uint16_t>(thread), kind};
}

void visit_by_hardware(const void* shared, int bytes, Kind kind, int agent, int time, const void* pc) {
  Access now = access_now(kind, pc);
  now.thread = static_cast<uint16_t>(agent);
  now.time = static_cast<uint32_t>(time);
  const uintptr_t first = reinterpret_cast<uintptr_t>(shared);
  for (int i = 0; i < bytes; ++i) visit(first + i, now, true, machine.running->number);
}

// Has `thread` seen that a thread of the block has begun, and might it not have returned by then?
void check_other_block(int rank, const Access& now, uintptr_t place) {
  const int first = rank * machine.block_fibers;
  bool begun = false;
  for (int i = 0; i < machine.block_threads && !begun; ++i) begun = clocks.seen(now.thread, now.block, first + i, 1);
  if (!begun) report("shared memory of a block that may not have begun", {}, now, place, true);
  if (machine.blocks[rank].alive == 0) report("shared memory of a block that has ended", {}, now, place, true);
}

// Has a thread of the block, which all have returned, seen it?
void check_before_the_end(int rank, const Access& access, uintptr_t place) {
  const int of = access.thread / machine.block_fibers;
  if (access.block != machine.first_block || clocks.is_agent(access.thread) || of == rank) return;
  if (seen_by(rank, access.thread, static_cast<int>(access.time))) return;
  report("shared memory of a block that may have ended", {}, access, place, true);
}

}  // namespace

void start_cluster(int threads) {
  if (machine.first_block == machine.launch_start) clocks.start_launch();
  clocks.start_cluster(machine.first_block, threads);
}

void end_block(int rank) {
  const Range range = dynamic_range(rank);
  for (char* place = range.begin; place < range.end; ++place) {
    const uintptr_t at = reinterpret_cast<uintptr_t>(place);
    const Cell& cell = cell_of(at);
    check_before_the_end(rank, cell.write, at);
    for (const Access& read : cell.reads) check_before_the_end(rank, read, at);
  }
}

void end_launch() {
  if (!reported.empty()) fail("the accesses above are errors", {nullptr, 0});
}

void block_barrier() {
  std::vector<int> met(machine.block_threads);
  for (int i = 0; i < machine.block_threads; ++i) met[i] = machine.running->rank * machine.block_fibers + i;
  clocks.meet(met);
}
void barrier(const std::vector<int>& threads) {
  clocks.meet(threads);
}
void warp_barrier(unsigned lanes) {
  clocks.barrier(machine.running->warp * 32, lanes);
}
void fence() {
  clocks.fence(machine.running->number);
}

void access(const void* place, int bytes, Kind kind, const void* pc) {
  if (machine.running == nullptr || bytes <= 0 || stacks().holds(place))
    return;  // the host, or a thread's own variable
  const bool in_arena = shared_arena().holds(place), shared = in_arena || static_range().holds(place);
  const Access now = access_now(kind, pc);
  const uintptr_t first = reinterpret_cast<uintptr_t>(place);
  const int rank = in_arena ? owner(place, bytes) : machine.running->rank;
  if (rank < 0) {
    report("out of bounds: shared memory", {}, now, first, true);
    fail("the accesses above are errors", {nullptr, 0});
  }
  if (rank != machine.running->rank) check_other_block(rank, now, first);
  for (int i = 0; i < bytes; ++i) visit(first + i, now, shared, now.thread);
  if (kind == Kind::kAtomic) clocks.atomic(now.thread, place);
}

void copy_starts(const void* shared, int bytes, const void* global, int valid, const void* pc) {
  access(global, valid, Kind::kRead, pc);
  access(shared, bytes, Kind::kCopy, pc);
}

// From here on the bytes are a write of the thread that waited, made at this time.
void copy_lands(const void* shared, int bytes) {
  for (int i = 0; i < bytes; ++i) {
    Access& copy = cell_of(reinterpret_cast<uintptr_t>(shared) + i).write;
    if (copy.kind != Kind::kCopy || copy.thread != machine.running->number) continue;  // overwritten, and reported
    copy.kind = Kind::kWrite;
    copy.time = clocks.now(copy.thread);
  }
}

int new_agent() {
  return clocks.new_agent();
}
void transfer(const void* shared, int bytes, int agent, int time, const void* pc) {
  visit_by_hardware(shared, bytes, Kind::kTransfer, agent, time, pc);
}
void product(const void* shared, int bytes, int agent, int time, const void* pc) {
  visit_by_hardware(shared, bytes, Kind::kProduct, agent, time, pc);
}
void learn(int thread, int agent, int time) {
  clocks.learn_agent(thread, agent, static_cast<uint32_t>(time));
}
void proxy_fence() {
  clocks.proxy_fence(machine.running->number);
}
void release(const void* key) {
  clocks.release(machine.running->number, key);
}
void release_agents(const void* key) {
  clocks.release_agents(machine.running->number, key);
}
void complete(const void* key, int agent, int time) {
  clocks.complete(key, agent, static_cast<uint32_t>(time));
}
void acquire(const void* key) {
  clocks.acquire(machine.running->number, key);
}

int now(int thread) {
  return static_cast<int>(clocks.now(thread));
}
bool seen_by(int rank, int thread, int time) {
  const int first = rank * machine.block_fibers;
  for (int i = 0; i < machine.block_threads; ++i) {
    if (clocks.seen(first + i, machine.first_block, thread, static_cast<uint32_t>(time))) return true;
  }
  return false;
}

}  // namespace emulator::race

using emulator::race::access;
using emulator::race::Kind;

#define HOOKS(bytes)                                                 \
  void __tsan_read##bytes(void* place) {                             \
    access(place, bytes, Kind::kRead, __builtin_return_address(0));  \
  }                                                                  \
  void __tsan_write##bytes(void* place) {                            \
    access(place, bytes, Kind::kWrite, __builtin_return_address(0)); \
  }                                                                  \
  void __tsan_unaligned_read##bytes(void* place) {                   \
    access(place, bytes, Kind::kRead, __builtin_return_address(0));  \
  }                                                                  \
  void __tsan_unaligned_write##bytes(void* place) {                  \
    access(place, bytes, Kind::kWrite, __builtin_return_address(0)); \
  }

extern "C" {
HOOKS(1)
HOOKS(2)
HOOKS(4)
HOOKS(8)
HOOKS(16)
void __tsan_read_range(void* place, size_t bytes) {
  access(place, static_cast<int>(bytes), Kind::kRead, __builtin_return_address(0));
}
void __tsan_write_range(void* place, size_t bytes) {
  access(place, static_cast<int>(bytes), Kind::kWrite, __builtin_return_address(0));
}
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit(void*) {}
void __tsan_vptr_read(void*) {}
void __tsan_vptr_update(void*, void*) {}
uint8_t __tsan_atomic8_load(const volatile void* guard, int) {
  return *static_cast<const volatile uint8_t*>(guard);
}
}

#endif
