// How the emulator's own tests run a kernel that is right and one with a planted bug: each in a process of its own,
// under several schedules. EMULATOR_BUILD = plain, asan or race.
#pragma once

#include <sys/wait.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <type_traits>

#include "emulator/emulator.h"
#include "tests/emulator_kernels.h"

namespace pk::test {

constexpr const char* kBuild = EMULATOR_BUILD;

inline int small_integer(int i) {
  return (i * 7919 + i / 13) % 5 - 2;
}

// -2 ... 2 in a 16-bit type; both write 2 alike.
template <class T>
T whole(int value) {
  const uint16_t one = std::is_same_v<T, bf16> ? 0x3F80 : 0x3C00, two = 0x4000;
  const uint16_t magnitude = value == 0 ? 0 : std::abs(value) == 1 ? one : two;
  return {static_cast<uint16_t>(value < 0 ? magnitude | 0x8000 : magnitude)};
}

struct Right {
  const char* name;
  bool (*is_right)(Bug);
};

// What each build must say of a bug; nullptr: it is not bound to see it. "wrong result" is the test's own word.
struct Planted {
  const char* name;
  bool (*is_right)(Bug);
  Bug bug;
  const char *plain, *asan, *race;
};

struct Outcome {
  bool right;
  std::string said;
};

// In a process of its own: what is caught ends it.
inline Outcome outcome(bool (*is_right)(Bug), Bug bug, emulator::Schedule schedule) {
  int ends[2];
  if (pipe(ends) != 0) abort();
  fflush(nullptr);
  const pid_t child = fork();
  if (child == 0) {
    dup2(ends[1], STDERR_FILENO);
    emulator::set_schedule(schedule);
    const bool right = is_right(bug);
    if (!right) fprintf(stderr, "wrong result\n");
    _exit(right ? 0 : 1);
  }
  close(ends[1]);
  Outcome seen;
  char text[4096];
  for (ssize_t bytes; (bytes = read(ends[0], text, sizeof text)) > 0;) seen.said.append(text, bytes);
  close(ends[0]);
  int status = 0;
  waitpid(child, &status, 0);
  seen.right = WIFEXITED(status) && WEXITSTATUS(status) == 0;
  return seen;
}

constexpr emulator::Copies kTimings[] = {emulator::Copies::kLate, emulator::Copies::kEarly, emulator::Copies::kRandom};

inline int failures = 0;

inline void expect(bool condition, const char* name, emulator::Schedule schedule, const std::string& said) {
  if (condition) return;
  ++failures;
  printf("FAILED %s: %s, seed %d, copies %d\n%s\n", kBuild, name, static_cast<int>(schedule.seed),
         static_cast<int>(schedule.copies), said.c_str());
}

template <size_t kCount>
void right_kernels_pass(const Right (&kernels)[kCount]) {
  for (const Right& kernel : kernels) {
    for (int seed = 0; seed < 4; ++seed) {
      for (const emulator::Copies copies : kTimings) {
        const emulator::Schedule schedule{static_cast<uint64_t>(seed), copies};
        const Outcome seen = outcome(kernel.is_right, Bug::kNone, schedule);
        expect(seen.right && seen.said.empty(), kernel.name, schedule, seen.said);
      }
    }
  }
}

// In order with late copies, in order with early ones, shuffled with random ones: what must be caught, in all three.
template <size_t kCount>
void planted_bugs_are_caught(const Planted (&bugs)[kCount], bool verbose) {
  for (const Planted& planted : bugs) {
    const bool plain = strcmp(kBuild, "plain") == 0, asan = strcmp(kBuild, "asan") == 0;
    const char* expected = plain ? planted.plain : asan ? planted.asan : planted.race;
    int caught = 0;
    for (int i = 0; i < 3; ++i) {
      const emulator::Schedule schedule{static_cast<uint64_t>(i / 2 * 5), kTimings[i]};
      const Outcome seen = outcome(planted.is_right, planted.bug, schedule);
      caught += !seen.right;
      if (verbose) printf("-- %s, schedule %d\n%s", planted.name, i, seen.said.c_str());
      if (expected == nullptr) continue;
      expect(!seen.right && seen.said.find(expected) != std::string::npos, planted.name, schedule, seen.said);
    }
    printf("%-6s %-36s caught %d of 3%s\n", kBuild, planted.name, caught, expected != nullptr ? "" : " (not bound to)");
  }
}

}  // namespace pk::test
