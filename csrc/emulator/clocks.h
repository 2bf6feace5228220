// Who has seen what of whom (vector clocks, Lamport 1978, Fidge 1988), for the race detector. A thread's clock ticks
// whenever others may learn of what it did so far: at a barrier, and at a fence that an atomic can publish.
// Blocks meet only where one does fence, atomic, and a later one an atomic on the same place, fence.
#pragma once

#include <algorithm>
#include <cstdint>
#include <map>
#include <vector>

namespace emulator::race {

using Clock = std::vector<uint32_t>;          // of each thread of a block
using Knowledge = std::map<uint32_t, Clock>;  // by block

inline void learn(Clock& mine, const Clock& other) {
  mine.resize(std::max(mine.size(), other.size()));
  for (size_t i = 0; i < other.size(); ++i) mine[i] = std::max(mine[i], other[i]);
}

inline void learn(Knowledge& mine, const Knowledge& other) {
  for (const auto& [block, clock] : other) learn(mine[block], clock);
}

class Clocks {
 public:
  void start_launch() { published_.clear(); }

  void start_block(uint32_t block, int threads) {
    block_ = block;
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
    if (block == block_) return other == thread || mine.clock[other] >= time;
    const auto known = mine.others.find(block);
    return known != mine.others.end() && known->second[other] >= time;
  }

  void barrier(int first, unsigned lanes) {
    std::vector<int> met;
    for (int l = 0; l < 32; ++l) {
      if (lanes >> l & 1) met.push_back(first + l);
    }
    meet(met);
  }

  void barrier() {
    std::vector<int> met(threads_.size());
    for (size_t i = 0; i < met.size(); ++i) met[i] = static_cast<int>(i);
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

 private:
  struct Seen {
    Clock clock;        // of this block
    Knowledge others;   // of other blocks
    Knowledge brought;  // by atomics, of use after the next fence
    Knowledge fenced;   // what an atomic publishes
  };

  // A whole block's barrier need not look at rows: nobody knows more of a thread than that thread.
  void meet(const std::vector<int>& met) {
    Clock all = threads_[met[0]].clock;
    Knowledge others;
    for (int i : met) {
      if (met.size() < threads_.size()) learn(all, threads_[i].clock);
      all[i] = now(i);
      learn(others, threads_[i].others);
    }
    for (int i : met) {
      threads_[i].clock = all;
      ++threads_[i].clock[i];
      threads_[i].others = others;
    }
  }

  uint32_t block_ = 0;
  std::vector<Seen> threads_;
  std::map<const void*, Knowledge> published_;
};

}  // namespace emulator::race
