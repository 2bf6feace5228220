// Warp groups: four warps that call the same operation together, the first a multiple of four.
#pragma once

#include "emulator/machine.h"

namespace emulator {

constexpr int kGroupThreads = 128, kMostGroups = kMaxThreads / kGroupThreads;  // of a block

struct Group {
  int number;              // through the cluster
  const char* operation;   // that they wait in
  int arrived, registers;  // registers: of each thread, where it has asked
  Site site;
};

Group& my_group(Site site);
Thread& thread_of(const Group& group, int i);

// Waits for all of the group. True for the last to come: it does the work while the others still stand.
bool gather_group(Group& group, const char* operation, Site site);

}  // namespace emulator
