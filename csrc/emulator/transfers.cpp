// mbarriers, and the copies that report to them. A copy lands at its issue, at random, or (late) when no thread can go
// on without it; until then its destination is 0xFF. The state of an mbarrier is kept here; its eight bytes of shared
// memory hold a mark that shows when something else is written there.
#include <cstdio>
#include <cstring>
#include <unordered_map>

#include "common/tma.h"
#include "emulator/machine.h"
#include "emulator/race.h"
#include "emulator/sm90.h"

namespace emulator {
namespace {

constexpr int64_t kMostBytes = (1 << 20) - 1;  // that a phase can count
constexpr char kWait[] = "mbarrier_wait";

struct Barrier {
  int rank, initialiser, count, pending, phase;  // phase: how many are over
  int64_t bytes;                                 // that are still to come
  bool fenced;                                   // by mbarrier_init_fence
  bool waiting_for_previous, waited_for_previous;
  int copies, awaited;  // phases up to the last with a copy, and up to the last that a thread has waited for
  struct {
    int phases, thread, time;  // phases: up to that of the arrival
  } remote;                    // the last arrival from another block
  int agent;                   // its copies, to the race detector
};

struct Map {  // what a TensorMap holds here
  uint64_t mark;
  const char* data;
  int64_t rows, cols, row_stride;
  int box_rows;
};
static_assert(sizeof(Map) <= sizeof(CUtensorMap), "kept inside the driver's own");
constexpr uint64_t kMapMark = 0x7061'6D72'6F73'6E65;

struct Transfer {
  char* shared;
  Barrier* barrier;
  int phase, bytes;
  Map map;  // of a box; data == nullptr: `bytes` from `global`
  int64_t row, col;
  const char* global;
  Site site;
};

std::unordered_map<uint64_t*, Barrier> barriers;
std::vector<Transfer> under_way;

uint64_t mark_of(const uint64_t* place) {
  return reinterpret_cast<uint64_t>(place) ^ 0x7265'6972'7261'626D;
}

// The place in block `rank` that `mine` is in the running one.
char* place_in(int rank, void* mine) {
  if (rank == machine.running->rank) return static_cast<char*>(mine);
  return dynamic_range(rank).begin + (static_cast<char*>(mine) - dynamic_range().begin);
}

Barrier& barrier_at(uint64_t* mine, int rank, const void* pc, Site site) {
  check_shared(mine, 8, 8, "mbarrier", site);
  uint64_t* const place = reinterpret_cast<uint64_t*>(place_in(rank, mine));
  if (machine.blocks[rank].alive == 0) fail("an mbarrier of a block that has ended", site);
  const auto found = barriers.find(place);
  if (found == barriers.end()) fail("an mbarrier that was not initialised", site);
  if (*place != mark_of(place)) fail("an mbarrier has been overwritten", site);
  if (found->second.rank != rank) fail("an mbarrier of another block", site);
  race::access(place, 8, race::Kind::kMbarrier, pc);
  return found->second;
}
Barrier& barrier_at(uint64_t* place, const void* pc, Site site) {
  return barrier_at(place, machine.running->rank, pc, site);
}

void end_phase_if_complete(Barrier& barrier, Site site) {
  if (barrier.pending > 0 || barrier.bytes > 0) return;
  if (barrier.bytes < 0) fail("more bytes come to an mbarrier than its phase expects", site);
  ++barrier.phase;
  barrier.pending = barrier.count;
  barrier.waited_for_previous = barrier.waiting_for_previous;
  race::complete(&barrier, barrier.agent, barrier.phase);
  for (Thread& thread : machine.threads) {
    if (thread.waits_for == kWait && thread.argument == &barrier) thread.waits_for = nullptr;
  }
}

void count_bytes(Barrier& barrier, int64_t bytes, Site site) {
  barrier.bytes += bytes;
  if (barrier.bytes > kMostBytes || barrier.bytes < -kMostBytes) {
    fail("more bytes at an mbarrier than it can count, 1048575", site);
  }
}

void move_box(const Transfer& transfer) {
  const Map& map = transfer.map;
  for (int r = 0; r < map.box_rows; ++r) {
    const int64_t row = transfer.row + r;
    for (int c = 0; c < pk::kSwizzledColumns; c += 8) {
      const int64_t col = transfer.col + c;
      char* const to = transfer.shared + pk::swizzled_offset(r, c);
      const char* const from = map.data + (row * map.row_stride + col) * 2;
      memset(to, 0, 16);
      if (row < 0 || row >= map.rows) continue;
      for (int64_t i = col < 0 ? -col : 0; i < 8 && col + i < map.cols; ++i) memcpy(to + i * 2, from + i * 2, 2);
    }
  }
}

void land(const Transfer& transfer) {
  if (transfer.map.data != nullptr) {
    move_box(transfer);
  } else {
    memcpy(transfer.shared, transfer.global, transfer.bytes);
  }
  Barrier& barrier = *transfer.barrier;
  if (barrier.phase != transfer.phase) {
    fail("a copy lands after the phase of its mbarrier: more bytes come than it expects", transfer.site);
  }
  count_bytes(barrier, -transfer.bytes, transfer.site);
  end_phase_if_complete(barrier, transfer.site);
}

void start(Transfer transfer, const void* pc) {
  if (!transfer.barrier->fenced) fail("a copy to an mbarrier without mbarrier_init_fence", transfer.site);
  transfer.phase = transfer.barrier->phase;
  transfer.barrier->copies = transfer.phase + 1;
  check_access(transfer.shared, transfer.bytes, true);
  race::transfer(transfer.shared, transfer.bytes, transfer.barrier->agent, transfer.phase + 1, pc);
  memset(transfer.shared, 0xFF, transfer.bytes);
  const Copies when = machine.schedule.copies;
  if (when == Copies::kEarly || (when == Copies::kRandom && random_number() % 2 == 0)) return land(transfer);
  under_way.push_back(transfer);
}

// What a thread of another block did by plain loads and stores before it arrives stays its own (mbarrier.h).
void arrive(Barrier& barrier, int64_t expected_bytes, Site site) {
  const Thread& me = *machine.running;
  if (barrier.pending == 0) fail("more arrivals at an mbarrier than it was initialised for", site);
  if (barrier.rank == me.rank) {
    barrier.waiting_for_previous |= me.waited_for_previous;
    race::release(&barrier);
  } else {
    barrier.remote = {barrier.phase + 1, me.number, race::now(me.number)};
    race::release_agents(&barrier);
  }
  --barrier.pending;
  count_bytes(barrier, expected_bytes, site);
  end_phase_if_complete(barrier, site);
}

// Without its barrier; the reads of global memory are made here.
Transfer box_of(const char* what, void* shared, const CUtensorMap* map, int col, int row, const void* pc, Site site) {
  check_tensor_map(map, site);
  Transfer transfer{static_cast<char*>(shared), nullptr, 0, 0, {}, row, col, nullptr, site};
  memcpy(&transfer.map, map, sizeof transfer.map);
  const Map& from = transfer.map;
  transfer.bytes = from.box_rows * pk::kSwizzledColumns * 2;
  check_shared(shared, transfer.bytes, 1024, what, site);
  const int64_t first = col < 0 ? 0 : col, last = col + 64 < from.cols ? col + 64 : from.cols;
  for (int64_t r = row; r < row + int64_t{from.box_rows}; ++r) {
    if (r < 0 || r >= from.rows || first >= last) continue;
    const char* const begin = from.data + (r * from.row_stride + first) * 2;
    check_access(begin, static_cast<int>(last - first) * 2, false);
    race::access(begin, static_cast<int>(last - first) * 2, race::Kind::kRead, pc);
  }
  return transfer;
}

}  // namespace

void start_transfers() {
  barriers.clear();
  under_way.clear();
}

bool land_a_transfer() {
  if (under_way.empty()) return false;
  const size_t at = machine.schedule.seed == 0 ? 0 : random_number() % under_way.size();
  const Transfer transfer = under_way[at];
  under_way.erase(under_way.begin() + at);
  land(transfer);
  return true;
}

void check_transfers(int rank) {
  for (const auto& [place, barrier] : barriers) {
    if (barrier.rank != rank) continue;
    if (barrier.copies > barrier.awaited) {
      fail("a block ends with tma_load or bulk_load in flight: no mbarrier_wait covers it", {nullptr, 0});
    }
    if (barrier.bytes != 0) {
      fail("a block ends with an mbarrier that expects bytes, or has had more than it expects", {nullptr, 0});
    }
    if (barrier.remote.phases > barrier.awaited && !race::seen_by(rank, barrier.remote.thread, barrier.remote.time)) {
      fail("an mbarrier of a block that may have ended: another block arrives there, nobody has waited", {nullptr, 0});
    }
  }
}

void describe_mbarriers() {
  int shown = 0;
  for (const auto& [place, barrier] : barriers) {
    bool awaited = false;
    for (const Thread& thread : machine.threads) awaited |= thread.waits_for == kWait && thread.argument == &barrier;
    if (!awaited || ++shown > 4) continue;
    fprintf(stderr, "  mbarrier at shared memory + 0x%zx is in phase %d, and lacks %d arrivals and %lld bytes\n",
            reinterpret_cast<char*>(place) - dynamic_range(barrier.rank).begin, barrier.phase, barrier.pending,
            static_cast<long long>(barrier.bytes));
  }
}

void mbarrier_init(uint64_t* place, int arrivals, Site site) {
  check_shared(place, 8, 8, "mbarrier", site);
  if (arrivals < 1 || arrivals > kMostBytes) fail("mbarrier_init: the number of arrivals is not 1 ... 1048575", site);
  if (barriers.count(place) != 0) fail("mbarrier_init of an mbarrier that is in use", site);
  check_access(place, 8, true);
  race::access(place, 8, race::Kind::kWrite, __builtin_return_address(0));
  *place = mark_of(place);
  const Thread& me = *machine.running;
  barriers[place] = {me.rank, me.number, arrivals, arrivals, 0, 0, false, false, false, 0, 0, {}, race::new_agent()};
}

void mbarrier_init_fence() {
  for (auto& [place, barrier] : barriers) barrier.fenced |= barrier.initialiser == machine.running->number;
}

void mbarrier_arrive(uint64_t* place, int expected_bytes, Site site) {
  Barrier& barrier = barrier_at(place, __builtin_return_address(0), site);
  if (expected_bytes < 0) fail("mbarrier_arrive_expect: a negative number of bytes", site);
  arrive(barrier, expected_bytes, site);
}

void mbarrier_arrive_at(uint64_t* place, int rank, Site site) {
  if (rank < 0 || rank >= cluster_blocks()) fail("mbarrier_arrive_at: the cluster has no such block", site);
  Barrier& barrier = barrier_at(place, rank, __builtin_return_address(0), site);
  if (!barrier.fenced) fail("mbarrier_arrive_at without mbarrier_init_fence", site);
  arrive(barrier, 0, site);
}

void mbarrier_wait(uint64_t* place, int parity, Site site) {
  Barrier& barrier = barrier_at(place, __builtin_return_address(0), site);
  if (parity != 0 && parity != 1) fail("mbarrier_wait: the parity is not 0 or 1", site);
  Thread& me = *machine.running;
  me.argument = &barrier;
  while (barrier.phase % 2 == parity) wait(kWait, site);
  barrier.awaited = barrier.phase;
  me.waited_for_previous |= barrier.waited_for_previous;
  race::acquire(&barrier);
}

cudaError_t make_tensor_map(CUtensorMap* map, const void* data, int64_t rows, int64_t cols, int64_t row_stride,
                            int box_rows, int box_cols) {
  constexpr int64_t kMostExtent = int64_t{1} << 32, kMostStride = int64_t{1} << 39;  // elements of 2 bytes
  const bool right = reinterpret_cast<uintptr_t>(data) % 16 == 0 && rows > 0 && rows <= kMostExtent && cols > 0 &&
                     cols <= kMostExtent && row_stride > 0 && row_stride % 8 == 0 && row_stride < kMostStride &&
                     box_rows > 0 && box_rows <= 256 && box_cols == pk::kSwizzledColumns;
  if (!right) return cudaErrorInvalidValue;
  const Map held{kMapMark, static_cast<const char*>(data), rows, cols, row_stride, box_rows};
  memset(map, 0, sizeof *map);
  memcpy(static_cast<void*>(map), &held, sizeof held);
  return cudaSuccess;
}

void check_tensor_map(const CUtensorMap* map, Site site) {
  uint64_t mark;
  memcpy(&mark, map, sizeof mark);
  if (mark != kMapMark) fail("a TensorMap that make_tensor_map has not made", site);
}

void tensor_load(void* shared, const CUtensorMap* map, uint64_t* place, int col, int row, Site site) {
  const void* const pc = __builtin_return_address(0);
  Transfer transfer = box_of("tma_load", shared, map, col, row, pc, site);
  transfer.barrier = &barrier_at(place, pc, site);
  start(transfer, pc);
}

// Into each block at a time of its own.
void tensor_load_multicast(void* shared, const CUtensorMap* map, uint64_t* place, int col, int row, uint16_t blocks,
                           Site site) {
  const void* const pc = __builtin_return_address(0);
  if (blocks == 0 || blocks >> cluster_blocks() != 0) {
    fail("tma_load_multicast to no block, or to one that the cluster has not", site);
  }
  Transfer transfer = box_of("tma_load_multicast", shared, map, col, row, pc, site);
  for (int rank = 0; rank < cluster_blocks(); ++rank) {
    if ((blocks >> rank & 1) == 0) continue;
    transfer.barrier = &barrier_at(place, rank, pc, site);
    transfer.shared = place_in(rank, shared);
    start(transfer, pc);
  }
}

void bulk_load(void* shared, const void* global, int bytes, uint64_t* place, Site site) {
  Barrier& barrier = barrier_at(place, __builtin_return_address(0), site);
  if (bytes <= 0 || bytes % 16 != 0) fail("bulk_load of a number of bytes that is not a multiple of 16", site);
  if (reinterpret_cast<uintptr_t>(global) % 16 != 0) fail("misaligned bulk_load: global address", site);
  check_shared(shared, bytes, 16, "bulk_load", site);
  check_access(global, bytes, false);
  race::access(global, bytes, race::Kind::kRead, __builtin_return_address(0));
  start({static_cast<char*>(shared), &barrier, 0, bytes, {}, 0, 0, static_cast<const char*>(global), site},
        __builtin_return_address(0));
}

void async_proxy_fence() {
  race::proxy_fence();
}

}  // namespace emulator
