// Fibers, the schedule, the block barrier and launches. A round runs every thread that can run, in the order that the
// seed gives; a round in which nobody could run is a deadlock. Never compiled with a sanitizer itself.
#include "emulator/machine.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <numeric>

#include "common/launch.h"
#include "emulator/race.h"

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

// Saves the callee-saved registers on the running stack, leaves its pointer in *from, and goes on where `to` was saved.
extern "C" void emulator_switch(void** from, void* to);
#if defined(__x86_64__)
asm(R"(.text
.hidden emulator_switch
.globl emulator_switch
.type emulator_switch, @function
emulator_switch:
  pushq %rbp; pushq %rbx; pushq %r12; pushq %r13; pushq %r14; pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15; popq %r14; popq %r13; popq %r12; popq %rbx; popq %rbp
  ret
.size emulator_switch, . - emulator_switch
)");
#else
#error "emulator_switch has to be written for this processor"
#endif

namespace emulator {

Machine machine;

namespace {

constexpr size_t kStack = 256 * 1024, kPage = 4096;

// Where the scheduler, which runs on the caller's own stack, was left.
struct Scheduler {
  void* stack_pointer;
  void* fake_stack;
  const void* stack;
  size_t stack_bytes;
} scheduler;

void to_scheduler() {
  Thread& me = *machine.running;
#if defined(EMULATOR_ASAN)
  __sanitizer_start_switch_fiber(me.returned ? nullptr : &me.fake_stack, scheduler.stack, scheduler.stack_bytes);
#endif
  emulator_switch(&me.stack_pointer, scheduler.stack_pointer);
#if defined(EMULATOR_ASAN)
  __sanitizer_finish_switch_fiber(me.fake_stack, &scheduler.stack, &scheduler.stack_bytes);
#endif
}

void resume(Thread& thread) {
  machine.running = &thread;
  threadIdx = thread.index;
  blockIdx = machine.blocks[thread.rank].index;
#if defined(EMULATOR_ASAN)
  __sanitizer_start_switch_fiber(&scheduler.fake_stack, stacks().begin + thread.number * kStack, kStack);
#endif
  emulator_switch(&scheduler.stack_pointer, thread.stack_pointer);
#if defined(EMULATOR_ASAN)
  __sanitizer_finish_switch_fiber(scheduler.fake_stack, nullptr, nullptr);
#endif
  machine.running = nullptr;
}

// The first and only function of a fiber.
void thread_main() {
#if defined(EMULATOR_ASAN)
  __sanitizer_finish_switch_fiber(nullptr, &scheduler.stack, &scheduler.stack_bytes);
#endif
  (*machine.body)();
  Thread& me = *machine.running;
  if (!me.copies.empty()) fail("a thread returns with cp.async in flight", {nullptr, 0});
  check_return();
  check_products();
  me.returned = true;
  machine.warps[me.warp].alive &= ~(1u << me.lane);
  --machine.alive;
  if (--my_block().alive == 0) {
    check_transfers(me.rank);
    if (machine.blocks.size() > 1) {
      race::end_block(me.rank);
      end_shared(me.rank);
    }
  }
  to_scheduler();
  abort();
}

void start(Thread& thread, int number) {
  const unsigned n = static_cast<unsigned>(number % machine.block_fibers), x = blockDim.x, y = blockDim.y;
  thread.index = {n % x, n / x % y, n / (x * y)};
  thread.number = number;
  thread.lane = number % 32;
  thread.warp = number / 32;
  thread.rank = number / machine.block_fibers;
  thread.waits_for = nullptr;
  thread.returned = n >= static_cast<unsigned>(machine.block_threads);
  if (thread.returned) return;
  thread.waited_for_previous = !machine.overlapped;
  thread.copies.clear();
  thread.committed = 0;
  thread.cluster_arrivals = thread.cluster_waits = 0;
  thread.fake_stack = nullptr;
  machine.warps[thread.warp].alive |= 1u << thread.lane;
  char* stack = stacks().begin + number * kStack;
  static int guarded = 0;
  for (; guarded <= number; ++guarded) {  // an overflow stops there
    mprotect(stacks().begin + guarded * kStack, kPage, PROT_NONE);
  }
#if defined(EMULATOR_ASAN)
  __asan_unpoison_memory_region(stack + kPage, kStack - kPage);
#endif
  // What emulator_switch pops: six registers and the address to go to; then a null return address, where unwinding
  // ends.
  void** top = reinterpret_cast<void**>(stack + kStack - 64);
  *--top = nullptr;
  *--top = reinterpret_cast<void*>(&thread_main);
  for (int i = 0; i < 6; ++i) *--top = nullptr;
  thread.stack_pointer = top;
}

template <class T>
void shuffle_order(std::vector<T>& order) {
  if (machine.schedule.seed == 0) return;
  for (size_t i = order.size(); i > 1; --i) std::swap(order[i - 1], order[random_number() % i]);
}

// The blocks from machine.first_block on, as many as machine.blocks has, until all have returned.
void run_cluster() {
  const int blocks = static_cast<int>(machine.blocks.size()), fibers = blocks * machine.block_fibers;
  machine.threads.resize(fibers);
  machine.warps.assign(fibers / 32, Warp{});
  machine.alive = blocks * machine.block_threads;
  poison_shared();
  race::start_cluster(fibers);
  start_cluster();
  start_transfers();
  start_products();
  for (int i = 0; i < fibers; ++i) start(machine.threads[i], i);
  std::vector<int> order(fibers);
  std::iota(order.begin(), order.end(), 0);
  while (machine.alive > 0) {
    shuffle_order(order);
    bool ran = false;
    for (int i : order) {
      Thread& thread = machine.threads[i];
      if (thread.returned || thread.waits_for != nullptr) continue;
      ran = true;
      resume(thread);
    }
    const bool eager = machine.schedule.copies == Copies::kRandom && random_number() % 2 == 0;
    if (ran && !eager) continue;
    if (!land_a_transfer() && !ran) fail("deadlock: every thread waits for another", {nullptr, 0});
  }
}

const char* base_name(const char* path) {
  const char* slash = strrchr(path, '/');
  return slash != nullptr ? slash + 1 : path;
}

}  // namespace

bool same_site(Site a, Site b) {
  return a.line == b.line && strcmp(a.file, b.file) == 0;
}

void set_schedule(Schedule schedule) {
  machine.schedule = schedule;
}

uint64_t random_number() {  // splitmix64
  uint64_t z = machine.random_state += 0x9E3779B97F4A7C15u;
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
  return z ^ (z >> 31);
}

const Range& stacks() {
  static const Range range = [] {
    const size_t bytes = kStack * kMaxFibers;
    void* memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) abort();
    char* begin = static_cast<char*>(memory);
    return Range{begin, begin + bytes};
  }();
  return range;
}

void fail(const char* what, Site site) {
  fprintf(stderr, "emulator: %s\n  kernel %s, block (%u,%u,%u)", what, machine.kernel, blockIdx.x, blockIdx.y,
          blockIdx.z);
  if (machine.running != nullptr) fprintf(stderr, ", thread (%u,%u,%u)", threadIdx.x, threadIdx.y, threadIdx.z);
  if (site.file != nullptr) fprintf(stderr, ", at %s:%d", base_name(site.file), site.line);
  fprintf(stderr, "\n");
  int shown = 0;
  for (const Thread& thread : machine.threads) {
    if (thread.returned || thread.waits_for == nullptr || ++shown > 8) continue;
    fprintf(stderr, "  thread (%u,%u,%u)", thread.index.x, thread.index.y, thread.index.z);
    if (machine.blocks.size() > 1) fprintf(stderr, " of block %d of the cluster", thread.rank);
    fprintf(stderr, " waits in %s at %s:%d\n", thread.waits_for, base_name(thread.site.file), thread.site.line);
  }
  if (shown > 8) fprintf(stderr, "  and %d more\n", shown - 8);
  describe_mbarriers();
  fflush(stderr);
  abort();
}

void wait(const char* reason, Site site) {
  Thread& me = *machine.running;
  me.waits_for = reason;
  me.site = site;
  to_scheduler();
}

void barrier(Site site) {
  Block& block = my_block();
  const int threads = machine.block_threads;
  if (block.alive != threads) fail("divergent barrier: __syncthreads after threads of the block have returned", site);
  if (block.at_barrier == 0) block.barrier_site = site;
  if (!same_site(site, block.barrier_site)) fail("divergent barrier: threads wait in different __syncthreads", site);
  if (++block.at_barrier < threads) return wait("__syncthreads", site);
  block.at_barrier = 0;
  bool waited = false;
  Thread* const first = &machine.threads[machine.running->rank * machine.block_fibers];
  for (int i = 0; i < threads; ++i) waited |= first[i].waited_for_previous;
  for (int i = 0; i < threads; ++i) {
    first[i].waits_for = nullptr;
    first[i].waited_for_previous = waited;
  }
  race::block_barrier();
}

void wait_for_previous_launch() {
  machine.running->waited_for_previous = machine.waited = true;
}

int lane() {
  return machine.running->lane;
}

namespace {

// What CUDA refuses by an error. cluster_blocks as in run().
cudaError_t refusal(dim3 grid, dim3 block, size_t all_shared_bytes, int cluster_blocks) {
  const uint64_t threads = static_cast<uint64_t>(block.x) * block.y * block.z;
  const uint64_t blocks = static_cast<uint64_t>(grid.x) * grid.y * grid.z;
  if (threads == 0 || threads > kMaxThreads || block.z > 64 || blocks == 0 || grid.x > 0x7FFFFFFFu || grid.y > 65535 ||
      grid.z > 65535) {
    return cudaErrorInvalidConfiguration;
  }
  if (cluster_blocks < 0 || cluster_blocks > pk::kMostClusterBlocks) return cudaErrorInvalidClusterSize;
  if (cluster_blocks > 1 && grid.x % cluster_blocks != 0) return cudaErrorInvalidClusterSize;
  const size_t most = cluster_blocks > 0 ? pk::kMostSharedSm90 : pk::kMostSharedEverywhere;
  return all_shared_bytes > most ? cudaErrorInvalidValue : cudaSuccess;
}

}  // namespace

cudaError_t run(const char* kernel, const void* entry, dim3 grid, dim3 block, size_t shared_bytes, bool overlapped,
                int cluster_blocks, const std::function<void()>& thread) {
  const size_t fixed = static_shared_of(entry);
  const cudaError_t refused = refusal(grid, block, fixed + shared_bytes, cluster_blocks);
  if (refused != cudaSuccess) return refused;
  machine.kernel = kernel;
  if (cluster_blocks > 1 && fixed > 0) fail("static shared memory in a kernel with clusters", {nullptr, 0});
  machine.body = &thread;
  machine.overlapped = overlapped;
  machine.shared_bytes = shared_bytes;
  machine.shared_alignment = 128;
  machine.random_state = machine.schedule.seed;
  if (!overlapped) {
    machine.overlapped_from = machine.unwaited_until = machine.first_block;
  } else if (!machine.waited) {
    machine.unwaited_until = machine.launch_start;
  }
  machine.waited = !overlapped;
  machine.launch_start = machine.first_block;
  machine.block_threads = static_cast<int>(block.x * block.y * block.z);
  machine.block_fibers = (machine.block_threads + 31) / 32 * 32;
  blockDim = block;
  gridDim = grid;
  const uint64_t together = cluster_blocks > 1 ? cluster_blocks : 1;
  std::vector<uint64_t> clusters(static_cast<uint64_t>(grid.x) * grid.y * grid.z / together);
  std::iota(clusters.begin(), clusters.end(), uint64_t{0});
  shuffle_order(clusters);
  machine.block_order.clear();
  for (uint64_t cluster : clusters) {  // neighbours along x, so neighbours in the linear index
    for (uint64_t i = 0; i < together; ++i) machine.block_order.push_back(cluster * together + i);
  }
  for (size_t done = 0; done < machine.block_order.size(); done += together) {
    machine.blocks.assign(together, Block{});
    for (uint64_t i = 0; i < together; ++i) {
      const uint64_t at = machine.block_order[done + i];
      machine.blocks[i].index = {static_cast<unsigned>(at % grid.x), static_cast<unsigned>(at / grid.x % grid.y),
                                 static_cast<unsigned>(at / grid.x / grid.y)};
      machine.blocks[i].alive = machine.block_threads;
    }
    run_cluster();
    machine.first_block += static_cast<uint32_t>(together);
  }
  race::end_launch();
  return cudaSuccess;
}

}  // namespace emulator
