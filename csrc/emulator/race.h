// What the emulator tells the race detector (race.cpp); nothing in the other builds.
#pragma once

#include <cstdint>
#include <vector>

namespace emulator::race {

enum class Kind : uint8_t { kRead, kWrite, kAtomic, kCopy, kMbarrier, kTransfer, kProduct };

#if defined(EMULATOR_RACE)
constexpr bool kOn = true;
void start_cluster(int threads);
void end_block(int rank);  // of a cluster
void end_launch();         // ends the program if anything was reported
void access(const void* place, int bytes, Kind kind, const void* pc);
void copy_starts(const void* shared, int bytes, const void* global, int valid, const void* pc);
void copy_lands(const void* shared, int bytes);
void block_barrier();
void warp_barrier(unsigned lanes);
void barrier(const std::vector<int>& threads);
void fence();

// What runs by itself: the copies to one mbarrier, the products of one warp group. It is numbered like a thread, and
// its time is what others have to learn of it: the phase, the group of products.
int new_agent();
void transfer(const void* shared, int bytes, int agent, int time, const void* pc);
void product(const void* shared, int bytes, int agent, int time, const void* pc);
void learn(int thread, int agent, int time);
void proxy_fence();

// A barrier that `key` stands for: each who arrives releases, who waits acquires what was complete by then.
void release(const void* key);
void release_agents(const void* key);  // no more than what it knows of agents
void complete(const void* key, int agent = -1, int time = 0);
void acquire(const void* key);

int now(int thread);
bool seen_by(int rank, int thread, int time);  // by any thread of the block
#else
constexpr bool kOn = false;
inline void start_cluster(int) {}
inline void end_block(int) {}
inline void end_launch() {}
inline void access(const void*, int, Kind, const void*) {}
inline void copy_starts(const void*, int, const void*, int, const void*) {}
inline void copy_lands(const void*, int) {}
inline void block_barrier() {}
inline void warp_barrier(unsigned) {}
inline void barrier(const std::vector<int>&) {}
inline void fence() {}
inline int new_agent() {
  return 0;
}
inline void transfer(const void*, int, int, int, const void*) {}
inline void product(const void*, int, int, int, const void*) {}
inline void learn(int, int, int) {}
inline void proxy_fence() {}
inline void release(const void*) {}
inline void release_agents(const void*) {}
inline void complete(const void*, int = -1, int = 0) {}
inline void acquire(const void*) {}
inline int now(int) {
  return 0;
}
inline bool seen_by(int, int, int) {
  return true;
}
#endif

}  // namespace emulator::race
