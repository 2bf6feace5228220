// What the emulator tells the race detector (race.cpp); nothing in the other builds.
#pragma once

#include <cstdint>

namespace emulator::race {

enum class Kind : uint8_t { kRead, kWrite, kAtomic, kCopy };

#if defined(EMULATOR_RACE)
void start_block(int threads);
void end_launch();  // ends the program if anything was reported
void access(const void* place, int bytes, Kind kind, const void* pc);
void copy_starts(const void* shared, int bytes, const void* global, int valid, const void* pc);
void copy_lands(const void* shared, int bytes);
void block_barrier();
void warp_barrier(unsigned lanes);
void fence();
#else
inline void start_block(int) {}
inline void end_launch() {}
inline void access(const void*, int, Kind, const void*) {}
inline void copy_starts(const void*, int, const void*, int, const void*) {}
inline void copy_lands(const void*, int) {}
inline void block_barrier() {}
inline void warp_barrier(unsigned) {}
inline void fence() {}
#endif

}  // namespace emulator::race
