// What threads of a cluster, of some warps or of a warp group do together: the cluster barrier, named barriers, other
// blocks' shared memory, setmaxnreg. All blocks of a cluster begin together here; on a GPU a block knows that another
// one has begun only after a cluster barrier, and that is what the race detector asks for.
#include "emulator/cluster.h"

#include <algorithm>

#include "emulator/race.h"
#include "emulator/sm90.h"

namespace emulator {
namespace {

struct ClusterBarrier {
  int arrived, phase;  // phase: how many are over
  bool waiting_for_previous, waited_for_previous;
  // Where a warp has arrived and waits, by warp, in even and odd phases; no file: not yet.
  std::vector<Site> arrive_site[2], wait_site[2];
} cluster;

Group groups[kMostGroups * pk::kMostClusterBlocks];

constexpr char kClusterWait[] = "cluster_wait", kNamedBarrier[] = "named_barrier";
constexpr int kAllRegisters = 64 * 1024, kMostOfThread = 256;  // registers

// The lanes of a warp are in one place, as `.aligned` wants it.
void check_place(Site& of_warp, const char* what, Site site) {
  if (of_warp.file == nullptr) of_warp = site;
  if (!same_site(of_warp, site)) fail(what, site);
}

void end_phase() {
  race::complete(&cluster);
  cluster.arrived = 0;
  ++cluster.phase;
  cluster.waited_for_previous = cluster.waiting_for_previous;
  for (auto* sites : {cluster.arrive_site, cluster.wait_site}) {
    sites[cluster.phase % 2].assign(machine.warps.size(), Site{nullptr, 0});
  }
  for (Thread& thread : machine.threads) {
    if (thread.waits_for == kClusterWait) thread.waits_for = nullptr;
  }
}

}  // namespace

void start_cluster() {
  cluster = ClusterBarrier{};
  for (auto* sites : {cluster.arrive_site, cluster.wait_site}) {
    sites[0].assign(machine.warps.size(), Site{nullptr, 0});
  }
  for (int i = 0; i < kMostGroups * pk::kMostClusterBlocks; ++i) groups[i] = Group{i, nullptr, 0, 0, {nullptr, 0}};
}

void check_return() {
  const Thread& me = *machine.running;
  constexpr Site kEnd{nullptr, 0};
  if (my_block().at_barrier > 0) fail("divergent barrier: a thread returns, others wait in __syncthreads", kEnd);
  if (me.cluster_arrivals != me.cluster_waits) fail("a thread returns between cluster_arrive and cluster_wait", kEnd);
  if (cluster.arrived > 0) fail("divergent cluster barrier: a thread returns, others have arrived", kEnd);
  if (groups[me.rank * kMostGroups + number_in_block(me) / kGroupThreads].arrived > 0) {
    fail("divergent warp group: a thread returns, others wait", kEnd);
  }
}

int cluster_rank() {
  return machine.running->rank;
}

int cluster_blocks() {
  return static_cast<int>(machine.blocks.size());
}

void cluster_arrive(Site site) {
  Thread& me = *machine.running;
  const int threads = machine.block_threads * cluster_blocks();
  if (me.cluster_arrivals != me.cluster_waits) fail("cluster_arrive twice without cluster_wait", site);
  if (machine.alive != threads) {
    fail("divergent cluster barrier: cluster_arrive after threads of the cluster have returned", site);
  }
  check_place(cluster.arrive_site[cluster.phase % 2][me.warp],
              "divergent cluster barrier: lanes of a warp are at different cluster_arrive", site);
  ++me.cluster_arrivals;
  cluster.waiting_for_previous |= me.waited_for_previous;
  race::release(&cluster);
  if (++cluster.arrived == threads) end_phase();
}

void cluster_wait(Site site) {
  Thread& me = *machine.running;
  if (me.cluster_arrivals == me.cluster_waits) fail("cluster_wait without cluster_arrive", site);
  check_place(cluster.wait_site[me.cluster_waits % 2][me.warp],
              "divergent cluster barrier: lanes of a warp are at different cluster_wait", site);
  if (cluster.phase < me.cluster_arrivals) wait(kClusterWait, site);
  ++me.cluster_waits;
  me.waited_for_previous |= cluster.waited_for_previous;
  race::acquire(&cluster);
}

void* of_block(void* mine, int rank, Site site) {
  const Range own = dynamic_range();
  if (!own.holds(mine)) fail("out of bounds: of_block of a place outside of the block's dynamic shared memory", site);
  if (rank < 0 || rank >= cluster_blocks()) fail("of_block: the cluster has no such block", site);
  return dynamic_range(rank).begin + (static_cast<char*>(mine) - own.begin);
}

void named_barrier(int id, int threads, Site site) {
  const Thread& me = *machine.running;
  if (id < 1 || id > 15) fail("named_barrier: the id is not 1 ... 15", site);
  if (threads < 32 || threads % 32 != 0 || threads > machine.block_threads) {
    fail("named_barrier of a number of threads that is no number of whole warps of the block", site);
  }
  NamedBarrier& barrier = my_block().named[id];
  if (barrier.arrived == 0) barrier.threads = threads;
  if (barrier.threads != threads) fail("divergent named barrier: threads name different numbers of threads", site);
  machine.running->argument = &barrier;
  if (++barrier.arrived < threads) return wait(kNamedBarrier, site);
  barrier.arrived = 0;
  std::vector<int> met;
  bool waited = false;
  for (Thread& thread : machine.threads) {
    const bool waits = thread.waits_for == kNamedBarrier && thread.argument == &barrier;
    if (!waits && &thread != &me) continue;
    met.push_back(thread.number);
    waited |= thread.waited_for_previous;
    thread.waits_for = nullptr;
  }
  std::vector<int> of_warp(machine.warps.size());
  for (int number : met) {
    machine.threads[number].waited_for_previous = waited;
    ++of_warp[machine.threads[number].warp];
  }
  for (int lanes : of_warp) {
    if (lanes % 32 != 0) fail("divergent named barrier: only some lanes of a warp are in it", site);
  }
  race::barrier(met);
}

void set_registers(int count, bool more, Site site) {
  Group& group = my_group(site);
  if (!gather_group(group, more ? "take_registers" : "give_registers", site)) return;
  group.registers = count;
  int all = 0;
  const int first = machine.running->rank * kMostGroups;
  for (int i = 0; i < kMostGroups; ++i) all += groups[first + i].registers * kGroupThreads;
  // What __launch_bounds__(threads, 1) leaves each thread at first is all that the block has to share out.
  const int at_first = std::min(kAllRegisters / machine.block_threads / 8 * 8, kMostOfThread);
  if (all > at_first * machine.block_threads) fail("take_registers: more registers than the block has", site);
}

Group& my_group(Site site) {
  const Thread& me = *machine.running;
  const int number = number_in_block(me) / kGroupThreads;
  if ((number + 1) * kGroupThreads > machine.block_threads) {
    fail("divergent warp group: the block has fewer than 128 threads from its first on", site);
  }
  return groups[me.rank * kMostGroups + number];
}

Thread& thread_of(const Group& group, int i) {
  const int first = group.number / kMostGroups * machine.block_fibers + group.number % kMostGroups * kGroupThreads;
  return machine.threads[first + i];
}

bool gather_group(Group& group, const char* operation, Site site) {
  if (group.arrived == 0) {
    group.operation = operation;
    group.site = site;
    for (int i = 0; i < kGroupThreads; ++i) {
      if (thread_of(group, i).returned) fail("divergent warp group: some of its threads have returned", site);
    }
  }
  if (group.operation != operation || !same_site(group.site, site)) {
    fail("divergent warp group: its threads are in different operations", site);
  }
  if (++group.arrived < kGroupThreads) {
    wait(operation, site);
    return false;
  }
  group.arrived = 0;
  for (int i = 0; i < kGroupThreads; ++i) thread_of(group, i).waits_for = nullptr;
  return true;
}

}  // namespace emulator
