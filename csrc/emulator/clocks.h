// Who has seen what of whom (vector clocks, Lamport 1978, Fidge 1988), for the race detector. A thread's clock ticks
// whenever others may learn of what it did so far: at a barrier, and at a fence that an atomic can publish.
// The blocks of a cluster are one here (a cluster goes by the number of its first block). Clusters meet only where one
// does fence, atomic, and a later one an atomic on the same place, fence. Besides threads, agents have a place in a
// clock: what the hardware does by itself (race.h).
#pragma once

#include <algorithm>
#include <cstdint>
#include <map>
#include <vector>

namespace emulator::race {

using Clock = std::vector<uint32_t>;          // of each thread of a cluster
using Knowledge = std::map<uint32_t, Clock>;  // by cluster

inline void learn(Clock& mine, const Clock& other, size_t from = 0) {
  mine.resize(std::max(mine.size(), other.size()));
  for (size_t i = from; i < other.size(); ++i) mine[i] = std::max(mine[i], other[i]);
}

inline bool has(const Clock& clock, int thread, uint32_t time) {
  return thread < static_cast<int>(clock.size()) && clock[thread] >= time;
}

inline void learn(Knowledge& mine, const Knowledge& other) {
  for (const auto& [block, clock] : other) learn(mine[block], clock);
}

class Clocks {
 public:
  void start_launch() { published_.clear(); }

  void start_cluster(uint32_t block, int threads) {
    block_ = block;
    agents_ = 0;
    syncs_.clear();
    threads_.assign(threads, Seen{});
    for (int i = 0; i < threads; ++i) {
      threads_[i].clock.assign(threads, 0);
      threads_[i].clock[i] = 1;
    }
  }

  uint32_t now(int thread) const { return threads_[thread].clock[thread]; }

  // Has `thread` seen what `other` of `block` did at `time`?
  bool seen(int thread, uint32_t block, int other, uint32_t time) const {
    const Seen& mine = threads_[thread];
    if (block == block_) return other == thread || has(mine.clock, other, time);
    const auto known = mine.others.find(block);
    return known != mine.others.end() && has(known->second, other, time);
  }

  // The same, with a proxy fence on the way.
  bool proxied(int thread, int other, uint32_t time) const { return has(threads_[thread].proxied, other, time); }

  bool is_agent(int thread) const { return thread >= static_cast<int>(threads_.size()); }
  int new_agent() { return static_cast<int>(threads_.size()) + agents_++; }

  void learn_agent(int thread, int agent, uint32_t time) {
    Clock& mine = threads_[thread].clock;
    if (static_cast<int>(mine.size()) <= agent) mine.resize(agent + 1);
    mine[agent] = std::max(mine[agent], time);
  }

  void proxy_fence(int thread) {
    Seen& mine = threads_[thread];
    mine.proxied = mine.clock;
    ++mine.clock[thread];
  }

  // release by each who arrives, complete, acquire by each who waits.
  void release(int thread, const void* key) {
    Seen& mine = threads_[thread];
    Sync& sync = syncs_[key];
    learn(sync.arriving, mine.clock);
    learn(sync.arriving_proxied, mine.proxied);
    learn(sync.arriving_others, mine.others);
    ++mine.clock[thread];
  }

  // Of agents alone.
  void release_agents(int thread, const void* key) {
    Seen& mine = threads_[thread];
    learn(syncs_[key].arriving, mine.clock, threads_.size());
    ++mine.clock[thread];
  }

  void complete(const void* key, int agent, uint32_t time) {
    Sync& sync = syncs_[key];
    if (agent >= 0) {
      sync.arriving.resize(std::max<size_t>(sync.arriving.size(), agent + 1));
      sync.arriving[agent] = time;
    }
    sync.clock = sync.arriving;
    sync.proxied = sync.arriving_proxied;
    sync.others = sync.arriving_others;
  }

  void acquire(int thread, const void* key) {
    Seen& mine = threads_[thread];
    const Sync& sync = syncs_[key];
    learn(mine.clock, sync.clock);
    learn(mine.proxied, sync.proxied);
    learn(mine.others, sync.others);
  }

  void barrier(int first, unsigned lanes) {
    std::vector<int> met;
    for (int l = 0; l < 32; ++l) {
      if (lanes >> l & 1) met.push_back(first + l);
    }
    meet(met);
  }

  // Takes in what atomics have brought, and lets the next atomics publish what is known by now.
  void fence(int thread) {
    Seen& mine = threads_[thread];
    const auto own = mine.brought.find(block_);
    if (own != mine.brought.end()) {
      learn(mine.clock, own->second);
      mine.brought.erase(own);
    }
    learn(mine.others, mine.brought);
    mine.brought.clear();
    mine.fenced = mine.others;
    mine.fenced[block_] = mine.clock;
    ++mine.clock[thread];
  }

  void atomic(int thread, const void* place) {
    Seen& mine = threads_[thread];
    learn(mine.brought, published_[place]);
    learn(published_[place], mine.fenced);
  }

  // Where all threads meet, only what they know of agents has to be compared: nobody knows more of a thread than
  // itself.
  void meet(const std::vector<int>& met) {
    const size_t compared = met.size() < threads_.size() ? 0 : threads_.size();
    Clock all = threads_[met[0]].clock, proxied;
    Knowledge others;
    for (int i : met) {
      learn(all, threads_[i].clock, compared);
      all[i] = now(i);
      learn(proxied, threads_[i].proxied);
      learn(others, threads_[i].others);
    }
    for (int i : met) {
      threads_[i].clock = all;
      ++threads_[i].clock[i];
      threads_[i].proxied = proxied;
      threads_[i].others = others;
    }
  }

 private:
  struct Seen {
    Clock clock;        // of this cluster
    Clock proxied;      // of it, by way of a proxy fence
    Knowledge others;   // of other clusters
    Knowledge brought;  // by atomics, of use after the next fence
    Knowledge fenced;   // what an atomic publishes
  };

  struct Sync {
    Clock arriving, arriving_proxied, clock, proxied;
    Knowledge arriving_others, others;
  };

  uint32_t block_ = 0;
  int agents_ = 0;
  std::map<const void*, Sync> syncs_;
  std::vector<Seen> threads_;
  std::map<const void*, Knowledge> published_;
};

}  // namespace emulator::race
