// Races between CUDA threads. g++ -fsanitize=thread puts a call before every load and store of the kernels; here are
// those calls, in place of ThreadSanitizer's own. Each byte remembers its last write and up to two reads that are not
// ordered among each other; an access must have seen (clocks.h) those that it conflicts with. Reported too: reads of
// shared memory that the block has not written, and touching what a cp.async in flight will overwrite.
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
  uint32_t block = 0, time = 0;
  int32_t pc = 0;  // from the address of `anchor`
  uint16_t thread = 0;
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
  static const char* const names[] = {"read", "write", "atomic", "cp.async"};
  const std::string text =
      std::string(names[static_cast<int>(access.kind)]) + " by thread " + std::to_string(access.thread) + " of ";
  const bool before = access.block < machine.launch_start;
  const std::string block = before
                                ? "the launch before"
                                : "block " + std::to_string(machine.block_order[access.block - machine.launch_start]);
  return text + block + " at " + source_line(access.pc);
}

void report(const char* what, const Access& before, const Access& now, uintptr_t place, bool shared) {
  if (!reported.insert({what, before.pc, now.pc}).second || reported.size() > kMostReports) return;
  const Range dynamic = dynamic_range();
  const bool in_dynamic = dynamic.holds(reinterpret_cast<void*>(place));
  fprintf(stderr, "emulator: %s\n  kernel %s, %s memory %s0x%zx\n  %s\n", what, machine.kernel,
          shared ? "shared" : "global", in_dynamic ? "+ " : "",
          in_dynamic ? place - reinterpret_cast<uintptr_t>(dynamic.begin) : place, described(now).c_str());
  if (before.block != 0) fprintf(stderr, "  after %s\n", described(before).c_str());
}

bool ordered(const Access& before, const Access& now, bool shared) {
  if (before.block == 0 || (before.kind == Kind::kAtomic && now.kind == Kind::kAtomic)) return true;
  if (shared && before.block != now.block) return true;  // the memory of a block that is gone
  if (before.block < machine.launch_start) {
    return machine.running->waited_for_previous || before.block < machine.previous_launch;
  }
  return clocks.seen(now.thread, before.block, before.thread, before.time);
}

void remember_read(Cell& cell, const Access& now, bool shared) {
  for (Access& read : cell.reads) {
    if ((read.thread == now.thread && read.block == now.block) || ordered(read, now, shared)) {
      read = now;
      return;
    }
  }
  // Two of different warps: whoever writes without a barrier is then unordered with one of them at least.
  if (cell.reads[0].thread / 32 == cell.reads[1].thread / 32) cell.reads[1] = now;
}

void visit(uintptr_t place, const Access& now, bool shared) {
  Cell& cell = cell_of(place);
  const bool reads = now.kind == Kind::kRead || now.kind == Kind::kAtomic;
  if (shared && reads && cell.write.block != now.block) {
    report("read of unwritten shared memory", {}, now, place, shared);
  }
  if (shared && cell.write.kind == Kind::kCopy && cell.write.block == now.block) {
    report("cp.async still in flight: no wait covers it", cell.write, now, place, shared);
  } else if (!ordered(cell.write, now, shared)) {
    report("race", cell.write, now, place, shared);
  }
  if (now.kind == Kind::kRead) return remember_read(cell, now, shared);
  for (const Access& read : cell.reads) {
    if (!ordered(read, now, shared)) report("race", read, now, place, shared);
  }
  cell = Cell{now, {}};
}

Access access_now(Kind kind, const void* pc) {
  const int thread = machine.running->number;
  const intptr_t offset = reinterpret_cast<intptr_t>(pc) - reinterpret_cast<intptr_t>(&anchor);
  return {machine.block, clocks.now(thread), static_cast<int32_t>(offset), static_cast<uint16_t>(thread), kind};
}

}  // namespace

void start_block(int threads) {
  if (machine.block == machine.launch_start) clocks.start_launch();
  clocks.start_block(machine.block, threads);
}

void end_launch() {
  if (!reported.empty()) fail("the accesses above are errors", {nullptr, 0});
}

void block_barrier() {
  clocks.barrier();
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
  if (in_arena && !dynamic_range().holds(place, bytes)) {
    report("out of bounds: shared memory", {}, now, first, true);
    fail("the accesses above are errors", {nullptr, 0});
  }
  for (int i = 0; i < bytes; ++i) visit(first + i, now, shared);
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
